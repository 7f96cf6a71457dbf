"""Threshold methods on synthetic statistics: gate, chess and cett at networks, teal and wina at linears."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_stats import LLAMA, PHI, SHAPES, TOKENS, N, chess_stats, gate_stats, linear_stats
from plan_checks import gates
from torch import Tensor
from torch.nn import functional as F

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import LINEARS, Threshold, check_plan
from sparsegate.converter.methods import make_config, needs
from sparsegate.converter.methods.channels import teal, wina
from sparsegate.converter.methods.gating import cett, chess, gate
from sparsegate.converter.methods.thresholds import share_at
from sparsegate.runtime_onnx.errors import InputError

# Gate


@pytest.mark.parametrize("sparsity", [0.02, 0.3, 0.5, 0.8, 0.97])
def test_gate_density(sparsity: float) -> None:
    g = torch.Generator().manual_seed(0)
    scores = [F.silu(torch.randn(TOKENS, N, generator=g) * (layer + 0.3)).abs() for layer in range(3)]
    plan = gate.plan(gate_stats(*scores), LLAMA, gate.Config(sparsity=sparsity))
    assert list(plan) == [Site(0), Site(1), Site(2)]
    for entry, score in zip(gates(plan).values(), scores, strict=True):
        assert isinstance(entry, Threshold) and entry.score == "gate"
        assert entry.tau.shape == (N,) and entry.tau.dtype == torch.float32 and len(entry.tau.unique()) == 1
        realised = float((score > entry.tau).double().mean())
        assert realised == pytest.approx(1 - sparsity, abs=1e-3) and entry.density == pytest.approx(realised, abs=1e-3)


def test_gate_of_relu_keeps_what_is_not_zero() -> None:
    score = F.relu(torch.randn(TOKENS, N, generator=torch.Generator().manual_seed(0)) - 1)
    entry = gate.plan(gate_stats(score), PHI, gate.Config(sparsity=0.5))[Site(0)].gating
    assert isinstance(entry, Threshold)
    assert (entry.tau == 0).all() and entry.density == pytest.approx(float((score > 0).double().mean()), abs=1e-9)


def test_gate_densities_by_site() -> None:
    g = torch.Generator().manual_seed(0)
    scores = [torch.rand(TOKENS, N, generator=g) for _ in range(3)]
    plan = gate.plan(
        gate_stats(*scores), LLAMA, gate.Config(sparsity=0.4, densities={"layers.1.ffn": 0.9, "layers.2.ffn": 0.0})
    )
    realised = [
        float((score > entry.tau).double().mean()) for entry, score in zip(gates(plan).values(), scores, strict=True)
    ]
    assert realised == pytest.approx([0.6, 0.9, 0.0], abs=2e-3) and [
        entry.density for entry in gates(plan).values()
    ] == pytest.approx(realised, abs=2e-3)


# CHESS


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_f15_chess_thresholds(sparsity: float) -> None:
    g = torch.Generator().manual_seed(0)
    activated = [F.silu(torch.randn(TOKENS, N, generator=g)).abs() for _ in range(2)]
    ups = [torch.randn(TOKENS, N, generator=g) * (torch.rand(N, generator=g) + 0.1) for _ in range(2)]
    plan = chess.plan(
        chess_stats(activated, ups), LLAMA, chess.Config(sparsity=sparsity, densities={"layers.1.ffn": 0.25})
    )
    for entry, score, up, density in zip(gates(plan).values(), activated, ups, (1 - sparsity, 0.25), strict=True):
        assert isinstance(entry, Threshold) and entry.score == "gate" and entry.tau.shape == (N,)
        constant = entry.tau.square() * up.square().mean(0)
        assert float(constant.max() / constant.min()) == pytest.approx(1, rel=1e-4)
        assert float((score > entry.tau).double().mean()) == pytest.approx(
            density, abs=5e-3
        ) and entry.density == pytest.approx(density, abs=1e-5)


def test_chess_loses_less_than_gate_where_ups_differ() -> None:
    """What the thresholds are for: at one density the squares of what is dropped are smaller."""
    g = torch.Generator().manual_seed(0)
    score, up = (
        F.silu(torch.randn(TOKENS, N, generator=g)).abs(),
        torch.randn(TOKENS, N, generator=g) * torch.logspace(-1, 1, N),
    )
    lost = []
    for method, stats in ((gate, gate_stats(score)), (chess, chess_stats([score], [up]))):
        entry = method.plan(stats, LLAMA, method.Config(sparsity=0.5))[Site(0)].gating
        keep = score > entry.tau
        assert float(keep.double().mean()) == pytest.approx(0.5, abs=5e-3)
        lost.append(float(torch.where(keep, 0.0, score * up).square().sum()))
    assert lost[1] < 0.5 * lost[0], lost


# CETT


def cett_stats(powers: tuple[float, ...]) -> dict[Site, dict[str, Tensor]]:
    """Layers whose error rises as share^power."""
    g, share = torch.Generator().manual_seed(0), torch.arange(1, 32) / 32
    stats = gate_stats(*(torch.rand(TOKENS, N, generator=g) for _ in powers))
    return {
        site: tensors | {"dropped:gate.share": share, "dropped:gate.error": share**p}
        for (site, tensors), p in zip(stats.items(), powers, strict=True)
    }


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_cett_is_one_for_all_layers(sparsity: float) -> None:
    stats = cett_stats((1.0, 2.0, 4.0))
    plan = cett.plan(stats, LLAMA, cett.Config(sparsity=sparsity))
    densities = [entry.density for entry in gates(plan).values()]
    assert sum(densities) / 3 == pytest.approx(1 - sparsity, abs=1e-6) and densities[0] > densities[1] > densities[2]
    commons = [(1 - density) ** power for density, power in zip(densities, (1.0, 2.0, 4.0), strict=True)]
    assert commons == pytest.approx([commons[0]] * 3, abs=0.01)
    assert [float(entry.tau[0]) for entry in gates(plan).values()] == pytest.approx(
        [1 - d for d in densities], abs=0.02
    ), "uniform scores"


def test_cett_may_be_given() -> None:
    stats = cett_stats((1.0, 3.0))
    plan = cett.plan(stats, LLAMA, cett.Config(cett=0.3))
    expected = [1 - share_at(t["dropped:gate.share"], t["dropped:gate.error"], 0.3) for t in stats.values()]
    assert [entry.density for entry in gates(plan).values()] == pytest.approx(expected, abs=1e-6) and expected[
        0
    ] == pytest.approx(0.7, abs=1e-3)


# TEAL and WINA


def skipped(plan: Any, inputs: dict[Site, Tensor]) -> tuple[dict[Site, float], float]:
    """(Skipped share by site, mean over weights), as realised on the inputs."""
    shares = {site: float((inputs[site] <= entry.tau).double().mean()) for site, entry in gates(plan).items()}
    sizes = {
        site: SHAPES[site.kind.removeprefix("linear:")][0] * SHAPES[site.kind.removeprefix("linear:")][1]
        for site in plan
    }
    return shares, sum(shares[site] * sizes[site] for site in plan) / sum(sizes.values())


@pytest.mark.parametrize("method", [teal, wina])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_inputs_are_skipped_at_the_mean(method: Any, greedy: bool, sparsity: float) -> None:
    score = "input" if method is teal else "wina"
    stats, inputs = linear_stats(score)
    plan = method.plan(stats, LLAMA, method.Config(sparsity=sparsity, greedy=greedy))
    check_plan(plan)
    assert list(plan) == list(stats)
    shares, mean = skipped(plan, inputs)
    assert mean == pytest.approx(sparsity, abs=3e-3)
    for site, entry in gates(plan).items():
        assert (
            isinstance(entry, Threshold)
            and entry.score == "input"
            and entry.tau.dtype == torch.float32
            and entry.tau.shape == inputs[site].shape[1:]
        )
        assert entry.density == pytest.approx(1 - shares[site], abs=3e-3)
        constant = entry.tau * stats[site][f"scale:{score}.scale"]
        assert float(constant.max() / constant.min()) == pytest.approx(1, abs=1e-5), (
            "one threshold a linear, on the score"
        )
    by_name = {site.kind.removeprefix("linear:"): share for site, share in shares.items() if site.layer == 0}
    if greedy:
        assert by_name["down_proj"] == pytest.approx(by_name["q_proj"] / 2, abs=5e-3)
    else:
        assert list(by_name.values()) == pytest.approx([sparsity] * 7, abs=5e-3)


def test_only_some_linears() -> None:
    stats, inputs = linear_stats("input")
    plan = teal.plan(stats, LLAMA, teal.Config(sparsity=0.6, linears=("q_proj", "down_proj")))
    shares, mean = skipped(plan, inputs)
    assert {site.kind for site in plan} == {"linear:q_proj", "linear:down_proj"} and mean == pytest.approx(
        0.6, abs=3e-3
    )
    assert shares[Site(0, kind="linear:q_proj")] > shares[Site(0, kind="linear:down_proj")] + 0.05
    without = {site: t for site, t in stats.items() if site.kind != "linear:gate_proj"}
    assert len(teal.plan(without, PHI, teal.Config())) == 12
    with pytest.raises(InputError, match="linears must name linears of the model, got gate_proj"):
        teal.plan(without, PHI, teal.Config(linears=("gate_proj",)))


def test_densities_of_blocks_and_linears() -> None:
    stats, inputs = linear_stats("wina")
    given = {"layers.1": 0.8, "layers.1.linear.k_proj": 0.3, "layers.0.linear.o_proj": 1.0}
    shares, _ = skipped(wina.plan(stats, LLAMA, wina.Config(sparsity=0.5, greedy=False, densities=given)), inputs)
    expected = {site: {0: 0.5, 1: 0.2}[site.layer] for site in shares}
    expected |= {Site(1, kind="linear:k_proj"): 0.7, Site(0, kind="linear:o_proj"): 0.0}
    assert shares == pytest.approx(expected, abs=5e-3)
    greedy = wina.plan(stats, LLAMA, wina.Config(densities={"layers.0": 0.7, "layers.1": 0.4}))
    for layer, mean in ((0, 0.3), (1, 0.6)):
        assert skipped({site: entries for site, entries in greedy.items() if site.layer == layer}, inputs)[
            1
        ] == pytest.approx(mean, abs=3e-3)


def test_a_channel_without_weights_goes() -> None:
    stats, _ = linear_stats("wina", 1)
    site = Site(0, kind="linear:q_proj")
    stats[site]["scale:wina.scale"][4] = 0.0
    entry = wina.plan(stats, LLAMA, wina.Config(greedy=False))[site].gating
    assert entry.tau[4] == torch.inf and bool(entry.tau[:4].isfinite().all())
    stats[site]["histogram:wina.count"][0] = TOKENS  # its scores, which are 0
    entry = wina.plan(stats, LLAMA, wina.Config(greedy=False, densities={site.key: 1.0}))[site].gating
    assert entry.tau[4] == torch.inf and not bool(entry.tau[:4].any()), (
        "every other channel stays where nothing is to be skipped"
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [("gate", "layers.9.ffn"), ("chess", "layers.0.linear.q_proj"), ("teal", "layers.7"), ("wina", "q_proj")],
)
def test_densities_name_sites(name: str, key: str) -> None:
    g = torch.Generator().manual_seed(0)
    rows = [torch.rand(TOKENS, N, generator=g)]
    stats: Any = {Site(0): gate_stats(*rows)[Site(0)] | chess_stats(rows, rows)[Site(0)]} | linear_stats("input", 1)[0]
    for site, tensors in linear_stats("wina", 1)[0].items():
        stats[site] = stats[site] | tensors
    module = {"gate": gate, "chess": chess, "teal": teal, "wina": wina}[name]
    assert module.plan(stats, LLAMA, module.Config()), "sites of the other kind are left alone"
    with pytest.raises(InputError) as error:
        module.plan(stats, LLAMA, module.Config(densities={key: 0.5}))
    assert key in str(error.value) and "layers.0." in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("gate", {"densities": {"layers.0.ffn": 1.5}}, ("gate.densities.layers.0.ffn", "1.5")),
        ("teal", {"linears": ["up"]}, ("teal.linears", "up")),
        ("teal", {"linears": []}, ("teal.linears",)),
        ("cett", {"cett": 1.0}, ("cett.cett", "1.0")),
        ("cett", {"densities": {}}, ("cett.densities",)),
        ("wina", {"sparsity": 0.0}, ("wina.sparsity", "0.0")),
    ],
)
def test_configurations_are_checked(name: str, values: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        make_config(name, values)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_needs_follow_the_configuration() -> None:
    assert needs("teal", teal.Config()) == ["histogram:input", "scale:input", "greedy:input"]
    assert needs("wina", wina.Config(greedy=False)) == ["histogram:wina", "scale:wina"] and len(LINEARS) == 7
