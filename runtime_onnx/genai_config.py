"""genai_config.json: a closed vocabulary. onnxruntime-genai reads fields that name libraries, programs and files; none
of them is let through.

A field must stand in the table below with a value of its kind. What genai is given is written anew from what was
understood, never the file itself, so that its reader and ours cannot see two contents.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .errors import InputError
from .library import LIBRARY, model_file
from .untrusted import load_json

CONFIG = "genai_config.json"
FieldRule = Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return type(value) is int and -(1 << 31) <= value < 1 << 31


def _count(value: Any) -> bool:
    return _whole(value) and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _flag(value: Any) -> bool:
    return type(value) is bool


def _token(value: Any) -> bool:
    return value is None or _whole(value)


def _tokens(value: Any) -> bool:
    return _token(value) or (isinstance(value, list) and all(_whole(entry) for entry in value))


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(_count(entry) for entry in value)


def _matches(pattern: str) -> FieldRule:
    compiled = re.compile(pattern, re.ASCII)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


_word = _matches(r"[\w.-]{1,64}")
_name = _matches(r"[\w./-]{1,128}")
_numbered = _matches(
    r"[\w./-]{0,64}%d[\w./-]{0,64}"
)  # genai prints the layer's number by it: no other % may stand there
_file = _matches(r"[\w-][\w.-]{0,127}")
_switch = _matches(r"[01]")

FIELDS: dict[str, Any] = {
    "model": {
        "type": _word,
        "vocab_size": _count,
        "context_length": _count,
        "bos_token_id": _token,
        "eos_token_id": _tokens,
        "pad_token_id": _tokens,
        "bot_token_id": _token,
        "eot_token_id": _token,
        "bor_token_id": _token,
        "eor_token_id": _token,
        "decoder": {
            "filename": _file,
            "head_size": _count,
            "hidden_size": _count,
            "num_attention_heads": _count,
            "num_hidden_layers": _count,
            "num_key_value_heads": _count,
            "inputs": {
                "input_ids": _name,
                "attention_mask": _name,
                "position_ids": _name,
                "past_key_names": _numbered,
                "past_value_names": _numbered,
            },
            "outputs": {"logits": _name, "present_key_names": _numbered, "present_value_names": _numbered},
            "sliding_window": {
                "window_size": _count,
                "slide_key_value_cache": _flag,
                "slide_inputs": _flag,
                "layers": _counts,
                "cache_slack": _count,
            },
            "session_options": {
                "log_id": _word,
                "log_severity_level": _count,
                "intra_op_num_threads": _count,
                "inter_op_num_threads": _count,
                "enable_cpu_mem_arena": _flag,
                "enable_mem_pattern": _flag,
                "custom_ops_library": lambda value: value == LIBRARY,
                "provider_options": [
                    {"cpu": {}, "cuda": {"enable_cuda_graph": _switch, "enable_skip_layer_norm_strict_mode": _switch}}
                ],
            },
        },
    },
    "search": {
        "do_sample": _flag,
        "early_stopping": _flag,
        "past_present_share_buffer": _flag,
        "max_length": _count,
        "min_length": _count,
        "num_beams": _count,
        "num_return_sequences": _count,
        "no_repeat_ngram_size": _count,
        "top_k": _count,
        "random_seed": _whole,
        "top_p": _number,
        "temperature": _number,
        "repetition_penalty": _number,
        "length_penalty": _number,
        "diversity_penalty": _number,
    },
}
"""Every field that a genai_config.json may have -> the check of its value, the fields inside it, or the one kind of its
list's entries.

It holds what the export writes, and plain numbers and switches beside. To allow a field, add it here; never one that
names a file or a library.
"""
_NEEDED = ("context_length", "decoder")
_NEEDED_DECODER = ("filename", "head_size")


def read_config(path: str | Path) -> dict[str, Any]:
    """The genai_config.json beside a model, as a new value with nothing in it that FIELDS does not have.

    Raises InputError when it is missing, is no JSON object or names a key twice, for a field outside FIELDS, and for a
    value of another kind.
    """
    file = model_file(path).with_name(CONFIG)
    try:
        value = load_json(file)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The model must have a {CONFIG} beside it, got {file} ({error}). Convert or download the folder again."
        ) from None
    return check_config(value, file)


def check_config(value: Any, file: Path) -> dict[str, Any]:
    """`value`, what genai_config.json at `file` says, copied field by field. Raises InputError as `read_config`."""
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("decoder"), dict):
        raise InputError(
            f"{file} must describe a decoder (model.decoder), got another JSON value. Convert or download the folder "
            "again."
        )
    for name in (
        *(f"model.{key}" for key in _NEEDED if key not in model),
        *(f"model.decoder.{key}" for key in _NEEDED_DECODER if key not in model["decoder"]),
    ):
        raise InputError(f"{file} must have {name}, got none. Convert or download the folder again.")
    return _copied(value, FIELDS, "", file)


def make_view(folder: Path, config: dict[str, Any]) -> TemporaryDirectory[str]:
    """A folder of links to the files of the ONNX folder `folder`, with `config` as its genai_config.json and no native
    library: what genai is given.
    """
    view = TemporaryDirectory(prefix="sparsegate-")
    try:
        for path in folder.resolve().iterdir():
            if path.name not in (CONFIG, LIBRARY):
                _link(path, Path(view.name) / path.name)
        (Path(view.name) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    except BaseException:
        view.cleanup()
        raise
    return view


def _link(target: Path, link: Path) -> None:
    try:
        link.symlink_to(target)
    except OSError:  # a system on which not everyone may make symbolic links
        os.link(target, link)


def _copied(value: Any, known: Any, where: str, file: Path) -> Any:
    if isinstance(known, dict):
        if not isinstance(value, dict):
            raise InputError(
                f"{where} in {file} must be a JSON object, got {ascii(value):.100}. Convert or download the folder "
                "again."
            )
        for name in value:
            if name not in known:
                raise InputError(
                    f"{file} must have only the fields that sparsegate knows, got "
                    f"{f'{where}.' if where else ''}{ascii(name)[1:-1]:.100}, "
                    "which onnxruntime-genai might run or open. Take it out, or do not use this folder."
                )
        return {
            name: _copied(entry, known[name], f"{where}.{name}" if where else name, file)
            for name, entry in value.items()
        }
    if isinstance(known, list):
        if not isinstance(value, list):
            raise InputError(
                f"{where} in {file} must be a list, got {ascii(value):.100}. Convert or download the folder again."
            )
        return [_copied(entry, known[0], f"{where}[{number}]", file) for number, entry in enumerate(value)]
    if not known(value):
        remedy = (
            "Take that line out first"
            if where.endswith("custom_ops_library")
            else "Convert or download the folder again"
        )
        said = (
            f"name no other custom_ops_library than {LIBRARY}"
            if where.endswith("custom_ops_library")
            else f"have a plain value for {where}"
        )
        raise InputError(f"{file} must {said}, got {ascii(value):.100}. {remedy}.")
    return list(value) if isinstance(value, list) else value
