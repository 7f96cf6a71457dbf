"""The torch executor against a forward pass written out by hand, and the checkpoint against stock transformers."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODEL_TYPES, VOCAB, make_model
from plan_checks import gates
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, Predictor, Residual, SitePlan, Swap, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.modeling.gated import NEAR, apply_plan, dense, load, load_dense, recording, remove_plan
from sparsegate.runtime_onnx.errors import InputError

D, N, R = 64, 176, 12
TOKENS = torch.randint(3, VOCAB, (3, 30), generator=torch.Generator().manual_seed(0))


def make_entry(kind: str, seed: int = 0) -> SitePlan:
    g = torch.Generator().manual_seed(seed)
    if kind == "gate":
        return SitePlan(gate=Threshold("gate", 0.3 + 0.3 * torch.rand(N, generator=g), 0.5))
    fc1, fc2 = torch.randn(R, D, generator=g) / D**0.5, torch.randn(N, R, generator=g)
    residual = Residual(torch.randn(R, D, generator=g) / 10) if kind == "residual" else None
    return SitePlan(gate=Predictor(fc1, fc2, 0.2 * torch.randn(N, generator=g), 0.5), residual=residual)


def make_plan(kind: str) -> Plan:
    return {Site(layer): make_entry(kind, layer) for layer in range(2)}


def write(folder: Path, plan: Plan, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(open_source(folder), plan, out)
    return out


def forward_by_hand(model: Any, plan: Plan) -> Any:
    """Replace every network of a stock model by the formula of the format, from the state dict's tensors."""
    arch = load_arch(model.config.model_type)
    weights = model.state_dict()
    act = ACT2FN[getattr(model.config, arch.ffn.activation.config)]
    for site, entry in gates(plan).items():
        prefix = arch.ffn_module(site.layer) + "."

        def matrix(name: str | None, x: Tensor, prefix: str = prefix) -> Tensor:
            return F.linear(x, weights[f"{prefix}{name}.weight"], weights.get(f"{prefix}{name}.bias"))

        def forward(x: Tensor, entry: Any = entry, matrix: Any = matrix, at: Site = site) -> Tensor:
            if arch.ffn.kind == "plain":
                gate = z = act(matrix(arch.ffn.up, x))
            elif arch.ffn.gate_up:
                both = matrix(arch.ffn.gate_up, x)
                gate = act(both[..., :N])
                z = gate * both[..., N:]
            else:
                gate = act(matrix(arch.ffn.gate, x))
                z = gate * matrix(arch.ffn.up, x)
            extra: Tensor | float = 0.0
            if isinstance(entry, Threshold):
                score = gate.abs()
            else:
                inner = torch.clamp(torch.einsum("bsd,rd->bsr", x, entry.fc1), min=0)
                score = torch.einsum("bsr,nr->bsn", inner, entry.fc2)
                residual = plan[at].residual
                extra = 0.0 if residual is None else torch.einsum("bsr,rd->bsd", inner, residual.weight)
            return matrix(arch.ffn.down, z * (score > entry.tau)) + extra

        model.get_submodule(arch.ffn_module(site.layer)).forward = forward
    return model


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits


@contextmanager
def messages() -> Iterator[list[str]]:
    """Everything that transformers logs or warns of."""
    seen: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(f"{record.levelname} {record.getMessage()}")

    handler, logger = Handler(level=logging.WARNING), logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield seen
        seen += [str(w.message) for w in caught if "weight" in str(w.message) or "parameter" in str(w.message)]
    finally:
        logger.removeHandler(handler)


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


# The checkpoint in stock transformers


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_stock_transformers_loads_the_dense_model(
    model_type: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model(model_type)
    out = write(folder, make_plan("predictor"), tmp_path / "out")
    with messages() as seen:
        model = stock(out)
    assert not seen, seen
    source = stock(folder)
    assert type(model) is type(source) and torch.equal(logits(model), logits(source))
    assert list(model.state_dict()) == list(source.state_dict())


def test_missing_and_foreign_weights_would_be_seen(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """The control of the capture."""
    from safetensors.torch import load_file, save_file

    out = write(tiny_model("llama"), make_plan("gate"), tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors | {"foreign": torch.zeros(1)}, out / "model.safetensors", {"format": "pt"})
    with messages() as seen:
        stock(out)
    assert seen


# Gating


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("kind", ["gate", "predictor"])
def test_load_equals_the_formula(model_type: str, kind: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = write(tiny_model(model_type), make_plan(kind), tmp_path / "out")
    model, expected = load(out), logits(forward_by_hand(stock(out), make_plan(kind)))
    found = logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert float((found - logits(stock(out))).abs().max()) > 0.1, "the gating must matter"


def test_residual_equals_the_formula(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = write(tiny_model("qwen3"), make_plan("residual"), tmp_path / "out")
    torch.testing.assert_close(
        logits(load(out)), logits(forward_by_hand(stock(out), make_plan("residual"))), rtol=1e-5, atol=1e-4
    )
    assert float((logits(load(out)) - logits(forward_by_hand(stock(out), make_plan("predictor")))).abs().max()) > 1e-2


def test_one_dropped_neuron_would_be_seen(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = write(tiny_model("llama"), make_plan("gate"), tmp_path / "out")
    plan = make_plan("gate")
    entry = plan[Site(1)].gating
    plan[Site(1)] = SitePlan(
        gate=Threshold("gate", entry.tau.clone().index_fill(0, torch.tensor([17]), torch.inf), 0.5)
    )
    assert float((logits(load(out)) - logits(forward_by_hand(stock(out), plan))).abs().max()) > 1e-2


@pytest.mark.parametrize("model_type", ["llama", "phi", "phi3"])
def test_thresholds_at_infinity(model_type: str, tiny_model: Callable[[str], Path]) -> None:
    arch, plain = load_arch(model_type), stock(tiny_model(model_type))
    activation = arch.activation(plain.config)
    everything: Plan = {
        site: SitePlan(gate=Threshold("gate", uniform_tau(-torch.inf, N), 1.0)) for site in arch.sites(plain.config)
    }
    nothing: Plan = {
        site: SitePlan(gate=Threshold("gate", uniform_tau(torch.inf, N), 0.0)) for site in arch.sites(plain.config)
    }
    off = 1e-5 if model_type == "phi" else 0.0  # transformers writes gelu_new out, torch has one function for it
    torch.testing.assert_close(
        logits(apply_plan(stock(tiny_model(model_type)), everything, arch, activation)),
        logits(plain),
        rtol=off,
        atol=off,
    )
    gated = apply_plan(stock(tiny_model(model_type)), nothing, arch, activation)
    down = gated.get_submodule(arch.ffn_module(0) + "." + arch.ffn.down)
    x = torch.randn(2, 5, D)
    expected = torch.zeros(2, 5, D) if down.bias is None else down.bias.expand(2, 5, D)
    assert torch.equal(gated.get_submodule(arch.ffn_module(0))(x), expected), "only the bias is left"


def test_the_comparison_is_strict(tiny_model: Callable[[str], Path]) -> None:
    arch, model = load_arch("llama"), stock(tiny_model("llama"))
    x = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(0))
    mlp = model.get_submodule(arch.ffn_module(0))
    scores = mlp.act_fn(mlp.gate_proj(x)).abs().detach()[0, 0]
    for tau, kept in ((scores, 0), (torch.nextafter(scores, torch.tensor(-1.0)), N)):
        apply_plan(model, {Site(0): SitePlan(gate=Threshold("gate", tau, 0.5))}, arch, "silu")
        with recording(model) as seen, torch.no_grad():
            mlp(x)
        assert seen.kept == {Site(0): kept} and bool(seen.near[Site(0)].all())
        remove_plan(model)


def test_sites_without_an_entry_stay_dense(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    plan: Plan = {Site(1): make_plan("gate")[Site(1)]}
    out = write(tiny_model("llama"), plan, tmp_path / "out")
    torch.testing.assert_close(logits(load(out)), logits(forward_by_hand(stock(out), plan)), rtol=1e-5, atol=1e-4)


def test_state_dict_and_class_stay_as_they_are(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = write(tiny_model("granite"), make_plan("residual"), tmp_path / "out")
    model, plain = load(out), stock(out)
    assert type(model) is type(plain) and not model.training
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_dense_switches_gating_off_and_on(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = write(tiny_model("gemma2"), make_plan("predictor"), tmp_path / "out")
    model, plain = load(out), logits(stock(out))
    sparse = logits(model)
    with dense(model) as same:
        assert same is model and torch.equal(logits(model), plain)
        with dense(model):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain), "blocks nest"
    assert torch.equal(logits(model), sparse) and not torch.equal(sparse, plain)
    with pytest.raises(RuntimeError), dense(model):
        raise RuntimeError
    assert torch.equal(logits(model), sparse)
    assert torch.equal(logits(remove_plan(model)), plain)
    with dense(model):
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi"])
def test_generate_is_gated(model_type: str, tmp_path: Path) -> None:
    """Greedy tokens with a cache equal the argmax of full passes by hand, while the top two logits are apart."""
    folder = make_model(model_type, tmp_path / "m", eos_token_id=None)
    out = write(folder, make_plan("gate"), tmp_path / "out")
    model, by_hand = load(out), forward_by_hand(stock(out), make_plan("gate"))
    prompt = TOKENS[:1, :8]
    found = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=2,
        eos_token_id=None,
    )
    assert found.shape == (1, 32)
    expected = prompt
    for _ in range(24):
        last = logits(by_hand, expected)[:, -1]
        top = last.topk(2).values[0]
        if float(top[0] - top[1]) < 1e-3:
            break
        expected = torch.cat([expected, last.argmax(-1, keepdim=True)], dim=1)
    assert expected.shape[1] > 16 and torch.equal(found[:, : expected.shape[1]], expected)
    with dense(model):
        plain = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=2,
            eos_token_id=None,
        )
    assert not torch.equal(plain, found)


def test_the_mask_does_not_depend_on_the_batch(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(write(tiny_model("smollm3"), make_plan("predictor"), tmp_path / "out"))
    whole = logits(model)
    for row in range(3):
        torch.testing.assert_close(
            logits(model, TOKENS[row : row + 1, :11]), whole[row : row + 1, :11], rtol=1e-4, atol=1e-4
        )


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gate", "residual"])
def test_half_precision_keeps_scores_and_thresholds_in_fp32(
    dtype: torch.dtype, kind: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every threshold lies a little below the token's score, so it keeps all; rounded to the model's type the two would
    mostly be equal.
    """
    plain = load_dense(tiny_model("llama"), dtype).get_submodule("model.layers.0.mlp")
    x = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    entry = make_entry(kind)
    made = entry.gating
    with torch.no_grad():
        gate = plain.act_fn(plain.gate_proj(x))
    score = (gate.abs().float() if isinstance(made, Threshold) else F.relu(x.float() @ made.fc1.T) @ made.fc2.T)[0, 0]
    made = replace(made, tau=score - 1e-5 * score.abs().clamp_min(0.1))
    mlp = load(write(tiny_model("llama"), {Site(0): replace(entry, gate=made)}, tmp_path / "out"), dtype).get_submodule(
        "model.layers.0.mlp"
    )
    with recording(mlp) as seen, torch.no_grad():
        assert mlp(x).dtype == dtype
    assert seen.kept == {Site(0): N}
    assert float((score.to(dtype) > made.tau.to(dtype)).float().mean()) < 0.1, (
        "the control: in half precision the comparison is lost"
    )


# Recording


def test_recorder_counts_and_near(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    plan = make_plan("gate")
    out = write(tiny_model("llama"), plan, tmp_path / "out")
    model, by_hand, seen = load(out), stock(out), {}
    arch = load_arch("llama")
    for site in plan:
        module = model.get_submodule(arch.ffn_module(site.layer))
        module.register_forward_pre_hook(lambda _, args, site=site: seen.setdefault(site, []).append(args[0]))
    with recording(model) as record:
        logits(model)
        logits(model, TOKENS[:, :7])
    kept = {}
    for site, entry in gates(plan).items():
        mlp = by_hand.get_submodule(arch.ffn_module(site.layer))
        scores = [mlp.act_fn(mlp.gate_proj(x)).abs() for x in seen[site]]
        kept[site] = sum(float((s > entry.tau).sum()) for s in scores) / sum(s.numel() for s in scores)
        room = NEAR * (entry.tau.abs() + scores[-1].square().mean(-1, keepdim=True).sqrt())
        assert torch.equal(record.near[site], ((scores[-1] - entry.tau).abs() <= room).any(-1)) and record.near[
            site
        ].shape == (3, 7)
    assert record.density() == pytest.approx(kept)
    logits(model)
    assert record.density() == pytest.approx(kept), "outside the block nothing is recorded"


# Errors


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({Site(2): make_entry("gate")}, ("layers.2.ffn", "layers.1.ffn")),
        ({Site(0, 3): make_entry("gate")}, ("layers.0.experts.3.ffn",)),
        ({Site(0): SitePlan((Swap("relu"),))}, ("layers.0.ffn", "got swap")),
        (
            {Site(0): make_entry("gate"), Site(1): SitePlan(gate=Threshold("gate", torch.zeros(1), 0.5))},
            ("layers.1.ffn.tau", "[176]", "[1]"),
        ),
        (
            {Site(0): SitePlan(gate=Predictor(torch.zeros(3, 65), torch.zeros(N, 3), torch.zeros(N), 0.5))},
            ("fc1", "[3, 64]", "[3, 65]"),
        ),
        (
            {Site(0): SitePlan(gate=Predictor(torch.zeros(3, D), torch.zeros(N, 4), torch.zeros(N), 0.5))},
            ("fc2", "[176, 3]", "[176, 4]"),
        ),
        (
            {
                Site(0): SitePlan(
                    gate=Predictor(torch.zeros(3, D), torch.zeros(N, 3), torch.zeros(N), 0.5),
                    residual=Residual(torch.zeros(1, D)),
                )
            },
            ("residual", "[3, 64]", "[1, 64]"),
        ),
    ],
)
def test_plan_of_another_model(plan: Plan, words: tuple[str, ...], tiny_model: Callable[[str], Path]) -> None:
    model = stock(tiny_model("llama"))
    before = logits(model)
    with pytest.raises(InputError) as error:
        apply_plan(model, plan, load_arch("llama"), "silu")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)
    assert torch.equal(logits(model), before), "nothing was gated before the error"


def test_checkpoint_of_another_activation(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = write(tiny_model("llama"), make_plan("gate"), tmp_path / "out")
    raw = json.loads((out / "config.json").read_text())
    raw["sparsity"]["sites"]["layers.1.ffn"]["activation"] = "relu"
    (out / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="layers.1.ffn's activation must be silu .*, got relu"):
        load(out)


def test_load_refuses_what_is_no_checkpoint(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    for folder, word in ((tmp_path / "absent", "config.json"), (tiny_model("llama"), "sparsity")):
        with pytest.raises(InputError) as error:
            load(folder)
        assert word in str(error.value) and "\n" not in str(error.value)
    out = write(tiny_model("llama"), make_plan("gate"), tmp_path / "out")
    data = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(data[:-64])
    with pytest.raises(InputError) as error:
        load(out)
    assert str(out) in str(error.value) and "\n" not in str(error.value)
    shutil.rmtree(out)


def test_load_dense_is_the_stock_model(tiny_model: Callable[[str], Path]) -> None:
    assert torch.equal(logits(load_dense(tiny_model("qwen2"))), logits(stock(tiny_model("qwen2"))))
