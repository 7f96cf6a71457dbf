"""Where a model is watched and changed while it runs. No other file sets a module's `forward` or hooks on to it.

- `tapped_inputs`, `tapped_outputs`: what enters and what leaves modules.
- `replaced`: what modules compute. `replace` and `restore` do the same for good, `replacements` tells what is set.
- `block_calls`: what a decoder calls its blocks with.
- `tapped`: the sites of a dense model, by the names of its architecture file. `ffn_inputs` keeps what enters them.

Contexts nest. Each leaves the modules as it found them, after an exception too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arch import Arch
from ..arch.shapes import linear_rows
from ..arch.site import Site
from .blocks import down_rows, ffn_down, ffn_modules, ffn_parts

Forward = Callable[..., Any]
"""Called in place of a module's forward, with its arguments; the module itself is not among them."""
Tap = Callable[[Tensor], Tensor | None]
"""Called with what passes; a tensor that it returns passes instead. `list.append` is one that only watches."""
Fields = dict[str, Tensor]
SiteTap = Callable[[Site, Fields], Tensor | None]
"""Called at a site with the fields of a score's Context, leading axes [B, S]; returns the units that stay [B, S, n]
(heads: [B, S, H]) or None for all.
"""


# Modules


def replace(module: Any, forward: Forward) -> None:
    """`module` computes `forward` from now on, whatever it computed before."""
    module.forward = forward


def restore(module: Any) -> None:
    """`module` computes again what its class says. One that does already stays as it is."""
    vars(module).pop("forward", None)


def replacements(module: Any) -> dict[Any, Forward]:
    """The forwards that are set on `module` and on those below it, by module; the others compute what their classes
    say.
    """
    return {part: vars(part)["forward"] for part in module.modules() if "forward" in vars(part)}


@contextmanager
def replaced(forwards: Mapping[Any, Forward]) -> Iterator[None]:
    """Every module of `forwards` computes its forward inside the block. Afterwards it computes what it did before, be
    that its class's forward or one that was set.

    A forward that wants the module's own takes `module.forward` before the block.
    """
    with ExitStack() as stack:
        for module, forward in forwards.items():
            if "forward" in vars(module):
                stack.callback(replace, module, vars(module)["forward"])
            else:
                stack.callback(restore, module)
            replace(module, forward)
        yield


@contextmanager
def tapped_inputs(taps: Mapping[Any, Tap]) -> Iterator[None]:
    """Every module's tap is called with the module's first positional argument inside the block, before the module
    runs. A call without a positional argument is not seen.
    """
    with ExitStack() as stack:
        for module, tap in taps.items():
            stack.callback(module.register_forward_pre_hook(partial(_enter, tap)).remove)
        yield


@contextmanager
def tapped_outputs(taps: Mapping[Any, Tap]) -> Iterator[None]:
    """Every module's tap is called with what the module returns inside the block; of a tuple, with its first."""
    with ExitStack() as stack:
        for module, tap in taps.items():
            stack.callback(module.register_forward_hook(partial(_leave, tap)).remove)
        yield


def _enter(tap: Tap, module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    changed = tap(arguments[0]) if arguments else None
    return None if changed is None else (changed, *arguments[1:])


def _leave(tap: Tap, module: Any, arguments: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        changed = tap(output[0])
        return None if changed is None else (changed, *output[1:])
    return tap(output)


# Blocks


class BlockCalls(NamedTuple):
    """What enters the first block [B, S, d], and the keyword arguments of every block."""

    hidden: Tensor
    keywords: list[dict[str, Any]]


def block_calls(model: Any, blocks: Iterable[Any], tokens: Tensor, mask: Tensor) -> BlockCalls:
    """Run embedding and preparation of the decoder on tokens [B, S] with mask [B, S]; no block runs, and nothing else
    whose parameters are on the meta device.

    Positions, rotary tables and attention masks come from the model's own forward.
    """
    decoder = model.get_decoder()
    hidden: list[Tensor] = []
    keywords: list[dict[str, Any]] = []

    def pass_on(hidden_states: Tensor, **arguments: Any) -> Tensor:
        hidden.append(hidden_states)
        keywords.append(arguments)
        return hidden_states

    empty = [
        child
        for child in decoder.children()
        if child is not blocks and any(parameter.is_meta for parameter in child.parameters())
    ]
    with replaced(dict.fromkeys(blocks, pass_on) | dict.fromkeys(empty, lambda x: x)):
        decoder(input_ids=tokens, attention_mask=None if bool(mask.all()) else mask.long(), use_cache=False)
    return BlockCalls(hidden[0], keywords)


# Sites


@contextmanager
def tapped(model: Any, arch: Arch, kinds: Sequence[str], see: SiteTap) -> Iterator[None]:
    """`model` with `see` at every site of `kinds` (ffn, attn, linear) inside the block. What does not stay is zero
    afterwards.
    """
    forwards: dict[Any, Forward] = {}
    inputs: dict[Any, Tap] = {}
    for layer in range(arch.size(model.config, "layers")):
        if "ffn" in kinds:
            ffn = model.get_submodule(arch.ffn_module(layer))
            forwards[ffn] = partial(_ffn, ffn, arch, arch.activation(model.config), Site(layer), see)
        if "attn" in kinds:
            o = model.get_submodule(f"{arch.attn_module(layer)}.{arch.attn.o}")
            heads = arch.size(model.config, "heads")
            inputs[o] = partial(_heads, heads, Site(layer, kind="attn"), see)
        if "linear" in kinds:
            for name, parts in linear_parts(model, arch, layer).items():
                linear = model.get_submodule(name)
                forwards[linear] = partial(_linear, linear, parts, see)
    with replaced(forwards), tapped_inputs(inputs):
        yield


@contextmanager
def ffn_inputs(model: Any, arch: Arch, sites: Iterable[Site]) -> Iterator[dict[Site, list[Tensor]]]:
    """Yields what enters the feed-forward networks of `sites` inside the block, by site: x [B, S, d] of every call."""
    modules = ffn_modules(model, arch, sites)
    inputs: dict[Site, list[Tensor]] = {site: [] for site in modules}
    with tapped_inputs({module: inputs[site].append for site, module in modules.items()}):
        yield inputs


def linear_parts(model: Any, arch: Arch, layer: int) -> dict[str, dict[Site, slice]]:
    """The linears of a block: full module name -> its sites with the rows of the weight that are theirs; a packed
    weight has two or three.
    """
    return {
        arch.block_prefix(layer) + module: {Site(layer, kind=f"linear:{name}"): at for name, at in rows.items()}
        for module, rows in linear_rows(arch, model.config, layer).items()
    }


def ffn_fields(module: Any, arch: Arch, activation: str, x: Tensor) -> Fields:
    """The fields of a neuron score for x [..., d] of a feed-forward module: gate, up and z [..., n], and the matrices
    neuron-major [n, d]. A plain network has no up; its w_gate is its w_up.
    """
    parts = ffn_parts(module, arch, activation, x)
    if arch.ffn.gate_up:
        w_gate, w_up = getattr(module, arch.ffn.gate_up).weight.chunk(2)
    else:
        w_gate, w_up = (getattr(module, str(name)).weight for name in (arch.ffn.gate or arch.ffn.up, arch.ffn.up))
    w_down = down_rows(module, arch)
    fields = {"x": x, "gate": parts.gate, "z": parts.z, "w_gate": w_gate, "w_up": w_up, "w_down": w_down}
    return fields if parts.up is None else fields | {"up": parts.up}


def masked(values: Tensor, keep: Tensor) -> Tensor:
    """`values` with zero where `keep`, which broadcasts to them, is False. What is dropped may be infinite or NaN."""
    return torch.where(keep, values, torch.zeros((), dtype=values.dtype, device=values.device))


def linear_by_parts(module: Any, rows: Sequence[slice], inputs: Sequence[Tensor]) -> Tensor:
    """A linear module whose parts, `rows` of its weight, have inputs [..., d_in] of their own: [..., d_out], the parts
    one after the other.
    """
    bias = module.bias
    parts = [
        F.linear(x, module.weight[at], None if bias is None else bias[at]) for at, x in zip(rows, inputs, strict=True)
    ]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def _ffn(module: Any, arch: Arch, activation: str, site: Site, see: SiteTap, x: Tensor) -> Tensor:
    fields = ffn_fields(module, arch, activation, x)
    keep = see(site, fields)
    return ffn_down(module, arch, fields["z"] if keep is None else masked(fields["z"], keep))


def _heads(heads: int, site: Site, see: SiteTap, joined: Tensor) -> Tensor | None:
    o = joined.unflatten(-1, (heads, -1))
    keep = see(site, {"o": o})
    return None if keep is None else masked(o, keep.unsqueeze(-1)).flatten(-2)


def _linear(module: Any, parts: Mapping[Site, slice], see: SiteTap, x: Tensor) -> Tensor:
    keeps = [see(site, {"x": x, "w": module.weight[at]}) for site, at in parts.items()]
    return linear_by_parts(module, list(parts.values()), [x if keep is None else masked(x, keep) for keep in keeps])
