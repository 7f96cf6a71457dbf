"""A model to read from: a folder (or a Hub repository fetched into one) with a transformers configuration, safetensors
weights and a tokenizer.

Only headers are read on opening. Weights are read tensor by tensor from memory-mapped files; each map is closed before
the next, so of the files at most one tensor is resident.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import inside, read_json
from ..arch import PREFIX, Arch, load_arch, supported
from .config_bounds import check_backed, check_counts
from .configs import build_config, check_swaps, register_configs
from .model_check import Stored, check_model, check_parameters
from .plan import Plan, exact_part
from .sparsity import KEY, read_key, read_sparsity, stock_config
from .stage import hash_json, known_hash, write_json
from .tensor_files import FLOATS, damaged, first_line, read_header
from .weight_names import check_names

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION_CONFIG = "generation_config.json"
HEAD = "lm_head.weight"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")
_PIECES = b"\n"  # how a sentencepiece model begins: its first field is the list of pieces
_CODE = "auto_map"
_CAUSAL = ("ForCausalLM", "LMHeadModel")
CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    GENERATION_CONFIG,
    "processor_config.json",
    "preprocessor_config.json",
)
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)
TERMS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENSE.PSF.txt", "USE_POLICY.md", "NOTICE")
COPIED = ("config.json", GENERATION_CONFIG, *TOKENIZER_FILES, *TERMS)
"""Files that go from a model folder into a checkpoint, beside the weights."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's dtype (safetensors' name), shape and file, from the header alone."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        size = FLOATS.get(self.dtype, 1)
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class Source:
    """An opened model folder. `id` and `revision` are the Hub repository and commit it came from, when it did.

    `arch` is the base's where activations were swapped, and `swaps` says where and to what, each with its exact zeros
    kept; {} for a stock model.
    """

    folder: Path
    config: Any
    arch: Arch
    tensors: dict[str, TensorInfo] = field(repr=False)
    id: str | None = None
    revision: str | None = None
    label: str | None = None
    swaps: Plan = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The Hub id, else the label, else the folder's name."""
        return self.id or self.label or self.folder.name

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (hex) over the bytes of every file that a checkpoint takes over: configuration, weights, tokenizer,
        generation settings and licences.
        """
        files = {info.file for info in self.tensors.values()}
        names = COPIED if {path.name for path in files} == {SINGLE} else (*COPIED, INDEX)
        files |= {self.folder / name for name in names if (self.folder / name).is_file()}
        return hash_json({path.name: known_hash(path) for path in sorted(files)})

    def tokenizer(self) -> Any:
        """The folder's tokenizer. Raises InputError when there is none."""
        from transformers import AutoTokenizer

        _check_tokenizer_files(self.folder)
        register_configs()
        for path in (self.folder / name for name in TOKENIZER_FILES):
            if path.suffix == ".json" and path.is_file():
                read_json(path, path.name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
            tokenizer.decode(tokenizer("a")["input_ids"])  # some settings are looked at only then
            return tokenizer
        except Exception as error:  # every tokenizer class raises its own kind
            raise InputError(
                f"The tokenizer must load from {self.folder}, got: {first_line(error)}. Add tokenizer.json and "
                "tokenizer_config.json."
            ) from None

    def read(self, names: Iterable[str], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Tensors by name as copies in `dtype`; the files are closed before this returns. Raises InputError for damaged
        files.
        """
        tensors: dict[str, Tensor] = {}
        for name in names:
            info = self.tensors[name]
            if info.dtype not in FLOATS:
                raise InputError(f"{name} must be a float tensor, got {info.dtype}. Fetch the weights again.")
            try:
                with safe_open(info.file, framework="pt") as file:
                    tensors[name] = torch.empty(info.shape, dtype=dtype).copy_(file.get_tensor(name))
            except (SafetensorError, OSError) as error:
                raise damaged(info.file, error) from None
        return tensors

    def rows(self, name: str, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The listed rows [k, ...] of a tensor, touching only their pages. `indices` [k] int64, sorted. Raises
        InputError for damaged files.
        """
        info = self.tensors[name]
        out = torch.empty((len(indices), *info.shape[1:]), dtype=dtype)
        try:
            with safe_open(info.file, framework="pt") as file:
                view = file.get_slice(name)
                for k, row in enumerate(indices.tolist()):
                    out[k] = view[row : row + 1][0]
        except (SafetensorError, OSError) as error:
            raise damaged(info.file, error) from None
        return out


def open_source(model: str | Path, id: str | None = None, revision: str | None = None, sparse: bool = False) -> Source:
    """Open a model folder and check everything that headers can tell; `sparse` allows a checkpoint that carries a plan.

    Raises InputError for a missing folder or configuration, an unknown architecture, pickle weights, and missing,
    truncated or lying safetensors.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise InputError(
            f"MODEL must be a model folder or a Hub id like owner/name, got {str(model)!r}, which is neither. Check "
            "the spelling."
        )
    if not (folder / "config.json").is_file():
        raise InputError(
            f"MODEL must be a transformers folder with config.json, got {folder} without one. Give the folder that "
            "save_pretrained wrote."
        )
    raw = read_json(folder / "config.json", "config.json")
    check_config({key: value for key, value in raw.items() if not (sparse and key == KEY)})
    swaps: Plan = {}
    if str(raw.get("model_type")).startswith(PREFIX):
        swaps = exact_part(read_sparsity(folder)[0])
    if (folder / GENERATION_CONFIG).is_file():
        read_json(folder / GENERATION_CONFIG, GENERATION_CONFIG)
    arch = load_arch(str(raw.get("model_type")))
    tensors = _read_headers(folder)
    config = backed_config(arch, raw, stored(tensors))
    return Source(folder.resolve(), config, arch, tensors, id, revision, swaps=swaps)


def check_weights(model: str | Path) -> None:
    """Raise InputError as `open_source` where transformers would make weights up or read them as what they are not.

    Of a model type without an architecture file what its class alone tells is checked.
    """
    config = Path(model) / "config.json"
    raw = read_json(config, config.name)
    if str(raw.get("model_type")).removeprefix(PREFIX) in supported():
        open_source(model, sparse=True)
        return
    tensors = _read_headers(config.parent)
    check_parameters(make_config(raw), stored(tensors))


def check_config(raw: dict[str, Any]) -> None:
    """Refuse configurations that this package cannot start from: quantised weights, checkpoints with a plan, and
    kernels that transformers would fetch.

    What keeps exact zeros alone, of a swapped activation or of a ReLU model's own, is no plan: nothing is lost, and
    another plan may stand on it.
    """
    if KEY in raw:
        stock, key = not str(raw.get("model_type")).startswith(PREFIX), raw[KEY]
        if stock and not (isinstance(key, dict) and key.get("version") == 2 and key.get("sites")):
            raise InputError(
                "MODEL must be a dense model, got a checkpoint that is sparse already. Convert its base model instead."
            )
        planned = read_key(key).planned()
        if planned:
            raise InputError(
                f"MODEL must be a model without a plan, got a checkpoint that has a plan already ({planned[0].key}). "
                "Convert the model that it was made from."
            )
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise InputError(
            f"architectures in config.json must be a list of names, got {ascii(named):.100}. Mend the file."
        )
    if named and not any(name.endswith(_CAUSAL) for name in named):
        raise InputError(
            f"MODEL must be a causal language model (...{_CAUSAL[0]}), got {named[0]:.100}. Convert the model that it "
            "was made from."
        )
    for name in _KERNELS:
        if "/" in str(raw.get(name)):
            raise InputError(
                f"{name} in config.json must be one of transformers' own, got {raw[name]!r:.100}, code of a "
                "repository. Take that line out."
            )
    if raw.get("quantization_config"):
        quantisation = raw["quantization_config"]
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise InputError(
            f"MODEL must have float weights, got weights quantised by {method!r}. Convert the unquantised model."
        )


def stored(tensors: Mapping[str, TensorInfo]) -> Stored:
    """Shape and dtype by name, as `check_model` takes them."""
    return {name: (info.shape, info.dtype) for name, info in tensors.items()}


def asks_for_code(folder: Path) -> list[str]:
    """The configuration files of a model folder that name code of the model's own for transformers to run."""
    return [name for name in CONFIGS if (folder / name).is_file() and _CODE in read_json(folder / name, name)]


def drop_code(folder: Path) -> None:
    """Take what names code of the model's own out of a folder's configuration files, so that nobody who trusts the
    folder runs it.
    """
    for name in asks_for_code(folder):
        write_json(folder / name, without_code(read_json(folder / name, name)))


def without_code(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what names code of the model's own."""
    return {key: value for key, value in raw.items() if key != _CODE}


def make_config(raw: dict[str, Any]) -> Any:
    """The transformers configuration of a config.json's content. Raises InputError for counts out of bounds and for
    values that transformers refuses.
    """
    check_counts(raw)
    dropped = {"model_type", _CODE} | (set() if str(raw["model_type"]).startswith(PREFIX) else {KEY})
    values = {key: value for key, value in raw.items() if key not in dropped}
    try:
        return build_config(raw["model_type"], values)
    except Exception as error:  # configuration classes raise their own validation errors
        raise InputError(
            f"config.json must hold a valid {raw['model_type']} configuration, got: {first_line(error)}. Mend the file."
        ) from None


def backed_config(arch: Arch, raw: dict[str, Any], tensors: Stored) -> Any:
    """The transformers configuration of a config.json's content, which the tensors in the files are those of: the one
    check of `inspect`, `convert` and every reader of weights. Raises InputError as `check_names`, `check_backed`,
    `make_config`, `check_swaps` and `check_model` do, in this order: nothing large is made before it is known.
    """
    check_names(arch, tensors)
    check_backed(arch, raw, {name: shape for name, (shape, _) in tensors.items()})
    config = make_config(raw)
    stock = config
    if config.model_type.startswith(PREFIX):
        check_swaps(arch, raw, arch.size(config, "layers"))
        stock = make_config(stock_config(raw))
    check_model(arch, stock, tensors)
    return config


def stock_view(folder: Path, out: Path) -> Path:
    """A folder that stock tools read as the base model: `folder` itself, or, where activations were swapped, `out` with
    links to its files.

    The weights there are those of the swapped model under the base's activation: the function is neither model's, and
    what is built from it must put the swapped activations in.
    """
    raw = read_json(folder / "config.json", "config.json")
    if not str(raw.get("model_type")).startswith(PREFIX):
        return folder
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path.name != "config.json" and not (out / path.name).exists():
            try:
                (out / path.name).symlink_to(path.resolve())
            except OSError:
                shutil.copyfile(path, out / path.name)  # a file system without links
    write_json(out / "config.json", stock_config(raw))
    return out


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    named: dict[str, str] = {}
    files: list[Path] = []
    if (folder / SINGLE).is_file():  # transformers prefers it to an index, too
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        named = read_json(folder / INDEX, INDEX).get("weight_map", {})
        if not isinstance(named, dict) or not all(
            isinstance(file, str) and file == Path(file).name for file in named.values()
        ):
            raise InputError(
                f"{INDEX} must map tensors to files beside it, got another weight_map in {folder}. Fetch it again."
            )
        files = [inside(folder, file, INDEX, link=True) for file in sorted(set(named.values()))]
    if not files:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"Weights must be safetensors, got {pickles[0]}, a pickle file that can run code when read. "
                "Load it with transformers on a machine you trust and save it with model.save_pretrained(DIR)."
            )
        raise InputError(
            f"Weights must be {SINGLE} or shards with {INDEX}, got neither in {folder}. Fetch the weights."
        )
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        if not path.is_file():
            raise InputError(f"{INDEX} names {path.name}, which must lie in {folder}, got no such file. Fetch it.")
        for name, entry in read_header(path).items():
            if name in tensors:
                raise InputError(
                    f"{name} must stand in one file, got it in {tensors[name].file.name} and {path.name}. Fetch the "
                    "weights again."
                )
            tensors[name] = TensorInfo(entry.dtype, entry.shape, path)
    absent = min(
        (name for name, file in named.items() if name not in tensors or tensors[name].file.name != file), default=None
    )
    if absent is not None:
        raise InputError(
            f"{INDEX} names {absent}, which must stand in {named[absent]}, got no such tensor there. Fetch the weights "
            "again."
        )
    return tensors


def has_own_head(source: Source) -> bool:
    """Whether the files hold another head than the embedding although config.json ties the two: transformers (5.23)
    uses it then.
    """
    if not getattr(source.config, "tie_word_embeddings", False) or HEAD not in source.tensors:
        return False
    weights = source.read([HEAD, source.arch.embedding])
    return not torch.equal(weights[HEAD], weights[source.arch.embedding])


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end a text: those of the generation configuration, or of the configuration where that names none.
    Empty where neither does.

    `model` is a transformers model or a model folder. As transformers' `generate`, which counts a tokenizer's end token
    only where these name it. Raises InputError for a folder whose end tokens are no token ids.
    """
    if isinstance(model, str | Path):
        files = [Path(model) / name for name in (GENERATION_CONFIG, "config.json")]
        named = [read_json(file, file.name).get("eos_token_id") for file in files if file.is_file()]
    else:
        named = [
            getattr(config, "eos_token_id", None)
            for config in (getattr(model, "generation_config", None), model.config)
        ]
    ends = next((value for value in named if value is not None), [])
    ends = ends if isinstance(ends, list) else [ends]
    if not all(type(token) is int for token in ends):
        raise InputError(
            f"eos_token_id must be a token id or a list of them, got {ends!r:.100}. Mend {GENERATION_CONFIG}."
        )
    return frozenset(ends)


def _check_tokenizer_files(folder: Path) -> None:
    """Refuse a folder without a vocabulary, for which transformers makes an empty tokenizer in silence, and a
    sentencepiece file that nothing here can read.
    """
    files = [path for path in folder.iterdir() if path.name in _VOCABULARIES or path.suffix in (".model", ".tiktoken")]
    if not files:
        raise InputError(
            f"The tokenizer must lie in {folder} as tokenizer.json, got none of its files. Add tokenizer.json and "
            "tokenizer_config.json."
        )
    pieces = folder / "tokenizer.model"
    if not (folder / "tokenizer.json").is_file() and pieces.is_file() and find_spec("sentencepiece") is None:
        with open(pieces, "rb") as file:
            if file.read(1) == _PIECES:
                raise InputError(
                    f"tokenizer.model of {folder} must be read by sentencepiece, got no such package. Do: pip install "
                    "sentencepiece protobuf."
                )
