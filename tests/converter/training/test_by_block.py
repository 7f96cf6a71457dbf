"""Recovery block by block: errors fall and are the real ones, later blocks see the student's inputs, the closed form is
least squares, resume is exact.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model
from safetensors.torch import load_file
from torch import Tensor

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.checkpoint.stage import Header
from sparsegate.converter.modeling.blocks import ffn_parts, swap
from sparsegate.converter.modeling.empty import empty_model
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training import by_block
from sparsegate.converter.training.block_fit import Fit, Rows, Tail
from sparsegate.converter.training.by_block import recover_by_block
from sparsegate.converter.training.inputs import Models, TrainingRun
from sparsegate.converter.training.settings import ByBlock, Settings
from sparsegate.converter.training.signs import orient
from sparsegate.converter.training.walk import Half, Walk
from sparsegate.runtime_onnx.errors import InputError

HEADER = Header(format="test")
TOKENS = torch.randint(3, 290, (64, 32), generator=torch.Generator().manual_seed(4))
BATCHES = Batches(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
DRAWN = TOKENS[torch.randperm(len(TOKENS), generator=torch.Generator().manual_seed(0))]  # as seed 0 draws them
ASIDE = DRAWN[::16]
ASKED = ByBlock(steps=30, tokens=256, rate=4e-3)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases": ("llama", {"mlp_bias": True}),
    "phi3": ("phi3", {}),
    "granite": ("granite", {}),
    "gemma2": ("gemma2", {}),
    "phi": ("phi", {}),
    "sliding": ("mistral", {}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    root = tmp_path_factory.mktemp("by_block")
    return {
        name: open_source(make_model(model_type, root / name, **changes))
        for name, (model_type, changes) in CASES.items()
    }


def swapped(model: Any, source: Source, layers: tuple[int, ...] = (0, 1)) -> Any:
    for layer in layers:
        swap(
            model.get_submodule(source.arch.ffn_module(layer)),
            source.arch,
            "relu" if source.arch.ffn.kind == "plain" else "drelu",
        )
    return model


def run(
    source: Source, folder: Path, asked: ByBlock = ASKED, student: Any = None, **options: Any
) -> tuple[Any, list[dict[str, Any]]]:
    student = swapped(load_dense(source.folder), source) if student is None else student
    models = models_of(student, load_dense(source.folder), source)
    return student, recover_by_block(models, asked, run_in(folder), **{"precision": "fp32", **options})


def models_of(student: Any, teacher: Any, source: Source) -> Models:
    return Models(student, teacher, source.arch, source.arch.activation(source.config))


def run_in(folder: Path, batches: Batches = BATCHES) -> TrainingRun:
    return TrainingRun(batches, 0, folder, HEADER)


@torch.no_grad()
def seen(model: Any, source: Source, tokens: Tensor) -> list[dict[str, Tensor]]:
    """By layer: what enters the network (`x`), and the hidden states after the block (`hidden`)."""
    found: list[dict[str, Tensor]] = [{}, {}]
    handles = []
    for layer, kept in enumerate(found):
        block = model.get_submodule(source.arch.block.format(layer=layer))
        handles.append(
            block.get_submodule(source.arch.ffn.module).register_forward_pre_hook(
                lambda _, given, kept=kept: kept.update(x=given[0])
            )
        )
        handles.append(
            block.register_forward_hook(
                lambda _, given, out, kept=kept: kept.update(hidden=out[0] if isinstance(out, tuple) else out)
            )
        )
    model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return found


def added_by_dense(source: Source, tokens: Tensor, layer: int) -> Tensor:
    """What a block of the dense model adds for its network: the hidden states after it without those of a model whose
    network gives zeros.
    """
    dense, silent = load_dense(source.folder), load_dense(source.folder)
    for parameter in silent.get_submodule(f"{source.arch.ffn_module(layer)}.{source.arch.ffn.down}").parameters():
        parameter.data.zero_()
    return seen(dense, source, tokens)[layer]["hidden"] - seen(silent, source, tokens)[layer]["hidden"]


# The result


@pytest.mark.parametrize("name", list(CASES))
def test_errors_fall_and_are_those_of_whole_forward_passes(
    name: str, sources: dict[str, Source], tmp_path: Path
) -> None:
    source = sources[name]
    student, rows = run(source, tmp_path)
    assert [row["layer"] for row in rows] == [0, 1]
    recovered, dense = seen(student, source, ASIDE), seen(load_dense(source.folder), source, ASIDE)
    start = seen(swapped(load_dense(source.folder), source), source, ASIDE)
    for layer, row in enumerate(rows):
        energy = added_by_dense(source, TOKENS, layer).square().mean()  # of all windows; the errors are of those aside
        error = float((recovered[layer]["hidden"] - dense[layer]["hidden"]).square().mean() / energy)
        assert row["after"] == pytest.approx(error, rel=0.01)
        assert row["after"] <= row["trained"] and row["solved"] <= row["before"], (
            "the closed form is kept only where it is better"
        )
        assert row["after"] < 0.95 * row["before"]
        parts = ffn_parts(student.get_submodule(source.arch.ffn_module(layer)), source.arch, "", recovered[layer]["x"])
        assert row["density"] == pytest.approx(float((parts.z != 0).float().mean()), abs=0.005)
        assert [point["step"] for point in row["curve"]] == [10, 20, 30]
    assert rows[0]["before"] == pytest.approx(
        float(
            (start[0]["hidden"] - dense[0]["hidden"]).square().mean()
            / added_by_dense(source, TOKENS, 0).square().mean()
        ),
        rel=0.01,
    )


def test_only_swapped_networks_change(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources["llama"]
    student = swapped(load_dense(source.folder), source, (1,))
    student.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    wants = {name: p.requires_grad for name, p in student.named_parameters()}
    _, rows = run(source, tmp_path, student=student)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert [row["layer"] for row in rows] == [1] and [path.name for path in tmp_path.iterdir()] == ["layers.1.ffn"]
    assert {name: p.requires_grad for name, p in student.named_parameters()} == wants and all(
        p.grad is None for p in student.parameters()
    )


def test_l1_makes_it_sparser(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources["llama"]
    plain, sparse = (
        run(source, tmp_path / name, ASKED.model_copy(update={"l1": l1}))[1]
        for name, l1 in (("plain", 0.0), ("sparse", 2.0))
    )
    for one, other in zip(plain, sparse, strict=True):
        assert other["density"] < 0.9 * one["density"] and other["trained"] > one["trained"]


# What later blocks see


def test_later_blocks_see_what_the_recovered_ones_give(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, fits = sources["llama"], []
    made = Fit.__init__

    def noting(self: Fit, *given: Any) -> None:
        fits.append(self)
        made(self, *given)

    monkeypatch.setattr(Fit, "__init__", noting)
    student, rows = run(source, tmp_path / "own")
    x = fits[1].rows.x[torch.arange(DRAWN.numel())]
    own, dense = (seen(model, source, DRAWN)[1]["x"].flatten(0, 1) for model in (student, load_dense(source.folder)))
    assert float((x - own).norm()) < 2e-3 * float(own.norm()), "half precision apart"
    assert float((x - dense).norm()) > 0.1 * float(dense.norm())

    def teachers(dense: Walk, own: Walk, fit: Fit) -> None:
        own.hidden = dense.hidden

    monkeypatch.setattr(by_block, "_advance", teachers)
    control, _ = run(source, tmp_path / "control")
    first, second = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
    assert torch.equal(student.get_parameter(first), control.get_parameter(first))
    assert not torch.equal(student.get_parameter(second), control.get_parameter(second))
    wanted = seen(load_dense(source.folder), source, ASIDE)[1]["hidden"]
    real, blind = (
        float((seen(model, source, ASIDE)[1]["hidden"] - wanted).square().mean()) for model in (student, control)
    )
    assert real < 0.99 * blind


def test_signs_are_chosen_on_the_students_inputs(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing trained or solved, layer 0 is what orientation of the dense model gives; without it errors start
    higher.
    """
    source, asked = sources["phi3"], ByBlock(steps=1, tokens=32, rate=1e-12)
    _, rows = run(source, tmp_path / "plain", asked)
    monkeypatch.setattr(by_block, "_solve", lambda *_: None)
    student, turned = run(source, tmp_path / "turned", asked, turned=True)
    oriented = load_dense(source.folder)
    orient(oriented, source.arch, "silu", DRAWN)
    found, wanted, dense = (
        model.model.layers[0].mlp.down_proj.weight for model in (student, oriented, load_dense(source.folder))
    )
    other, whole = ((found - one).abs().max(dim=0).values > 1e-6 for one in (wanted, dense))
    assert int(other.sum()) <= 2 and int(whole.sum()) > 50, "of 176; near ties may fall differently in half precision"
    assert turned[0]["before"] < 0.9 * rows[0]["before"]


# The closed form


@pytest.mark.parametrize("bias", [True, False])
def test_closed_form_is_least_squares(bias: bool, sources: dict[str, Source]) -> None:
    source = sources["biases" if bias else "llama"]
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(700, 64, generator=generator) for _ in range(2)]
    halves = [Half(700, 64) for _ in rows]
    for half, values in zip(halves, rows, strict=True):
        half[:] = values
    numbers = torch.randperm(700, generator=generator)[:600]
    x, target = (half[numbers].double() for half in halves)
    network = swapped(load_dense(source.folder), source).model.layers[0].mlp
    z = ffn_parts(copy.deepcopy(network).double(), source.arch, "", x).z.detach()
    ones = torch.ones(600, int(bias), dtype=torch.float64)
    regressors, old = torch.cat([z, ones], dim=1), [p.detach().double() for p in network.down_proj.parameters()]
    before = torch.cat([old[0].T, *(p[None] for p in old[1:])])
    fit = Fit(network, source.arch, "", Tail(None, 0.5, True), Rows(halves[0], halves[1], 1.0, 1))

    wanted = torch.linalg.lstsq(regressors, target / 0.5).solution
    assert float((before - wanted).norm()) > 0.5 * float(wanted.norm())
    fit.solve_down(numbers, 1e-9)
    found = torch.cat([network.down_proj.weight.T, *([network.down_proj.bias[None]] if bias else [])]).double().detach()
    assert float((found - wanted).norm()) < 1e-4 * float(wanted.norm())

    penalty = 0.3 * float(z.square().sum(0).mean())
    system = torch.cat([regressors, penalty**0.5 * torch.eye(len(before), dtype=torch.float64)])
    change = torch.linalg.lstsq(
        system, torch.cat([target / 0.5 - regressors @ found, torch.zeros(len(before), 64, dtype=torch.float64)])
    ).solution
    fit.solve_down(numbers, 0.3)
    again = torch.cat([network.down_proj.weight.T, *([network.down_proj.bias[None]] if bias else [])]).double().detach()
    assert float((again - found - change).norm()) < 1e-4 * max(float(change.norm()), float(found.norm()))


def test_half_keeps_rows_with_outliers() -> None:
    values = torch.randn(6, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 6)[:, None, None]
    values[..., 3] *= 300.0
    values[0, 0] = 0.0
    half = Half(6, 5, 64)
    half[:3], half[3:] = values[:3], values[3:]
    assert half.values.dtype == torch.float16 and float(values.abs().max()) > 65504
    found = half[:]
    assert float(((found - values).abs() / values.abs().clamp_min(1e-30)).max()) < 2e-3
    assert torch.equal(half.flat()[torch.tensor([7, 29])], found.flatten(0, 1)[[7, 29]])


# Resume


class _Cut:
    """Counts the steps of every block's training, by site's number, and raises in a step if asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cut: tuple[int, int] | None) -> None:
        self.steps: list[list[int]] = []
        made, loss = Fit.__init__, Fit.loss

        def init(fit: Fit, *given: Any) -> None:
            self.steps.append([])
            made(fit, *given)

        def counted(fit: Fit, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
            if (len(self.steps) - 1, step) == cut:
                raise KeyboardInterrupt
            self.steps[-1].append(step)
            return loss(fit, tokens, mask, step)

        monkeypatch.setattr(Fit, "__init__", init)
        monkeypatch.setattr(Fit, "loss", counted)


@pytest.mark.parametrize(
    ("cut", "begins"), [((0, 7), (0, 0)), ((0, 25), (20, 0)), ((1, 3), (None, 0)), ((1, 12), (None, 10))]
)
def test_an_interrupted_run_ends_with_the_same_bits(
    cut: tuple[int, int],
    begins: tuple[int | None, int],
    sources: dict[str, Source],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(by_block, "Settings", partial(Settings, save_every=10))
    source = sources["llama"]
    asked = ASKED.model_copy(update={"tokens": 64})
    whole, rows = run(source, tmp_path / "whole", asked)
    with monkeypatch.context() as patch:
        _Cut(patch, cut)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "cut", asked)
    with monkeypatch.context() as patch:
        counts = _Cut(patch, None)
        resumed, again = run(source, tmp_path / "cut", asked)
    assert tuple(steps[0] if steps else None for steps in counts.steps) == begins
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in resumed.named_parameters())
    kept = ("layer", "before", "trained", "after", "density")
    assert [[row[key] for key in kept] for row in again] == [[row[key] for key in kept] for row in rows]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["layers.0.ffn", "layers.1.ffn"]


def test_other_settings_start_anew(sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources["llama"]
    first, _ = run(source, tmp_path)
    counts = _Cut(monkeypatch, None)
    same, _ = run(source, tmp_path)
    assert counts.steps == [[], []] and all(
        torch.equal(p, first.get_parameter(name)) for name, p in same.named_parameters()
    )
    other, _ = run(source, tmp_path, ASKED.model_copy(update={"rate": 1e-3}))
    assert [len(steps) for steps in counts.steps] == [0, 0, 30, 30]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(other.get_parameter(name), first.get_parameter(name))


# One block at a time


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_models_read_block_by_block(
    name: str, sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources[name]
    student, rows = run(source, tmp_path / "whole")
    models = [swapped(empty_model(source), source), empty_model(source)]
    loss, held = Fit.loss, []

    def watched(self: Fit, *given: Any) -> Tensor:
        held.append(
            [
                [k for k, block in enumerate(m.model.layers) if not any(p.is_meta for p in block.parameters())]
                for m in models
            ]
        )
        return loss(self, *given)

    monkeypatch.setattr(Fit, "loss", watched)
    both, in_lean = models_of(*models, source), run_in(tmp_path / "lean")
    again = recover_by_block(both, ASKED, in_lean, source=source, precision="fp32")
    assert held == [[[0], [0]]] * 30 + [[[1], [1]]] * 30
    assert [row["after"] for row in again] == [row["after"] for row in rows]
    for layer in (0, 1):
        stored = load_file(tmp_path / "lean" / f"layers.{layer}.ffn" / "weights.safetensors")
        wanted = {name: p for name, p in student.model.layers[layer].named_parameters() if name.startswith("mlp.")}
        assert set(stored) == set(wanted) and all(torch.equal(stored[name], p) for name, p in wanted.items())
        assert all(p.is_meta for p in models[0].model.layers[layer].parameters())
    with pytest.raises(InputError, match=r"meta device must come with its source"):
        recover_by_block(both, ASKED, in_lean)


# Mistakes


def test_nothing_to_recover(sources: dict[str, Source], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"swapped activation .* Swap first\.$"):
        run(sources["llama"], tmp_path, student=load_dense(sources["llama"].folder))


def test_too_few_windows(sources: dict[str, Source], tmp_path: Path) -> None:
    source, mask = sources["llama"], torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1:, -1] = False
    with pytest.raises(InputError, match=r"at least 2 windows without padding, got 1\."):
        student = swapped(load_dense(source.folder), source)
        models = models_of(student, load_dense(source.folder), source)
        recover_by_block(models, ASKED, run_in(tmp_path, Batches(TOKENS, mask)))


def test_a_block_that_does_something_else_with_its_network(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources["llama"]
    student = swapped(load_dense(source.folder), source)

    block = student.model.layers[1]
    plain = block.forward
    block.forward = lambda *a, **k: (lambda out: out + out.square())(plain(*a, **k))
    with pytest.raises(InputError, match=r"Block 1 must add its network's output"):
        run(source, tmp_path, student=student)
    assert (tmp_path / Site(0).key).is_dir()
