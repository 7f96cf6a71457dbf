"""The first step of a conversion: the model is opened; whether OUT is up to date, what fits into the time and what it
needs is found out.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ...runtime_onnx.errors import InputError
from ..arch import load_arch
from ..bundled import BUNDLED_MODEL
from ..checkpoint.config_bounds import check_graph
from ..checkpoint.listing import SMALL, unlisted
from ..checkpoint.manifest import MANIFEST, check_files, read_manifest
from ..checkpoint.source import Source, backed_config, check_config, has_own_head
from ..checkpoint.stage import hash_json, known_hash
from ..checkpoint.work_folder import remove_leftover, work_of
from ..evaluation.records import RESULTS, Report
from ..evaluation.recovery_record import RECOVERY, RecoveryRecord
from ..modeling.empty import unused_tensors
from ..modeling.rotation import stream_of
from ..sources.hub import Remote, check_disk, is_hub_id, remote_inspect
from ..sources.named import resolve
from ..sources.published import is_published, normal_config
from .configs import Configs, has_zeros, method_configs
from .estimate import Estimate, estimate, estimate_shapes
from .fingerprint import conversion_fingerprint, fetched_fingerprint
from .finish import pushed
from .order import Opened, Order, Result
from .recipe import training_stages
from .time_budget import Decision, decide, decided, header, keep, stored

log = logging.getLogger("sparsegate")


def open_model(order: Order, work: Path) -> Opened | Result:
    """The model, fetched where it lies on the Hub; the result where nothing is to be made: of a dry run, or where OUT
    is there already.
    """
    requested, out = order.recipe, order.out
    configs = method_configs(requested)
    if requested.model != BUNDLED_MODEL and is_hub_id(requested.model):
        if out.exists() and not order.dry_run:
            return _up_to_date(order, fetched_fingerprint(out, requested, configs))
        if order.dry_run or not (work / "source").exists():  # what was fetched before also serves without a network
            remote_needs = _remote_estimate(remote_inspect(requested.model), order, configs)
            if order.dry_run:
                return Result(out, False, None, remote_needs, precision=requested.export.precision)
            check_disk(out, remote_needs.disk_bytes)
    source = resolve(requested.model, work / "source")
    check_graph(source.arch, source.config)
    if requested.rotate:
        stream_of(source.arch)
    record = RecoveryRecord.load(source.folder / RECOVERY) if (source.folder / RECOVERY).is_file() else None
    exact = bool(training_stages(requested)) or has_zeros(source)
    fingerprint = ""
    if not order.dry_run:
        fingerprint = conversion_fingerprint(_taken_over(source), requested, method_configs(requested, exact))
        if out.exists():
            return _up_to_date(order, fingerprint)
    decision = _decision(order, source, method_configs(requested, exact))
    recipe = decided(requested, decision)
    configs = method_configs(recipe, exact)
    needed = estimate(source, recipe, configs).model_copy(update=decision.shown())
    if order.dry_run:
        return Result(out, False, None, needed, precision=requested.export.precision)
    check_disk(out, needed.disk_bytes)
    unused = unused_tensors(source)
    if unused:
        names = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
        log.warning(
            "Not computed with, because %s has no such tensors: %s. The report lists them.",
            source.arch.model_type,
            names,
        )
    if has_own_head(source):
        log.warning(
            "config.json ties the head to the embedding, but the weights hold another head: that one is converted, as "
            "transformers uses it."
        )
    keep(work, header(source.fingerprint, requested), decision)
    return Opened(source, record, recipe, configs, needed, fingerprint, unused, decision)


def _decision(order: Order, source: Source, configs: Configs) -> Decision:
    """The methods and steps that fit: those of an earlier run, else by what this machine takes now."""
    shapes, size = (
        {name: info.shape for name, info in source.tensors.items()},
        sum(info.bytes for info in source.tensors.values()),
    )
    kept = stored(work_of(order.out), lambda: header(source.fingerprint, order.recipe))
    return kept or decide(source.arch, source.config, shapes, size, order.recipe, configs, order.device)


def _up_to_date(order: Order, fingerprint: str) -> Result:
    out, manifest = order.out, read_manifest(order.out)
    if manifest.fingerprint == fingerprint:
        wrong = check_files(out, manifest, hashed=SMALL) + unlisted(out, manifest)
        if wrong:
            raise InputError(
                f"OUT must be as its {MANIFEST} says, got {out}, where {wrong[0]}. Remove the folder and run the same "
                "command again."
            )
        if not order.keep_stages:
            remove_leftover(out, order.inputs, shared=(out / "config.json").stat().st_nlink > 1)
        return Result(out, True, Report.load(out / RESULTS), url=pushed(order))
    raise occupied(out, "another conversion")


def occupied(out: Path, what: str) -> InputError:
    """The error for an OUT that holds something else."""
    return InputError(
        f"OUT must be a new folder, got {out}, which holds {what}. Choose another -o, or remove the folder."
    )


def _taken_over(source: Source) -> str:
    """The fingerprint of the model, with the record of the training that made it, where there is one: it goes into OUT
    as well.
    """
    record = source.folder / RECOVERY
    return (
        hash_json({"model": source.fingerprint, "record": known_hash(record)})
        if record.is_file()
        else source.fingerprint
    )


def _remote_estimate(remote: Remote, order: Order, configs: Configs) -> Estimate:
    """What a Hub model will need, from its configuration and headers; no weight is fetched. Bytes include the download,
    the times of a dry run do not.
    """
    recipe = order.recipe
    raw = normal_config(remote.config) if is_published(remote.config) else remote.config
    check_config(raw)
    arch = load_arch(str(raw.get("model_type")))
    config = backed_config(arch, raw, remote.tensors)
    check_graph(arch, config)
    shapes = {name: shape for name, (shape, _) in remote.tensors.items()}
    times: dict[str, Any] = {}
    if order.dry_run:
        decision = decide(arch, config, shapes, remote.total_bytes, recipe, configs, order.device)
        times, configs = decision.shown(), method_configs(decided(recipe, decision))
    needed = estimate_shapes(arch, config, shapes, remote.total_bytes, recipe, configs)
    return needed.model_copy(
        update={
            "disk_bytes": needed.disk_bytes + remote.download_bytes,
            "download_bytes": remote.download_bytes,
            **times,
        }
    )
