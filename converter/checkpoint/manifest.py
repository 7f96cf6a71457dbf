"""manifest.json: what a finished checkpoint is made of and from; written last, so a folder without one is
not finished.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import check_name, inside, read_json
from .fields import LARGEST_LOSS
from .stage import VERSION, hash_file, write_json

MANIFEST = "manifest.json"
LINK_FILES = ("sparsegate_link.json", "libsparsegate_onnx.so")
"""Files that `link` adds; they and the genai_config.json it edits are exempt from the check."""
_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
)


_ROUNDING = 1e-3  # nats: a divergence of 0 may come out below it
_LARGEST = 1e9
MEASURED: dict[str, tuple[float, float]] = {
    "nll_dense": (0, _LARGEST),
    "nll": (0, _LARGEST),
    "kl": (-_ROUNDING, _LARGEST),
    "agreement": (0, 1),
    "density": (0, 1),
    "cost": (0, _LARGEST),
    "nll_error": (0, _LARGEST),
    "windows": (1, _LARGEST),
    "kl_long": (-_ROUNDING, _LARGEST),
    "long_windows": (1, _LARGEST),
    "long_length": (2, _LARGEST),
    "onnx_nll": (0, _LARGEST),
    "onnx_kl": (-_ROUNDING, _LARGEST),
    "onnx_agreement": (0, 1),
}
"""What may have been measured, least and most of each."""
_BUDGET = {"max_ppl_increase": LARGEST_LOSS, "max_kl": LARGEST_LOSS, "max_kl_long": LARGEST_LOSS, "sparsity": 1.0}


class File(BaseModel):
    """A file's sha256 (hex) and size in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(BaseModel):
    """The record of a conversion: `fingerprint` covers source, recipe and calibration; equal fingerprints mean the same
    conversion. `updated`: weights were trained together with what selects. `rotated`: they are those of the model after
    a rotation of its residual stream.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    version: Literal[1] = 1
    tool: str = VERSION
    fingerprint: str
    source: dict[str, str | None]
    calibration: dict[str, Any]
    recipe: dict[str, Any]
    seed: int
    budget: dict[str, bool | float | None]
    measured: dict[str, float]
    onnx: dict[str, Any] = {}
    updated: bool = False
    rotated: bool = False
    versions: dict[str, str]
    files: dict[str, File]

    @field_validator("measured")
    @classmethod
    def _check_measured(cls, values: dict[str, float]) -> dict[str, float]:
        for name, value in values.items():
            if name not in MEASURED:
                raise ValueError(f"{name} is none of {', '.join(MEASURED)}")
            least, most = MEASURED[name]
            if not least <= value <= most:
                raise ValueError(f"{name} must be from {least:g} to {most:g}, got {value}")
        return values

    @field_validator("budget")
    @classmethod
    def _check_budget(cls, values: dict[str, bool | float | None]) -> dict[str, bool | float | None]:
        for name, value in values.items():
            if name == "searched":
                fits = isinstance(value, bool)
            elif name in _BUDGET:
                fits = value is None or (not isinstance(value, bool) and 0 <= value <= _BUDGET[name])
            else:
                raise ValueError(f"{name} is none of searched, {', '.join(_BUDGET)}")
            if not fits:
                raise ValueError(
                    f"{name} must be {'true or false' if name == 'searched' else f'from 0 to {_BUDGET[name]:g}'}, got "
                    f"{value!r}"
                )
        return values


def installed_versions() -> dict[str, str]:
    """Versions of the packages that shape a result, as far as they are installed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def list_files(folder: Path) -> dict[str, File]:
    """Every file below a checkpoint folder with size and hash, apart from the manifest and what `link` added."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    kept = [
        name
        for name in names
        if name != MANIFEST and Path(name).name not in LINK_FILES and not name.startswith(".cache/")
    ]
    return {name: File(sha256=hash_file(folder / name), size=(folder / name).stat().st_size) for name in kept}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a finished folder."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises InputError when it is missing, of another version, or lists files outside
    the folder.
    """
    raw = read_json(folder / MANIFEST, "manifest.json of the checkpoint")
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"manifest.json must follow version 1, got {where}: {first['msg']}. Update sparsegate or convert again."
        ) from None
    for name in manifest.files:
        check_name(name, MANIFEST)
    return manifest


def check_links(folder: Path) -> None:
    """Raise InputError for a link in a checkpoint folder: what is written there or pushed from there must not lie, or
    end, in another place.
    """
    link = next((path for path in sorted(folder.rglob("*")) if path.is_symlink()), None)
    if link is not None:
        raise InputError(
            f"{folder} must hold regular files and folders alone, got {link.relative_to(folder)}, a link. Put what it "
            "leads to in its place."
        )


def check_files(folder: Path, manifest: Manifest, hashed: int | None = None) -> list[str]:
    """What is wrong with a folder's files by its manifest, one line a file; empty when all is as written. The model
    card may be edited by hand.

    Of files above `hashed` bytes (None: none) sizes alone are compared.
    """
    linked = any((folder / "onnx" / name).is_file() for name in LINK_FILES)
    wrong = []
    for name, file in manifest.files.items():
        try:
            path = inside(folder, name, MANIFEST)
        except InputError:
            wrong.append(f"{name} is a link to another place")
            continue
        if linked and path.name == "genai_config.json":
            continue
        if name == "README.md" and path.is_file():
            continue
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != file.size or (
            (hashed is None or file.size <= hashed) and hash_file(path) != file.sha256
        ):
            wrong.append(f"{name} has other bytes than the manifest says")
    return wrong
