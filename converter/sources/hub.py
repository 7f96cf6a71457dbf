"""The Hugging Face Hub side: what a repository holds, and downloads into real folders.

Every failure a person can mend is an InputError of one line. Weights are read as safetensors only; neither pickle files
nor code nor libraries are ever fetched or pushed, and every name that a repository or a record tells passes `inside`
before anything is written or removed by it.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download
from huggingface_hub.utils import validate_repo_id
from pydantic import BaseModel, ConfigDict

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.genai_config import check_config
from ...runtime_onnx.untrusted import check_data, check_name, inside, is_data, load_json, read_json
from ..checkpoint.listing import SMALL
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.stage import disk_full, is_disk_full, known_hash, size, write_json
from ..progress import job
from .hub_errors import Unreachable, explained

TIMEOUT = 10.0  # seconds until a silent Hub counts as unreachable; later requests have the Hub client's own limits
_RECORD = Path(".cache") / "sparsegate.json"  # beside huggingface_hub's own notes on a local folder
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_TEXTS = re.compile(r"(licen[cs]e|notice|copying|use_policy|readme\.md)", re.IGNORECASE)

logger = logging.getLogger("sparsegate")


class _Record(BaseModel):
    """What a finished download left in its folder: sizes and sha256 of the files. Earlier versions noted no hashes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    requested: str | None
    revision: str
    files: dict[str, int]
    hashes: dict[str, str] = {}


@dataclass(frozen=True)
class _Listed:
    """A file as a repository lists it: bytes, and the sha256 of one that is kept in large-file storage, else git's
    sha1; None where it tells neither.
    """

    size: int
    sha256: str | None
    git: str | None

    def fits(self, path: Path) -> bool:
        """Whether the file at `path` has these bytes."""
        if not _has_size(path, self.size):
            return False
        if self.sha256 is not None:
            return known_hash(path) == self.sha256
        return self.git is None or _git_hash(path) == self.git


@dataclass(frozen=True)
class Download:
    """A repository's model files in a real folder (no links): where, of which repository, at which commit."""

    folder: Path
    id: str
    revision: str


@dataclass(frozen=True)
class Remote:
    """What a repository tells before any download.

    `tensors` maps names to (shape, safetensors dtype such as "BF16"); `total_bytes` is the size of the tensors,
    `download_bytes` that of all files that `download` fetches.
    """

    id: str
    revision: str
    config: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    total_bytes: int
    download_bytes: int


@dataclass(frozen=True)
class PushTarget:
    """A repository that the token may write: its full id, and whether it exists and is private (None when it does not
    exist).
    """

    id: str
    exists: bool
    private: bool | None


def is_hub_id(model: str) -> bool:
    """Whether `model` names a Hub repository (`owner/name` or `name`) and no local file or folder."""
    if not model or model.endswith("/") or model.startswith((".", "/", "~")) or Path(model).exists():
        return False
    try:
        validate_repo_id(model)
    except errors.HFValidationError:
        return False
    return True


def check_disk(path: Path, bytes_needed: int) -> None:
    """Raise InputError unless the file system that will hold `path` has `bytes_needed` bytes free."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        needed, left = (
            (size(bytes_needed), size(free))
            if size(bytes_needed) != size(free)
            else (f"{bytes_needed} bytes", f"{free} bytes")
        )
        raise InputError(
            f"Free disk space at {place} must be at least {needed}, got {left}. Free some space or choose another "
            "folder."
        )


def remote_inspect(
    repo_id: str, revision: str | None = None, token: str | None = None, endpoint: str | None = None
) -> Remote:
    """Read config.json and the safetensors headers of a repository: a few kilobytes, whatever the model's size.

    Raises InputError when the repository is missing, gated, unreachable or holds no safetensors model.
    """
    api = HfApi(endpoint=endpoint, token=token)
    with explained(repo_id, api.endpoint):
        commit, listing = commit_and_files(api, repo_id, revision)
        names = _select(repo_id, list(listing))
        config = remote_json(api, repo_id, "config.json", commit)
        weights = [name for name in names if name.endswith(".safetensors")]
        with ThreadPoolExecutor(8) as pool:
            headers = list(
                pool.map(lambda name: api.parse_safetensors_file_metadata(repo_id, name, revision=commit), weights)
            )
    infos = {name: info for header in headers for name, info in header.tensors.items()}
    if len(infos) < sum(len(header.tensors) for header in headers):
        raise InputError(
            f"The safetensors files of {repo_id} must hold every tensor once, got one in two files. Choose another "
            "repository or revision."
        )
    tensors = {name: (tuple(info.shape), str(info.dtype)) for name, info in sorted(infos.items())}
    total = sum(info.data_offsets[1] - info.data_offsets[0] for info in infos.values())
    return Remote(repo_id, commit, config, tensors, total, sum(listing[name].size for name in names))


def head_commit(repo_id: str, token: str | None = None, endpoint: str | None = None) -> str:
    """The sha of a repository's newest commit. Raises InputError as `remote_inspect` does."""
    api = HfApi(endpoint=endpoint, token=token)
    with explained(repo_id, api.endpoint):
        return str(api.model_info(repo_id, timeout=TIMEOUT).sha)


def download(
    repo_id: str, folder: Path, revision: str | None = None, token: str | None = None, endpoint: str | None = None
) -> Download:
    """Fetch the model files of a repository into `folder` as real files, since ONNX Runtime refuses the links of the
    Hub's cache.

    Fetched are the root's safetensors weights, configuration, tokenizer, README and licence. Free disk space is checked
    before the first byte, an interrupted download goes on where it stopped, and a finished one also serves without a
    network. Raises InputError as `remote_inspect` does, or when the disk is full.
    """
    return _fetch(
        HfApi(endpoint=endpoint, token=token),
        repo_id,
        Path(folder),
        revision,
        lambda _, names: _select(repo_id, names),
        None,
    )


def fetch_checkpoint(
    repo_id: str,
    folder: Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Download:
    """Fetch a whole sparse checkpoint, onnx/ included: the files that its manifest lists, and the manifest.

    `folder` is by default that of `home_folder`. Works and fails as `download`; a repository without a manifest is
    refused.
    """
    api = HfApi(endpoint=endpoint, token=token)

    def listed(commit: str, names: list[str]) -> list[str]:
        if MANIFEST not in names:
            raise InputError(
                f"{repo_id} must hold a finished sparse checkpoint, got no {MANIFEST}. Convert it with `sparsegate "
                f"convert {repo_id}`."
            )
        files = remote_json(api, repo_id, MANIFEST, commit).get("files")
        check_data(files if isinstance(files, dict) else (), f"{MANIFEST} of {repo_id}")
        return [*sorted(set(names) & set(files if isinstance(files, dict) else ())), MANIFEST]

    return _fetch(api, repo_id, Path(folder) if folder else home_folder("sparse", repo_id), revision, listed, SMALL)


def home_folder(kind: str, repo_id: str) -> Path:
    """Where downloads without a folder of their own go: sparsegate/KIND/OWNER--NAME in Hugging Face's home folder."""
    return Path(constants.HF_HOME) / "sparsegate" / kind / repo_id.replace("/", "--")


def local_folder(model: str | Path) -> Path:
    """The folder that a folder's name or the Hub id of a sparse checkpoint means; a repository is fetched first, onnx/
    included.

    Raises InputError, before anything else is done, where its genai_config.json has what onnxruntime-genai must not be
    given.
    """
    name = str(model)
    folder = fetch_checkpoint(name).folder if is_hub_id(name) else Path(name)
    check_genai(folder)
    return folder


def check_genai(folder: Path) -> None:
    """Raise InputError for a genai_config.json in a checkpoint that says what is not known."""
    config = folder / "onnx" / "genai_config.json"
    if config.is_file():
        check_config(read_json(config, config.name), config)


@job()
def _fetch(
    api: HfApi,
    repo_id: str,
    folder: Path,
    revision: str | None,
    choose: Callable[[str, list[str]], list[str]],
    hashed: int | None,
) -> Download:
    """Bring the files that `choose` takes from (commit, names) into `folder`, and those of an earlier commit that are
    not among them away.

    A copy that is there already is used when its sizes and hashes are those of its download, hashes of files above
    `hashed` bytes left out (None: of none).
    """
    record = _finished(folder, repo_id, hashed)
    if record and revision == record.revision:
        return Download(folder, repo_id, record.revision)
    try:
        with explained(repo_id, api.endpoint):
            commit, listing = commit_and_files(api, repo_id, revision)
            names = choose(commit, list(listing))
    except Unreachable:
        if record is None or revision != record.requested:
            raise
        logger.warning(
            "The Hub cannot be reached; using the copy of %s at %s in %s.", repo_id, record.revision[:12], folder
        )
        return Download(folder, repo_id, record.revision)
    if record and (record.revision, record.requested) == (commit, revision) and set(names) == record.files.keys():
        return Download(folder, repo_id, commit)
    places = {name: inside(folder, name, repo_id) for name in names}
    check_disk(
        folder, sum(listing[name].size for name, path in places.items() if not _has_size(path, listing[name].size))
    )
    stale = _stale(folder, places)
    try:
        for path in stale:
            path.unlink(missing_ok=True)
        hashes = _download(api, repo_id, commit, folder, places, listing)
        sizes = {name: listing[name].size for name in names}
        record = _Record(id=repo_id, requested=revision, revision=commit, files=sizes, hashes=hashes)
        write_json(folder / _RECORD, record.model_dump(mode="json"))
    except (OSError, RuntimeError) as error:
        if is_disk_full(error):
            raise disk_full(folder) from error
        raise
    return Download(folder, repo_id, commit)


def _stale(folder: Path, places: dict[str, Path]) -> list[Path]:
    """What an earlier download left in `folder` that must go before the files at `places` come: files that are not
    among them, and those with other bytes than they came with, at which the client does not look again.
    """
    earlier = _read_record(folder)
    if earlier is None:
        return []
    gone = [inside(folder, name, str(folder / _RECORD)) for name in sorted(earlier.files.keys() - places.keys())]
    return gone + [
        places[name]
        for name in earlier.hashes.keys() & places.keys()
        if places[name].is_file() and known_hash(places[name]) != earlier.hashes[name]
    ]


def _download(
    api: HfApi, repo_id: str, commit: str, folder: Path, places: dict[str, Path], listing: dict[str, _Listed]
) -> dict[str, str]:
    """Fetch the files at `places` and compare them with what the repository lists; returns their sha256 by name."""
    with explained(repo_id, api.endpoint):
        snapshot_download(
            repo_id,
            revision=commit,
            local_dir=folder,
            token=api.token,
            endpoint=api.endpoint,
            allow_patterns=[glob.escape(name) for name in places],
        )
    _check_fetched(repo_id, places, listing)
    return {name: known_hash(path) for name, path in places.items()}


def _check_fetched(repo_id: str, places: dict[str, Path], listing: dict[str, _Listed]) -> None:
    """Raise InputError, and remove the file, where one that was fetched is not what the repository lists."""
    for name, path in places.items():
        if not listing[name].fits(path):
            path.unlink(missing_ok=True)
            raise InputError(
                f"{name} of {repo_id} must have the bytes that the repository lists, got others. Run the same command "
                "again."
            )


def commit_and_files(api: HfApi, repo_id: str, revision: str | None) -> tuple[str, dict[str, _Listed]]:
    """The commit sha that `revision` means now, and every file of it."""
    info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT)
    return str(info.sha), {
        file.rfilename: _Listed(
            file.size or 0, file.lfs.sha256 if file.lfs else None, None if file.lfs else file.blob_id
        )
        for file in info.siblings or []
    }


def _select(repo_id: str, names: list[str]) -> list[str]:
    """The files that a conversion needs: the root's weights in safetensors (one set of them), configuration, tokenizer
    and texts.
    """
    root = sorted(name for name in names if "/" not in name)
    if "config.json" not in root:
        raise InputError(
            f"{repo_id} must be a transformers model with a config.json, got {', '.join(root[:4]) or 'no files'}. "
            "Choose another repository."
        )
    weights = [name for name in root if name.endswith(".safetensors")]
    if not weights:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        if pickles:
            raise InputError(
                f"The weights must be safetensors, got only pickle files ({pickles[0]}) in {repo_id}. "
                f"Convert them with {constants.ENDPOINT}/spaces/safetensors/convert, then use the converted repository."
            )
        raise InputError(f"{repo_id} must hold *.safetensors weights, got none. Choose another repository.")
    texts = [name for name in root if (name.endswith(_SUFFIXES) or _TEXTS.match(name)) and is_data(name)]
    if _SINGLE in weights:  # transformers' order; copies of the weights in other layouts stay away
        return [_SINGLE, *(name for name in texts if name != _INDEX)]
    if _INDEX in texts:
        return [*([name for name in weights if _SHARD.fullmatch(name)] or weights), *texts]
    raise InputError(
        f"The weights must be {_SINGLE} or shards with {_INDEX}, got {weights[0]} in {repo_id}. Choose another "
        "repository."
    )


@job()
def remote_json(api: HfApi, repo_id: str, name: str, revision: str | None) -> dict[str, Any]:
    """The JSON object in a file of a repository. Raises InputError where it is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = hf_hub_download(
            repo_id, name, revision=revision, local_dir=folder, token=api.token, endpoint=api.endpoint
        )
        return read_json(Path(path), f"{name} of {repo_id}")


def remote_names(api: HfApi, target: PushTarget) -> set[str]:
    """What the repository's present manifest lists and the repository still holds; a broken or missing manifest lists
    nothing.
    """
    if not target.exists:
        return set()
    present = set(api.list_repo_files(target.id))
    try:
        files = remote_json(api, target.id, MANIFEST, None).get("files") if MANIFEST in present else None
    except InputError:
        files = None
    return present & set(files) if isinstance(files, dict) else set()


def _read_record(folder: Path) -> _Record | None:
    """The record of a download; None where there is none that this module could have written."""
    try:
        record = _Record.model_validate(load_json(folder / _RECORD))
        for name in (*record.files, *record.hashes):
            check_name(name, str(_RECORD))
        if not record.hashes.keys() <= record.files.keys():
            return None
    except (OSError, ValueError):
        return None
    return record


def _finished(folder: Path, repo_id: str, hashed: int | None) -> _Record | None:
    """The record of a finished download of `repo_id` whose files are all still there as they came; see `_fetch`. The
    log says what is damaged.
    """
    record = _read_record(folder)
    if (
        record is None
        or record.id != repo_id
        or not all(_has_size(folder / name, size) for name, size in record.files.items())
    ):
        return None
    for name, sha256 in record.hashes.items():
        if (hashed is None or record.files.get(name, 0) <= hashed) and known_hash(folder / name) != sha256:
            logger.warning("%s in %s is fetched again: it has other bytes than when it came.", name, folder)
            return None
    return record


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _git_hash(path: Path) -> str:
    """Git's sha1 (hex) of a file, by which a repository lists what is not in large-file storage."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
