"""Gradients at all sites against step-by-step cached backward passes, and what they cost."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODEL_TYPES, VOCAB, make_model
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from sparsegate.converter.arch import Arch, load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.bundled import BUNDLED, HELDOUT_TEXT
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.evaluation.analysis.ranks import mean_spearman
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.modeling.gradients import NEURONS, AttributionSettings, Gradients, attribute
from sparsegate.converter.scores import Context, load_score
from sparsegate.converter.text.windows import make_batches, read_text
from sparsegate.runtime_onnx.errors import InputError

LENGTH = 28  # longer than the tiny models' sliding window of 24
Make = Callable[[str], Path]


def tiny(tiny_model: Make, model_type: str = "llama") -> tuple[Any, Arch, Tensor]:
    tokens = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    return load_dense(tiny_model(model_type)), load_arch(model_type), tokens


def sites_of(model: Any, arch: Arch) -> dict[Site, Any]:
    """The module whose input is the site's value."""
    found = {}
    for layer in range(arch.size(model.config, "layers")):
        found[Site(layer)] = model.get_submodule(f"{arch.ffn_module(layer)}.{arch.ffn.down}")
        found[Site(layer, kind="attn")] = model.get_submodule(f"{arch.attn_module(layer)}.{arch.attn.o}")
    return found


@contextmanager
def changed(modules: dict[Site, Any], change: Callable[[Site, Tensor], Tensor]) -> Iterator[None]:
    """Every site's value replaced by `change(site, value)`."""
    hooks = [
        m.register_forward_pre_hook(partial(lambda site, _, args: (change(site, args[0]),), site))
        for site, m in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cached_step(
    model: Any, tokens: Tensor, t: int, modules: dict[Site, Any], change: Callable[[Site, Tensor], Tensor]
) -> Tensor:
    """Logits [B, V] at position t as a cached generation computes them: the positions before it dense, `change` at t
    alone.
    """
    past = DynamicCache(config=model.config)
    if t:
        with torch.no_grad():
            model(input_ids=tokens[:, :t], past_key_values=past, use_cache=True)
    with changed(modules, change):
        return model(input_ids=tokens[:, t : t + 1], past_key_values=past, use_cache=True).logits[:, -1]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_f04_local_gradients_equal_cached_backward(tiny_model: Make, model_type: str) -> None:
    model, arch, tokens = tiny(tiny_model, model_type)
    found = attribute(model, arch, tokens)
    with torch.no_grad():
        dense = model(input_ids=tokens).logits
    torch.testing.assert_close(found.logits, dense, rtol=0, atol=1e-4)
    assert torch.equal(found.labels, dense.argmax(-1))
    torch.testing.assert_close(
        found.nll,
        F.cross_entropy(dense.flatten(0, 1), found.labels.flatten(), reduction="none").view(2, -1),
        rtol=1e-4,
        atol=1e-5,
    )
    modules = sites_of(model, arch)
    assert set(found.sites) == set(modules)
    for t in (0, 5, LENGTH - 1):
        seen: dict[Site, Tensor] = {}

        def watch(site: Site, value: Tensor, seen: dict[Site, Tensor] = seen) -> Tensor:
            seen[site] = value if value.requires_grad else value.detach().requires_grad_()
            return seen[site]

        logits = cached_step(model, tokens, t, modules, watch)
        grads = torch.autograd.grad(F.cross_entropy(logits, found.labels[:, t], reduction="sum"), list(seen.values()))
        for (site, value), grad in zip(seen.items(), grads, strict=True):
            mine = found.sites[site]
            for got, expected in ((mine.value, value), (mine.grad, grad)):
                got, expected = got[:, t].flatten(1), expected[:, 0].detach()
                assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4, (site, t)


def test_plain_gradients_equal_autograd_and_differ_from_local(tiny_model: Make) -> None:
    model, arch, tokens = tiny(tiny_model)
    plain, local = (attribute(model, arch, tokens, AttributionSettings(local=flag)) for flag in (False, True))
    probes = {
        site: torch.zeros(2, LENGTH, module.weight.shape[1], requires_grad=True)
        for site, module in sites_of(model, arch).items()
    }
    with changed(sites_of(model, arch), lambda site, value: value + probes[site]):
        logits = model(input_ids=tokens).logits
    grads = torch.autograd.grad(
        F.cross_entropy(logits.flatten(0, 1), plain.labels.flatten(), reduction="sum"), list(probes.values())
    )
    for site, grad in zip(probes, grads, strict=True):
        torch.testing.assert_close(plain.sites[site].grad.flatten(2), grad, rtol=1e-4, atol=1e-5)
        difference = (plain.sites[site].grad - local.sites[site].grad).abs().flatten(2).amax((0, 2))
        assert float(difference[-1]) < 1e-4
        if site.layer == 0:  # nothing of the last layer reaches later positions
            assert float(difference[:-1].max()) > 1e-2


def test_without_recomputation_the_same(tiny_model: Make) -> None:
    model, arch, tokens = tiny(tiny_model, "gemma2")
    one, other = (
        attribute(model, arch, tokens, AttributionSettings(recompute=flag, steps=2)) for flag in (True, False)
    )
    for site in one.sites:
        for a, b in zip(one.sites[site], other.sites[site], strict=True):
            assert a is not None and b is not None
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_padding_and_given_labels(tiny_model: Make) -> None:
    """Padding on the right and positions without a label change no other gradient and get zero; labels can be made from
    the logits.
    """
    model, arch, tokens = tiny(tiny_model)
    full = attribute(model, arch, tokens)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]])
    holes = full.labels.clone()
    holes[0, 4] = -100
    for found in (
        attribute(model, arch, tokens, mask=mask, labels=holes),
        attribute(model, arch, tokens, mask=mask, labels=lambda _: holes),
    ):
        kept = mask & (torch.arange(LENGTH) != 4) | (torch.arange(2)[:, None] == 1) & mask
        for site in full.sites:
            torch.testing.assert_close(found.sites[site].grad[kept], full.sites[site].grad[kept], rtol=1e-4, atol=1e-5)
            assert not found.sites[site].grad[~kept].any()
    second = attribute(model, arch, tokens, labels=lambda logits: logits.topk(2).indices[..., 1])
    assert not bool((second.labels == full.labels).any())


def test_everything_is_put_back(tiny_model: Make) -> None:
    model, arch, tokens = tiny(tiny_model)
    before = model(input_ids=tokens).logits
    attribute(model, arch, tokens, AttributionSettings(steps=1))
    with pytest.raises(ZeroDivisionError):
        attribute(model, arch, tokens, labels=lambda _: 1 // 0)  # type: ignore[arg-type, return-value]
    assert torch.equal(model(input_ids=tokens).logits, before) and before.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(InputError, match="kinds must be"):
        AttributionSettings(kinds=["linear"])


def test_consumed_sites_come_last_block_first(tiny_model: Make) -> None:
    model, arch, tokens = tiny(tiny_model)
    kept, taken = attribute(model, arch, tokens), {}
    assert not attribute(model, arch, tokens, consume=taken.__setitem__).sites
    assert [site.layer for site in taken] == [1, 1, 0, 0]
    assert all(torch.equal(taken[site].grad, kept.sites[site].grad) for site in taken)


def test_one_forward_and_one_backward(tiny_model: Make) -> None:
    """All sites of all layers: the model runs once, every block's backward once, and each block's forward once more for
    it.
    """
    model, arch, tokens = tiny(tiny_model)
    head = model.get_output_embeddings()
    counts: Counter[str] = Counter()
    hooks = [
        model.register_forward_hook(lambda *_: counts.update(["model"])),
        head.register_forward_hook(lambda *_: counts.update(["head"])),
    ]
    hooks.append(head.register_full_backward_hook(lambda *_: counts.update(["head backward"])))
    for layer in range(2):
        down = model.get_submodule(f"{arch.ffn_module(layer)}.{arch.ffn.down}")
        hooks.append(down.register_forward_hook(lambda *_, layer=layer: counts.update([f"block {layer}"])))
        hooks.append(
            down.register_full_backward_hook(lambda *_, layer=layer: counts.update([f"block {layer} backward"]))
        )
    for recompute, runs in ((True, 2), (False, 1)):
        counts.clear()
        assert len(attribute(model, arch, tokens, AttributionSettings(recompute=recompute)).sites) == 4
        blocks = {f"block {layer}": runs for layer in range(2)} | {f"block {layer} backward": 1 for layer in range(2)}
        assert counts == {"model": 1, "head": 1, "head backward": 1, **blocks}
    counts.clear()
    attribute(model, arch, tokens, AttributionSettings(steps=3))
    sweeps = 3 * 4  # each from its own layer on: two kinds from layer 0, two from layer 1
    assert counts == {
        "model": 1 + sweeps,
        "head": 1 + sweeps,
        "head backward": 1 + sweeps,
        "block 0": 2 * (1 + 6),
        "block 0 backward": 1 + 6,
        "block 1": 2 * (1 + 12),
        "block 1 backward": 1 + 12,
    }
    for hook in hooks:
        hook.remove()


def saved_bytes(model: Any, arch: Arch, tokens: Tensor, recompute: bool) -> int:
    """The most bytes that autograd holds for the backward at one time, parameters left out."""
    held, peak = Counter({"now": 0}), 0
    parameters = {p.data_ptr() for p in model.parameters()}

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Saved:
        nonlocal peak
        saved = Saved(tensor.detach() if tensor.data_ptr() in parameters else tensor)
        if tensor.data_ptr() not in parameters:
            held["now"] += tensor.nbytes
            weakref.finalize(saved, lambda size: held.subtract({"now": size}), tensor.nbytes)
        peak = max(peak, held["now"])
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        attribute(model, arch, tokens, AttributionSettings(recompute=recompute), consume=lambda *_: None)
    return peak


def test_saved_activations_do_not_grow_with_layers(tmp_path: Path) -> None:
    arch = load_arch("llama")
    tokens = torch.randint(3, VOCAB, (1, LENGTH))
    peaks = {}
    for layers in (2, 6):
        model = load_dense(make_model("llama", tmp_path / str(layers), num_hidden_layers=layers))
        peaks[layers] = [saved_bytes(model, arch, tokens, flag) for flag in (True, False)]
    assert peaks[6][0] == peaks[2][0] > 0
    assert peaks[6][1] > 2.5 * peaks[2][1] and peaks[2][1] > 1.5 * peaks[2][0]


def test_f02_one_step_of_integrated_gradients_is_gxo(tiny_model: Make) -> None:
    """Bit for bit, neurons and heads; and heads: the derivative by a mask on the head is sum_d g_d o_d, the score its
    mean, negated.
    """
    model, arch, tokens = tiny(tiny_model)
    last = torch.full((2, LENGTH), -100)
    last[:, -1] = attribute(model, arch, tokens).labels[:, -1]
    found = attribute(model, arch, tokens, AttributionSettings(steps=1), labels=last)
    for site, (value, grad, path) in found.sites.items():
        assert path is not None and torch.equal(path[0], grad), site
        if site.kind == "ffn":
            fields = Context(z=value, grad=grad, grad_path=path)
            assert torch.equal(load_score("gxo").score(fields), load_score("integrated_gradients").score(fields))
    heads = {site: module for site, module in sites_of(model, arch).items() if site.kind == "attn"}
    scale = {site: torch.ones(2, 4, 1, requires_grad=True) for site in heads}
    with changed(
        heads,
        lambda site, o: torch.cat([o[:, :-1], (o[:, -1].unflatten(-1, (4, -1)) * scale[site]).flatten(1)[:, None]], 1),
    ):
        logits = model(input_ids=tokens).logits[:, -1]
    for site, by_mask in zip(
        scale,
        torch.autograd.grad(F.cross_entropy(logits, last[:, -1], reduction="sum"), list(scale.values())),
        strict=True,
    ):
        value, grad, _ = found.sites[site]
        torch.testing.assert_close((value * grad).sum(-1)[:, -1], by_mask[..., 0], rtol=1e-3, atol=1e-5)
        scores = load_score("gxo").score_heads(Context(o=value, o_grad=grad))[:, -1]
        torch.testing.assert_close(scores, -by_mask[..., 0] / value.shape[-1], rtol=1e-3, atol=1e-6)


def test_f03_completeness_of_integrated_gradients(tiny_model: Make) -> None:
    """At a cached step the scores sum to the rise of the loss when the site is zeroed, with an error of O(1/K); scaling
    all prompt positions breaks it.
    """
    model, arch, tokens = tiny(tiny_model)
    modules = sites_of(model, arch)
    labels = attribute(model, arch, tokens).labels
    t = 7
    found = {
        steps: attribute(
            model, arch, tokens[:, : t + 1], AttributionSettings(steps=steps), labels=labels[:, : t + 1]
        ).sites
        for steps in (4, 24)
    }
    for site in modules:

        def loss(factor: float, site: Site = site) -> Tensor:
            step = cached_step(model, tokens, t, {site: modules[site]}, lambda _, z: z * factor)
            return F.cross_entropy(step, labels[:, t], reduction="none")

        with torch.no_grad():
            exact = loss(0.0) - loss(1.0)
        errors = {}
        for steps, sites in found.items():
            value, _, path = sites[site]
            assert path is not None
            errors[steps] = float(((-value * path.mean(0)).flatten(2).sum(-1)[:, t] - exact).abs().max())
        assert errors[24] < 0.25 * errors[4] and errors[24] < 0.1 * float(exact.abs().max()), (site, errors, exact)

    site = Site(0)
    total = torch.zeros(2)
    for k in range(1, 25):
        seen = []

        def scale(_: Site, value: Tensor, k: int = k, seen: list[Tensor] = seen) -> Tensor:
            seen.append((value * (k / 24)).detach().requires_grad_())
            return seen[0]

        with changed({site: modules[site]}, scale):
            logits = model(input_ids=tokens[:, : t + 1]).logits[:, -1]
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, labels[:, t], reduction="sum"), seen)
        total -= (seen[0].detach() * (24 / k) * grad)[:, -1].sum(-1) / 24
    with torch.no_grad(), changed({site: modules[site]}, lambda _, value: value * 0):
        zeroed = F.cross_entropy(model(input_ids=tokens[:, : t + 1]).logits[:, -1], labels[:, t], reduction="none")
    exact = zeroed - F.cross_entropy(
        attribute(model, arch, tokens[:, : t + 1]).logits[:, -1], labels[:, t], reduction="none"
    )
    assert float((total - exact).abs().max()) > 0.2 * float(exact.abs().max())


def test_f05_gradients_over_all_labels_sum_to_zero(tiny_model: Make) -> None:
    """sum_y p(y) g_y = 0 at every site; with one label left out it is not."""
    model, arch, tokens = tiny(tiny_model)
    row = tokens[:1, :4]
    labels = torch.arange(VOCAB)[:, None].expand(-1, 4)
    found = attribute(model, arch, row.expand(VOCAB, -1), labels=labels)
    p = found.logits[0].softmax(-1).T[..., None]  # [V, S, 1]
    for site, (_, grad, _) in found.sites.items():
        weighted = p.double() * grad.flatten(2).double()
        assert float((weighted.sum(0).abs() / weighted.abs().sum(0)).max()) < 1e-4, site
        assert float(weighted.sum(0).norm() / weighted.norm(dim=0).norm()) < 1e-5
        assert float(weighted[:-1].sum(0).norm() / weighted.norm(dim=0).norm()) > 1e-4


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Arch, Tensor]:
    source = open_source(BUNDLED)
    return (
        load_dense(BUNDLED),
        source.arch,
        make_batches(source.tokenizer(), read_text(HELDOUT_TEXT)[:60_000], 4, 64, 0).tokens,
    )


def test_f06_corrected_orders_as_magnitude(bundled: tuple[Any, Arch, Tensor]) -> None:
    """n = 512 neurons of a trained model: Spearman with |z| at least .99, with GxO next to none."""
    model, arch, tokens = bundled
    for site, (value, grad, _) in attribute(model, arch, tokens, NEURONS).sites.items():
        fields = Context(z=value, grad=grad)
        corrected, gxo, size = (
            load_score(name).score(fields).flatten(0, 1) for name in ("corrected_gxo", "gxo", "abs_z")
        )
        assert mean_spearman(corrected, size) >= 0.99, site
        assert mean_spearman(corrected, gxo) < 0.3


def test_f06_gxo_predicts_the_removal_of_one_unit(bundled: tuple[Any, Arch, Tensor]) -> None:
    """Every one of 512 neurons removed by itself at one position: Spearman of the loss's rise with GxO at least .98,
    and little with magnitude.
    """
    model, arch, tokens = bundled
    row, t, site = tokens[:1, :16], 15, Site(2)
    # a label that is no certainty: the second choice
    found: dict[Site, Gradients] = {}
    labels = attribute(
        model, arch, row, NEURONS, labels=lambda logits: logits.topk(2).indices[..., 1], consume=found.__setitem__
    ).labels
    value, grad, _ = found[site]
    units = value.shape[-1]
    past = DynamicCache(config=model.config)
    keep = 1 - torch.eye(units)
    with torch.no_grad():
        model(input_ids=row[:, :t], past_key_values=past, use_cache=True)
        past.batch_repeat_interleave(units)
        with changed({site: sites_of(model, arch)[site]}, lambda _, z: z * keep[:, None]):
            logits = model(input_ids=row[:, t:].expand(units, -1), past_key_values=past, use_cache=True).logits[:, -1]
    rise = F.cross_entropy(logits.double(), labels[:, t].expand(units), reduction="none")
    predicted = load_score("gxo").score(Context(z=value, grad=grad))[0, t]
    assert mean_spearman(predicted[None], rise[None]) >= 0.98
    assert mean_spearman(value[0, t].abs()[None], rise[None]) < 0.5
