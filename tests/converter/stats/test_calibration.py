"""The block walk against a stock forward pass, its resumption, and its memory in a process of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_walk import BOTH, contents, make_batches, times
from models import MODEL_TYPES, VOCAB
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.activations import ACT2FN

from sparsegate.converter.arch.shapes import linear_rows, linear_shapes
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, SitePlan, Threshold
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.modeling.gated import apply_plan, load_dense
from sparsegate.converter.stats import Probe, greedy, histogram, samples
from sparsegate.converter.stats import collect as walk
from sparsegate.converter.stats.bins import greedy_split
from sparsegate.converter.stats.collect import collect
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.errors import InputError

pytestmark = pytest.mark.usefixtures("small_groups")


def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x, score, positions) of every update of the samples statistic, in fp32, as the walk makes them."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    real = samples.update

    def update(state: dict[str, Any], x: Tensor, score: Tensor, positions: Tensor) -> None:
        seen.append((x.clone(), score.clone(), positions.clone()))
        real(state, x, score, positions)

    monkeypatch.setattr(samples, "update", update)
    return seen


def by_layer(seen: list[tuple[Tensor, Tensor, Tensor]], layers: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    size = len(seen) // layers
    return [
        tuple(torch.cat(parts) for parts in zip(*seen[k * size : (k + 1) * size], strict=True)) for k in range(layers)
    ]  # type: ignore[misc]


@torch.no_grad()
def stock_forward(source: Source, batches: Batches) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer the unpadded rows that enter a stock model's network, the products before its down projection, and the
    size of its activated gate.
    """
    model = load_dense(source.folder)
    arch, layers = source.arch, range(len(source.arch.sites(source.config)))
    entered, inner = [], []
    for layer in layers:
        module = model.get_submodule(arch.ffn_module(layer))
        module.register_forward_pre_hook(lambda _, args: entered.append(args[0][batches.mask]))
        getattr(module, arch.ffn.down).register_forward_pre_hook(lambda _, args: inner.append(args[0][batches.mask]))
    model(input_ids=batches.tokens, attention_mask=None if bool(batches.mask.all()) else batches.mask.long())
    gates = []
    for layer, x in zip(layers, entered, strict=True):
        module = model.get_submodule(arch.ffn_module(layer))
        act = ACT2FN[getattr(source.config, arch.ffn.activation.config)]
        projection = getattr(module, str(arch.ffn.gate_up or arch.ffn.gate or arch.ffn.up))
        gates.append(act(projection(x)[:, : inner[layer].shape[1]]).abs())
    return list(zip(entered, inner, gates, strict=True))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_walk_equals_stock_transformers(
    model_type: str, padded: bool, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    source, batches, seen = open_source(tiny_model(model_type)), make_batches(padded=padded), record(monkeypatch)
    rng = torch.get_rng_state()
    stats = collect(source, batches, BOTH, tmp_path)
    assert torch.equal(torch.get_rng_state(), rng), "global random numbers stay as they were"
    stock = stock_forward(source, batches)
    assert len(stats) == len(stock) == 2
    for site, (x, score, positions), (entered, z, gate) in zip(stats, by_layer(seen, 2), stock, strict=True):
        assert positions.tolist() == list(range(batches.count)), "every token once, in order, padding never"
        torch.testing.assert_close(x, entered, rtol=1e-5, atol=1e-5)
        down = load_file(source.folder / "model.safetensors")[
            f"{source.arch.ffn_module(site.layer)}.{source.arch.ffn.down}.weight"
        ]
        torch.testing.assert_close(score, z.abs() * down.norm(dim=0), rtol=1e-4, atol=1e-5)
        count = stats[site]["histogram:gate.count"]
        assert int(count.sum()) == gate.numel() and int(stats[site]["histogram:gate.units"]) == gate.shape[1]
        edges = histogram.edges(0, histogram.BINS)
        for share in (
            0.1,
            0.5,
            0.9,
        ):  # the count is the gate's: cumulated to the edge below its quantile, give or take one bin
            at = int(torch.searchsorted(edges, torch.quantile(gate.flatten().double(), share))) - 1
            below = float((gate < edges[at]).double().mean())
            assert float(count[:at].sum()) / gate.numel() == pytest.approx(below, abs=2e-3)


def test_a_wrong_mask_would_be_seen(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a walk that hides other tokens, on a model with a sliding window, leaves the bound by far."""
    source, batches, seen = open_source(tiny_model("mistral")), make_batches(padded=False), record(monkeypatch)
    wrong = batches.mask.clone()
    wrong[:, 5] = False
    collect(source, Batches(batches.tokens, wrong), BOTH, tmp_path)
    stock = stock_forward(source, batches)
    rows = wrong.flatten()
    assert float((by_layer(seen, 2)[1][0] - stock[1][0][rows]).abs().max()) > 1e-2


def test_sliding_window_matters(tiny_model: Callable[[str], Path]) -> None:
    """Windows of the walk are longer than the sliding window of the tiny models, so a lost one would show."""
    for model_type in ("mistral", "gemma2"):
        assert open_source(tiny_model(model_type)).config.sliding_window < make_batches().tokens.shape[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sources(
    dtype: torch.dtype, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_model("qwen2"), tmp_path / "m")
    save_file(
        {name: t.to(dtype) for name, t in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    source, batches, seen = open_source(folder), make_batches(), record(monkeypatch)
    collect(source, batches, BOTH, tmp_path / "stats")
    for (x, _, _), (entered, _, _) in zip(by_layer(seen, 2), stock_forward(source, batches), strict=True):
        torch.testing.assert_close(x, entered, rtol=1e-5, atol=1e-5)


def test_padding_is_never_counted(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plain = open_source(tiny_model("gemma2")), make_batches(padded=False)
    wide = Batches(torch.nn.functional.pad(plain.tokens, (0, 9), value=7), torch.nn.functional.pad(plain.mask, (0, 9)))
    monkeypatch.setattr(samples, "CAP", 100)
    found = []
    for k, batches in enumerate((plain, wide)):
        with monkeypatch.context() as patch:
            seen = record(patch)
            stats = collect(source, batches, BOTH, tmp_path / str(k))
        found.append((by_layer(seen, 2), stats))
    for layer, site in enumerate(found[0][1]):
        for a, b in zip(found[0][0][layer], found[1][0][layer], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        left, right = found[0][1][site], found[1][1][site]
        assert int(left["histogram:gate.count"].sum()) == int(right["histogram:gate.count"].sum()) == plain.count * 176
        assert left["samples:magnitude.x"].shape == (100, 64)
        torch.testing.assert_close(left["samples:magnitude.x"], right["samples:magnitude.x"], rtol=2e-3, atol=2e-3)


def test_what_stands_in_the_padding_does_not_matter(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source, batches = open_source(tiny_model("phi3")), make_batches()
    other = Batches(torch.where(batches.mask, batches.tokens, 200), batches.mask)
    assert other.sha256 != batches.sha256
    for k, b in enumerate((batches, other)):
        collect(source, b, BOTH, tmp_path / str(k))
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


def test_statistics_do_not_depend_on_the_batch_size(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, batches = open_source(tiny_model("llama")), make_batches()
    found = []
    for k, at_once in enumerate((1, 97, 10**6)):
        monkeypatch.setattr(walk, "TOKENS_AT_ONCE", at_once)
        found.append(collect(source, batches, BOTH, tmp_path / str(k)))
    for site in found[0]:
        for other in found[1:]:
            moved = (found[0][site]["histogram:gate.count"] - other[site]["histogram:gate.count"]).abs().sum()
            assert int(moved) < 1e-3 * batches.count * 176, "only what rounding carries over a bin's edge"
            torch.testing.assert_close(
                found[0][site]["samples:magnitude.x"], other[site]["samples:magnitude.x"], rtol=2e-3, atol=2e-3
            )


# Linear sites, and statistics that look again


@torch.no_grad()
def stock_inputs(source: Source, batches: Batches) -> dict[Site, Tensor]:
    """The unpadded rows that enter every linear of a stock model."""
    model, seen = load_dense(source.folder), {}
    for layer in range(2):
        for module, parts in linear_rows(source.arch, source.config).items():

            def hook(_: Any, arguments: tuple[Tensor], layer: int = layer, parts: Any = parts) -> None:
                seen.update({Site(layer, kind=f"linear:{name}"): arguments[0][batches.mask] for name in parts})

            model.get_submodule(source.arch.block_prefix(layer) + module).register_forward_pre_hook(hook)
    model(input_ids=batches.tokens, attention_mask=None if bool(batches.mask.all()) else batches.mask.long())
    return seen


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_linear_sites_see_their_inputs(model_type: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source, batches = open_source(tiny_model(model_type)), make_batches()
    stats, stock = (
        collect(source, batches, ["histogram:input", "histogram:wina", "scale:wina", "unit_histogram:gate"], tmp_path),
        stock_inputs(source, batches),
    )
    assert {site for site in stats if site.kind != "ffn"} == set(stock)
    weights, shapes = load_file(source.folder / "model.safetensors"), linear_shapes(source.arch, source.config)
    for site, x in stock.items():
        name = site.kind.removeprefix("linear:")
        module, _ = source.arch.linears()[name]
        norms = weights[f"{source.arch.block_prefix(site.layer)}{module}.weight"][
            linear_rows(source.arch, source.config)[module][name]
        ].norm(dim=0)
        torch.testing.assert_close(stats[site]["scale:wina.scale"], norms, rtol=1e-5, atol=1e-6)
        for score, values in (("input", x.abs()), ("wina", x.abs() * norms)):
            count = stats[site][f"histogram:{score}.count"]
            assert (
                int(count.sum()) == x.numel()
                and (int(stats[site][f"histogram:{score}.outputs"]), int(stats[site][f"histogram:{score}.units"]))
                == shapes[name]
            )
            for share in (0.2, 0.5, 0.8):
                at = (
                    int(torch.searchsorted(histogram.edges(0, 65280), torch.quantile(values.flatten().double(), share)))
                    - 1
                )
                below = float((values < histogram.edges(at, at + 1)).double().mean())
                assert float(count[:at].sum()) / x.numel() == pytest.approx(below, abs=3e-3)
    for (entered, _, gate), site in zip(
        stock_forward(source, batches), (site for site in stats if site.kind == "ffn"), strict=True
    ):
        module, _ = source.arch.linears()["up_proj"]
        rows = linear_rows(source.arch, source.config)[module]["up_proj"]
        plain = source.arch.ffn.kind == "plain"
        up = (
            torch.ones_like(gate)
            if plain
            else entered @ weights[f"{source.arch.block_prefix(site.layer)}{module}.weight"][rows].T
        )
        torch.testing.assert_close(
            stats[site]["unit_histogram:gate.up_moment"], up.square().mean(0), rtol=1e-3, atol=1e-4
        )
        assert bool((stats[site]["unit_histogram:gate.count"].sum(1) == batches.count).all())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_the_second_look_equals_a_gated_model(
    model_type: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block's output with masked inputs is the one of a stock model whose layer has the same thresholds; padding is
    left out.
    """
    source, batches, probed = open_source(tiny_model(model_type)), make_batches(), []
    monkeypatch.setattr(walk, "PROBE_TOKENS", 4 * 40)
    g = torch.Generator().manual_seed(0)
    taus = {
        name: torch.rand(width, generator=g) / 2
        for name, (_, width) in linear_shapes(source.arch, source.config).items()
        if name != "k_proj"
    }

    def settle(states: Any, probe: Probe, score: str) -> None:
        assert score == "input" and [site.kind for site in states] == [
            f"linear:{name}" for name in source.arch.linears()
        ]
        probed.append((probe.block({}), probe.block(taus)))
        for state in states.values():
            state["path"] = torch.zeros(1)

    monkeypatch.setattr(greedy, "settle", settle)
    found = collect(source, batches, ["greedy:input", "dropped:gate"], tmp_path)
    assert all(0 < float(found[Site(layer)]["dropped:gate.error"][3]) < 1 for layer in range(2))
    tokens, mask = batches.tokens[:4], batches.mask[:4]
    for layer, (plain, masked) in enumerate(probed):
        plan: Plan = {
            Site(layer, kind=f"linear:{name}"): SitePlan(gate=Threshold("input", tau, 0.5))
            for name, tau in taus.items()
        }
        for given, expected in ((plain, {}), (masked, plan)):
            model, out = (
                apply_plan(load_dense(source.folder), expected, source.arch, source.arch.activation(source.config)),
                [],
            )
            model.get_decoder().layers[layer].register_forward_hook(
                lambda _m, _a, o, out=out: out.append(o[0] if isinstance(o, tuple) else o)
            )
            model(input_ids=tokens, attention_mask=mask.long())
            torch.testing.assert_close(given, out[0][mask], rtol=1e-4, atol=1e-4)
        assert float((plain - masked).abs().max()) > 1e-2


def test_a_second_look_leaves_no_trace(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Histograms and what later layers see are the same with and without it, and a whole layer is looked at again on
    resume.
    """
    source, batches = open_source(tiny_model("phi3")), make_batches()
    monkeypatch.setattr(greedy, "greedy_split", partial(greedy_split, step=0.5, widest=0.5))
    monkeypatch.setattr(walk, "PROBE_TOKENS", 40)
    collect(source, batches, ["histogram:input", "histogram:gate"], tmp_path / "a")
    collect(source, batches, ["histogram:input", "histogram:gate", "greedy:input", "dropped:gate"], tmp_path / "b")
    left, right = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert left and all(right[name] == data for name, data in left.items())
    shutil.rmtree(tmp_path / "b" / "layers.1.linear.v_proj")
    before = times(tmp_path / "b")
    collect(source, batches, ["histogram:input", "histogram:gate", "greedy:input", "dropped:gate"], tmp_path / "b")
    assert contents(tmp_path / "b") == right
    again = {name for name, stamp in times(tmp_path / "b").items() if before.get(name) != stamp}
    assert {name.partition("/")[0] for name in again} == {f"layers.1.linear.{name}" for name in source.arch.linears()}


@pytest.mark.parametrize("score", ["corrected_gxo", "chess", "griffin"])
def test_scores_that_one_forward_does_not_give(score: str, source: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"one forward only, got {score}"):
        collect(source, make_batches(), [f"histogram:{score}"], tmp_path)


# Bad models and texts


def test_weights_that_are_no_numbers(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError,
        match="^Hidden states must be finite numbers, got NaN or infinity after layer 1. Check the weights; .*$",
    ):
        collect(open_source(folder), make_batches(), BOTH, tmp_path / "stats")
    assert [p.name for p in (tmp_path / "stats").iterdir()] == ["layers.0.ffn"]


def test_tokens_beyond_the_embedding(source: Source, tmp_path: Path) -> None:
    batches = make_batches()
    batches.tokens[0, 0] = VOCAB
    with pytest.raises(InputError, match=f"ids must lie below {VOCAB}, .*, got {VOCAB}. Fetch"):
        collect(source, batches, BOTH, tmp_path)


def test_padding_token_above_the_tokens_in_use(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Only the used rows of the embedding are in memory, fewer than the number of the padding token."""
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"pad_token_id": VOCAB - 1}))
    batches = make_batches()
    few = Batches(batches.tokens % 5, batches.mask)
    collect(open_source(folder), few, BOTH, tmp_path / "a")
    collect(open_source(tiny_model("llama")), few, BOTH, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_tensors_that_the_model_does_not_have_are_left_alone(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Older versions of transformers stored rotary tables inside the blocks."""
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    collect(open_source(folder), make_batches(), BOTH, tmp_path / "a")
    collect(open_source(tiny_model("llama")), make_batches(), BOTH, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
