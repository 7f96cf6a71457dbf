"""OUT.work: the stages on the way to OUT. It is ours by the record in it, one process at a time writes there, and of it
only what is ours is ever removed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ...runtime_onnx.errors import InputError
from .locks import Held, NoLocks, locked, read_record
from .stage import RECORD, disk_full, is_disk_full, read_header, remove_abandoned

ENTRIES = {
    "source": "a download",
    "source-normal": "a published model in our form",
    "decision": "what fits into the time",
    "generated": "text that the model wrote",
    "mixture": "text of several parts",
    "recovery": "the training stages of a conversion",
    "rotated": "the model with a rotated residual stream",
    "stage_<k>": "a training stage of tune",
    "stats": "statistics by site",
    "stats_labels": "statistics of scores that need gradients",
    "stats_rotated": "statistics of the rotated model",
    "trained": "trained selectors",
    "plan": "plans by method",
    "models": "models with the weights that were trained with a plan, by method",
    "quality": "their losses",
    "base": "the dense graph",
    "bases": "dense graphs of checkpoints with weights of their own",
    "base_cuda": "the dense graph for CUDA",
    "dense": "the dense graph in integers",
    "quality_dense": "its loss",
    "reference": "the graphs of the model before its training",
    "original": "the same, of an earlier version",
    "checkpoint": "checkpoints by method",
    "onnx": "ONNX folders by method",
    "measured": "their checks and speed",
    "references": "the dense model in fewer bits",
}
"""The folders in a work folder -> what they are. A new stage is a new row; what has none is left where it is."""
_UNFINISHED = re.compile(r"\.partial-[0-9a-f]+(-old)?$|\.[0-9a-f]{16}$")
_NUMBER = re.compile(r"(?<=stage_)\d+")
_DONE = ".sparsegate.done"
_DEEP = ("*", "*/*", "*/*/*")  # where an earlier version's stages lie

_TRIES = 100  # its last holder may remove it at any moment

log = logging.getLogger("sparsegate")


def work_of(out: Path) -> Path:
    """The work folder of OUT."""
    return out.absolute().with_name(f"{out.absolute().name}.work")


def check_out(out: Path, what: str = "OUT") -> None:
    """Raise InputError where nothing could be renamed to OUT at the end: a link to nothing, a place in something that
    is no folder.
    """
    if out.is_symlink() and not out.exists():
        raise InputError(
            f"{what} must be a new folder, got {out}, a link to {os.readlink(out)}, which is not there. Remove the "
            "link, or choose another -o."
        )
    place = out.absolute().parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{what} must lie in a folder, got {out} in {place}, which is none. Choose another -o.")


def check_work(out: Path, inputs: Iterable[tuple[str, Path]] = ()) -> None:
    """Raise InputError where the work folder of OUT is not ours.

    Also where it holds one of `inputs` (what it is, where), which would go with it. Nothing is written.
    """
    work = work_of(out)
    obstacle = None
    if work.is_symlink() or (os.path.lexists(work) and not work.is_dir()):
        obstacle = "a link" if work.is_symlink() else "a file"
    elif work.is_dir() and not is_ours(work):
        obstacle = "one that sparsegate did not make"
    place = work.resolve()
    for what, path in inputs:
        if any(each.resolve() == place or place in each.resolve().parents for each in (path, *_links(path))):
            raise InputError(
                f"{what} must lie outside {work}, where the stages are kept until they are removed, got {path}. Choose "
                "another -o, or move it."
            )
    if obstacle:
        raise InputError(
            f"{work} must be free for the stages, or hold those of an earlier run, got {obstacle}. Choose another -o, "
            "or move it away."
        )


def _links(path: Path) -> list[Path]:
    """Files of a folder that lie elsewhere."""
    with suppress(OSError):
        return [each for each in path.iterdir() if each.is_symlink()] if path.is_dir() else []
    return []


def is_ours(work: Path) -> bool:
    """Whether a folder is empty, carries our record, or holds nothing but the stages of a version that wrote none."""
    paths = list(work.iterdir())
    if not paths:
        return True
    if record := read_record(work / RECORD):
        return record.get("version") == 1
    if not all(path.name == RECORD or _is_stage(path) for path in paths):
        return False
    return (
        len(paths) == 1
        and paths[0].name == RECORD
        or any(read_header(path) for pattern in _DEEP for path in work.glob(pattern) if path.is_dir())
    )


def _is_stage(path: Path) -> bool:
    name = _UNFINISHED.sub("", path.name)
    return path.is_dir() and _NUMBER.sub("<k>", name) in ENTRIES


@contextmanager
def claimed(out: Path, inputs: Iterable[tuple[str, Path]] = ()) -> Iterator[Path]:
    """The work folder of OUT, for this process alone until the block ends, or it does. A folder without stages goes
    then.

    Raises InputError as `check_out` and `check_work`, and when another process has it.
    """
    check_out(out)
    inputs, work = list(inputs), work_of(out)
    with ExitStack() as stack:
        for _ in range(_TRIES):
            check_work(out, inputs)
            try:
                work.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(work / RECORD, out=out.name))
            except FileNotFoundError:  # another process has just removed it
                continue
            except Held as held:
                holder = f" ({held.holder})" if held.holder else ""
                raise InputError(
                    "OUT must be written by one process at a time, got another conversion that is writing "
                    f"{out}{holder}. "
                    "Wait for it and run the same command again, end it, or choose another -o."
                ) from None
            except NoLocks:
                log.warning(
                    "The file system of %s has no locks: start no second conversion to %s meanwhile.", work, out
                )
            except OSError as error:
                raise disk_full(out) if is_disk_full(error) else error from error
            break
        else:
            raise InputError(f"{work} must be a folder to write in, got one that vanishes. Choose another -o.")
        stack.callback(_drop_empty, work)
        yield work


def remove(work: Path) -> None:
    """Remove the stages of a work folder that this process has claimed, and the folder, unless it holds anything that
    is not ours.
    """
    with suppress(OSError):
        (work / _DONE).touch()  # a run that finds the rest after a kill knows that nobody asked to keep it
    for path in list(work.iterdir()):
        if path.is_symlink() and _is_stage(path):
            path.unlink()
        elif _is_stage(path):
            shutil.rmtree(path)
    (work / _DONE).unlink(missing_ok=True)
    left = sorted(path.name for path in work.iterdir() if path.name != RECORD)
    if left:
        log.warning("%s is left where it is: it holds %s, which sparsegate did not make.", work, ", ".join(left[:3]))
    (work / RECORD).unlink(missing_ok=True)
    if not left:
        with suppress(OSError):
            work.rmdir()


def remove_leftover(out: Path, inputs: Iterable[tuple[str, Path]], shared: bool) -> None:
    """Remove the work folder of a finished OUT, and what OUT was renamed from, where the run that wrote OUT was killed
    before it did.

    `shared`: OUT's files are still the stages' own.
    """
    remove_abandoned(out)
    work = work_of(out)
    if (
        work.is_symlink()
        or not work.is_dir()
        or not any(work.iterdir())
        or not is_ours(work)
        or not (shared or (work / _DONE).exists())
    ):
        return
    with suppress(InputError, OSError), claimed(out, inputs):  # the user's answer is OUT, which is whole
        remove(work)


def _drop_empty(work: Path) -> None:
    with suppress(OSError):
        if [path.name for path in work.iterdir()] == [RECORD]:
            (work / RECORD).unlink()
            work.rmdir()
