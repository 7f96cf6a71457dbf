"""Recovery block by block: every swapped network is fitted to the dense block's output, in order, on the inputs that
the recovered blocks before it give.

What is minimised in layer l is |h_student - h_dense|^2 over the tokens, h the hidden states after the block, relative
to the energy of what the dense network adds to them. The student's own attention output stands beside its network's, so
a block also makes up for what the blocks before it left. The down projection is solved in closed form (ridge, fp64)
before all three matrices are trained, and after.

Made for machines without an accelerator: no pass through the whole model is ever differentiated, and of either model
one block is needed at a time. A model whose blocks lie on the meta device (`empty.empty_model`) is read from its files
block by block; beside the two blocks memory then holds four tensors of hidden states in half precision, at most _BYTES
together.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops.activation import cuts_up
from ...runtime_onnx.untrusted import read_json
from ..arch import Arch
from ..arch.site import Site
from ..checkpoint.fields import PassPrecision
from ..checkpoint.source import Source
from ..checkpoint.stage import Header, atomic_folder, is_finished, write_header, write_json, write_tensors
from ..modeling.distributed import in_bf16, same_error, share_tensors, sum_over_processes, world
from ..modeling.taps import replaced, tapped_inputs, tapped_outputs
from ..progress import track
from ..text.windows import Batches
from .block_fit import Fit, Rows, Tail
from .inputs import Models, TrainingRun
from .loop import train
from .settings import ByBlock, Settings
from .walk import Half, Walk

_BYTES = 1 << 31
_ASIDE = 16  # every 16th window is kept for measuring
_PER_UNIT, _SOLVED_PER_UNIT = 128, 64  # tokens for a neuron, at most: in training, in the closed form
GROUP = 32  # tokens that are drawn together
_WEIGHTS, _CURVE = "weights.safetensors", "curve.json"


@contextmanager
def _giving(network: Any, output: Tensor | None) -> Iterator[list[Tensor]]:
    """Inside, `network` gives `output` (None: zeros) for any input; yields the inputs that it saw."""
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x) if output is None else output

    with replaced({network: forward}):
        yield seen


def _tail(walk: Walk, layer: int, block: Any, network: Any) -> Tail:
    """The tail of a block, from its outputs for two outputs of its network. Raises InputError for a block that adds
    something else.
    """
    group = walk.groups[0]
    with _giving(network, None) as seen:
        without = walk.run(layer, block, group)
    drawn = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(0)).to(seen[0])
    output = drawn * float(without.square().mean().sqrt())
    takers: list[Any] = []

    def note(module: Any, entering: Any) -> None:
        if entering is output:
            takers.append(module)

    noting = {module: partial(note, module) for module in block.modules() if module is not network}
    with tapped_inputs(noting), _giving(network, output):
        change = walk.run(layer, block, group) - without
    norm = takers[0] if takers else None
    one, two = (output * k if norm is None else norm(output * k) for k in (1.0, 2.0))
    factor = float((change * one).sum() / one.square().sum())
    if float((change - factor * one).norm()) > 1e-2 * float(change.norm()):
        raise InputError(
            f"Block {layer} must add its network's output, scaled or normed, to its hidden states, got another sum. "
            "Recover end to end instead."
        )
    return Tail(norm, factor, bool(torch.allclose(two, 2 * one, rtol=1e-4, atol=1e-6 * float(one.abs().max()))))


def recover_by_block(
    models: Models,
    settings: ByBlock,
    run: TrainingRun,
    *,
    source: Source | None = None,
    turned: bool = False,
    precision: PassPrecision = "auto",
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Fit the student's networks whose activation was swapped to the teacher's blocks, in place.

    Tokens come from the run's windows without padding. `precision` is that of the products while training. A finished
    block is a folder below the run's with its weights under their names in the block and the header extended by the
    site, so that a run goes on where it was interrupted, to the same weights. A model whose blocks lie on the meta
    device is read from `source` on `device`; of such a student the recovered weights are in the folders only. `turned`
    chooses the signs of a dReLU network's neurons afresh, as `signs.orient` does, on the inputs that the student gives
    it: for a student that could not be oriented whole, fresh from its swap. Returns a row per block, of its `layer` and
    the figures of `_recovered`. Raises InputError where there is nothing to fit, or a block does something else with
    its network's output than scale and norm it.
    """
    arch, wanted = models.arch, _swapped_sites(models)
    tokens = _enough(run.batches, arch, models.student.config, run.seed)
    decides = {"by_block": settings.model_dump(), "sites": [site.key for site in wanted], "l1": settings.l1}
    config = run.header.config | decides | {"precision": precision, "turned": turned}
    header = run.header.model_copy(update={"seed": run.seed, "calibration": run.batches.sha256})
    rows: list[dict[str, Any]] = []
    dense, student = (Walk(model, source, arch, tokens, device) for model in (models.teacher, models.student))
    for layer in track(range(wanted[-1].layer + 1), unit="block"):
        site = Site(layer)
        with dense.block(layer) as dense_block, student.block(layer) as block:
            if site not in wanted:
                dense.advance(layer, dense_block)
                student.advance(layer, block)
                continue
            tail, seen = _rows(dense, student, layer, dense_block, block)
            network = block.get_submodule(arch.ffn.module)
            half = in_bf16(precision, next(network.parameters()).device)
            fit = Fit(network, arch, models.activation, tail, seen, settings.l1, half)
            if turned and cuts_up(network.swapped):
                fit.turn()
            stage = header.model_copy(update={"config": config | {"site": site.key}})
            rows.append({"layer": layer, **_recovered(fit, settings, run.seed, run.folder / site.key, stage)})
            _advance(dense, student, fit)
    return rows


def _swapped_sites(models: Models) -> list[Site]:
    """The sites whose networks are to be fitted. Raises InputError where there is none."""
    sites = [
        site
        for site in models.arch.sites(models.student.config)
        if hasattr(models.student.get_submodule(models.arch.ffn_module(site.layer)), "swapped")
    ]
    if not sites:
        raise InputError("A network must have a swapped activation to be recovered, got none. Swap first.")
    return sites


def micro_batch(settings: ByBlock) -> int:
    """Groups of at most GROUP tokens in a training step, which processes share."""
    return settings.tokens // min(GROUP, settings.tokens)


def _enough(batches: Batches, arch: Arch, config: Any, seed: int) -> Tensor:
    """The windows that are used [N, S], drawn by seed: _PER_UNIT tokens for every neuron, as far as there are so many
    and they fit into _BYTES.
    """
    tokens = batches.tokens[batches.mask.all(1)]
    length = tokens.shape[1]
    count = min(
        -(-_PER_UNIT * arch.size(config, "units") // length), _BYTES // (4 * 2 * arch.size(config, "hidden") * length)
    )
    if len(tokens) < 2:
        raise InputError(
            f"Recovery must have at least 2 windows without padding, got {len(tokens)}. Give more text, or shorter "
            "windows."
        )
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[: max(2, count)]]


@torch.no_grad()
def _rows(dense: Walk, student: Walk, layer: int, dense_block: Any, block: Any) -> tuple[Tail, Rows]:
    """The tail of the student's block and what its network sees and must give; advances the dense hidden states."""
    dense_network, network = (each.get_submodule(student.arch.ffn.module) for each in (dense_block, block))
    dense_tail = _tail(dense, layer, dense_block, dense_network)
    tail = _tail(student, layer, block, network)
    x, target = (Half(*student.hidden.values.shape) for _ in range(2))
    added: list[Tensor] = []  # sums of squares

    def note(out: Tensor) -> None:
        added.append(dense_tail(out).double().square().sum().cpu())

    with tapped_outputs({dense_network: note}):
        for group in student.groups:
            out = dense.run(layer, dense_block, group)
            with _giving(network, None) as seen:
                rest = student.run(layer, block, group)
            x[group], target[group], dense.hidden[group] = seen[0], out - rest.to(out), out
    if not bool(dense.hidden.scales.isfinite().all()):
        raise InputError(
            f"Hidden states must be finite numbers, got NaN or infinity after layer {layer}. Check the weights; fetch "
            "the model again."
        )
    energy = float(torch.stack(added).sum()) / target.values.numel()
    return tail, Rows(x.flat(), target.flat(), energy, len(x.values))


@torch.no_grad()
def _advance(dense: Walk, student: Walk, fit: Fit) -> None:
    """The student's hidden states after the block: the dense ones and what is still missing or too much."""
    length = student.hidden.values.shape[1]
    for group in student.groups:
        at = torch.arange(group.start * length, group.stop * length)
        missed = fit.added(at)[2].cpu() - fit.rows.target[at]
        student.hidden[group] = dense.hidden[group] + missed.view(-1, length, missed.shape[1])


def _recovered(fit: Fit, settings: ByBlock, seed: int, folder: Path, header: Header) -> dict[str, Any]:
    """Fit one network, or take its weights from its finished folder. Returns the block's figures: `before`, `solved`,
    `trained` and `after`, the error on windows set aside relative to the energy of what the dense network adds (0 is
    perfect), at the start, with the down projection solved, after training and with it solved again; `density`, the
    share of z that is not 0; `curve`, the training's; `seconds`, and `cpu_seconds` of all processes, of the run that
    finished it.
    """
    parameters = dict(fit.network.named_parameters())
    if is_finished(folder, header):
        stored = load_file(folder / _WEIGHTS)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[f"{fit.arch.ffn.module}.{name}"])
        return read_json(folder / _CURVE, "The block's figures")
    cpu_before, before = time.process_time(), time.monotonic()
    state = folder.with_name(f"{folder.name}.training")
    figures = _fitted(fit, settings, seed, state, header)
    figures["seconds"] = time.monotonic() - before
    cpu_seconds = torch.tensor(time.process_time() - cpu_before, dtype=torch.float64)
    figures["cpu_seconds"] = float(sum_over_processes(cpu_seconds))
    share_tensors(parameters.values())
    with same_error():
        if world().rank == 0:
            with atomic_folder(folder) as partial:
                weights = {
                    f"{fit.arch.ffn.module}.{name}": p.detach().cpu().contiguous() for name, p in parameters.items()
                }
                write_tensors(partial / _WEIGHTS, weights)
                write_json(partial / _CURVE, figures)
                write_header(partial, header)
            shutil.rmtree(state, ignore_errors=True)
    return figures


def _fitted(fit: Fit, settings: ByBlock, seed: int, state: Path, header: Header) -> dict[str, Any]:
    """Solve, train and solve again; returns errors, density and curve."""
    number = torch.arange(len(fit.rows.x.values))
    apart = number // (len(number) // fit.rows.windows) % _ASIDE == 0
    aside, others = number[apart], number[~apart]
    drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))]
    figures: dict[str, Any] = {"before": fit.measure(aside)[0]}
    _solve(fit, drawn, aside)
    figures["solved"] = fit.measure(aside)[0]
    group = min(GROUP, settings.tokens, len(drawn))
    groups = drawn[: len(drawn) // group * group].view(-1, group)
    loop = Settings(steps=settings.steps, windows=settings.tokens // group, rate=settings.rate, seed=seed)
    with _with_gradients(fit.network):
        figures["curve"] = train(
            fit, Batches(groups, torch.ones_like(groups, dtype=torch.bool)), loop, state, header, lambda _: None
        )
    figures["trained"] = fit.measure(aside)[0]
    _solve(fit, drawn, aside)
    figures["after"], figures["density"] = fit.measure(aside)
    return figures


@contextmanager
def _with_gradients(network: Any) -> Iterator[None]:
    """Every parameter of `network` takes gradients inside the block; afterwards those that did, and none is left."""
    taking = {parameter: parameter.requires_grad for parameter in network.parameters()}
    network.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, before in taking.items():
            parameter.requires_grad_(before)
            parameter.grad = None


@torch.no_grad()
def _solve(fit: Fit, drawn: Tensor, aside: Tensor) -> None:
    """Solve the down projection on the rows `drawn`, and keep that where the error on the rows `aside` falls."""
    if not fit.tail.linear:
        return
    down = getattr(fit.network, fit.arch.ffn.down)
    held, error = [p.detach().clone() for p in down.parameters()], fit.measure(aside)[0]
    fit.solve_down(drawn[: _SOLVED_PER_UNIT * down.weight.shape[1]])
    if fit.measure(aside)[0] > error:
        for parameter, value in zip(down.parameters(), held, strict=True):
            parameter.copy_(value)
