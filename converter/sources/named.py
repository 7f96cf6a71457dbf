"""From what a person names to an opened model: a row of SOURCES turns it into a model folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ...runtime_onnx.untrusted import read_json
from ..bundled import BUNDLED, BUNDLED_MODEL, BUNDLED_NAME
from ..checkpoint.source import Source, asks_for_code, open_source
from .hub import download, is_hub_id
from .powerinfer import import_powerinfer, is_powerinfer
from .published import is_published, normalise

_log = logging.getLogger("sparsegate")


@dataclass(frozen=True)
class Fetched:
    """A model folder, the Hub repository and commit that it is of, when it is of one, and what the model is called
    where the folder's name does not say it.
    """

    folder: Path
    id: str | None = None
    revision: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class SourceKind:
    """A kind of source: whether what a person named is one, and the function that turns it into a model folder. Its
    second argument is the folder to write, a stage: what is whole there already is not made again. Raises InputError.
    """

    is_named: Callable[[str], bool]
    fetch: Callable[[str, Path], Fetched]


def _from_hub(model: str, folder: Path) -> Fetched:
    fetched = download(model, folder)
    return Fetched(fetched.folder, fetched.id, fetched.revision)


SOURCES = {
    "bundled": SourceKind(lambda model: model == BUNDLED_MODEL, lambda _, __: Fetched(BUNDLED, label=BUNDLED_NAME)),
    "hub": SourceKind(is_hub_id, _from_hub),
    "powerinfer": SourceKind(
        is_powerinfer, lambda model, folder: Fetched(import_powerinfer(model, folder), label=Path(model).stem)
    ),
    "folder": SourceKind(lambda _: True, lambda model, _: Fetched(Path(model))),
}
"""The first row that knows what was named takes it; a folder is what no other one knows."""


def resolve(model: str, folder: Path) -> Source:
    """Open what a row of SOURCES knows; what has to be fetched or written goes into `folder`, and published models with
    another activation are brought into sparsegate's form beside it. Raises InputError for what cannot be opened.
    """
    row = next(row for row in SOURCES.values() if row.is_named(model))
    fetched = row.fetch(model, folder)
    source = open_source(_normal(fetched.folder, folder), fetched.id, fetched.revision)
    moved = source.folder != fetched.folder.resolve()
    return replace(source, label=fetched.label or (fetched.folder.absolute().name if moved else None))


def _normal(model: Path, folder: Path) -> Path:
    """The folder `model`, or one beside `folder` in sparsegate's form where it is of a published type."""
    config = model / "config.json"
    for name in asks_for_code(model):
        _log.warning(
            "%s of %s names code of the model's own (auto_map): it is not run, and left out of what is written.",
            name,
            model.name,
        )
    if not config.is_file() or not is_published(read_json(config, "config.json")):
        return model
    return normalise(model, folder.with_name(f"{folder.name}-normal"))
