"""Text to token ids and back, as transformers does it, from the files beside a model: tokenizer.json by the tokenizers
library, and the chat template.

onnxruntime-genai reads tokenizer.json by an implementation of its own, which gives other ids for some tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import chat_template
from .errors import InputError
from .library import model_file
from .untrusted import load_json, read_bytes

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LARGEST_TEMPLATE = 1 << 22
"""Bytes of a chat template; the largest have a hundredth of it."""
_CONTEXT = 8  # tokens before a text that decide how it begins
_INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are no whole character


class Tokenizer:
    """The tokenizer beside a model.

    Attributes:
        folder: Where its files lie.
        template: The source of the chat template; None for a model without one.
        special_tokens: What a template may name, such as bos_token.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the tokenizer of an ONNX folder, or of a sparse checkpoint with onnx/ inside.

        Raises InputError where there is no model, no tokenizer.json, or a damaged file.
        """
        self.folder = model_file(path).parent
        settings = read_json(self.folder / "tokenizer_config.json")
        self._tokenizer = _open(self.folder / "tokenizer.json")
        self._tokenizer.no_truncation()  # transformers truncates and pads only where a call says so
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens", False))
        self._special = {token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        self.special_tokens = _special_tokens(settings, self.folder)
        self.template = find_template(path)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that this tokenizer puts around every text. A lone surrogate, which has
        no bytes, is read as a question mark.
        """
        text = text.encode("utf-8", "replace").decode()
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def chat(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text of a conversation [{"role", "content"}, ...] in the model's chat template, up to where the
        assistant's answer starts.

        Raises InputError for a model without a template and for one that fails.
        """
        if self.template is None:
            raise InputError(
                f"The model must have a chat template to be chatted with, got none in {self.folder}. Pass the prompt "
                "as it is instead (--raw)."
            )
        return chat_template.render(
            self.template,
            {
                **self.special_tokens,
                "messages": list(messages),
                "tools": None,
                "documents": None,
                "add_generation_prompt": True,
            },
        )

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of `chat`; the template writes the special tokens itself. Raises InputError as `chat` does."""
        return self.encode(self.chat(messages), add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; ids that no token has are left out."""
        return self._tokenizer.decode([token for token in ids if token >= 0], skip_special_tokens=skip_special_tokens)

    def stream(self, context: Sequence[int] = (), skip_special_tokens: bool = False) -> Stream:
        """A decoder of tokens that come one by one, after the text of `context`."""
        return Stream(self, context, self._special if skip_special_tokens else set())


class Stream:
    """Decodes tokens one by one: the pieces together are what the tokens after the context add to its text.

    A piece is held back until its characters are whole. As text-generation servers do, each step decodes only a few
    tokens: those of the last piece, which decide about a leading space, and the new ones.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skipped: set[int]) -> None:
        """Starts after the text of `context`; tokens in `skipped` add nothing."""
        self._tokenizer, self._skipped = tokenizer, skipped
        ids = [token for token in context if token not in skipped]
        start = max(0, len(ids) - _CONTEXT)
        while start > 0 and tokenizer.decode(ids[start:]).startswith(_INCOMPLETE):
            start -= 1  # byte tokens in a row are decoded together or not at all
        self._ids = ids[start:]
        self._start, self._shown = 0, len(self._ids)

    def put(self, token: int) -> str:
        """The next whole characters, which may be none."""
        if token in self._skipped:
            return ""
        self._ids.append(token)
        before, text = self._texts()
        if len(text) <= len(before) or text.endswith(_INCOMPLETE):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def end(self) -> str:
        """What is still held back at the end, broken characters included."""
        before, text = self._texts()
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._tokenizer.decode(self._ids[self._start : self._shown]), self._tokenizer.decode(
            self._ids[self._start :]
        )


def _open(file: Path) -> Any:
    import tokenizers

    if not file.is_file():
        raise InputError(
            f"The model must have a tokenizer.json beside it, got none in {file.parent}. Convert or download the "
            "folder again."
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:  # the library raises bare Exception, and a panic of its own that is not even one
        if isinstance(error, KeyboardInterrupt):
            raise
        said = " ".join(str(error).split())
        raise InputError(
            f"{file} must be a tokenizer of the tokenizers library, got: {said:.200}. Convert or download the folder "
            "again."
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none."""
    try:
        value = load_json(file) if file.is_file() else {}
    except ValueError as error:
        raise InputError(
            f"{file} must be JSON, got another text ({error}). Convert or download the folder again."
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"{file} must be a JSON object, got another value. Convert or download the folder again.")
    return value


def _special_tokens(settings: dict[str, Any], folder: Path) -> dict[str, str]:
    """The named special tokens; those of an older folder stand in a file of their own."""
    fields = (
        settings if "added_tokens_decoder" in settings else settings | read_json(folder / "special_tokens_map.json")
    )
    extra = fields.get("extra_special_tokens")
    named = {name: value for name, value in fields.items() if name in _NAMED or name.endswith("_token")} | (
        extra if isinstance(extra, dict) else {}
    )
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def find_template(path: str | Path) -> str | None:
    """The chat template beside a model: of its own file, or of tokenizer_config.json, there perhaps under the name
    default of a list. None without one.

    Raises InputError where there is no model, and for a damaged file.
    """
    folder = model_file(path).parent
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return read_bytes(file, LARGEST_TEMPLATE).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except ValueError as error:  # bytes of another encoding, too
            raise InputError(
                f"{file} must be a template in UTF-8, got another file ({error}). Convert or download the folder again."
            ) from None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
