"""What the Hub's client raises, as one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors

from ...runtime_onnx.errors import InputError
from ..checkpoint.stage import is_disk_full

TOKENS = f"{constants.ENDPOINT}/settings/tokens"


class Unreachable(InputError):
    """No answer from the Hub; what is on the disk may still do."""


@contextmanager
def explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn the Hub client's exceptions into InputErrors of one line; others pass."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        link: BaseException | None = error
        while link is not None:  # the client wraps connection errors in its own kinds of OSError and RuntimeError
            if explanation := _explain(link, repo_id, endpoint):
                raise explanation from error
            link = (link.__cause__ or link.__context__) if isinstance(link, (OSError, RuntimeError)) else None
        if isinstance(error, RuntimeError) and not is_disk_full(error):  # all that the Xet transfer library raises
            raise InputError(
                f"The transfer of {repo_id} must complete, got: {str(error).splitlines()[0]}. Run the same command "
                "again."
            ) from error
        raise


def _explain(error: BaseException, repo_id: str, endpoint: str) -> InputError | None:
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Unreachable(
            f"The Hub must be reachable to fetch {repo_id}, got offline mode. Unset HF_HUB_OFFLINE and "
            "TRANSFORMERS_OFFLINE, or give a folder."
        )
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{repo_id} must be open to the token's user, got a gated repository. Ask for access at "
            f"{endpoint}/{repo_id} and run `hf auth login`."
        )
    if isinstance(error, errors.DisabledRepoError):
        return InputError(
            f"{repo_id} must be available, got a repository that the Hub has disabled. Choose another one."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(
            f"The revision must exist in {repo_id}, got one that does not. Give a branch, a tag or a commit of "
            f"{endpoint}/{repo_id}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"MODEL must be a folder or a Hub repository, got {repo_id}, which is neither. Check the name, or run `hf "
            "auth login` if it is private."
        )
    if isinstance(error, errors.SafetensorsParsingError):
        return InputError(
            f"The safetensors files of {repo_id} must have valid headers, got a broken one. Choose another repository "
            "or revision."
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return InputError(f"{repo_id} must hold the files it lists, got one that is gone. Run the same command again.")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return InputError(
                "The Hub token must be valid, got one that the Hub refused (401). Run `hf auth login --force`, or "
                "correct HF_TOKEN."
            )
        if status == 403:
            return InputError(
                f"The Hub token must have the right to do this in {repo_id}, got a refusal (403). Change its rights at "
                f"{TOKENS}."
            )
        return InputError(
            f"The Hub must answer requests for {repo_id}, got the status {status} from {endpoint}. Wait a little and "
            "run the same command again."
        )
    # the base of every exception of the client's HTTP library, whichever one its version uses
    if isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError)):
        problem = f"no connection to {endpoint} ({type(error).__name__})"
        return Unreachable(
            f"The Hub must be reachable for {repo_id}, got {problem}. Check the name, the network and HF_ENDPOINT."
        )
    return None
