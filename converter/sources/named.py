"""From what a person names to an opened model: the bundled one, a folder, a published folder of another tool, or a Hub
id.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from ...runtime_onnx.untrusted import read_json
from ..bundled import BUNDLED, BUNDLED_MODEL, BUNDLED_NAME
from ..checkpoint.source import Source, asks_for_code, open_source
from .hub import download, is_hub_id
from .published import is_published, normalise

_log = logging.getLogger("sparsegate")


def resolve(model: str, folder: Path) -> Source:
    """Open a folder, the bundled model, or a Hub id, which is fetched into `folder`; published models with another
    activation are brought into sparsegate's form beside it. Raises InputError for what cannot be opened.
    """
    if model == BUNDLED_MODEL:
        return replace(open_source(BUNDLED), label=BUNDLED_NAME)
    if is_hub_id(model):
        fetched = download(model, folder)
        return open_source(_normal(fetched.folder, folder), fetched.id, fetched.revision)
    given = Path(model)
    found = open_source(_normal(given, folder))
    return replace(found, label=given.absolute().name) if found.folder != given.resolve() else found


def _normal(given: Path, folder: Path) -> Path:
    config = given / "config.json"
    for name in asks_for_code(given):
        _log.warning(
            "%s of %s names code of the model's own (auto_map): it is not run, and left out of what is written.",
            name,
            given.name,
        )
    if not config.is_file() or not is_published(read_json(config, "config.json")):
        return given
    return normalise(given, folder.with_name(f"{folder.name}-normal"))
