"""convert: schedule, ONNX, verification and report, then one rename. Everything before lives in OUT.work and is resumed from there."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..runtime_onnx.bench import bench
from . import report as reporting
from .artifact import VERSION, Header, InputError, atomic_folder, hash_file, hash_json, is_finished, read_header, read_json, write_header, write_json
from .data import BUNDLED, CALIBRATION_TEXT, HELDOUT_TEXT, Batches, make_batches, read_text
from .hub import check_disk, check_push, download, fetch_checkpoint, is_hub_id, push
from .manifest import MANIFEST, Manifest, check_files, installed_versions, list_files, read_manifest, write_manifest
from .onnx_export import build_base, check_base, export
from .planning import BUNDLED_MODEL, Estimate, compile_recipe, estimate, method_configs
from .plans import Plan
from .recipe import Budget, Recipe
from .reference import dense, load
from .report.card import write_card
from .report.plots import plot_layers
from .schedule import checkpoint, once
from .source import Source, open_source
from .verification import Check, Quality, Verification, check_budget, check_onnx, check_source, make_probe, measure_quality, read_plan

log = logging.getLogger("sparsegate")
_HELDOUT_WINDOWS = 64
_HELDOUT_SHARE = 0.2  # of a user's own calibration text, kept for measuring


@dataclass(frozen=True)
class Result:
    """What `convert` returns: the folder, whether it was there already, its report and the URL it was pushed to."""

    folder: Path
    up_to_date: bool
    report: reporting.Report | None
    estimate: Estimate | None = None
    url: str | None = None


@dataclass(frozen=True)
class _Texts:
    calibration: Batches
    heldout: Batches


@dataclass(frozen=True)
class _Candidate:
    """One method's result: plan, checkpoint and ONNX folders, quality, checks, and the measured speeds against dense."""

    method: str
    plan: Plan
    checkpoint: Path
    onnx: Path
    quality: Quality
    checks: list[Check]
    speed: dict[str, Any]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def convert(
    model: str | None = None,
    output: str | Path | None = None,
    method: str | None = None,
    sparsity: float | None = None,
    max_ppl_increase: float | None = None,
    max_kl: float | None = None,
    recipe: str | Path | None = None,
    calibration: str | Path | None = None,
    precision: str | None = None,
    target: str | None = None,
    seed: int | None = None,
    device: str = "cpu",
    push_to: str | None = None,
    public: bool = False,
    dry_run: bool = False,
    keep_stages: bool = False,
    command: str = "sparsegate convert",
) -> Result:
    """Turn a model folder or Hub id into the sparse checkpoint OUT. `model` None is the small model that comes with sparsegate.

    Raises InputError for every user's mistake, and when the result breaks its budget or its executors disagree; OUT then does not appear.
    """
    asked = compile_recipe(model, method, sparsity, max_ppl_increase, max_kl, recipe, calibration, precision, target, seed)
    out = Path(output) if output else Path(f"{Path(asked.model).name if asked.model != BUNDLED_MODEL else 'sparsegate-small'}-sparse")
    work = out.with_name(out.name + ".work")
    _check_device(device)
    if push_to:
        check_push(push_to)
    source = resolve(asked.model, work)
    configs = method_configs(asked)
    plan_cost = estimate(source, asked, configs)
    if dry_run:
        return Result(out, False, None, plan_cost)
    texts = _texts(source, asked)
    fingerprint = hash_json({"tool": VERSION, "source": source.fingerprint, "recipe": asked.model_dump(mode="json"), "texts": [texts.calibration.sha256, texts.heldout.sha256]})
    if out.exists():
        return _existing(out, fingerprint, push_to, public)
    check_disk(out, plan_cost.disk_bytes)
    work.mkdir(parents=True, exist_ok=True)

    plans = once(source, texts.calibration, configs, work, asked.seed, device)
    base = _base(source, texts, work)
    candidates = [_candidate(source, name, plan, texts, base, asked, configs[name], work) for name, plan in plans.items()]
    chosen = _choose(candidates)
    report = reporting.build(source, asked, texts.calibration, candidates, chosen, command)
    _finish(out, source, asked, fingerprint, texts, chosen, report, keep_stages)
    if not keep_stages:
        shutil.rmtree(work)
    url = push(out, push_to, private=not public) if push_to else None
    return Result(out, False, report, plan_cost, url)


def resolve(model: str, work: Path) -> Source:
    """Open a folder, the bundled model, or a Hub id, which is fetched into `work`/source."""
    if model == BUNDLED_MODEL:
        return replace(open_source(BUNDLED), id=None)
    if is_hub_id(model):
        fetched = download(model, work / "source")
        return open_source(fetched.folder, fetched.id, fetched.revision)
    return open_source(model)


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, got {device!r}. Choose one of these.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda must have a CUDA GPU and a CUDA build of torch, got none. Use --device cpu.")


def _texts(source: Source, recipe: Recipe) -> _Texts:
    tokenizer, asked = source.tokenizer(), recipe.calibration
    length = min(asked.length, int(getattr(source.config, "max_position_embeddings", asked.length)))
    if asked.file is None:
        text, heldout = read_text(CALIBRATION_TEXT), read_text(HELDOUT_TEXT)
    else:
        whole = read_text(Path(asked.file))
        cut = int(len(whole) * (1 - _HELDOUT_SHARE))
        text, heldout = whole[:cut], whole[cut:]
    return _Texts(
        make_batches(tokenizer, text, asked.windows, length, recipe.seed),
        make_batches(tokenizer, heldout, _HELDOUT_WINDOWS, length, recipe.seed + 1, "The last fifth of the calibration text"),
    )


def _existing(out: Path, fingerprint: str, push_to: str | None, public: bool) -> Result:
    if (out / MANIFEST).is_file() and read_manifest(out).fingerprint == fingerprint:
        return Result(out, True, reporting.read(out), url=push(out, push_to, private=not public) if push_to else None)
    what = "another conversion" if (out / MANIFEST).is_file() else "something else"
    raise InputError(f"OUT must be a new folder, got {out}, which holds {what}. Choose another -o, or remove the folder.")


def _base(source: Source, texts: _Texts, work: Path) -> Path:
    folder, header = work / "base", Header(format="base", parents={"model": source.fingerprint})
    if not is_finished(folder, header):
        from .reference import load_dense

        with atomic_folder(folder) as partial:
            build_base(source.folder, partial)
            check_base(partial, load_dense(source.folder), texts.heldout.tokens[texts.heldout.mask.all(1)][:2, :32])
            write_header(partial, header)
    return folder


def _candidate(source: Source, name: str, plan: Plan, texts: _Texts, base: Path, recipe: Recipe, config: dict[str, Any], work: Path) -> _Candidate:
    plan_folder = work / "plan" / name
    folder = checkpoint(source, plan, name, work, plan_folder)
    onnx, parent = work / "onnx" / name, read_header(folder)
    assert parent is not None
    header = Header(format="onnx", parents={"checkpoint": parent.fingerprint}, config=recipe.export.model_dump(mode="json"))
    if not is_finished(onnx, header):
        with atomic_folder(onnx) as partial:
            export(base, plan, source.arch, source.config, partial)
            write_header(partial, header)
    measured, header = work / "measured" / name, Header(format="measured", parents={"onnx": header.fingerprint}, config=recipe.budget.model_dump(mode="json"), calibration=texts.heldout.sha256)
    if not is_finished(measured, header):
        model = load(folder)
        quality = measure_quality(model, plan, texts.heldout)
        checks = check_onnx(onnx, make_probe(model, texts.heldout)) + check_budget(quality, recipe.budget.model_dump(), config.get("sparsity"))
        del model
        speed = _speed(base, onnx, texts)
        with atomic_folder(measured) as partial:
            write_json(partial / "measured.json", {"quality": quality.model_dump(), "checks": [check.model_dump() for check in checks], "speed": speed})
            write_header(partial, header)
    stored = read_json(measured / "measured.json", "The measurement")
    return _Candidate(name, plan, folder, onnx, Quality(**stored["quality"]), [Check(**row) for row in stored["checks"]], stored["speed"])


def _speed(base: Path, onnx: Path, texts: _Texts) -> dict[str, Any]:
    """Tokens per second of a candidate and of the dense graph, back to back; an empty dict where the machine was too busy to measure."""
    length = texts.heldout.tokens.shape[1]
    prompt = texts.heldout.tokens[0, : min(128, length // 2)].tolist()
    try:
        return bench(base, onnx, prompt=prompt, new_tokens=min(64, length - len(prompt) - 1), command="sparsegate convert")
    except ValueError as error:
        log.warning("Speed was not measured: %s", error)
        return {}


def _choose(candidates: list[_Candidate]) -> _Candidate:
    """The passing candidate with the least KL to dense. Raises InputError with the failed checks when none passes."""
    passing = [candidate for candidate in candidates if candidate.passed]
    if not passing:
        failed = [f"{c.method}: {check.name} {check.value:.3g} > {check.bound:.3g} ({check.note})" for c in candidates for check in c.checks if not check.passed]
        raise InputError(f"A checkpoint must hold its budget and its executors must agree, got {'; '.join(failed)}. Lower --sparsity or loosen the budget.")
    return min(passing, key=lambda candidate: candidate.quality.kl)


def _finish(out: Path, source: Source, recipe: Recipe, fingerprint: str, texts: _Texts, chosen: _Candidate, report: reporting.Report, keep_stages: bool) -> None:
    place = shutil.copytree if keep_stages else shutil.move
    with atomic_folder(out) as partial:
        for path in list(chosen.checkpoint.iterdir()):
            if path.name != "header.json":
                (shutil.copytree if path.is_dir() and keep_stages else shutil.copyfile if keep_stages else shutil.move)(path, partial / path.name)
        place(chosen.onnx, partial / "onnx")
        (partial / "onnx" / "header.json").unlink(missing_ok=True)
        reporting.write(partial, report)
        plot_layers(partial, report)
        write_card(partial, report, source.folder)
        manifest = Manifest(
            fingerprint=fingerprint,
            source={"id": source.id, "revision": source.revision, "fingerprint": source.fingerprint},
            calibration={"sha256": texts.calibration.sha256, "tokens": texts.calibration.count, "file": None if recipe.calibration.file is None else hash_file(Path(recipe.calibration.file))},
            recipe=recipe.model_copy(update={"model": source.name}).model_dump(mode="json"),
            seed=recipe.seed,
            budget=Budget.model_validate(recipe.budget).model_dump() | {"sparsity": dict(recipe.stages[0].config).get("sparsity")},
            measured={"nll_dense": chosen.quality.nll_dense, "nll": chosen.quality.nll, "kl": chosen.quality.kl, "agreement": chosen.quality.agreement, "density": chosen.quality.density, "cost": chosen.quality.cost},
            versions=installed_versions(),
            files=list_files(partial),
        )
        write_manifest(partial, manifest)


def local_folder(model: str | Path) -> Path:
    """The folder that a folder's name or a Hub id means; a repository is fetched into the Hub cache's neighbourhood as real files, onnx/ included."""
    name = str(model)
    if Path(name).exists() or not is_hub_id(name):
        return Path(name)
    return fetch_checkpoint(name).folder


def verify(model: str | Path, source: str | Path | None = None) -> Verification:
    """Check a checkpoint: files against the manifest, dense weights against `source`, quality against the budget, executors against each other.

    Speed is never judged. Raises InputError when the folder is no sparse checkpoint.
    """
    folder = local_folder(model)
    if not folder.is_dir():
        raise InputError(f"DIR must be a sparse checkpoint or a Hub id, got {str(model)!r}, which is neither. Check the spelling.")
    manifest = read_manifest(folder)
    wrong = check_files(folder, manifest)
    checks = [Check(name="files", value=len(wrong), bound=0, passed=not wrong, note="; ".join(wrong[:3]) or f"{len(manifest.files)} files as written")]
    plan = read_plan(folder)
    sparse = load(folder)
    opened = open_source(folder, sparse=True)
    recipe = Recipe.model_validate(manifest.recipe)
    file = recipe.calibration.file
    if file is not None and not Path(file).is_file():
        log.warning("The calibration text %s is not here; quality is measured on the text that comes with sparsegate.", file)
        recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"file": None})})
    texts = _texts(opened, recipe)
    quality = measure_quality(sparse, plan, texts.heldout)
    if source is not None:
        checks.append(check_source(sparse, resolve(str(source), folder.with_name(folder.name + ".work")).folder, texts.heldout))
    checks += check_onnx(folder / "onnx", make_probe(sparse, texts.heldout))
    checks += check_budget(quality, manifest.budget, manifest.budget.get("sparsity"))
    return Verification(quality=quality, checks=checks)
