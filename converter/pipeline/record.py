"""The report on a conversion, filled from what was measured of its candidates."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ...runtime_onnx.library import DENSE, PROVIDERS, executor
from .. import report as reporting
from ..arch import Arch
from ..arch.shapes import linear_shapes
from ..arch.site import Site
from ..checkpoint.cost import predictor_cost, site_parameters
from ..checkpoint.plan import FFN_LINEARS, Gate, Predictor
from ..checkpoint.source import Source
from ..evaluation.agreement import NO_CUDA, has_cuda
from ..evaluation.checks import ExecutorQuality
from ..evaluation.quality import paired_rise
from ..evaluation.records import DenseReference, Report
from ..onnx_export.precision import PRECISIONS, Export, Precision
from .candidates import Candidate
from .conversion import Conversion
from .graphs import Graphs
from .recipe import Recipe
from .references import read_bytes
from .texts import heldout_name


def build_report(
    conversion: Conversion,
    candidates: list[Candidate],
    chosen: Candidate,
    graphs: Graphs,
    references: list[DenseReference],
    command: str,
) -> Report:
    """The report on every candidate, dense first; layers and checks are the chosen one's."""
    source, recipe, texts, quality = conversion.reference, conversion.recipe, conversion.texts, chosen.quality
    dense_speed = chosen.speed.get("baseline", {})
    dense = reporting.Row(
        method="dense",
        nll=quality.nll_dense,
        perplexity=math.exp(quality.nll_dense),
        kl=0.0,
        agreement=1.0,
        density=1.0,
        cost=1.0,
        block_cost=1.0,
        read_share=1.0,
        prefill_tokens_per_second=dense_speed.get("prefill_tokens_per_s"),
        decode_tokens_per_second=dense_speed.get("decode_tokens_per_s"),
    )
    return Report(
        model=source.name,
        revision=source.revision,
        swapped=bool(source.swaps),
        updated=chosen.updated,
        rotated=recipe.rotate or chosen.rotated,
        date=datetime.now(UTC).date().isoformat(),
        command=command,
        machine=reporting.this_machine(),
        versions=reporting.installed_versions(),
        recipe=recipe.model_copy(
            update={"model": source.name, "calibration": _public(recipe), "stages": _public_stages(recipe)}
        ).model_dump(mode="json"),
        calibration=reporting.Text(hash=texts.calibration.sha256, tokens=texts.calibration.count, name=texts.name),
        evaluation=reporting.Text(hash=texts.heldout.sha256, tokens=quality.tokens, name=heldout_name(recipe)),
        speed=_conditions(chosen.speed, recipe.export),
        speed_note=f"not run: {NO_CUDA}" if not chosen.speed and recipe.export.target == "cuda" else "",
        onnx=_onnx_rows(chosen, graphs, source, recipe.export),
        references=references,
        rows=[dense, *(_row(candidate, candidate is chosen, source) for candidate in candidates)],
        long=quality.long,
        layers=[_layer(chosen, site, entry.gating) for site, entry in chosen.plan.items()],
        checks=[
            reporting.ReportCheck(
                name=check.name,
                value=check.value,
                bound=check.bound,
                passed=check.passed,
                at_least=check.at_least,
                note=check.note,
            )
            for check in chosen.checks
        ],
    )


def _public(recipe: Recipe) -> Any:
    """The calibration part without the folders of this machine."""
    file = recipe.calibration.file
    return recipe.calibration if file is None else recipe.calibration.model_copy(update={"file": Path(file).name})


def _public_stages(recipe: Recipe) -> Any:
    """The stages without the folders of this machine."""

    def public(stage: Any) -> Any:
        folder, tune = stage.config.get("folder"), stage.tune
        if folder is not None:
            stage = stage.model_copy(update={"config": stage.config | {"folder": Path(folder).name}})
        if tune is not None:
            parts = tuple(
                part.model_copy(update={"files": tuple(Path(file).name for file in part.files)})
                for part in tune.data.mixture
            )
            stage = stage.model_copy(
                update={"tune": tune.model_copy(update={"data": tune.data.model_copy(update={"mixture": parts})})}
            )
        return stage

    return tuple(public(stage) for stage in recipe.stages)


def _row(candidate: Candidate, selected: bool, source: Source) -> reporting.Row:
    quality, speed = candidate.quality, candidate.speed
    return reporting.Row(
        method=candidate.method,
        nll=quality.nll,
        perplexity=math.exp(quality.nll),
        kl=max(quality.kl, 0.0),
        nll_error=quality.nll_error if quality.windows > 1 else None,
        agreement=quality.agreement,
        density=quality.density,
        cost=quality.cost,
        block_cost=quality.block_cost,
        selected=selected,
        read_share=_read_share(candidate, source),
        prefill_tokens_per_second=speed.get("candidate", {}).get("prefill_tokens_per_s"),
        decode_tokens_per_second=speed.get("candidate", {}).get("decode_tokens_per_s"),
        decode_ratio=speed.get("decode", {}).get("ratio"),
        prefill_ratio=speed.get("prefill", {}).get("ratio"),
    )


def _read_share(candidate: Candidate, source: Source) -> float | None:
    """Bytes that a token reads of the blocks' linear maps and the output head, relative to dense ones in the same
    format.
    """
    block_cost = candidate.quality.block_cost
    if block_cost is None:
        return None
    blocks, head = decoder_values(source.arch, source.config)
    return (block_cost * blocks + head) / (blocks + head)


def decoder_values(arch: Arch, config: Any) -> tuple[int, int]:
    """Weights of all blocks' linear maps, and of the output head."""
    blocks = arch.size(config, "layers") * sum(d_out * d_in for d_out, d_in in linear_shapes(arch, config).values())
    return blocks, int(config.vocab_size) * arch.size(config, "hidden")


def _layer(candidate: Candidate, site: Site, gate: Gate) -> reporting.Layer:
    quality = candidate.quality
    realised = quality.site_density[site.key]
    return reporting.Layer(
        site=site.key,
        density_target=None if candidate.sparsity is None else 1 - candidate.sparsity,
        density_calibrated=gate.density,
        density_realised=realised,
        cost=quality.site_cost[site.key],
        recall=gate.recall if isinstance(gate, Predictor) else None,
        rank=gate.rank if isinstance(gate, Predictor) else None,
    )


def _shipped_cost(chosen: Candidate, source: Source, form: Precision) -> float:
    """Bytes of the feed-forward networks touched per token relative to dense ones in the same precision: predictors may
    be wider than weights.
    """
    extra = 0.0
    for site, entry in chosen.plan.items():
        share = predictor_cost({site: entry}, source.arch, source.config)
        extra += share * (form.predictor_share(entry.residual is not None) - 1)
    return chosen.quality.cost + extra


def _onnx_rows(chosen: Candidate, graphs: Graphs, source: Source, settings: Export) -> list[reporting.OnnxRow]:
    """What the ONNX files lose in their own precision, the dense one first."""
    rows, on_cpu = [], settings.target == "cuda" and not has_cuda()
    sparse = _shipped_cost(chosen, source, PRECISIONS[settings.precision])
    shares = _file_shares(chosen, graphs, source, settings)
    pair = None if chosen.shipped is None or graphs.loss is None else paired_rise(chosen.shipped, graphs.loss)
    files: list[tuple[Literal["dense", "sparse"], Path | None, ExecutorQuality | None, float]] = [
        ("dense", graphs.dense, graphs.loss, 1.0),
        ("sparse", chosen.onnx, chosen.shipped, sparse),
    ]
    for model, folder, quality, cost in files:
        if folder is None or quality is None:
            continue
        chose = executor(folder, PROVIDERS[settings.target == "cuda"])
        runner = (
            "ONNX Runtime"
            if chose.reason == DENSE
            else "native kernel"
            if chose.kernel and not on_cpu
            else "standard ONNX ops"
        )
        rise, rise_error = pair if pair is not None and model == "sparse" else (None, None)
        rows.append(
            reporting.OnnxRow(
                model=model,
                precision=settings.precision,
                executor=f"{runner}{' on the CPU' if on_cpu else ''}",
                bytes=sum(path.stat().st_size for path in folder.glob("model.onnx*")),
                tokens=quality.tokens,
                nll=quality.nll,
                perplexity=math.exp(quality.nll),
                kl=max(quality.kl, 0.0),
                nll_dense=quality.nll_dense,
                nll_error=quality.nll_error if quality.windows > 1 else None,
                rise=rise,
                rise_error=rise_error,
                agreement=quality.agreement,
                cost=cost,
                read_share=shares[model],
            )
        )
    return rows


def _file_shares(chosen: Candidate, graphs: Graphs, source: Source, settings: Export) -> dict[str, float | None]:
    """Bytes that a token reads of the dense and the sparse file's products, relative to the dense graph in fp32. Ops in
    16 bits lie in a graph in fp32 on the CPU; in integers all products have as many bits.
    """
    blocks, head = decoder_values(source.arch, source.config)
    sizes, form = site_parameters(chosen.plan, source.arch, source.config), PRECISIONS[settings.precision]
    predictors = blocks * _network_share(source) * (_shipped_cost(chosen, source, form) - chosen.quality.cost)
    gated = sum(size * chosen.quality.site_cost[site.key] for site, size in sizes.items()) + predictors
    narrow = 0.5 if form.bits is None and form.w != "float32" and settings.target == "cpu" else 1.0
    dense = read_bytes(graphs.dense) / (4 * (blocks + head))
    return {"dense": dense, "sparse": dense * (blocks + head - sum(sizes.values()) + narrow * gated) / (blocks + head)}


def _network_share(source: Source) -> float:
    """Weights of the feed-forward network among all linear maps of a block."""
    sizes = {name: d_out * d_in for name, (d_out, d_in) in linear_shapes(source.arch, source.config).items()}
    return sum(size for name, size in sizes.items() if name in FFN_LINEARS) / sum(sizes.values())


def _conditions(speed: dict[str, Any], settings: Export) -> reporting.Speed | None:
    if not speed:
        return None
    conditions = speed["settings"]
    baseline = (
        "fp32" if settings.target == "cpu" and PRECISIONS[settings.precision].bits is None else settings.precision
    )
    return reporting.Speed(
        precision=settings.precision,
        baseline=baseline,
        provider=speed["candidate"]["provider"],
        threads=conditions["threads"],
        prompt_tokens=conditions["prompt_tokens"],
        new_tokens=conditions["new_tokens"],
        executor=speed["candidate"]["executor"],
        command=speed["command"],
        disturbed=speed["quiet"] is False,
    )
