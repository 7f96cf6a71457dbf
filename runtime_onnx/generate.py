"""Streams text from an ONNX folder over onnxruntime-genai, with the native kernels where the library supports the
model.

genai opens a custom-op library only inside the model folder or the current directory, or by a bare name that the
dynamic loader knows. A library that is loaded already answers to its SONAME, so from Python nothing is copied. A folder
that `link` has treated names its own copy, which must be the installed library.

genai never reads the folder's own genai_config.json: it opens a folder of links with a configuration that is written
here from the checked fields.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, explained, said_by
from .genai_config import CONFIG, check_config, make_view, read_config
from .library import LIBRARY, PROVIDERS, Executor, library_path, model_file
from .session import choose, report
from .text import Stream, Tokenizer, read_json

LEAST_TEMPERATURE = 1e-4
"""Logits are divided by it: below, their quotients leave float32."""
NO_TOKEN = -1
"""The pad token's id in genai_config.json. genai takes pads off a prompt's end, and many models pad with a token that
ends a turn; no token has this id, and the lookup of an embedding takes it in a padded batch.
"""


def load(path: str | Path, library: bool | None = None, options: dict[str, Any] | None = None) -> Any:
    """An onnxruntime-genai Model for an ONNX folder or sparse checkpoint, with one log line that says what runs its
    ai.sparsegate ops.

    Args:
        path: ONNX folder with genai_config.json, or a sparse checkpoint with onnx/ inside.
        library: None uses the native library where it supports the model, False never, True raises InputError where it
        cannot.
        options: Session options to lay over those of genai_config.json, e.g. {"intra_op_num_threads": 2}.

    Raises:
        InputError: No such folder, a field of genai_config.json that is not known, a linked library that is
        not the installed one, a folder that
            onnxruntime-genai refuses (its text is in the error), or onnxruntime-genai is not installed.
    """
    genai = _genai()
    config = read_config(path)
    file = model_file(path)
    if (named := config["model"]["decoder"]["filename"]) != file.name:
        raise InputError(
            f"{CONFIG} beside {file} must name that file, got {named}. Convert or download the folder again."
        )
    chosen = choose(file, [config_provider(config)], library)
    if "custom_ops_library" in config["model"]["decoder"].get("session_options", {}):
        _check_copy(file.parent)
    if chosen.kernel and (foreign := _foreign()):
        if library:
            raise InputError(
                f"{foreign} must not lie in the way: onnxruntime-genai would take it, got another library than the "
                "installed one. Remove it."
            )
        chosen = Executor(
            False, f"{foreign} is another library of the same name, which onnxruntime-genai would take. Remove it"
        )
    config = check_config(
        config | {"model": config["model"] | _tokens_overlay(file.parent, config)}, file.with_name(CONFIG)
    )
    try:
        with explained(str(file)):
            model = _open(genai, file.parent, config, options or {}, chosen.kernel)
    except InputError as error:
        if not chosen.kernel or library:
            raise
        with explained(str(file)):
            model = _open(genai, file.parent, config, options or {}, False)
        chosen = Executor(False, f"onnxruntime-genai did not take the library: {said_by(error.__cause__ or error)}")
    report(file, chosen, library)
    return model


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; above 0 it is sampled from the `top_k` likeliest (0: all)
    within probability mass `top_p`, seeded.
    """

    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def options(self, vocabulary: int | None) -> dict[str, Any]:
        """Search options of onnxruntime-genai; greedy search has none of its own."""
        if not self.temperature:
            return {"do_sample": False}
        top_k = self.top_k if vocabulary is None else min(self.top_k, vocabulary)
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": top_k,
            "top_p": self.top_p,
            "random_seed": self.seed,
        }


def generate(
    path: str | Path,
    prompt: str,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    library: bool | None = None,
    chat: bool | None = None,
) -> Iterator[str]:
    """Yields the model's text piece by piece, until a token that ends a text, `max_new_tokens`, or the model's context
    is full.

    With `chat` the prompt is what a user says in the model's chat template, and the text is the answer. Without it the
    prompt is continued as it is, with the tokens that the tokenizer puts before a text, and special tokens are shown,
    but for the one that ends the text. None chats with a model that has a template.

    `sampling` is greedy by default; `path` and `library` are as in `load`.

    Raises:
        InputError: At the call, before any piece: as `load`, or the prompt is empty or too long, a number out of range,
        the chat template absent or failing.
    """
    sampling = sampling or Sampling()
    _check_numbers(max_new_tokens, sampling)
    if not prompt:
        raise InputError("The prompt must hold text, got an empty string. Pass some words to continue.")
    genai = _genai()
    config = read_config(path)["model"]
    context = config["context_length"]
    tokenizer = Tokenizer(path)
    chat = tokenizer.template is not None if chat is None else chat
    tokens = tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
    if not tokens:
        raise InputError("The prompt must make tokens, got none. Pass some words to continue.")
    if len(tokens) >= context:
        raise InputError(
            f"The prompt must be shorter than the model's context of {context} tokens, got {len(tokens)} tokens. "
            "Shorten it."
        )
    model = load(path, library)
    file = model_file(path)
    with explained(str(file)):
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(
            max_length=min(len(tokens) + max_new_tokens, context), **sampling.options(config.get("vocab_size"))
        )
        generator = genai.Generator(model, parameters)
        generator.append_tokens(tokens)
    return _pieces(
        generator, file, end_tokens(path), tokenizer.stream(() if chat else tokens, skip_special_tokens=chat)
    )


def _check_numbers(max_new_tokens: int, sampling: Sampling) -> None:
    temperature, top_k, top_p, seed = sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed
    for name, value, right, bound in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        (
            "temperature",
            temperature,
            LEAST_TEMPERATURE <= temperature < math.inf or temperature == 0,
            f"0, or at least {LEAST_TEMPERATURE}",
        ),
        ("top_k", top_k, top_k >= 0, "at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("seed", seed, 0 <= seed < 1 << 31, "from 0 to 2147483647"),
    ):
        if not right:
            raise InputError(f"{name} must be {bound}, got {value}. Choose another number.")


def end_tokens(path: str | Path) -> frozenset[int]:
    """The tokens that end a text of the model at `path`; empty where none does. Raises InputError as `load` does for a
    folder without configuration.
    """
    config = read_config(path)
    ends = {**config["model"], **_tokens_overlay(model_file(path).parent, config)}.get("eos_token_id")
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def config_provider(config: dict[str, Any]) -> str:
    """The execution provider that a genai_config.json chooses for its decoder."""
    entries = config["model"]["decoder"].get("session_options", {}).get("provider_options", [])
    return PROVIDERS[any(key.lower().startswith("cuda") for entry in entries for key in entry)]


def _pieces(generator: Any, file: Path, ends: frozenset[int], stream: Stream) -> Iterator[str]:
    while not generator.is_done():
        with explained(str(file)):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
        if token not in ends and (piece := stream.put(token)):
            yield piece
    if rest := stream.end():
        yield rest


def _tokens_overlay(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The pad and end tokens of a folder whose configuration is the builder's own: no pad, and the ends of the
    checkpoint that it lies in.
    """
    if config["model"].get("pad_token_id") == NO_TOKEN:
        return {}
    ends = None
    if folder.name == "onnx":
        files = (folder.parent / "generation_config.json", folder.parent / "config.json")
        ends = next((value for file in files if (value := read_json(file).get("eos_token_id")) is not None), None)
    return {"pad_token_id": NO_TOKEN, **({} if ends is None else {"eos_token_id": ends})}


def _open(genai: Any, folder: Path, config: dict[str, Any], options: dict[str, Any], library: bool) -> Any:
    """A model of `folder` under `config` with the caller's session options over it; genai reads both in a folder of
    links that lives as long as the model.
    """
    session = config["model"]["decoder"].get("session_options", {}) | options
    session.pop("custom_ops_library", None)
    if library:
        ctypes.CDLL(str(library_path()))
        session["custom_ops_library"] = LIBRARY
    merged = config | {
        "model": config["model"] | {"decoder": config["model"]["decoder"] | {"session_options": session}}
    }
    view = make_view(folder, merged)
    try:
        model = genai.Model(genai.Config(view.name))
    except BaseException:
        view.cleanup()
        raise
    weakref.finalize(model, view.cleanup)
    return model


def _check_copy(folder: Path) -> None:
    """The copy that a linked folder names is what apps in other languages load: only the installed library is let
    through.
    """
    if not (folder / LIBRARY).is_file() or not _installed(folder / LIBRARY):
        raise InputError(
            f"custom_ops_library in {folder} must be the installed library, got another file of that name or none. Do: "
            f"sparsegate link {folder}"
        )


def _foreign() -> Path | None:
    """A library of our name, but not ours, in the current directory, where genai looks before the loader's names."""
    path = Path.cwd() / LIBRARY
    return path if path.is_file() and not _installed(path) else None


def _installed(path: Path) -> bool:
    ours = library_path()
    return (
        path.stat().st_size == ours.stat().st_size
        and hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(ours.read_bytes()).digest()
    )


def _genai() -> Any:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise InputError(
            f'onnxruntime-genai must be installed to generate text, got: {error}. Do: pip install "sparsegate[cpu]" '
            '(with a CUDA GPU: "sparsegate[gpu]")'
        ) from None
    return onnxruntime_genai
