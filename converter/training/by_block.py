"""Recovery block by block: every swapped network is fitted to the dense block's output, in order, on the inputs that
the recovered blocks before it give.

What is minimised in layer l is |h_student - h_dense|^2 over the tokens, h the hidden states after the block, relative
to the energy of what the dense network adds to them. The student's own attention output stands beside its network's, so
a block also makes up for what the blocks before it left. The down projection is solved in closed form (ridge, fp64)
before all three matrices are trained, and after.

Made for machines without an accelerator: no pass through the whole model is ever differentiated, and of either model
one block is needed at a time. A model whose blocks lie on the meta device (`blocks.empty_model`) is read from its files
block by block; beside the two blocks memory then holds four tensors of hidden states in half precision, at most _BYTES
together.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops.activation import cuts_up
from ...runtime_onnx.untrusted import read_json
from ..arch import Arch
from ..arch.site import Site
from ..checkpoint.source import Source
from ..checkpoint.stage import Header, atomic_folder, is_finished, write_header, write_json, write_tensors
from ..modeling.blocks import embed, ffn_down, ffn_parts, filled, moved
from ..modeling.distributed import in_bf16, same_error, share_tensors, sum_over_processes, world
from ..modeling.linalg import Gram
from ..modeling.taps import block_calls, replaced, tapped_inputs, tapped_outputs
from ..progress import track
from ..text.windows import Batches
from .loop import train
from .optimizers import Trained
from .settings import ByBlock, Settings
from .signs import energy_by_sign, flip

_TOKENS_AT_ONCE = 2048
_BYTES = 1 << 31
_ASIDE = 16  # every 16th window is kept for measuring
_PER_UNIT, _SOLVED_PER_UNIT = (
    128,
    64,
)  # tokens for every neuron of a network, at most, in training and in the closed form
_L2 = 1e-3  # relative to the mean square of z
GROUP = 32  # tokens that are drawn together
_WEIGHTS, _CURVE = "weights.safetensors", "curve.json"


class Half:
    """Rows [..., d] in fp16, each relative to its root mean square, so that outliers of hidden states fit the range."""

    def __init__(self, *shape: int) -> None:
        self.values = torch.empty(shape, dtype=torch.float16)
        self.scales = torch.empty((*shape[:-1], 1))

    def __setitem__(self, at: Any, rows: Tensor) -> None:
        scale = rows.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        self.values[at], self.scales[at] = (rows.float() / scale).half().cpu(), scale.cpu()

    def __getitem__(self, at: Any) -> Tensor:
        """Rows in fp32, on the CPU."""
        return self.values[at].float() * self.scales[at]

    def flat(self) -> Half:
        """The same memory as rows [R, d]."""
        found = Half(0, 1)
        found.values, found.scales = self.values.flatten(0, -2), self.scales.flatten(0, -2)
        return found


class Rows(NamedTuple):
    """What a network sees and must give, [R, d] from `windows` windows, and the mean square of what the dense network
    adds.
    """

    x: Half
    target: Half
    energy: float
    windows: int


class Walk:
    """A model's hidden states [N, S, d] before one of its blocks."""

    @torch.no_grad()
    def __init__(self, model: Any, source: Source | None, arch: Arch, tokens: Tensor, device: str) -> None:
        self.arch, self.source = arch, source
        self.blocks: nn.ModuleList = model.get_decoder().layers
        self.device = device
        self.lean = any(p.is_meta for p in self.blocks.parameters())
        if self.lean:
            if source is None:
                raise InputError(
                    "A model on the meta device must come with its source, got none. Pass the source that it was made "
                    "from."
                )
            tokens, _ = embed(model, source, tokens)
        else:
            self.device = str(next(self.blocks.parameters()).device)
        rows = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
        self.groups = [slice(k, min(k + rows, len(tokens))) for k in range(0, len(tokens), rows)]
        self.hidden = Half(*tokens.shape, arch.size(model.config, "hidden"))
        self.keywords: dict[int, list[dict[str, Any]]] = {}
        for group in self.groups:
            window = tokens[group].to("cpu" if self.lean else self.device)
            call = block_calls(model, self.blocks, window, torch.ones_like(window, dtype=torch.bool))
            self.hidden[group] = call.hidden
            self.keywords.setdefault(len(window), call.keywords)

    @contextmanager
    def block(self, layer: int) -> Iterator[Any]:
        """The block with its weights, which a lean model holds inside the context only."""
        if not self.lean:
            yield self.blocks[layer]
            return
        assert self.source is not None
        prefix = self.arch.block_prefix(layer)
        tensors = self.source.read(prefix + name for name, _ in self.blocks[layer].named_parameters())
        with filled(
            self.blocks[layer], {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, self.device
        ) as block:
            yield block

    def run(self, layer: int, block: Any, group: slice) -> Tensor:
        """The block's output [B, S, d] for some windows."""
        rows = self.hidden[group].to(self.device)
        out = block(rows, **moved(self.keywords[len(rows)][layer], self.device))
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(self, layer: int, block: Any) -> None:
        """Pass the hidden states on through the block."""
        for group in self.groups:
            self.hidden[group] = self.run(layer, block, group)


@contextmanager
def _giving(network: Any, output: Tensor | None) -> Iterator[list[Tensor]]:
    """Inside, `network` gives `output` (None: zeros) for any input; yields the inputs that it saw."""
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x) if output is None else output

    with replaced({network: forward}):
        yield seen


@dataclass(frozen=True)
class Tail:
    """What a block does to its network's output m before it adds it: factor * norm(m), the norm absent in most
    architectures; `linear` without one.
    """

    norm: Any | None
    factor: float
    linear: bool

    def __call__(self, m: Tensor) -> Tensor:
        """What is added for m [..., d]."""
        return self.factor * (m if self.norm is None else self.norm(m))


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


class Fit:
    """The objective of `loop.train` for one network: tail(network(x)) against what the block must add to the student's
    hidden states.

    A window's tokens are numbers of rows of `x` and `target` [R, d]. The error is relative to `energy`, the mean square
    of what the dense network adds; `l1` weighs mean|z| / rms z, `half` lets products run in bf16.
    """

    def __init__(
        self, network: Any, arch: Arch, activation: str, tail: Tail, rows: Rows, l1: float = 0.0, half: bool = False
    ) -> None:
        self.network, self.arch, self.activation, self.tail = network, arch, activation, tail
        self.rows, self.l1, self.half = rows, l1, half
        self.device = next(network.parameters()).device
        self.figures: dict[str, float] = {}

    def parameters(self) -> Mapping[str, Trained]:
        """The network's weights and biases, at the same rate."""
        return {name: Trained(parameter, hidden=True) for name, parameter in self.network.named_parameters()}

    def added(self, at: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Of some rows z [T, n], the network's output and what the block adds, both [T, d]."""
        z = ffn_parts(self.network, self.arch, self.activation, self.rows.x[at].to(self.device)).z
        out = ffn_down(self.network, self.arch, z)
        return z, out, self.tail(out)

    def loss(self, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        """The relative error and the penalty for numbers of rows [B, G]."""
        at = tokens.flatten()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            z, _, added = self.added(at)
        error = (added.float() - self.rows.target[at].to(self.device)).square().mean() / self.rows.energy
        self.figures = {"error": float(error.detach())}
        if not self.l1:
            return error
        return error + self.l1 * z.float().abs().mean() / z.float().square().mean().sqrt().clamp_min(1e-12)

    def after(self, step: int) -> dict[str, float]:
        """The error of the step's rows."""
        return self.figures

    def state(self) -> dict[str, float]:
        """Nothing is carried from step to step."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Nothing to restore."""

    @torch.no_grad()
    def measure(self, numbers: Tensor) -> tuple[float, float]:
        """The relative error over rows, given their numbers [T], and the share of z that is not 0."""
        error = nonzero = 0.0
        for at in numbers.split(_TOKENS_AT_ONCE):
            z, _, added = self.added(at)
            error += float((added - self.rows.target[at].to(self.device)).double().square().mean(1).sum())
            nonzero += float((z != 0).float().mean(1).sum())
        return error / len(numbers) / self.rows.energy, nonzero / len(numbers)

    def turn(self) -> None:
        """Flip the neurons whose energy, with the dense model's activation, is larger where up is negative."""
        chunks = torch.arange(len(self.rows.x.values)).split(_TOKENS_AT_ONCE)
        sums = sum(
            energy_by_sign(self.network, self.arch, self.activation, self.rows.x[at].to(self.device)) for at in chunks
        )
        assert isinstance(sums, Tensor)
        flip(self.network, self.arch, sums[1] > sums[0])

    @torch.no_grad()
    def solve_down(self, numbers: Tensor, l2: float = _L2) -> None:
        """Move the down projection, with its bias, to the ridge regression's solution on rows, given their numbers [T]:
        the least change that explains what is missing, `l2` relative to the mean square of z. Only for a linear tail.
        """
        linear = getattr(self.network, self.arch.ffn.down)
        units = linear.weight.shape[1]
        gram = Gram.empty(units + (linear.bias is not None), linear.weight.shape[0])
        for at in numbers.split(_TOKENS_AT_ONCE):
            z, out, _ = self.added(at)
            regressors = z if linear.bias is None else torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
            gram.add(regressors, self.rows.target[at].to(self.device) / self.tail.factor - out)
        change = gram.solve(l2 * float(gram.hidden.diagonal()[:units].mean())).to(linear.weight)
        linear.weight += change[:units].T
        if linear.bias is not None:
            linear.bias += change[units]


def recover_by_block(
    student: Any,
    teacher: Any,
    arch: Arch,
    batches: Batches,
    settings: ByBlock,
    seed: int,
    folder: Path,
    header: Header,
    *,
    source: Source | None = None,
    turned: bool = False,
    l1: float = 0.0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Fit the networks of `student` whose activation was swapped to the blocks of `teacher`, the dense model, in place.

    Tokens come from the windows of `batches` without padding. `l1` weighs mean|z| / rms z against the relative error;
    `precision` is that of the products while training (auto: bf16 where the machine multiplies it natively). A finished
    block is a folder below `folder` with its weights under their names in the block and `header` extended by the site,
    so that a run goes on where it was interrupted, to the same weights. A model whose blocks lie on the meta device is
    read from `source` on `device`; of such a student the recovered weights are in the folders only. `turned` chooses
    the signs of a dReLU network's neurons afresh, as `signs.orient` does, on the inputs that the student gives it: for
    a student that could not be oriented whole, fresh from its swap. Returns a row per block: its `layer`; `before`,
    `solved`, `trained` and `after`, the error on windows set aside relative to the energy of what the dense network
    adds (0 is perfect), at the start, with the down projection solved, after training and with it solved again;
    `density`, the share of z that is not 0; `curve`, the training's; `seconds`, and `cpu_seconds` of all processes, of
    the run that finished it. Raises InputError where there is nothing to fit, or a block does something else with its
    network's output than scale and norm it.
    """
    wanted = [
        site
        for site in arch.sites(teacher.config)
        if hasattr(student.get_submodule(arch.ffn_module(site.layer)), "swapped")
    ]
    if not wanted:
        raise InputError("A network must have a swapped activation to be recovered, got none. Swap first.")
    tokens = _enough(batches, arch, teacher.config, seed)
    config = header.config | {
        "by_block": settings.model_dump(),
        "sites": [site.key for site in wanted],
        "l1": l1,
        "precision": precision,
        "turned": turned,
    }
    header = header.model_copy(update={"seed": seed, "calibration": batches.sha256})
    curve: list[dict[str, Any]] = []
    dense, own = (Walk(model, source, arch, tokens, device) for model in (teacher, student))
    for layer in track(range(wanted[-1].layer + 1), unit="block"):
        site = Site(layer)
        with dense.block(layer) as block, own.block(layer) as fitted:
            if site not in wanted:
                dense.advance(layer, block)
                own.advance(layer, fitted)
                continue
            tail, rows = _rows(dense, own, layer, block, fitted)
            fit = Fit(fitted.get_submodule(arch.ffn.module), arch, arch.activation(teacher.config), tail, rows, l1)
            fit.half = in_bf16(precision, fit.device)
            stage = header.model_copy(update={"config": config | {"site": site.key}})
            if turned and cuts_up(fit.network.swapped):
                fit.turn()
            curve.append({"layer": layer, **_recovered(fit, settings, seed, folder / site.key, stage)})
            _advance(dense, own, fit)
    return curve


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
def _rows(dense: Walk, own: Walk, layer: int, block: Any, fitted: Any) -> tuple[Tail, Rows]:
    """The tail of the student's block and what its network sees and must give; advances the dense hidden states."""
    arch = own.arch
    tails = [
        _tail(walk, layer, one, one.get_submodule(arch.ffn.module)) for walk, one in ((own, fitted), (dense, block))
    ]
    x, target = (Half(*own.hidden.values.shape) for _ in range(2))
    added: list[Tensor] = []  # sums of squares

    def note(out: Tensor) -> None:
        added.append(tails[1](out).double().square().sum().cpu())

    with tapped_outputs({block.get_submodule(arch.ffn.module): note}):
        for group in own.groups:
            out = dense.run(layer, block, group)
            with _giving(fitted.get_submodule(arch.ffn.module), None) as seen:
                rest = own.run(layer, fitted, group)
            x[group], target[group], dense.hidden[group] = seen[0], out - rest.to(out), out
    if not bool(dense.hidden.scales.isfinite().all()):
        raise InputError(
            f"Hidden states must be finite numbers, got NaN or infinity after layer {layer}. Check the weights; fetch "
            "the model again."
        )
    return tails[0], Rows(
        x.flat(), target.flat(), float(torch.stack(added).sum()) / target.values.numel(), len(x.values)
    )


@torch.no_grad()
def _advance(dense: Walk, own: Walk, fit: Fit) -> None:
    """The student's hidden states after the block: the dense ones and what is still missing or too much."""
    length = own.hidden.values.shape[1]
    for group in own.groups:
        at = torch.arange(group.start * length, group.stop * length)
        missed = fit.added(at)[2].cpu() - fit.rows.target[at]
        own.hidden[group] = dense.hidden[group] + missed.view(-1, length, missed.shape[1])


def _recovered(fit: Fit, settings: ByBlock, seed: int, folder: Path, header: Header) -> dict[str, Any]:
    """Train and solve one network, or take its weights from its finished folder; returns the block's figures."""
    parameters = dict(fit.network.named_parameters())
    if is_finished(folder, header):
        stored = load_file(folder / _WEIGHTS)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[f"{fit.arch.ffn.module}.{name}"])
        return read_json(folder / _CURVE, "The block's figures")
    begun = time.process_time(), time.monotonic()
    length = len(fit.rows.x.values) // fit.rows.windows
    number = torch.arange(len(fit.rows.x.values))
    apart = number // length % _ASIDE == 0
    aside, drawn = (
        number[apart],
        number[~apart][torch.randperm(int((~apart).sum()), generator=torch.Generator().manual_seed(seed))],
    )
    figures: dict[str, Any] = {"before": fit.measure(aside)[0]}
    _solve(fit, drawn, aside)
    figures["solved"] = fit.measure(aside)[0]
    group = min(GROUP, settings.tokens, len(drawn))
    indices = drawn[: len(drawn) // group * group].view(-1, group)
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    state = folder.with_name(f"{folder.name}.training")
    loop = Settings(steps=settings.steps, windows=settings.tokens // group, rate=settings.rate, seed=seed)
    figures["curve"] = train(
        fit, Batches(indices, torch.ones_like(indices, dtype=torch.bool)), loop, state, header, lambda _: None
    )
    for name, parameter in parameters.items():
        parameter.requires_grad_(wanted[name])
        parameter.grad = None
    figures["trained"] = fit.measure(aside)[0]
    _solve(fit, drawn, aside)
    figures["after"], figures["density"] = fit.measure(aside)
    figures["seconds"] = time.monotonic() - begun[1]
    figures["cpu_seconds"] = float(
        sum_over_processes(torch.tensor(time.process_time() - begun[0], dtype=torch.float64))
    )
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
