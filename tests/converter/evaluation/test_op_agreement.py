"""Equality of executors: a deep chaotic model passes, and small faults fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gated_torch import put_plan
from models import make_model

from sparsegate.converter.arch.site import Site
from sparsegate.converter.bundled import BUNDLED, HELDOUT_TEXT
from sparsegate.converter.checkpoint.plan import Plan, SitePlan, Threshold, threshold_of
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.evaluation.agreement import check_onnx
from sparsegate.converter.evaluation.checks import Check
from sparsegate.converter.evaluation.op_agreement import Watched, judge_ops, open_watched, watch, watched_tokens
from sparsegate.converter.evaluation.paired import compare, eight_bits, last_bits, noised
from sparsegate.converter.modeling.blocks import ffn_parts
from sparsegate.converter.modeling.gated import apply_plan, gated_modules, load_dense, remove_plan
from sparsegate.converter.onnx_export.export import export
from sparsegate.converter.onnx_export.precision import Export
from sparsegate.converter.onnx_export.rounded import round_model
from sparsegate.converter.onnx_export.stored import stored_ops
from sparsegate.converter.text.windows import Batches, make_batches, read_text
from sparsegate.runtime_onnx.ops.quantisation import round_activations
from sparsegate.runtime_onnx.session import Decoder


class Exported(NamedTuple):
    """A model, half of whose neurons a threshold by layer keeps, and its files by precision."""

    source: Source
    model: Any
    plan: Plan
    batches: Batches
    folder: Path

    def onnx(self, precision: str) -> Path:
        """The ONNX folder in a precision."""
        out = self.folder / precision
        if not out.exists():
            self.export(self.plan, out, precision)
        return out

    def export(self, plan: Plan, out: Path, precision: str = "fp32") -> None:
        """The ONNX folder of the model with another plan."""
        export(put_plan(self.source.folder, plan, out), out, precision, base=self.folder / "base")

    def checks(self, plan: Plan, precision: str = "fp32") -> dict[str, Check]:
        """The file against a torch model gated by `plan`; checks by name."""
        model = self.model if precision == "fp32" else load_dense(self.source.folder)
        apply_plan(model, plan, self.source.arch, "silu")
        try:
            checks = check_onnx(self.onnx(precision), model, plan, self.batches, Export(precision=precision))  # type: ignore[arg-type]
        finally:
            remove_plan(model)
        return {check.name: check for check in checks}

    def ops(self, plan: Plan, precision: str = "fp32") -> set[str]:
        """The executors whose ops differ from a checkpoint with `plan`; the file is run once a precision."""
        key, rounded = (self.folder, precision), precision in ("int8", "int4")
        if key not in _SEEN:
            tokens = watched_tokens(self.batches, rounded)[: 1 if rounded else 2]
            _SEEN[key] = {
                name: watch(open_watched(self.onnx(precision), name == "kernel", None, rounded), tokens)
                for name in ("body", "kernel")
            }
        model = self.model if precision == "fp32" else load_dense(self.source.folder)
        apply_plan(model, plan, self.source.arch, "silu")
        stored = list(stored_ops(model, plan, self.source.arch, precision))
        try:
            if precision != "fp32":
                round_model(model, plan, self.source.arch, precision)
            return {
                name for name, tally in judge_ops(model, _SEEN[key], stored).items() if not tally.check(name).passed
            }
        finally:
            remove_plan(model)


_SEEN: dict[tuple[Path, str], dict[str, Watched]] = {}


def exported(model: Path, folder: Path) -> Exported:
    """Build, plan and gate a model."""
    source = open_source(model)
    batches = make_batches(source.tokenizer(), read_text(HELDOUT_TEXT), 16, 64, 0)
    folder.mkdir(exist_ok=True)
    dense = load_dense(source.folder)
    return Exported(source, dense, halved(dense, source, batches), batches, folder)


@torch.no_grad()
def halved(model: Any, source: Source, batches: Batches) -> Plan:
    """A threshold by layer at the median of its gates."""
    taus: dict[int, float] = {}

    def see(layer: int) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            taus[layer] = float(ffn_parts(module, source.arch, "silu", inputs[0]).gate.abs().median())

        return hook

    layers = [site.layer for site in source.arch.sites(source.config)]
    handles = [
        model.get_submodule(source.arch.ffn_module(layer)).register_forward_pre_hook(see(layer)) for layer in layers
    ]
    model(input_ids=batches.tokens[:4])
    for handle in handles:
        handle.remove()
    units = source.arch.size(source.config, "units")
    return {Site(layer): SitePlan(gate=Threshold("gate", torch.full((units,), taus[layer]), 0.5)) for layer in layers}


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(BUNDLED, tmp_path_factory.mktemp("bundled"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """30 layers with random weights: chaotic."""
    folder = tmp_path_factory.mktemp("deep")
    return exported(make_model("llama", folder / "model", num_hidden_layers=30), folder)


@pytest.fixture(params=["bundled", "deep"])
def either(request: pytest.FixtureRequest) -> Iterator[Exported]:
    yield request.getfixturevalue(request.param)


def swapped(plan: Plan) -> Plan:
    """Two layers' thresholds in each other's place."""
    return plan | {Site(1): plan[Site(2)], Site(2): plan[Site(1)]}


def without_a_neuron(plan: Plan) -> Plan:
    """One neuron of one layer is never kept."""
    entry = plan[Site(1)].gating
    assert isinstance(entry, Threshold)
    tau = entry.tau.clone()
    tau[5] = torch.inf
    return plan | {Site(1): SitePlan(gate=replace(entry, tau=tau))}


def shifted(plan: Plan) -> Plan:
    """One layer's thresholds are 1 % higher."""
    entry = plan[Site(1)].gating
    assert isinstance(entry, Threshold)
    return plan | {Site(1): SitePlan(gate=replace(entry, tau=entry.tau * 1.01))}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.passed}


def test_the_same_model_agrees(either: Exported) -> None:
    checks = either.checks(either.plan)
    assert failed(checks) == set(), [check for check in checks.values() if not check.passed]
    assert set(checks) == {
        "body ops",
        "kernel ops",
        "torch ops",
        "body logits",
        "kernel logits",
        "kernel NLL",
        "genai kernel greedy tokens",
    }
    layers = len(either.plan)
    assert all(
        f"{layers} ops, {layers * 128} tokens" in checks[name].note for name in ("body ops", "kernel ops", "torch ops")
    )


@pytest.mark.parametrize("fault", [swapped, without_a_neuron, shifted])
def test_small_faults_fail_in_every_executor(either: Exported, fault: Any) -> None:
    assert either.ops(fault(either.plan)) == {"body", "kernel"}, "torch is judged by the checkpoint that it holds"


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_precisions_agree_and_faults_fail(bundled: Exported, precision: str) -> None:
    assert bundled.ops(bundled.plan, precision) == set()
    for fault in (swapped, without_a_neuron, shifted):
        assert bundled.ops(fault(bundled.plan), precision) == {"body", "kernel"}, (fault, precision)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_whole_files_agree_in_every_precision(bundled: Exported, precision: str) -> None:
    assert failed(bundled.checks(bundled.plan, precision)) == set()


def test_an_op_too_few_and_an_op_too_many_fail(bundled: Exported) -> None:
    missing = {site: entries for site, entries in bundled.plan.items() if site != Site(1)}
    checks = bundled.checks(missing)
    assert "is not in the checkpoint" in checks["kernel ops"].note and not checks["kernel ops"].passed
    folder = bundled.folder / "fewer"
    bundled.export(missing, folder)
    apply_plan(bundled.model, bundled.plan, bundled.source.arch, "silu")
    try:
        found = {check.name: check for check in check_onnx(folder, bundled.model, bundled.plan, bundled.batches)}
    finally:
        remove_plan(bundled.model)
    assert "is not in the file" in found["body ops"].note and not found["body ops"].passed


def test_a_wrong_rest_of_the_graph_fails(bundled: Exported) -> None:
    """Every op is right, but a norm before the head differs by 1 %."""
    norm = bundled.model.model.norm.weight
    with torch.no_grad():
        norm[3] *= 1.01
        try:
            assert {"body logits", "kernel logits"} <= failed(bundled.checks(bundled.plan))
        finally:
            norm[3] /= 1.01


def test_a_wrong_wiring_fails_end_to_end(bundled: Exported) -> None:
    nothing = replace(threshold_of(bundled.plan[Site(0)]), tau=torch.full((512,), torch.inf))
    plan = bundled.plan | {Site(0): SitePlan(gate=nothing)}
    apply_plan(bundled.model, plan, bundled.source.arch, "silu")
    try:
        (check,) = compare("kernel", Decoder(bundled.onnx("fp32")), bundled.model, bundled.batches, last_bits(0), False)
    finally:
        remove_plan(bundled.model)
    assert not check.passed and check.value > 2 * check.bound


def test_noise_enters_every_gated_module(bundled: Exported) -> None:
    apply_plan(bundled.model, bundled.plan, bundled.source.arch, "silu")
    seen: list[torch.Tensor] = []

    def noise(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return last_bits(1)(x)

    try:
        assert len(gated_modules(bundled.model)) == 5
        with torch.no_grad(), noised(bundled.model, noise):
            bundled.model(input_ids=bundled.batches.tokens[:1])
        moved = (last_bits(1)(seen[0]) / seen[0] - 1).abs()
        assert len(seen) == 5 and 0 < float(moved.max()) <= 2**-20
    finally:
        remove_plan(bundled.model)


def test_eight_bits_are_the_kernels() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32))
    q, step = round_activations(x.numpy().reshape(3, 2, 32))
    assert np.allclose(eight_bits(x).numpy(), (q * step).reshape(3, 64), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_no_false_alarm_in_deep_models(seed: int, tmp_path: Path) -> None:
    model = exported(make_model("llama", tmp_path / "model", seed=seed, num_hidden_layers=30), tmp_path)
    checks = model.checks(model.plan)
    assert failed(checks) == set(), [check for check in checks.values() if not check.passed]
