"""Whether onnxruntime-genai's own tokenizer reads an ONNX folder's tokenizer.json as the tokenizers library does.

genai has an implementation of its own, which knows some tokenizers otherwise or not at all. It runs in a process of its
own here, on a configuration of known fields: what it does with files it does not expect is not known.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...runtime_onnx.genai_config import make_view, read_config

TEXTS = (
    "Once upon a time, there was a model.",
    "The capital of France is",
    " a leading space",
    "two  spaces,   three",
    "a trailing space ",
    "Caf\u00e9, na\u00efve, \u00c5ngstr\u00f6m",
    "Cafe\u0301, nai\u0308ve, A\u030angstro\u0308m",
    "UPPER lower MiXeD \u0130stanbul stra\u00dfe",
    "0 7 42 1234567890 3.14159 1,000,000",
    "don't we'll I'VE it's",
    "a\tb\n\nc\r\nd\n",
    "   \n\n\n  ",
    "def add(first, second):\n    return first + second\n",
    "for (int i = 0; i < n; ++i) { x[i] += 1; } // done",
    '{"key": [1, 2.5, null], "other": "\\u00e9"}',
    "https://example.org/a?b=c&d=%20#e",
    "<b>bold</b> &amp; <br/>",
    "東京は日本の首都です。",
    "你好，世界！",
    "한국어 문장",
    "Привет, мир",
    "مرحبا بالعالم",
    "नमस्ते",
    "\U0001f600 \U0001f469\u200d\U0001f4bb \U0001f1eb\U0001f1f7",
    "\ufb01 \uff21\uff22\uff23 \u2460 \u00bd",
    "x\u00a0y\u2003z\u200bw",
    "\u201cquoted\u201d \u2014 and \u2026",
    "_______ ------ ======",
)
"""Accents composed and decomposed, case, digits, white space, code, other scripts, emoji, compatibility forms."""
SECONDS = 60

# Read by `python -c`: genai alone is imported there. Texts come as JSON, ids and texts go back, or the reason why there
# are none.
_PROGRAM = """
import json, sys
import onnxruntime_genai as og
given = json.load(sys.stdin)
found = {"texts": []}
try:
    tokenizer = og.Tokenizer(og.Config(given["folder"]))
    tokenizer.update_options(add_special_tokens="true")
except Exception as error:
    found["error"] = str(error)
else:
    for text, ids in given["texts"]:
        row = []
        for function, value in ((lambda t: [int(i) for i in tokenizer.encode(t)], text), (tokenizer.decode, ids)):
            try:
                row.append(function(value))
            except Exception as error:
                row.append(None)
        found["texts"].append(row)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class TokenizerCheck:
    """How many of `texts` probe texts genai's tokenizer gives the same ids for, and decodes the ids of to the same
    text, as the tokenizers library does.

    `error` says why it was not compared, where it was not.
    """

    texts: int
    ids: int
    decoded: int
    error: str = ""

    @property
    def agrees(self) -> bool:
        """Whether genai's tokenizer may be used."""
        return not self.error and self.ids == self.decoded == self.texts

    @property
    def note(self) -> str:
        """One line for people."""
        if self.error:
            return (
                f"genai's own tokenizer cannot be used ({self.error}): use sparsegate generate or the tokenizers "
                "library"
            )
        if self.agrees:
            return (
                f"genai's own tokenizer may be used: it reads all {self.texts} probe texts as the tokenizers "
                "library does"
            )
        wrong = [
            f"{what} {self.texts - right} of {self.texts}"
            for what, right in (("reads", self.ids), ("decodes", self.decoded))
            if right < self.texts
        ]
        return (
            f"genai's own tokenizer {' and '.join(wrong)} probe texts otherwise: use sparsegate generate or the "
            "tokenizers library"
        )


def check_tokenizer(folder: Path) -> TokenizerCheck:
    """Compare genai's tokenizer on TEXTS, and on one text around each of a few added tokens, with the tokenizers
    library's, both with special tokens added.

    It never raises for what genai does: a tokenizer that cannot be opened, or ends the process, is the result.
    """
    if not (folder / "tokenizer.json").is_file():
        return TokenizerCheck(0, 0, 0, "there is no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library has no class of its own
        return TokenizerCheck(0, 0, 0, _line(error))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = [*TEXTS, *_added_texts(tokenizer)]
    expected = [tokenizer.encode(text).ids for text in texts]
    try:
        view = make_view(folder, read_config(folder))
    except ValueError as error:
        return TokenizerCheck(len(texts), 0, 0, _line(error))
    with view as place:
        request = json.dumps({"folder": place, "texts": list(zip(texts, expected, strict=True))})
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _PROGRAM], input=request, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return TokenizerCheck(len(texts), 0, 0, f"it takes more than {SECONDS} seconds")
    answer = _answer(done)
    if "error" in answer:
        return TokenizerCheck(len(texts), 0, 0, answer["error"])
    rows = answer["texts"]
    same = sum(row[0] == ids for row, ids in zip(rows, expected, strict=True))
    decoded = sum(row[1] == tokenizer.decode(ids) for row, ids in zip(rows, expected, strict=True))
    return TokenizerCheck(len(texts), same, decoded)


def _added_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts around the first added tokens of each kind: inside a word and between words."""
    added = [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    chosen = [token for special in (True, False) for token in [t for t in added if t.special == special][:4]]
    return [f"some{token.content}thing {token.content} else" for token in chosen]


def _answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return {"error": f"its process ended: {last:.200}"}
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": "its process gave no answer"}
    return {"error": _line(answer["error"])} if "error" in answer else answer


def _line(error: object) -> str:
    return f"{' '.join(str(error).split()):.200}"
