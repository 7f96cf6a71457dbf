"""Which files a manifest must list: what a checkpoint of its kind has, and whatever else a reader would open."""

from __future__ import annotations

from pathlib import Path

from ...runtime_onnx.untrusted import read_json
from .manifest import LINK_FILES, Manifest
from .source import GENERATION_CONFIG, INDEX, SINGLE, TOKENIZER_FILES
from .sparsity import KEY, TENSORS, read_key

SMALL = 1 << 24
"""Bytes of a file whose hash takes no time: everything but weights."""
_ALWAYS = ("config.json", "README.md", "onnx/model.onnx", "onnx/genai_config.json", "report/report.json")
_READ = {"config.json", INDEX, GENERATION_CONFIG, *TOKENIZER_FILES}


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Files that the manifest of a checkpoint must list and does not, one line each. Raises InputError for a
    config.json that is no checkpoint's.
    """
    return [f"{name} is not listed" for name in sorted({*_needed(folder), *_present(folder)} - set(manifest.files))]


def _needed(folder: Path) -> set[str]:
    key = read_key(read_json(folder / "config.json", "config.json").get(KEY))
    files: set[str] = set(_ALWAYS)
    if key.planned():
        files.add(TENSORS.as_posix())
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return files | {SINGLE}
    shards = read_json(folder / INDEX, INDEX).get("weight_map")
    return files | {INDEX, *(str(file) for file in (shards.values() if isinstance(shards, dict) else ()))}


def _present(folder: Path) -> set[str]:
    """Files in the places where readers look; others may lie in a checkpoint as they like."""
    files = {
        path.name
        for path in folder.iterdir()
        if path.is_file() and (path.name in _READ or path.suffix == ".safetensors")
    }
    for part, pattern in (("sparsity", "*"), ("onnx", "*"), ("report", "*.json")):
        files |= {
            path.relative_to(folder).as_posix()
            for path in (folder / part).rglob(pattern)
            if path.is_file() and path.name not in LINK_FILES
        }
    return files
