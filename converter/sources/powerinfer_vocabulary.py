"""A tokenizer as llama.cpp's files hold it: gpt2 (byte-level BPE) with merges, or llama (BPE with byte fallback), whose
scores rank tokens by their merge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...runtime_onnx.errors import InputError, explained
from ..checkpoint.source import Source
from .powerinfer_file import gguf_package

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_VOCABULARY = "vocabulary.gguf"
_LONGEST = 1 << 10  # characters of a token: where merges are not stored, each of its halves is looked up


def add_vocabulary(gguf: Any, writer: Any, source: Source) -> None:
    """The tokenizer as llama.cpp holds it: gpt2 (byte-level BPE) with merges, or llama (BPE with byte fallback), whose
    scores rank tokens by their merge.

    Raises InputError for any other tokenizer.
    """
    tokenizer = source.tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"] if tokenizer.is_fast else {}
    if model.get("type") != "BPE":
        raise InputError(
            f"PowerInfer's tokenizer must be a BPE one, got {model.get('type') or 'one without tokenizer.json'}. Use "
            "ONNX Runtime for this model."
        )
    bytewise = not model.get("byte_fallback")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    rank = {merge.replace(" ", ""): -float(k) for k, merge in reversed(list(enumerate(merges)))}
    types = gguf.TokenType
    tokens, scores, kinds = [], [], []
    text = {token: name for name, token in tokenizer.get_vocab().items()}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for token in range(source.arch.size(source.config, "vocab")):
        name = text.get(token)
        kind = (
            types.UNUSED
            if name is None
            else types.UNKNOWN
            if name == model.get("unk_token")
            else types.CONTROL
            if token in special
            else types.NORMAL
        )
        if kind == types.NORMAL and not bytewise and _BYTE.fullmatch(str(name)):
            kind = types.BYTE
        tokens.append(f"[PAD{token}]" if name is None else name)
        scores.append(rank.get(str(name), 0.0))
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2" if bytewise else "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if bytewise:
        writer.add_token_merges(merges)
    else:
        writer.add_token_scores(scores)
    for token, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
    ):
        if token is not None:
            add(token)


def write_tokenizer(fields: Mapping[str, Any], size: int, path: Path, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, as transformers reads them from the vocabulary in a
    file's metadata; the vocabulary has `size` tokens.

    Raises InputError for a vocabulary of another size, and for one that transformers cannot read.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = fields.get("tokenizer.ggml.tokens")
    named = len(tokens) if isinstance(tokens, list) else 0
    if named != size or not all(isinstance(token, str) and len(token) <= _LONGEST for token in tokens or ()):
        wrong = f"{named} of them" if named != size else "a longer one, or one that is no text,"
        raise InputError(
            f"tokenizer.ggml.tokens must name each of the {size} tokens in at most {_LONGEST} characters, got {wrong} "
            f"in {path}. Fetch the file again."
        )
    gguf = gguf_package()
    with (
        TemporaryDirectory() as temporary,
        explained(f"The vocabulary of {path}", "Fetch the file again, or take the model in another format."),
    ):
        writer = gguf.GGUFWriter(Path(temporary) / _VOCABULARY, "llama")
        for key, value in fields.items():
            if key.startswith("tokenizer.ggml."):
                _add(writer, key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            temporary, gguf_file=_VOCABULARY, local_files_only=True, trust_remote_code=False
        )
        tokenizer.save_pretrained(folder)


def _add(writer: Any, key: str, value: Any) -> None:
    """Put a value of a file's metadata into another file's."""
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    kinds = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
    getattr(writer, kinds[type(value)])(key, value)
