"""push: a checkpoint becomes a repository on the Hub."""

from __future__ import annotations

import glob
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors, get_token
from huggingface_hub.utils import validate_repo_id

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import check_data
from ..checkpoint.listing import unlisted
from ..checkpoint.manifest import LINK_FILES, MANIFEST, check_files, check_links, read_manifest
from ..progress import job, stage
from ..sources.hub import TIMEOUT, PushTarget, check_genai, commit_and_files, logger, remote_json, remote_names
from ..sources.hub_errors import TOKENS, explained


def check_push(repo_id: str, token: str | None = None, endpoint: str | None = None) -> PushTarget:
    """Whether `push` to `repo_id` will be allowed, asked before the work: token present, valid and allowed to write,
    name and namespace right.

    A name without an owner belongs to the token's user. A repository that holds another model is refused. Raises
    InputError.
    """
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError:
        raise InputError(
            f"The repository must read owner/name with letters, digits, '-', '_' and '.', got {repo_id!r}. Correct the "
            "name."
        ) from None
    api = HfApi(endpoint=endpoint, token=token or get_token())
    if not api.token:
        raise InputError(
            f"Pushing to {repo_id} must have a Hub token, got none. Run `hf auth login` with a token of the role "
            "write, or set HF_TOKEN."
        )
    with explained(repo_id, api.endpoint):
        info = None
        try:
            info = api.model_info(repo_id, timeout=TIMEOUT) if "/" in repo_id else None
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            pass
        account = api.whoami()
        if "/" not in repo_id:
            repo_id = f"{account['name']}/{repo_id}"
            info = api.model_info(repo_id, timeout=TIMEOUT) if api.repo_exists(repo_id) else None
        _check_rights(account, repo_id)
        if info is None:
            return PushTarget(repo_id, False, None)
        names = {file.rfilename for file in info.siblings or []}
        if (
            MANIFEST not in names
            and "config.json" in names
            and "sparsity" not in remote_json(api, repo_id, "config.json", info.sha)
        ):
            raise InputError(
                f"{repo_id} must be new or hold a sparse checkpoint, got a repository with another model. Choose "
                "another name."
            )
    return PushTarget(repo_id, True, bool(info.private))


@job()
@stage("push")
def push(
    folder: Path, repo_id: str, private: bool = True, token: str | None = None, endpoint: str | None = None
) -> str:
    """Upload a finished checkpoint folder and return the repository's URL.

    1. Uploaded is what manifest.json lists, each a regular file checked against its sha256 first.
    2. The manifest comes in a last commit of its own, once the repository holds the others: a half-uploaded one is seen
       as such.
    3. Files of an older manifest that the new one lacks are removed.
    4. Running it again continues, and changes nothing when all is there.
    5. A repository that exists keeps its visibility.
    6. README.md has to exist but may be edited by hand.

    Raises InputError, with the line that retries when the upload failed.
    """
    folder = Path(folder)
    names = _check_folder(folder)
    target = check_push(repo_id, token, endpoint)
    if private and target.private is False:
        logger.warning("%s exists and is public; pushing does not change that.", target.id)
    api = HfApi(endpoint=endpoint, token=token or get_token())
    retry = f"sparsegate push {shlex.quote(str(folder))} {repo_id}{'' if private else ' --public'}"
    try:
        with explained(target.id, api.endpoint):
            url = str(api.create_repo(target.id, private=private, exist_ok=True))
            stale = remote_names(api, target) - set(names)
            api.upload_folder(
                repo_id=target.id,
                folder_path=folder,
                allow_patterns=[glob.escape(name) for name in names],
                delete_patterns=[glob.escape(name) for name in sorted(stale)] or None,
                commit_message="Upload sparse checkpoint",
            )
            _check_uploaded(api, target.id, folder, names)
            api.upload_file(
                path_or_fileobj=folder / MANIFEST,
                path_in_repo=MANIFEST,
                repo_id=target.id,
                commit_message="Upload manifest",
            )
            _check_uploaded(api, target.id, folder, [MANIFEST])
    except InputError as error:
        raise InputError(f"{error} Nothing local was changed; to go on with the upload run `{retry}`.") from error
    return url


def _check_rights(account: dict[str, Any], repo_id: str) -> None:
    """Raise InputError unless the token behind `account` (the answer of whoami) may write to `repo_id`."""
    owner = repo_id.split("/")[0]
    access = account.get("auth", {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise InputError(
            f"The Hub token must have the role write, got one of the role read ({account['name']}). Make another at "
            f"{TOKENS}."
        )
    writable = [account["name"], *(org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read")]
    if owner not in writable:
        raise InputError(
            f"The owner of {repo_id} must be one that the token may write to ({', '.join(writable)}), got {owner}. "
            "Choose one of these."
        )
    if access.get("role") == "fineGrained":
        scopes = (access.get("fineGrained") or {}).get("scoped") or []
        if not any(
            scope.get("entity", {}).get("name") in (owner, repo_id) and "repo.write" in scope.get("permissions", ())
            for scope in scopes
        ):
            raise InputError(
                f"The fine-grained Hub token must have write access to the repositories of {owner}, got one without "
                f"it. Change it at {TOKENS}."
            )


def _check_uploaded(api: HfApi, repo_id: str, folder: Path, names: list[str]) -> None:
    """Raise InputError unless the repository holds every file with its bytes: the client leaves out what it cannot
    reach, in silence.
    """
    _, listing = commit_and_files(api, repo_id, None)
    wrong = next((name for name in names if name not in listing or not listing[name].fits(folder / name)), None)
    if wrong is not None:
        raise InputError(
            f"{repo_id} must hold every file of the manifest after the upload, got {wrong} missing or with other bytes."
        )


def _check_folder(folder: Path) -> list[str]:
    """The files of a checkpoint folder as its manifest lists them.

    Raises InputError when one is missing, altered, outside, a link, not listed, or of a kind that no checkpoint has,
    and when the folder is linked to the native library.
    """
    check_links(folder)
    manifest, quoted = read_manifest(folder), shlex.quote(str(folder))
    if not manifest.files:
        raise InputError("manifest.json must list files inside the folder, got none. Convert the model again.")
    genai = folder / "onnx" / "genai_config.json"
    linked = [path.name for path in folder.rglob("*") if path.name in LINK_FILES]
    if genai.is_file() and b"custom_ops_library" in genai.read_bytes():
        linked.append(genai.name)
    if linked:
        raise InputError(
            f"{folder} must not be linked to this machine's library when pushed, got {linked[0]}. Run `sparsegate "
            f"unlink {quoted}` first."
        )
    check_data(manifest.files, MANIFEST)
    check_genai(folder)
    wrong = [
        line for line in check_files(folder, manifest) if line != "README.md has other bytes than the manifest says"
    ]
    if wrong:
        raise InputError(
            f"{folder} must be as its manifest.json says, got: {wrong[0]}. Restore the file or convert the model again."
        )
    if not (folder / "README.md").is_file():
        raise InputError(f"{folder} must hold a model card, got no README.md. Convert the model again.")
    lacking = [line for line in unlisted(folder, manifest) if not line.startswith("README.md ")]
    if lacking:
        raise InputError(
            f"manifest.json must list every file of a checkpoint, got {len(lacking)} left out: {lacking[0]}. Convert "
            "the model again."
        )
    return [*manifest.files, *(["README.md"] if "README.md" not in manifest.files else [])]
