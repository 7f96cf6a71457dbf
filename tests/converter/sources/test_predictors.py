"""Predictors of other systems against their own rules, computed by hand from the files."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from models import MODEL_TYPES, TEXT, make_model
from onnx import helper, numpy_helper
from plan_checks import same
from predictor_folders import (
    LAYERS,
    NORMS,
    RANKS,
    TOKENS,
    D,
    N,
    entry_of,
    kept,
    make_folder,
    make_tensors_of,
    put_beside,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Exact, Predictor, SitePlan, Swap, uniform_tau
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.modeling.gated import dense, load, load_dense
from sparsegate.converter.onnx_export.base_graph import build_base, check_base
from sparsegate.converter.sources.predictor_folder import export_predictors
from sparsegate.converter.sources.predictors import (
    Config,
    fingerprint,
    imported_plan,
    measured,
    predictors_beside,
    read_predictors,
    residual_gains,
    strict_threshold,
)
from sparsegate.converter.sources.published import normalise
from sparsegate.converter.stats.collect import collect
from sparsegate.converter.text.windows import make_batches
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.library import library_path
from sparsegate.runtime_onnx.ops.gated_mlp import DOMAIN, NAME, Variant, function


@pytest.fixture
def source(tiny_model: Callable[[str], Path]) -> Source:
    return open_source(tiny_model("llama"))


def three_logits(tau: Tensor) -> Predictor:
    """x = [1] has the logits -1, 0, 1."""
    return Predictor(torch.ones(1, 1), torch.tensor([[-1.0], [0.0], [1.0]]), tau, 1.0)


def run_op(tau: Tensor, native: bool) -> float:
    """The op on `three_logits`, with neurons of the outputs 1, 10 and 100."""
    entry = three_logits(tau)
    ones, down = np.ones((3, 1), np.float32), np.array([[1], [10], [100]], np.float32)
    tensors = {
        "w_gate": ones,
        "w_up": ones,
        "w_down": down,
        "tau": tau.numpy(),
        "p1": entry.fc1.numpy(),
        "p2": entry.fc2.numpy(),
    }
    variant = Variant("relu", "predictor", "float", tuple(tensors))
    node = helper.make_node(NAME, ["x", *tensors], ["y"], domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in variant.attributes().items())
    io = [helper.make_tensor_value_info(name, 1, [1, 1]) for name in ("x", "y")]
    graph = helper.make_graph(
        [node], "graph", io[:1], io[1:], [numpy_helper.from_array(array, role) for role, array in tensors.items()]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function(variant)])
    options = ort.SessionOptions()
    if native:
        options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return float(np.asarray(session.run(None, {"x": np.ones((1, 1), np.float32)})[0]).item())


@pytest.mark.parametrize(("keep_equal", "expected"), [(False, [False, False, True]), (True, [False, True, True])])
@pytest.mark.parametrize("native", [False, True])
def test_f09_tie_rules(keep_equal: bool, expected: list[bool], native: bool) -> None:
    """round(sigmoid(logit)) drops a logit of 0, PowerInfer's not (logit < 0) keeps it; in torch, the op's body and its
    kernel.
    """
    logits = torch.tensor([-1.0, 0.0, 1.0])
    rule = ~(logits < 0.0) if keep_equal else torch.sigmoid(logits).round() == 1
    assert rule.tolist() == expected
    tau = strict_threshold(torch.zeros(3, dtype=torch.float64), keep_equal)
    assert kept(three_logits(tau), torch.ones(1, 1))[0].tolist() == expected
    y = run_op(tau, native)
    assert y == sum(w for w, keep in zip((1, 10, 100), expected, strict=True) if keep)


@pytest.mark.parametrize("threshold", [0.0, -0.0, 0.1, -0.5, 1e-45, 3.5e37, -7.0, 1 / 3])
def test_f09_threshold_is_exact_at_neighbouring_floats(threshold: float) -> None:
    at = np.float32(threshold)
    around = [at]
    for direction in (-np.inf, np.inf):
        near = at
        for _ in range(3):
            near = np.nextafter(near, np.float32(direction))
            around.append(near)
    logits = torch.from_numpy(np.array(around, np.float32))
    for keep_equal in (True, False):
        tau = strict_threshold(torch.tensor([float(at)], dtype=torch.float64), keep_equal)
        rule = ~(logits < float(at)) if keep_equal else logits > float(at)
        assert torch.equal(logits > tau, rule) and 0 < int(rule.sum()) < len(rule)
    between = torch.tensor([float(at) * (1 + 1e-9) + 1e-60], dtype=torch.float64)  # no float32: the neighbours decide
    for keep_equal in (True, False):
        wide = logits.double()
        assert torch.equal(
            logits > strict_threshold(between, keep_equal), wide >= between if keep_equal else wide > between
        )


def test_powerinfer_folder_reads_as_its_rule(source: Source, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "p", {"sparse_threshold": 0.1, "model": "any other key"})
    plan = imported_plan(source, Config(folder=str(folder), tap="input"))
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(9))
    for layer in range(LAYERS):
        t = make_tensors_of(layer)
        logits = torch.relu(x @ t["fc1.weight"].T) @ t["fc2.weight"].T
        entry = entry_of(plan, layer)
        assert entry.rank == RANKS[layer] and torch.equal(kept(entry, x), ~(logits < torch.tensor(0.1)))
        assert 0.1 < kept(entry, x).float().mean() < 0.9
        assert not torch.equal(kept(entry, x), logits >= 0)
    replaced = imported_plan(source, Config(folder=str(folder), tap="input", threshold=-0.25))
    assert torch.equal(
        entry_of(replaced, 0).tau, uniform_tau(float(np.nextafter(np.float32(-0.25), np.float32(-1))), N)
    )


def test_half_precision_and_sequential_names_are_read(source: Source, tmp_path: Path) -> None:
    plain = imported_plan(source, Config(folder=str(make_folder(tmp_path / "a")), tap="input"))
    folder = make_folder(tmp_path / "b")
    for layer, last in ((0, "1.weight"), (1, "2.weight")):
        t = make_tensors_of(layer)
        save_file(
            {"0.weight": t["fc1.weight"].half(), last: t["fc2.weight"].half()}, folder / f"model_{layer}.safetensors"
        )
    renamed = imported_plan(source, Config(folder=str(folder), tap="input"))
    for layer in range(LAYERS):
        assert torch.equal(entry_of(renamed, layer).fc1, entry_of(plain, layer).fc1.half().float())
        assert torch.equal(entry_of(renamed, layer).fc2, entry_of(plain, layer).fc2.half().float())


def test_biases_fold_into_tau(source: Source, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "p", {"sparse_threshold": 0.25, "tap": "input"}, biases=True)
    with pytest.raises(InputError, match=r"model_0\.safetensors must have no fc1\.bias"):
        imported_plan(source, Config(folder=str(folder)))
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(3)).double()
    linear = imported_plan(source, Config(folder=str(folder), form="linear2"))
    for layer in range(LAYERS):
        t = {role: tensor.double() for role, tensor in make_tensors_of(layer, biases=True).items()}
        logits = (x @ t["fc1.weight"].T + t["fc1.bias"]) @ t["fc2.weight"].T + t["fc2.bias"]
        entry = entry_of(linear, layer)
        own = torch.relu(x @ entry.fc1.double().T) @ entry.fc2.double().T
        far = (logits - 0.25).abs() > 1e-5
        assert torch.equal((own > entry.tau.double())[far], (logits >= 0.25)[far]) and far.float().mean() > 0.999
    for layer in range(LAYERS):
        t = make_tensors_of(layer, biases=True)
        save_file(
            {k: v for k, v in t.items() if k != "fc1.bias"} | {"fc1.bias": torch.zeros(RANKS[layer])},
            folder / f"model_{layer}.safetensors",
        )
    entry = entry_of(imported_plan(source, Config(folder=str(folder))), 0)
    t = {role: tensor.double() for role, tensor in make_tensors_of(0, biases=True).items()}
    raw = torch.relu(x @ t["fc1.weight"].T) @ t["fc2.weight"].T
    far = (raw + t["fc2.bias"] - 0.25).abs() > 1e-5
    assert (
        torch.equal((raw > entry.tau.double())[far], (raw + t["fc2.bias"] >= 0.25)[far]) and far.float().mean() > 0.999
    )


def test_linear2_is_exact_at_twice_the_rank(source: Source, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "p")
    plan = imported_plan(source, Config(folder=str(folder), form="linear2", tap="input"))
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(4))
    for layer in range(LAYERS):
        t, entry = make_tensors_of(layer), entry_of(plan, layer)
        inner = x @ t["fc1.weight"].T
        assert entry.rank == 2 * RANKS[layer]
        own = torch.relu(x.double() @ entry.fc1.double().T) @ entry.fc2.double().T
        torch.testing.assert_close(
            own, x.double() @ t["fc1.weight"].double().T @ t["fc2.weight"].double().T, rtol=0, atol=1e-12
        )
        relu = torch.relu(inner) @ t["fc2.weight"].T
        assert (own.float() - relu).abs().max() > 1, "the nonlinear form must differ"


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name != "phi"])
def test_residual_tap_decides_as_before_the_norm(
    model_type: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_source(tiny_model(model_type))
    folder = make_folder(tmp_path / "p")
    plan = imported_plan(source, Config(folder=str(folder)))
    unfolded = imported_plan(source, Config(folder=str(folder), tap="input"))
    model = load_dense(source.folder)
    before, after = {}, {}
    for layer, block in enumerate(model.get_decoder().layers):
        block.get_submodule(NORMS.get(model_type, "post_attention_layernorm")).register_forward_pre_hook(
            lambda _, given, k=layer: before.update({k: given[0]})
        )
        block.mlp.register_forward_pre_hook(lambda _, given, k=layer: after.update({k: given[0]}))
    with torch.no_grad():
        model(input_ids=TOKENS)
    for layer in range(LAYERS):
        t = {role: tensor.double() for role, tensor in make_tensors_of(layer).items()}
        logits = torch.relu(before[layer].double() @ t["fc1.weight"].T) @ t["fc2.weight"].T
        near = logits.abs() < 1e-4 * logits.square().mean(-1, keepdim=True).sqrt()
        assert torch.equal(kept(entry_of(plan, layer), after[layer]) | near, (logits >= 0) | near)
        assert near.float().mean() < 0.001
        assert (kept(entry_of(unfolded, layer), after[layer]) != (logits >= 0)).float().mean() > 0.02, (
            "without the fold many must differ"
        )


def test_residual_gains_of_a_norm_that_adds_one_itself(tiny_model: Callable[[str], Path]) -> None:
    for model_type, offset in (("llama", 0), ("gemma2", 1)):
        folder = tiny_model(model_type)
        stored = load_file(folder / "model.safetensors")[
            f"model.layers.1.{NORMS.get(model_type, 'post_attention_layernorm')}.weight"
        ]
        assert torch.equal(residual_gains(open_source(folder))[Site(1)], stored.double() + offset)


def test_residual_tap_is_refused_where_it_does_not_fold(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "p")
    with pytest.raises(
        InputError, match=r"a norm that only scales, got LayerNorm at model\.layers\.0\.input_layernorm"
    ):
        imported_plan(open_source(tiny_model("phi")), Config(folder=str(folder)))
    source = open_source(tiny_model("llama"))
    with pytest.raises(InputError, match=r"must have threshold 0 and no bias, got threshold 0\.5 for model_0"):
        imported_plan(source, Config(folder=str(folder), threshold=0.5))
    with pytest.raises(InputError, match="must have threshold 0 and no bias, got a bias for model_0"):
        imported_plan(source, Config(folder=str(make_folder(tmp_path / "q", biases=True)), form="linear2"))
    holed = make_model("llama", tmp_path / "m")
    weights = load_file(holed / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"][7] = 0
    save_file(weights, holed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"model\.layers\.1\.post_attention_layernorm\.weight must have no zero .* channel 7"
    ):
        imported_plan(open_source(holed), Config(folder=str(folder)))


def _bad(name: str, tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    return lambda folder: save_file(tensors, folder / name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model_1.safetensors").unlink(), "must hold model_1.safetensors for a model of 2 layers"),
        (
            lambda f: (f / "model_1.safetensors").rename(f / "model_1.pt"),
            "Predictors must be safetensors, got model_1.pt, a pickle file",
        ),
        (_bad("model_2.safetensors", make_tensors_of(1)), "must hold predictors of 2 layers, got model_2.safetensors"),
        (
            lambda f: (f / "model_1.safetensors").write_bytes(b"12345678901"),
            "model_1.safetensors must be a complete safetensors file",
        ),
        (
            _bad("model_1.safetensors", {"fc1.weight": torch.zeros(3, D)}),
            "must hold fc1.weight, fc2.weight and at most their biases, got fc1.weight.",
        ),
        (
            _bad("model_1.safetensors", make_tensors_of(1) | {"norm.weight": torch.ones(D)}),
            "got fc1.weight, fc2.weight, norm.weight",
        ),
        (
            _bad("model_1.safetensors", {"fc1.weight": torch.zeros(3, D + 1), "fc2.weight": torch.zeros(N, 3)}),
            "fc1 must have shape [3, 64]",
        ),
        (
            _bad("model_1.safetensors", {"fc1.weight": torch.zeros(3, D), "fc2.weight": torch.zeros(3, N)}),
            "fc2 must have shape [176, 3]",
        ),
        (
            _bad("model_1.safetensors", {"fc1.weight": torch.zeros(3, D), "fc2.weight": torch.full((N, 3), math.nan)}),
            "fc2.weight must hold finite",
        ),
        (
            _bad(
                "model_1.safetensors",
                {"fc1.weight": torch.zeros(3, D), "fc2.weight": torch.zeros(N, 3, dtype=torch.int8)},
            ),
            "a float tensor, got int8",
        ),
        (
            lambda f: (f / "config.json").write_text('{"sparse_threshold": "0"}'),
            "threshold must be a finite float32, got '0'",
        ),
        (
            lambda f: (f / "config.json").write_text('{"sparse_threshold": 1e40}'),
            "threshold must be a finite float32, got 1e+40",
        ),
        (lambda f: (f / "config.json").write_text('{"tap": "output"}'), "tap must be input or residual, got 'output'"),
        (lambda f: (f / "config.json").write_text("[0]"), "config.json must be a JSON object"),
    ],
)
def test_bad_folders_are_refused(spoil: Callable[[Path], Any], message: str, source: Source, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "p")
    spoil(folder)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        imported_plan(source, Config(folder=str(folder)))
    assert "\n" not in str(error.value)


def test_fingerprint_covers_what_decides(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "p")
    config = Config(folder=str(folder))
    first = fingerprint(config)
    (folder / "README.md").write_text("any")
    assert fingerprint(config) == first and fingerprint(Config()) is None
    (folder / "config.json").write_text("{}")
    second = fingerprint(config)
    save_file(make_tensors_of(0), folder / "model_1.safetensors")
    assert len({first, second, fingerprint(config)}) == 3


def test_no_folder_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder must be a folder with model_0.safetensors"):
        imported_plan(source, Config(folder=str(tmp_path / "none")))


def test_the_command_for_pickles_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in range(LAYERS):
        torch.save(make_tensors_of(layer), tmp_path / f"model_{layer}.pt")
    with pytest.raises(InputError) as error:
        read_predictors(tmp_path, LAYERS)
    flag, program, files, *_ = shlex.split(str(error.value).partition("Run python ")[2])
    assert (flag, files) == ("-c", "model_*.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["-c", "model_0.pt", "model_1.pt"])
    exec(program, {})
    assert torch.equal(read_predictors(tmp_path, LAYERS)[0][1].fc2, make_tensors_of(1)["fc2.weight"])


@torch.no_grad()
def test_predictors_beside_the_weights(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Read with logit > 0; everything else about the model stays as it is: loading, statistics, the checkpoint."""
    plain = tiny_model("llama")
    source = open_source(put_beside(plain, tmp_path / "m"))
    plan = predictors_beside(source)
    assert all(torch.equal(entry_of(plan, k).tau, torch.zeros(N)) for k in range(LAYERS))
    gains = residual_gains(source)
    for k in range(LAYERS):
        fc1 = make_tensors_of(k)["fc1.weight"].bfloat16().double()
        assert torch.equal(entry_of(plan, k).fc1, (fc1 / gains[Site(k)]).float())
        assert torch.equal(entry_of(plan, k).fc2, make_tensors_of(k)["fc2.weight"].bfloat16().float())
    assert imported_plan(source, Config()).keys() == plan.keys()
    taken = imported_plan(source, Config(tap="input", form="linear2", threshold=0.5))
    assert entry_of(taken, 0).rank == 2 * RANKS[0] and torch.equal(entry_of(taken, 0).tau, torch.full((N,), 0.5))
    expected = load_dense(plain)(input_ids=TOKENS).logits
    assert torch.equal(load_dense(source.folder)(input_ids=TOKENS).logits, expected)
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(source, plan, out)
    gated = load(out)
    assert not torch.equal(gated(input_ids=TOKENS).logits, expected)
    with dense(gated):
        assert torch.equal(gated(input_ids=TOKENS).logits, expected)
    with pytest.raises(InputError, match=r"must hold model\.layers\.0\.mlp\.predictor\.fc1\.weight .* got neither"):
        predictors_beside(open_source(plain))


def test_measured_density_and_recall(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(put_beside(tiny_model("llama"), tmp_path / "m"))
    plan = predictors_beside(source)
    assert entry_of(plan, 0).density == 1
    stats = collect(
        source, make_batches(source.tokenizer(), TEXT * 4, 8, 32, 0), ["samples:magnitude"], tmp_path / "stats"
    )
    found = measured(plan, stats)
    for k in range(LAYERS):
        x, score = stats[Site(k)]["samples:magnitude.x"].float(), stats[Site(k)]["samples:magnitude.score"].float()
        keep = kept(entry_of(plan, k), x)
        density = keep.sum().item() / keep.numel()
        top = max(1, round(density * N))
        hits = [
            len(set(keep[t].nonzero()[:, 0].tolist()) & set(score[t].argsort(descending=True)[:top].tolist()))
            for t in range(len(x))
        ]
        assert entry_of(found, k).density == pytest.approx(density) and 0.2 < density < 0.8
        assert entry_of(found, k).recall == pytest.approx(sum(hits) / (top * len(x)), abs=2e-3)  # equal fp16 scores
        assert torch.equal(entry_of(found, k).fc1, entry_of(plan, k).fc1)


def test_the_base_graph_ignores_predictors_beside(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = put_beside(tiny_model("llama"), tmp_path / "m")
    check_base(
        build_base(folder, tmp_path / "onnx"),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        TOKENS,
    )


def test_predictors_of_a_model_with_another_activation(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Every list is the swap and the predictor; measured and written they are as without the swap."""
    folder = put_beside(tiny_model("llama"), tmp_path / "m")
    stock = predictors_beside(open_source(folder))
    source = open_source(normalise(folder, tmp_path / "out", activation="drelu"))
    assert source.swaps == {Site(k): SitePlan((Swap("drelu"),), Exact()) for k in range(LAYERS)}
    beside = predictors_beside(source)
    plan = imported_plan(source, Config(folder=str(make_folder(tmp_path / "p"))))
    for found in (beside, plan):
        assert len(found) == LAYERS
        assert all(e.edits == (Swap("drelu"),) and isinstance(e.gate, Predictor) for e in found.values())
    for layer in range(LAYERS):
        ours, theirs = (found[Site(layer)].tensors() for found in (beside, stock))
        assert all(torch.equal(ours[role], theirs[role]) for role in theirs)

    x = torch.randn(30, D, generator=torch.Generator().manual_seed(8))
    score = torch.rand(30, N, generator=torch.Generator().manual_seed(9))
    stats = {site: {"samples:magnitude.x": x, "samples:magnitude.score": score} for site in plan}
    with_swaps, without = (
        measured(plan, stats),
        measured({site: SitePlan((), e.gate) for site, e in plan.items()}, stats),
    )
    for site, entry in with_swaps.items():
        assert entry.edits == (Swap("drelu"),) and same(SitePlan((), entry.gate), without[site])
        assert 0 < entry.gating.density < 1

    out = export_predictors(with_swaps, tmp_path / "a", tap="residual", source=source)
    again = imported_plan(source, Config(folder=str(out)))
    assert len(again) == LAYERS
    assert all(e.edits == (Swap("drelu"),) and isinstance(e.gate, Predictor) for e in again.values())
    for layer in range(LAYERS):
        assert torch.allclose(
            load_file(out / f"model_{layer}.safetensors")["fc1.weight"],
            make_tensors_of(layer)["fc1.weight"],
            rtol=3e-7,
            atol=0,
        )
    with pytest.raises(InputError, match=r"one predictor a layer, got exact at layers\.0\.ffn"):
        export_predictors({Site(0): SitePlan((Swap("drelu"),), Exact())}, tmp_path / "b")
