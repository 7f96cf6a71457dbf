"""Damage to the files and flags that sparsegate reads, seeded, by kind of file. `keeps`: whoever accepts the damaged
file must read what it said before.

Another number or text of the same kind, and a missing or null field, may mean another model; those only have to be
caught by the manifest's hashes.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Mutation(NamedTuple):
    """What was done, whether the meaning may not change, and the new bytes; or `place`, which puts something else than
    a file there.
    """

    what: str
    keeps: bool
    data: bytes = b""
    place: Callable[[Path], object] | None = None


_MARK = '"@@fuzz@@"'
LITERALS = {
    "a deep list": "[" * 100_000 + "]" * 100_000,
    "5000 digits": "9" * 5000,
    "1e400": "1e400",
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "half a pair": '"\\ud800"',
    "2^63": str(1 << 63),
    "2^31": str(1 << 31),
    "1e7": "10000000",
    "-1": "-1",
    "0": "0",
    "1": "1",
    "17": "17",
    "0.5": "0.5",
    "[]": "[]",
    "{}": "{}",
    '""': '""',
    '"x"': '"x"',
    "true": "true",
    "null": "null",
    "a long text": '"' + "x" * 100_000 + '"',
    '"1"': '"1"',
    "a mix": '[1, {"a": null}, "b"]',
    "a path": '"../../../etc/passwd"',
    "a zero byte": '"a\\u0000b"',
}
TEXTS = {
    "empty": lambda data, drawn: b"",
    "cut": lambda data, drawn: data[: drawn.randrange(len(data))],
    "blanks": lambda data, drawn: b" \n" * 100,
    "a byte order mark": lambda data, drawn: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data, drawn: data.decode("utf-8", "replace").encode("utf-16"),
    "other bytes": lambda data, drawn: _insert(data, drawn, b"\xff\xfe\x80"),
    "a zero": lambda data, drawn: _insert(data, drawn, b"\0"),
    "more": lambda data, drawn: data + b"}]x",
    "a list": lambda data, drawn: b"[]",
    "a number": lambda data, drawn: b"1",
    "null": lambda data, drawn: b"null",
    "deep": lambda data, drawn: b"[" * 200_000,
}


def _insert(data: bytes, drawn: random.Random, more: bytes) -> bytes:
    at = drawn.randrange(len(data) + 1)
    return data[:at] + more + data[at:]


def _folder(path: Path) -> None:
    path.mkdir()


PLACES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": _folder,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
    "three terabytes of zeros": lambda path: _sparse(path),
}


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(3 << 40)


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside; of long lists and objects the first few."""
    for key in (
        list(value)[:40] if isinstance(value, dict) else range(min(len(value), 8)) if isinstance(value, list) else []
    ):
        found.append((value, key))
        _places(value[key], found)
    return found


def _kind(value: Any) -> str:
    return "bool" if isinstance(value, bool) else "number" if isinstance(value, int | float) else type(value).__name__


def mutate_json(data: bytes, drawn: random.Random) -> Mutation:
    """One value of another kind or size, a key too few, too many or twice, or another text altogether."""
    if drawn.random() < 0.15:
        name = drawn.choice(sorted(TEXTS))
        return Mutation(f"JSON: {name}", True, TEXTS[name](data, drawn))
    value = json.loads(data)
    container, key = drawn.choice(_places(value, []))
    old, name = container[key], drawn.choice(sorted(LITERALS))
    way = drawn.random()
    if way < 0.1:
        del container[key]
        return Mutation(f"JSON: without {key!r:.40}", False, json.dumps(value).encode())
    if way < 0.2 and isinstance(container, dict):
        container["@@fuzz@@"] = 0
        text = json.dumps(value).replace(f"{_MARK}: 0", f"{json.dumps(key)}: {LITERALS[name]}")
        return Mutation(f"JSON: {key!r:.40} twice, with {name}", True, text.encode())
    if way < 0.25 and isinstance(container, dict):
        container["fuzz"] = "@@fuzz@@"
        return Mutation(f"JSON: a new key with {name}", True, json.dumps(value).replace(_MARK, LITERALS[name]).encode())
    container[key] = "@@fuzz@@"
    keeps = (
        old is not None
        and name != "null"
        and (name in ("5000 digits", "NaN", "-Infinity", "1e400") or _kind(json.loads(_small(name))) != _kind(old))
    )
    return Mutation(f"JSON: {key!r:.40} is {name}", keeps, json.dumps(value).replace(_MARK, LITERALS[name], 1).encode())


def _small(name: str) -> str:
    return "[]" if name == "a deep list" else LITERALS[name]


def mutate_bytes(data: bytes, drawn: random.Random) -> Mutation:
    """Bits turned, bytes put in, taken out or zeroed, the end cut off or more put behind it."""
    way, changed = (
        drawn.choice(["flip", "flips", "cut", "more", "zeros", "insert", "remove", "ones", "empty"]),
        bytearray(data),
    )
    at = min(int(drawn.random() ** 3 * len(data)), len(data) - 1)  # most of what has a meaning stands at the beginning
    count = drawn.choice([1, 4, 8, 64])
    if way in ("flip", "flips"):
        for place in [at] if way == "flip" else [drawn.randrange(len(data)) for _ in range(20)]:
            changed[place] ^= 1 << drawn.randrange(8)
    elif way == "cut":
        del changed[drawn.randrange(len(data)) :]
    elif way == "more":
        changed += drawn.randbytes(count)
    elif way in ("zeros", "ones"):
        changed[at : at + count] = bytes([0 if way == "zeros" else 255]) * len(changed[at : at + count])
    elif way == "insert":
        changed[at:at] = drawn.randbytes(count)
    elif way == "remove":
        del changed[at : at + count]
    else:
        changed.clear()
    return Mutation(f"bytes: {way} at {at}", False, bytes(changed))


def mutate_safetensors(data: bytes, drawn: random.Random) -> Mutation:
    """The header's entries, its text or its length, or the bytes behind it."""
    size = int.from_bytes(data[:8], "little")
    if drawn.random() < 0.2:
        return mutate_bytes(data, drawn)
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = sorted(name for name in header if name != "__metadata__")
    name, way = (
        drawn.choice(names),
        drawn.choice(
            ["dtype", "shape", "remove", "rename", "offsets", "length", "text", "swap", "cut", "more", "extra", "nan"]
        ),
    )
    if way == "length":
        return Mutation(
            "safetensors: header length",
            True,
            drawn.choice([0, 1, size - 1, size + 1, 1 << 31, (1 << 63) - 1]).to_bytes(8, "little") + data[8:],
        )
    if way in ("cut", "more"):
        return Mutation(
            f"safetensors: {way}",
            True,
            data[: -drawn.randrange(1, len(body))] if way == "cut" else data + b"\0" * drawn.randrange(1, 100),
        )
    if way == "text":
        mutation = mutate_json(data[8 : 8 + size], drawn)
        return Mutation(
            f"safetensors: {mutation.what}",
            mutation.keeps,
            len(mutation.data).to_bytes(8, "little") + mutation.data + body,
        )
    entry = header[name]
    if way == "nan":
        first, last = entry["data_offsets"]
        body = body[:first] + b"\0\0\xc0\x7f" * ((last - first) // 4) + body[last:]
    elif way == "dtype":
        entry["dtype"] = drawn.choice(["I32", "U32", "F16", "I64", "BOOL", "F8_E4M3", "F64", "X", 5, None])
    elif way == "shape":
        entry["shape"] = drawn.choice(
            [[], [0], entry["shape"][::-1], [*entry["shape"], 1], [-1], [1 << 62, 4], [1], "x", [0.5], [True]]
        )
    elif way == "remove":
        header, body = _without(header, body, name)
    elif way == "rename":
        header[drawn.choice(["x", name + ".", "module." + name, "", "\0", name.upper()])] = header.pop(name)
    elif way == "extra":
        header["extra.weight"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(body), len(body) + 8]}
        body += bytes(8)
    elif way == "offsets":
        entry["data_offsets"] = drawn.choice([[0, 0], [0, 1 << 62], entry["data_offsets"][::-1], [-1, 4], [], "x"])
    else:
        other = drawn.choice(names)
        header[name], header[other] = header[other], header[name]
    text = json.dumps(header).encode()
    keeps = way not in ("nan", "swap") and not (way == "shape" and not entry["shape"])
    return Mutation(f"safetensors: {way} of {name}", keeps, len(text).to_bytes(8, "little") + text + body)


def _without(header: dict[str, Any], body: bytes, name: str) -> tuple[dict[str, Any], bytes]:
    first, last = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= last:
            entry["data_offsets"] = [place - (last - first) for place in entry["data_offsets"]]
    return header, body[:first] + body[last:]


YAML = (
    "!!int x",
    "!!timestamp x",
    "!!binary x",
    "!!python/object:os.system {}",
    "!!float x",
    "&a [*a]",
    '"\\ud800"',
    "9" * 5000,
    "0x" + "f" * 10_000,
    ".nan",
    ".inf",
    "-1",
    "0",
    "9223372036854775808",
    "[]",
    "{}",
    "''",
    "x",
    "true",
    "null",
    "{a: {b: c}}",
    "[[[[1]]]]",
    "? x",
    "*b",
    "0.5",
    "1e9",
    "2026-01-01",
    "!!set {a}",
    "'../../x'",
    "[" * 2000,
    "16",
    "[1, 2]",
)


def mutate_yaml(data: bytes, drawn: random.Random) -> Mutation:
    """A value of a YAML file replaced by a hostile one, or its text damaged."""
    if drawn.random() < 0.25:
        name = drawn.choice(sorted(TEXTS))
        return Mutation(f"YAML: {name}", False, TEXTS[name](data, drawn))
    lines = data.decode().splitlines()
    at, value = drawn.randrange(len(lines)), drawn.choice(YAML)
    head, colon, _ = lines[at].partition(":")
    lines[at] = f"{head}{colon} {value}"
    if drawn.random() < 0.1:
        lines.insert(at, f"{head}x: {value}")
    return Mutation(f"YAML: {lines[at]:.60}", False, "\n".join(lines).encode("utf-8", "surrogatepass"))


def mutate_text(data: bytes, drawn: random.Random) -> Mutation:
    """A text for calibration that is none, of another encoding, too short, or of one character."""
    more: dict[str, bytes] = {
        "one letter": b"x" * 50_000,
        "short": data[:50],
        "CRLF": data.replace(b"\n", b"\r\n"),
        "controls": bytes(range(32)) * 500,
        "emoji": "😀".encode() * 5000,
        "private": "\ue000\U0010ffff".encode() * 5000,
        "half a pair": b"\xed\xa0\x80" * 1000 + data,
        "random": drawn.randbytes(20_000),
    }
    names = [*more, *TEXTS]
    name = drawn.choice(names)
    return Mutation(f"text: {name}", False, more[name] if name in more else TEXTS[name](data, drawn))


VALUES = (
    "",
    "-1",
    "0",
    "1",
    "0.5",
    "nan",
    "inf",
    "1e400",
    "-0",
    str(1 << 31),
    str(1 << 63),
    str(1 << 64),
    "9" * 5000,
    "x",
    "x" * 5000,
    "\udcff",
    "é",
    "../../x",
    "/dev/zero",
    "/dev/null",
    "/",
    ".",
    "~",
    "1%",
    "%",
    "self",
    "auto",
    "gate+gate",
    "+",
    "fp16",
    "cuda",
    "[]",
    "{}",
    "1h",
    "-1h",
    "1e9h",
    "9" * 400 + "h",
    "a b",
    "a/b",
    "\n",
    "--",
    "1,2",
    "True",
)
VERB_FLAGS = {
    "convert": (
        "--method",
        "--sparsity",
        "--max-ppl-increase",
        "--max-kl",
        "--recipe",
        "--calibration",
        "--precision",
        "--target",
        "--seed",
        "--time-budget",
        "--device",
        "-o",
    ),
    "generate": ("--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed"),
    "tune": ("--recipe", "--data", "--steps", "--density", "--lora", "--seed", "--device"),
    "inspect": (),
    "verify": ("--source", "--calibration"),
    "report": (),
    "link": (),
    "unlink": (),
    "eval": ("--windows", "--text"),
    "export": ("--format", "--precision", "--vram-budget", "--calibration", "-o"),
    "bench": (
        "--pairs",
        "--threads",
        "--prompt-tokens",
        "--new-tokens",
        "--runtime",
        "--shape",
        "--op",
        "--density",
        "--layers",
    ),
}


def draw_flags(drawn: random.Random) -> list[str]:
    """A verb with its folder, MODEL, OUT or a hostile word, and one or two flags with hostile values."""
    verb = drawn.choice(sorted(VERB_FLAGS))
    good = {"convert": "MODEL", "inspect": "MODEL", "tune": "MODEL"}.get(verb, "OUT")
    words = [verb, good if drawn.random() < 0.8 else drawn.choice(VALUES)]
    if verb == "generate":
        words += ["x" if drawn.random() < 0.7 else drawn.choice(VALUES), "--raw"]
    for flag in drawn.sample(VERB_FLAGS[verb], min(len(VERB_FLAGS[verb]), drawn.choice([1, 1, 2]))):
        words.append(f"{flag}={drawn.choice(VALUES)}" if flag.startswith("--") else f"-o{drawn.choice(VALUES)}")
    return words
