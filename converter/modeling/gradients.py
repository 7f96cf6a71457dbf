"""Gradients of the loss by every neuron and head of every layer, from one forward and one backward of a batch.

1. The loss is the sum over positions of -log p(label). The label is the model's own greedy token unless given.
2. Local gradients (the default) are what the steps of a cached generation would give: at position t the gradient of
   that position's loss alone, keys and values of other positions held fixed.
3. All positions share one pass: the attention then detaches the others' keys and values and keeps only its diagonal
   differentiable.
4. The forward keeps the hidden states between blocks and nothing inside them. The backward runs each block again with
   its graph, last block first, so the activations of one block are held at a time.
5. Sites are tapped at the inputs of the down and output projections, so no architecture is named here.

Source: "Achieving Sparse Activation in Small Language Models", arXiv 2406.06562, which computes the same gradients one
layer and one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...runtime_onnx.errors import InputError
from ..arch import Arch
from ..arch.site import Site
from .fisher import frozen
from .taps import replaced, tapped_inputs

KINDS = ("ffn", "attn")
_ATTENTION = "sparsegate_local"
_IGNORED = -100  # a position with this label has no loss


class Gradients(NamedTuple):
    """One site: `value` and `grad`, [B, S, n] for neurons (z) and [B, S, H, d_h] for heads (o before the output
    projection); zero where no label is.

    `path` [K, ...] are the gradients with the value scaled by k/K at this site alone, k = 1..K; None without steps.
    """

    value: Tensor
    grad: Tensor
    path: Tensor | None = None


@dataclass(frozen=True)
class Attribution:
    """What `attribute` found: dense `logits` [B, S, V], `labels` and `nll` [B, S], and the sites unless they were
    consumed.
    """

    logits: Tensor
    labels: Tensor
    nll: Tensor
    sites: dict[Site, Gradients] = field(default_factory=dict)


Labels = Tensor | Callable[[Tensor], Tensor] | None
"""Labels [B, S] (-100: no loss there), a function of the dense logits [B, S, V], or None: the dense greedy token."""


@dataclass(frozen=True)
class AttributionSettings:
    """How gradients are taken, at sites of `kinds`. Raises InputError for unknown kinds.

    `local` False gives the plain gradient of the summed loss, later positions included. `steps` K > 0 adds the path of
    integrated gradients, K sweeps over a site's own and later blocks. `recompute` False keeps every block's graph
    instead.
    """

    kinds: Sequence[str] = KINDS
    local: bool = True
    steps: int = 0
    recompute: bool = True

    def __post_init__(self) -> None:
        if not set(self.kinds) <= set(KINDS) or not self.kinds:
            raise InputError(
                f"kinds must be some of {', '.join(KINDS)}, got {', '.join(self.kinds) or 'none'}. Name sites that "
                "have gradients."
            )


DEFAULT = AttributionSettings()
NEURONS = AttributionSettings(kinds=("ffn",))


def attribute(
    model: Any,
    arch: Arch,
    tokens: Tensor,
    settings: AttributionSettings = DEFAULT,
    *,
    mask: Tensor | None = None,
    labels: Labels = None,
    consume: Callable[[Site, Gradients], None] | None = None,
) -> Attribution:
    """Values and gradients at the sites of `settings` for tokens [B, S]; mask [B, S] is False on padding, which must be
    on the right.

    `consume` gets each site, last block first, in place of the result.
    """
    with torch.enable_grad(), _Sweep(model, arch, tokens, settings, mask, labels).attached() as sweep:
        return sweep.run(consume)


class _Sweep:
    """One batch on its way through the model: which blocks run how, what they were given, and what the taps saw."""

    def __init__(
        self,
        model: Any,
        arch: Arch,
        tokens: Tensor,
        settings: AttributionSettings,
        mask: Tensor | None,
        labels: Labels,
    ) -> None:
        self.model, self.tokens, self.settings, self.wanted = model, tokens, settings, labels
        self.mask = None if mask is None or bool(mask.all()) else mask
        self.blocks = list(model.get_decoder().layers)
        self.heads = arch.size(model.config, "heads")
        self.modules = {"ffn": f"{arch.ffn.module}.{arch.ffn.down}", "attn": f"{arch.attn.module}.{arch.attn.o}"}
        self.forwards = [block.forward for block in self.blocks]
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {})] * len(self.blocks)
        self.entered: list[Tensor] = [torch.empty(0)] * len(self.blocks)  # dense hidden states before each block
        self.path: list[Tensor] = []  # the same with one site scaled
        self.scaled: tuple[int, str, float] | None = None
        self.graph = False  # whether blocks keep their graph in the forward
        self.taps: dict[tuple[int, str], Tensor] | None = None
        self.dense: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of the dense pass by layer
        self.store = False
        self.exit = torch.empty(0)

    @contextmanager
    def attached(self) -> Iterator[_Sweep]:
        """The model with its blocks, taps and attention in the sweep's hands; as it was afterwards."""
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            stack.enter_context(
                replaced({block: partial(self._block, layer) for layer, block in enumerate(self.blocks)})
            )
            taps = {
                block.get_submodule(self.modules[kind]): partial(self._tap, layer, kind)
                for layer, block in enumerate(self.blocks)
                for kind in self.settings.kinds
            }
            stack.enter_context(tapped_inputs(taps))
            if self.settings.local:
                stack.enter_context(_attention(self.model, self._attend))
            yield self

    def run(self, consume: Callable[[Site, Gradients], None] | None) -> Attribution:
        self.graph, self.store = not self.settings.recompute, self.settings.steps > 0 and self.settings.local
        self.taps = {} if self.graph else None
        logits, labels, nll = self._forward()
        attribution = Attribution(logits.detach(), labels, nll.detach())
        give = consume or attribution.sites.__setitem__
        if self.graph:
            assert self.taps is not None
            named, self.taps, self.graph, self.store = self.taps, None, False, False
            grads = dict(zip(named, torch.autograd.grad(nll.sum(), list(named.values())), strict=True))
            for layer in reversed(range(len(self.blocks))):
                self._give(
                    layer,
                    {kind: (named.pop((layer, kind)), grads.pop((layer, kind))) for kind in self.settings.kinds},
                    labels,
                    give,
                )
        else:
            self.store = False
            self._backward(nll, 0, self.entered, lambda layer, seen: self._give(layer, seen, labels, give))
        return attribution

    def _give(
        self,
        layer: int,
        seen: dict[str, tuple[Tensor, Tensor]],
        labels: Tensor,
        give: Callable[[Site, Gradients], None],
    ) -> None:
        steps = self.settings.steps
        for kind, (value, grad) in seen.items():
            path = (
                torch.stack([self._scaled(layer, kind, k / steps, labels) for k in range(1, steps + 1)])
                if steps
                else None
            )
            tensors = (value.detach(), grad, path)
            if kind == "attn":
                tensors = tuple(None if t is None else t.unflatten(-1, (self.heads, -1)) for t in tensors)
            give(Site(layer, kind=kind), Gradients(*tensors))  # type: ignore[arg-type]

    def _scaled(self, layer: int, kind: str, factor: float, labels: Tensor) -> Tensor:
        """The gradient by the site's value with that value scaled by `factor`, everything before it dense:
        [B, S, n].
        """
        self.scaled, self.path = (layer, kind, factor), list(self.entered)
        wanted, self.wanted = self.wanted, labels
        gradients: list[Tensor] = []
        try:
            _, _, nll = self._forward()
            self._backward(
                nll, layer, self.path, lambda at, seen: gradients.append(seen[kind][1]) if at == layer else None
            )
        finally:
            self.scaled, self.path, self.wanted = None, [], wanted
        return gradients[0]

    def _forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, labels and the loss [B, S]; the graph reaches back to `exit`, what the last block gave (to the first
        block with `graph`).
        """
        logits = self.model(
            input_ids=self.tokens, attention_mask=None if self.mask is None else self.mask.long(), use_cache=False
        ).logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = (
            self.wanted
            if isinstance(self.wanted, Tensor)
            else (wide.argmax(-1) if self.wanted is None else self.wanted(wide.detach()))
        )
        labels = labels.to(logits.device)
        if self.mask is not None:
            labels = torch.where(self.mask.to(labels.device), labels, _IGNORED)
        nll = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=_IGNORED).view(
            labels.shape
        )
        return logits, labels, nll

    def _backward(
        self,
        nll: Tensor,
        start: int,
        entered: list[Tensor],
        see: Callable[[int, dict[str, tuple[Tensor, Tensor]]], None],
    ) -> None:
        """Walk from the loss down to block `start`, running each block again; `see` gets its layer and {kind: (value,
        gradient)}.
        """
        (grad,) = torch.autograd.grad(nll.sum(), [self.exit])
        self.exit = torch.empty(0)
        for layer in reversed(range(start, len(self.blocks))):
            self.taps = {}
            hidden = entered[layer].detach().requires_grad_()
            out = _hidden(self._run(layer, hidden))
            taps, self.taps = self.taps, None
            grads = torch.autograd.grad(out, [hidden, *taps.values()], grad)
            grad, out = grads[0], hidden
            see(
                layer,
                {kind: (value.detach(), g) for ((_, kind), value), g in zip(taps.items(), grads[1:], strict=True)},
            )

    def _block(self, layer: int, hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """Stands in for a block's forward."""
        first, last = self.scaled[0] if self.scaled else 0, len(self.blocks) - 1
        if layer < first:
            return self.entered[layer + 1]
        if not self.scaled:
            self.calls[layer] = (arguments, keywords)
        (self.path if self.scaled else self.entered)[layer] = hidden.detach()
        if self.graph:
            return self._run(layer, hidden.detach().requires_grad_() if layer == 0 else hidden)
        with torch.no_grad():
            out = self._run(layer, hidden)
        if layer < last:
            return out
        self.exit = _hidden(out).detach().requires_grad_()
        return (self.exit, *out[1:]) if isinstance(out, tuple) else self.exit

    def _run(self, layer: int, hidden: Tensor) -> Any:
        arguments, keywords = self.calls[layer]
        return self.forwards[layer](hidden, *arguments, **keywords)

    def _tap(self, layer: int, kind: str, value: Tensor) -> Tensor:
        if self.scaled and self.scaled[:2] == (layer, kind):
            value = value * self.scaled[2]
        if self.taps is not None:
            self.taps[layer, kind] = value
        return value

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of other positions are the dense run's; with nothing scaled these are the present ones."""
        if self.store:
            self.dense[module.layer_idx] = (key.detach(), value.detach())
        others = self.dense[module.layer_idx] if self.scaled else (key.detach(), value.detach())
        return local_attention(query, (key, value), others, attention_mask, **keywords)


def local_attention(
    query: Tensor,
    present: tuple[Tensor, Tensor],
    others: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of every position to itself by the `present` keys and values, and to the others by theirs: [B, S, H,
    d_h] and the weights [B, H, S, S].

    query [B, H, S, d_h], a pair of keys and values [B, G, S, d_h] each, additive mask [B, 1, S, S] (causal and sliding
    window included). Raises InputError for attention sinks.
    """
    if s_aux is not None:
        raise InputError("Local gradients need plain softmax attention, got attention sinks. Use local=False.")
    if attention_mask is None:
        raise InputError("Local gradients need the model's attention mask, got none. Use local=False.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // present[0].shape[1]
    key, value, other_key, other_value = (t.repeat_interleave(groups, dim=1) for t in (*present, *others))
    # the difference is zero in value unless a site is scaled: it only carries the diagonal's gradient
    logits = (query @ other_key.transpose(-1, -2) + torch.diag_embed((query * (key - other_key)).sum(-1))) * scale
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    logits = logits + attention_mask
    weights = logits.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    out = weights @ other_value + weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * (value - other_value)
    return out.transpose(1, 2).contiguous(), weights


@contextmanager
def _attention(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """`model` with another attention function, through transformers' own registry."""
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        ALL_ATTENTION_FUNCTIONS[_ATTENTION] = function
        for config in configs.values():
            config._attn_implementation = _ATTENTION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        del ALL_ATTENTION_FUNCTIONS[_ATTENTION]


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
