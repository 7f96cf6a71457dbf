"""The base graph of a causal language model: built by onnxruntime-genai's model builder, then compared with torch by
teacher forcing.

The builder writes a decoder with KV cache: `model.onnx`, `model.onnx.data`, `genai_config.json` and the tokenizer's
files. It is known to be wrong for some models, so nothing is exported before `check_base` has passed its graph in fp32
for the CPU.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...runtime_onnx.errors import InputError, explained
from ...runtime_onnx.genai_config import check_config
from ...runtime_onnx.untrusted import read_json
from ..arch import supported
from ..checkpoint.source import drop_code, end_tokens, has_own_head, open_source, stock_view
from ..checkpoint.stage import disk_full, is_disk_full
from ..modeling.gated import load_dense

BOUND = 1e-4
"""Largest logit difference between the base graph and torch, times the rms of torch's logits where that is above 1."""

MODEL = "model.onnx"
DATA = "model.onnx.data"
GENAI_CONFIG = "genai_config.json"
NO_TOKEN = -1
"""An id that no token has. ONNX's Gather takes it, so that a padded batch still runs."""

_LOG = logging.getLogger("sparsegate")
# Every layer keeps its whole KV cache: a loop in plain ONNX Runtime then only appends, where a windowed cache would
# have to be sized and rotated by the app.
_OPTIONS = ["hf_token=false", "hf_remote=false", "windowed_kv_cache=false"]
_TARGET_OPTIONS = {"cpu": [], "cuda": ["enable_cuda_graph=true"]}


def build_base(checkpoint: Path, out: Path, precision: str = "fp32", target: str = "cpu") -> Path:
    """Build the graph of a Hugging Face folder into `out`; returns `out`. Reads local files only and holds the whole
    model in memory, in fp32.

    Where activations were swapped the graph is that of `load_stock`, with the base model's activation: `export` puts
    the swapped ones in.

    `precision` is fp32, or for the target cuda one of 16 bits; a graph for CUDA asks its provider for CUDA graphs.

    Raises InputError when onnxruntime-genai is missing, when the builder refuses or fails on the model, or when the
    disk is full.
    """
    builder = _builder()
    with TemporaryDirectory() as temporary, _to_log():
        try:
            stock = stock_view(checkpoint, Path(temporary) / "stock")
            arguments = (str(_for_builder(stock, Path(temporary))), str(out), precision, target, f"{temporary}/cache")
            options = builder.parse_extra_options("", *arguments, [*_OPTIONS, *_TARGET_OPTIONS[target]])
            missing = _prepare(options["hf_details"]["hf_config"])
            builder.create_model("", *arguments, **options)
            _complete(out, missing)
            _set_tokens(out, end_tokens(checkpoint))
            drop_code(out)
        except InputError:
            raise
        except Exception as error:  # the builder raises whatever its hundred code paths meet
            if is_disk_full(error):
                raise disk_full(out) from error
            said = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"The model must be one that onnxruntime-genai's builder exports, got {type(error).__name__}: {said}. "
                "Convert another model, or another version of onnxruntime-genai may know this one."
            ) from error
    return out


def load_stock(checkpoint: Path) -> Any:
    """The model that `build_base` exports: of the stock class with the base model's activation, so of a swapped
    checkpoint another function than its own.
    """
    with TemporaryDirectory() as temporary:
        return load_dense(stock_view(checkpoint, Path(temporary) / "stock"))


def _builder() -> ModuleType:
    path = list(sys.path)
    try:
        from onnxruntime_genai.models import builder
    except ImportError as error:
        raise InputError(
            f"ONNX export must find onnxruntime-genai, got {error}. Install it with: pip install 'sparsegate[cpu]'"
        ) from None
    finally:
        sys.path[:] = path  # the package appends its own folder, whose modules have names like `builders`
    return builder


def _for_builder(checkpoint: Path, temporary: Path) -> Path:
    """A folder with the same files whose configuration asks for fp32, and for the head that transformers uses.

    In half precision the builder would round what it computes from weights, such as gemma's 1 + norm; and it believes a
    configuration that ties the head.
    """
    config = read_json(checkpoint / "config.json", "config.json")
    changes: dict[str, Any] = (
        {} if config.get("dtype", config.get("torch_dtype")) == "float32" else {"dtype": "float32"}
    )
    if config.get("model_type") in supported() and has_own_head(open_source(checkpoint, sparse=True)):
        changes["tie_word_embeddings"] = False
    if not changes:
        return checkpoint
    folder = temporary / "float32"
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file() and path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    if "dtype" in changes:
        config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


class _Missing(NamedTuple):
    """What `_complete` puts into a built graph: no rotation in the layers `unrotated`, and a rotation of other
    frequencies [d_h / 2] and their factor.
    """

    unrotated: list[int]
    rotary: tuple[Tensor, float] | None


def _prepare(config: Any) -> _Missing:
    """Change a configuration so that the builder exports what transformers computes; returns what it leaves to
    `_complete`.

    Defects of the builder 0.18: it reads a sliding window only together with `layer_types`, which mistral and phi3 do
    not have, it fails on layers without rotary embedding (smollm3) when the others rotate inside the attention op, and
    its YaRN takes absent fields for 0 and does not round to whole dimensions.
    """
    layers = config.num_hidden_layers
    rope, rotary = getattr(config, "rope_parameters", None), None
    if isinstance(rope, dict) and rope.get("rope_type") == "yarn":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rotary = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
        config.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * layers
    rotated = getattr(config, "no_rope_layers", None) or [1] * layers  # 1 means that the layer does rotate
    if not all(rotated):
        config.no_rope_layers = [1] * layers
    return _Missing([layer for layer in range(layers) if not rotated[layer]], rotary)


def _complete(folder: Path, missing: _Missing) -> None:
    """Finish the built graph by what is `missing`, and a fixed head size in the cache's shapes, so that an app can read
    it from the file.
    """
    size = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]["decoder"]["head_size"]
    model = ir.load(folder / MODEL)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and len(value.shape) == 4:
            value.shape = ir.Shape([*value.shape[:3], size])
    caches = {f"past_key_values.{layer}.key" for layer in missing.unrotated}
    for value in model.graph.inputs:
        if value.name in caches:
            ((attention, _),) = value.uses()
            attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)
            for index, operand in enumerate(attention.inputs):
                if operand is not None and operand.name in ("cos_cache", "sin_cache"):
                    attention.replace_input_with(index, None)
    if missing.rotary is not None:
        frequencies, factor = missing.rotary
        for name, function in (("cos_cache", torch.cos), ("sin_cache", torch.sin)):
            table = model.graph.initializers[name]
            assert table.shape is not None and table.dtype is not None
            angles = torch.outer(torch.arange(int(table.shape.numpy()[0])).float(), frequencies.float())
            table.const_value = ir.Tensor((function(angles) * factor).numpy().astype(table.dtype.numpy()), name=name)
    ir.save(model, folder / MODEL)


def _set_tokens(folder: Path, ends: frozenset[int]) -> None:
    """The end tokens that transformers' `generate` stops at, and no pad token. Where it stops at none the builder's
    remain, since genai has to have one.

    The builder adds the tokenizer's end token, and genai takes pads off a prompt's end: a chat model often pads with
    the token that ends a turn.
    """
    file = folder / GENAI_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["pad_token_id"] = NO_TOKEN
    if ends:
        config["model"]["eos_token_id"] = min(ends) if len(ends) == 1 else sorted(ends)
    file.write_text(json.dumps(check_config(config, file), indent=4), encoding="utf-8")


class _LogLines(io.TextIOBase):
    """A text stream whose lines go to the package's log, level debug."""

    def write(self, text: str) -> int:
        for line in text.replace("\r", "\n").splitlines():
            if line.strip():
                _LOG.debug("builder: %s", line.strip())
        return len(text)


@contextmanager
def _to_log() -> Iterator[None]:
    lines = _LogLines()
    with redirect_stdout(lines), redirect_stderr(lines):
        yield


def onnx_logits(session: Any, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [N, S, V] of token rows [N, S] without padding, by one teacher-forced call with an empty KV cache;
    `session` is an onnxruntime.InferenceSession.

    Raises InputError for an input that a decoder graph does not have.
    """
    tokens = np.ascontiguousarray(tokens, dtype=np.int64)
    rows, length = tokens.shape
    feeds: dict[str, NDArray] = {}
    for entry in session.get_inputs():
        if entry.name == "input_ids":
            feeds[entry.name] = tokens
        elif entry.name == "attention_mask":
            feeds[entry.name] = np.ones((rows, length), dtype=np.int64)
        elif entry.name == "position_ids":
            feeds[entry.name] = np.tile(np.arange(length, dtype=np.int64), (rows, 1))
        elif (
            entry.name.startswith("past_key_values.")
            and isinstance(entry.shape[1], int)
            and isinstance(entry.shape[3], int)
        ):
            dtype = np.float16 if entry.type == "tensor(float16)" else np.float32
            feeds[entry.name] = np.zeros((rows, entry.shape[1], 0, entry.shape[3]), dtype=dtype)
        else:
            raise InputError(
                "A decoder's inputs must be input_ids, attention_mask, position_ids and past_key_values.* [N, heads, "
                "length, head size], "
                f"got {entry.name} {entry.shape}. Export the model with sparsegate."
            )
    return session.run(["logits"], feeds)[0].astype(np.float32, copy=False)


@torch.no_grad()
def compare_base(onnx_folder: Path, model: Callable[[Tensor], Any], tokens: NDArray[np.int64] | Tensor) -> float:
    """Largest absolute logit difference between an ONNX folder and `model` on token rows [N, S].

    `model` is a transformers model in fp32, or any function from int64 tokens [N, S] to logits [N, S, V]. NaN when
    either side is not finite.
    """
    return _differences(onnx_folder, model, tokens)[0]


@torch.no_grad()
def check_base(onnx_folder: Path, model: Callable[[Tensor], Any], tokens: NDArray[np.int64] | Tensor) -> float:
    """`compare_base` against the bound BOUND * max(1, rms of the logits).

    Returns the difference. Raises InputError when the builder's graph is not the model.
    """
    difference, rms = _differences(onnx_folder, model, tokens)
    bound = BOUND * max(1.0, rms)
    if not difference <= bound:
        raise InputError(
            f"The graph from onnxruntime-genai's builder must give torch's logits within {bound:.1e}, got a difference "
            f"of {difference:.1e} "
            f"(rms of the logits {rms:.2g}). The builder is wrong for this model: convert another one, or try another "
            "version of onnxruntime-genai."
        )
    return difference


def _differences(
    onnx_folder: Path, model: Callable[[Tensor], Any], tokens: NDArray[np.int64] | Tensor
) -> tuple[float, float]:
    """(Largest absolute difference, rms of torch's logits); the rows go one by one, so that one row's logits are held
    at a time.
    """
    session = open_session(onnx_folder / MODEL)
    largest, squares, count = 0.0, 0.0, 0
    for row in np.asarray(tokens, dtype=np.int64):
        outputs = model(torch.from_numpy(row[None]))
        expected = getattr(outputs, "logits", outputs).float().numpy()
        difference = np.abs(onnx_logits(session, row[None]) - expected).max()
        largest = float(np.maximum(largest, difference))  # unlike max(), keeps a NaN
        squares, count = squares + float(np.square(expected, dtype=np.float64).sum()), count + expected.size
    return largest, (squares / count) ** 0.5


def open_session(model: Path | bytes) -> Any:
    """A plain CPU session on a file or a serialised model, without the native library. Raises InputError when
    onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            f"ONNX export must find onnxruntime, got {error}. Install it with: pip install 'sparsegate[cpu]'"
        ) from None
    with explained(str(model) if isinstance(model, Path) else "A part of the graph"):
        return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
