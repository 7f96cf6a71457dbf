"""All methods on the bundled model: quality against density and cost, one table.

    python tests/bench/benchmarks/curves.py --work WORK [--seeds 0,1,2] [--only NAME,...] [--no-training]

Every result is stored below WORK as soon as it is measured, so the run can be stopped and started again; predictors and
thresholds trained end to end are trained below WORK/trained (hours on one core) or found there. Writes
results/curves.json, results/curves_prompt.json, the page curves.md and its pictures.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from sparsegate.converter.arch.shapes import linear_shapes
from sparsegate.converter.bundled import BUNDLED, BUNDLED_NAME, CALIBRATION_TEXT, HELDOUT_TEXT
from sparsegate.converter.checkpoint.plan import FFN_LINEARS, LINEARS, Plan, SitePlan, merge
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.checkpoint.stage import Header, write_json
from sparsegate.converter.evaluation.analysis.executor import analyse_all
from sparsegate.converter.evaluation.analysis.ranks import rank_correlations
from sparsegate.converter.evaluation.analysis.setting import Outcome, Setting
from sparsegate.converter.evaluation.quality import Reference, Totals, compare, measure_quality, torch_logits
from sparsegate.converter.methods import load_method, make_config, needs
from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.modeling.gated import apply_plan, load_dense, remove_plan
from sparsegate.converter.modeling.predictor import fresh_predictor, rank_for
from sparsegate.converter.report.curves import Correlations, Curves, Point
from sparsegate.converter.scores import load_score
from sparsegate.converter.stats.collect import collect
from sparsegate.converter.text.windows import Batches, make_batches, read_text
from sparsegate.converter.training.inputs import Models, TrainingRun
from sparsegate.converter.training.plans import train_plan
from sparsegate.converter.training.residual import add_residuals
from sparsegate.runtime_onnx.untrusted import read_json

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.provenance import provenance
from pages.curves_page import write_page
from records.folders import RESULTS

DENSITIES = (0.7, 0.5, 0.4, 0.3, 0.2)
TRAINED_WINDOWS = 1024  # of 256 tokens: nearly all of the calibration text
_FROZEN = Tune(local=0.2, updates="none", offsets=False, likeliest=0)  # nothing of the weights is trained
PREDICTOR, GATE = (_FROZEN.model_copy(update={"steps": steps}) for steps in (1500, 300))
GATE_START = 0.8
RESIDUAL_WINDOWS, RESIDUAL_RANK = 64, 40
ATTENTION = tuple(name for name in LINEARS if name not in FFN_LINEARS)
PROMPT = 128
CORRELATED = ("gate", "chess", "abs_z", "magnitude", "gradient", "gxo", "snip", "fisher", "corrected_gxo")


@dataclass(frozen=True)
class Study:
    """The model, the texts and where results go."""

    work: Path
    training: bool

    @cached_property
    def source(self) -> Source:
        return replace(open_source(BUNDLED), label=BUNDLED_NAME)

    @cached_property
    def calibration(self) -> Batches:
        """What `convert` calibrates on by default."""
        return self.windows(0, 128)

    @cached_property
    def heldout(self) -> Batches:
        """What `convert` measures on."""
        return make_batches(self.source.tokenizer(), read_text(HELDOUT_TEXT), 64, 256, 1)

    @cached_property
    def model(self) -> Any:
        return load_dense(self.source.folder)

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.model, self.heldout, keep_bytes=1e9)

    @property
    def activation(self) -> str:
        return self.source.arch.activation(self.source.config)

    def windows(self, seed: int, count: int = TRAINED_WINDOWS) -> Batches:
        """Calibration windows of a training, drawn by its seed."""
        return make_batches(self.source.tokenizer(), read_text(CALIBRATION_TEXT), count, 256, seed)


Plans = Iterator[tuple[float, Plan]]


def calibrated(study: Study, seed: int | None, densities: tuple[float, ...], method: str, **values: Any) -> Plans:
    """A method of the toolkit as `convert` runs it; one that has a seed sees as much text as the trainings do."""
    batches = study.calibration if seed is None else study.windows(seed)
    given = values | ({} if seed is None else {"seed": seed})
    for density in densities:
        config = make_config(method, given | {"sparsity": round(1 - density, 9)})
        names = needs(method, config)
        stats = collect(study.source, batches, names, study.work / "stats" / f"{method}-{seed}", seed or 0)
        yield density, load_method(method).plan(stats, study.source.arch, config)


def cross_entropy(study: Study, seed: int | None, densities: tuple[float, ...]) -> Plans:
    """The cheap form, layer by layer on the top-k of the magnitude, unweighted."""
    return calibrated(study, seed, densities, "predictor", loss="cross_entropy", weighting="none")


def with_attention(study: Study, seed: int | None, densities: tuple[float, ...], method: str) -> Plans:
    """Neurons by `method` and the inputs of q, k, v and o by TEAL, both at the density."""
    pairs = zip(
        calibrated(study, None, densities, method),
        calibrated(study, None, densities, "teal", linears=ATTENTION),
        strict=True,
    )
    for (density, neurons), (_, inputs) in pairs:
        yield density, merge([neurons, inputs])


def trained_predictor(study: Study, seed: int | None, densities: tuple[float, ...]) -> Plans:
    """One run through all densities from a fresh predictor."""
    source, generator = study.source, torch.Generator().manual_seed(seed or 0)
    hidden, units = (source.arch.size(source.config, space) for space in ("hidden", "units"))
    rank = rank_for(hidden, units, 3, 0.1)
    start: Plan = {
        site: SitePlan(gate=fresh_predictor(hidden, units, rank, generator))
        for site in source.arch.sites(source.config)
    }
    return _trained(study, seed, densities, "predictor", start, 1.0, PREDICTOR)


def trained_gate(study: Study, seed: int | None, densities: tuple[float, ...]) -> Plans:
    """One run through all densities from CHESS thresholds."""
    ((_, start),) = calibrated(study, None, (GATE_START,), "chess")
    return _trained(study, seed, densities, "gate", start, GATE_START, GATE)


def _trained(
    study: Study, seed: int | None, densities: tuple[float, ...], name: str, start_plan: Plan, start: float, tune: Tune
) -> Plans:
    assert seed is not None
    folder = study.work / "trained" / name / f"seed{seed}"
    if not study.training and not (folder / f"level_{len(densities) - 1}").is_dir():
        print(f"{name} trained end to end, seed {seed}: not finished below {folder}, left out", flush=True)
        return iter(())
    header = Header(format="tune", parents={"model": study.source.fingerprint})
    model = load_dense(study.source.folder)  # training freezes its weights
    trained = train_plan(
        Models(model, None, study.source.arch, study.activation),
        start_plan,
        start,
        list(densities),
        tune,
        TrainingRun(study.windows(seed), seed, folder, header),
    )
    return zip(densities, (each.plan for each in trained), strict=True)


def with_residual(study: Study, seed: int | None, densities: tuple[float, ...], of: Callable[..., Plans]) -> Plans:
    """The plans of `of` with a closed-form residual for what is skipped."""
    for density, plan in of(study, seed, densities):
        windows = study.windows(seed or 0, RESIDUAL_WINDOWS)
        yield density, add_residuals(study.model, study.source.arch, study.activation, plan, windows, RESIDUAL_RANK)


@dataclass(frozen=True)
class Method:
    """How to plan a method at densities, whether it has seeds, densities besides the common ones (so that others' costs
    lie between its own), a remark.
    """

    plans: Callable[[Study, int | None, tuple[float, ...]], Plans]
    seeded: bool = False
    more: tuple[float, ...] = ()
    note: str = ""


def _calibrated(method: str, more: tuple[float, ...] = (), **values: Any) -> Method:
    return Method(partial(calibrated, method=method, **values), more=more)


METHODS = {
    "gate": _calibrated("gate", (0.8, 0.385, 0.1, 0.05)),  # .385 costs what predictors cost at .5
    "chess": _calibrated("chess", (0.8, 0.1, 0.05)),
    "cett": _calibrated("cett", (0.8, 0.1, 0.05)),
    "teal": _calibrated("teal", (0.8,)),
    "teal MLP": _calibrated("teal", (0.8,), linears=FFN_LINEARS),
    "wina": _calibrated("wina", (0.8,)),
    "wina MLP": _calibrated("wina", (0.8,), linears=FFN_LINEARS),
    "gate + teal attention": Method(partial(with_attention, method="gate"), more=(0.8,)),
    "chess + teal attention": Method(partial(with_attention, method="chess"), more=(0.8,)),
    "predictor cross-entropy": Method(cross_entropy, seeded=True),
    "predictor end to end": Method(trained_predictor, seeded=True),
    "predictor end to end + ridge": Method(
        partial(with_residual, of=trained_predictor), seeded=True, note="closed-form residual on the predictor's hidden"
    ),
    "gate end to end": Method(trained_gate, seeded=True, note="thresholds trained from chess at .8"),
    "gate end to end + ridge": Method(
        partial(with_residual, of=trained_gate), seeded=True, note=f"residual of rank {RESIDUAL_RANK}"
    ),
}
ORACLES: dict[str, tuple[float, ...]] = {
    "magnitude": (0.8, 0.15),
    "abs_z": (),
    "corrected_gxo": (),
    "gxo": (),
    "snip": (),
    "fisher": (),
    "integrated_gradients": (),
}
"""Scores to choose by per token and layer, and densities besides the common ones."""


def measure(study: Study, name: str, seed: int | None) -> None:
    """Store the rows of a method that are not there yet."""
    method = METHODS[name]
    rows = [(density, density not in DENSITIES) for density in (*DENSITIES, *method.more)]
    missing = tuple(density for density, _ in rows if not is_stored(study, name, density, seed))
    if not missing:
        return
    asked = DENSITIES if method.plans in (trained_predictor, trained_gate) or "end to end" in name else missing
    for density, plan in method.plans(study, seed, asked):
        if density not in missing:
            continue
        apply_plan(study.model, plan, study.source.arch, study.activation)
        quality = measure_quality(study.model, plan, study.heldout, error=0.0, reference=study.reference)
        remove_plan(study.model)
        ranks = {entry.rank for entry in plan.values() if entry.rank}
        store(
            study,
            Point(
                method=name,
                density_target=density,
                seed=seed,
                nll=quality.nll,
                kl=quality.kl,
                agreement=quality.agreement,
                density=quality.density,
                cost=quality.cost,
                block_cost=quality.block_cost,
                rank=max(ranks, default=None),
                note=method.note,
            ),
        )


def measure_oracles(study: Study, names: list[str]) -> None:
    """Store the rows of scores that see too much, from the dense model's activations and gradients."""
    asked = [
        (name, density)
        for name in names
        for density in (*DENSITIES, *ORACLES[name])
        if not is_stored(study, name, density, None)
    ]
    if asked:
        outcomes = analyse_all(
            study.model, study.source.arch, study.heldout, [Setting(name, density) for name, density in asked]
        )
        for outcome in outcomes:
            label = (
                "top-k a token; the dense model's own argmax is the label"
                if outcome.phase == "oracle"
                else "top-k a token; sees every activation"
            )
            store(study, analysed(study, outcome, outcome.setting.score, label, True))


def analysed(study: Study, outcome: Outcome, name: str, note: str, oracle: bool) -> Point:
    """An outcome as a row; its cost is that of its neurons alone."""
    sizes = {
        linear: d_out * d_in for linear, (d_out, d_in) in linear_shapes(study.source.arch, study.source.config).items()
    }
    share, density = sum(sizes[linear] for linear in FFN_LINEARS) / sum(sizes.values()), outcome.density["ffn"]
    return Point(
        method=name,
        density_target=outcome.setting.density,
        nll=outcome.nll,
        kl=outcome.kl,
        agreement=outcome.agreement,
        density=density,
        cost=density,
        block_cost=1 - share * (1 - density),
        oracle=oracle,
        note=note,
    )


def measure_prompt(study: Study) -> None:
    """Selections fixed by a prompt (GRIFFIN), beside gate thresholds and the oracle magnitude: the prompt runs dense,
    what follows is measured.
    """
    path = study.work / "prompt.json"
    if path.is_file():
        return
    scores = {"griffin": "top_k", "gate": "threshold", "magnitude": "top_k"}
    settings = [
        Setting(score, density, selector, positions="prefill", prompt=PROMPT)
        for score, selector in scores.items()
        for density in DENSITIES
    ]
    outcomes = analyse_all(study.model, study.source.arch, study.heldout, settings, study.calibration)
    rows = [
        Point(
            method="dense",
            density_target=1,
            nll=outcomes[0].nll_dense,
            kl=0,
            agreement=1,
            density=1,
            cost=1,
            block_cost=1,
        )
    ]
    for outcome in outcomes:
        name = {"griffin": "griffin (analysis)"}.get(outcome.setting.score, outcome.setting.score)
        point = analysed(
            study, outcome, name, "chosen once, by the prompt" if "griffin" in name else "", outcome.oracle
        )
        if name == "gate":
            point = point.model_copy(update={"cost": (1 + 2 * point.density) / 3, "block_cost": None})
        rows.append(point.model_copy(update={"block_cost": None}))
    write_json(path, {"tokens": outcomes[0].tokens, "rows": [row.model_dump(mode="json") for row in rows]})


def measure_correlations(study: Study) -> None:
    """Rank correlations of neuron scores on the dense model, mean over layers."""
    path = study.work / "correlations.json"
    if path.is_file():
        return
    first = Batches(study.heldout.tokens[:16], study.heldout.mask[:16])
    found = rank_correlations(study.model, study.source.arch, first, CORRELATED, calibration=study.calibration)
    matrix = torch.stack(list(found.values())).mean(0)
    oracles = [name for name in CORRELATED if load_score(name).PHASE in ("oracle", "post")]
    note = (
        f"Over the {study.source.config.intermediate_size} neurons of a layer, mean over {first.count} tokens and "
        "all layers; gradients of the dense argmax."
    )
    write_json(
        path,
        Correlations(
            scores=list(CORRELATED), matrix=((matrix + matrix.T) / 2).tolist(), oracles=oracles, note=note
        ).model_dump(mode="json"),
    )


def place(study: Study, name: str, density: float, seed: int | None) -> Path:
    return study.work / "rows" / re.sub(r"\W+", "_", name) / f"{density}-{seed}.json"


def is_stored(study: Study, name: str, density: float, seed: int | None) -> bool:
    path = place(study, name, density, seed)
    return path.is_file() and read_json(path, "A row")["measured"] == _measured(study)


def store(study: Study, point: Point) -> None:
    path = place(study, point.method, point.density_target, point.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"measured": _measured(study), "row": point.model_dump(mode="json")})
    print(
        f"{point.method} {point.density_target} seed {point.seed}: NLL {point.nll:.4f} KL {point.kl:.4f} agreement "
        f"{point.agreement:.4f} "
        f"density {point.density:.4f} cost {point.cost:.4f} block {point.block_cost or 0:.4f}",
        flush=True,
    )


def _measured(study: Study) -> dict[str, str]:
    return {"model": study.source.fingerprint, "text": study.heldout.sha256}


def write(study: Study) -> None:
    """Everything that is stored, as results and page."""
    tokens = sum(int(row.sum()) - 1 for row in study.heldout.mask)
    dense = measure_dense(study)
    names = {name: [*DENSITIES, *METHODS[name].more] for name in METHODS} | {
        name: [*DENSITIES, *more] for name, more in ORACLES.items()
    }
    rows = [dense]
    for name, densities in names.items():
        for density in sorted(densities, reverse=True):
            for path in sorted(place(study, name, density, None).parent.glob(f"{density}-*.json")):
                stored = json.loads(path.read_text(encoding="utf-8"))
                if stored["measured"] == _measured(study):
                    rows.append(Point.model_validate(stored["row"]))
    correlations = study.work / "correlations.json"
    common: dict[str, Any] = {
        "model": study.source.name,
        "command": "python tests/bench/benchmarks/curves.py --work WORK",
        **provenance(),
    }
    found = (
        Correlations.model_validate_json(correlations.read_text(encoding="utf-8")) if correlations.is_file() else None
    )
    Curves(tokens=tokens, rows=rows, correlations=found, **common).save(RESULTS / "curves.json")
    prompt = study.work / "prompt.json"
    if prompt.is_file():
        Curves(**json.loads(prompt.read_text(encoding="utf-8")), **common).save(RESULTS / "curves_prompt.json")
    write_page()


def measure_dense(study: Study) -> Point:
    """The dense model's row."""
    if not is_stored(study, "dense", 1.0, None):
        total = Totals()
        for number, group in enumerate(study.reference.groups):
            with torch.no_grad():
                total.add(compare(study.reference, number, [torch_logits(study.model, {}, group)])[0])
        store(
            study,
            Point(
                method="dense",
                density_target=1,
                nll=total.means()[0],
                kl=0,
                agreement=1,
                density=1,
                cost=1,
                block_cost=1,
            ),
        )
    return Point.model_validate(read_json(place(study, "dense", 1.0, None), "A row")["row"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where plans, trainings and results are kept")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of what is trained")
    parser.add_argument("--only", help="methods, oracles, prompt or correlations, separated by commas; default: all")
    parser.add_argument("--no-training", action="store_true", help="leave out what is not trained yet")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = [*METHODS, *ORACLES, "prompt", "correlations"]
    only = known if args.only is None else [name for name in args.only.split(",") if name]
    if unknown := sorted(set(only) - set(known)):
        parser.error(f"--only must name some of {', '.join(known)}, got {', '.join(unknown)}")
    study = Study(args.work, not args.no_training)
    for name in METHODS:
        for seed in [int(text) for text in args.seeds.split(",")] if METHODS[name].seeded else [None]:
            if name in only:
                measure(study, name, seed)
    measure_oracles(study, [name for name in ORACLES if name in only and name != "integrated_gradients"])
    if "prompt" in only:
        measure_prompt(study)
    if "correlations" in only:
        measure_correlations(study)
    measure_oracles(study, [name for name in ORACLES if name in only and name == "integrated_gradients"])
    write(study)


if __name__ == "__main__":
    main()
