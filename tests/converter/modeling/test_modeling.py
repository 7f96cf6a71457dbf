"""Checkpoints whose activation was swapped: what stock transformers makes of them, and our classes against a forward
pass written out by hand.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODEL_TYPES, make_model
from test_swap import N, by_hand, exact_for, logits
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparsegate.converter.arch import load_arch, supported
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Exact, Plan, Predictor, SitePlan, Swap, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import check_config, make_config, open_source, stock_view
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.modeling import swapped as modeling
from sparsegate.converter.modeling.gated import dense, load, load_dense, recording
from sparsegate.runtime_onnx.errors import InputError

modeling.register()

PREDICTOR = Predictor(torch.zeros(2, 64), torch.zeros(N, 2), torch.full((N,), -1.0), 1.0)


def write(folder: Path, plan: Plan, out: Path) -> Path:
    out.mkdir()
    write_checkpoint(open_source(folder), plan, out)
    return out


def swaps(model_type: str) -> Plan:
    return {
        Site(0): SitePlan((Swap(exact_for(model_type)),), Exact(0.25, 0.5)),
        Site(1): SitePlan((Swap("fatrelu(0.25)"),), Exact(0.4, 0.4)),
    }


@pytest.fixture(scope="module")
def swapped(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Model type -> folder of its tiny model with another activation in each layer; copy it before changing anything in
    it.
    """
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = write(
                tiny_model(model_type), swaps(model_type), tmp_path_factory.mktemp("swapped") / model_type
            )
        return made[model_type]

    return make


def auto(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def edit(folder: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(folder, out)
    raw = json.loads((out / "config.json").read_text())
    change(raw)
    (out / "config.json").write_text(json.dumps(raw))
    return out


# Stock transformers, and with our classes registered


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=500
    )


STOCK = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
for folder in sys.argv[1:]:
    for kind in (AutoConfig, AutoModelForCausalLM, LlamaForCausalLM):
        try:
            kind.from_pretrained(folder, local_files_only=True)
            print("loaded")
        except Exception as error:
            print(" ".join(str(error).split()) or repr(error))
assert not [name for name in sys.modules if name.startswith("sparsegate.converter.")]
"""


@pytest.mark.parametrize("before", ["", pytest.param("import sparsegate.converter", marks=pytest.mark.slow)])
def test_stock_transformers_stops(
    before: str, swapped: Callable[[str], Path], tiny_model: Callable[[str], Path]
) -> None:
    """With the package imported and nothing registered it stops in the same way."""
    found = python(before + STOCK, swapped("llama"), tiny_model("llama"))
    config, model, stock, *dense_ones = found.stdout.splitlines()
    assert "`sparsegate_llama`" in config and "does not recognize" in config and config == model, found.stderr
    assert stock.strip("'") == "sparsegate", "the class itself stops at an activation that it does not know"
    assert dense_ones == ["loaded"] * 3, "the dense model does load there"


LOADED = """
import sys
%s
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
found = [kind.from_pretrained(sys.argv[1]) for kind in (AutoConfig, AutoModelForCausalLM)]
assert AutoTokenizer.from_pretrained(sys.argv[1])("def")["input_ids"]
print(*(type(one).__name__ for one in found))
"""


@pytest.mark.parametrize(
    "lines",
    [
        "import sparsegate.converter; sparsegate.converter.register(); sparsegate.converter.register()",
        pytest.param(
            "import transformers, sparsegate.converter; sparsegate.converter.register()", marks=pytest.mark.slow
        ),
        pytest.param(
            "from transformers import AutoConfig; import sparsegate.converter; sparsegate.converter.register()",
            marks=pytest.mark.slow,
        ),
        pytest.param("import sys, sparsegate.converter as c; c.load(sys.argv[1])", marks=pytest.mark.slow),
    ],
)
def test_auto_classes_know_it_once_registered(lines: str, swapped: Callable[[str], Path]) -> None:
    """Every other test here has it registered before."""
    found = python(LOADED % lines, swapped("llama"))
    assert found.stdout.splitlines() == ["SparsegateLlamaConfig SparsegateLlamaForCausalLM"], found.stderr


def test_importing_the_package_does_nothing_else() -> None:
    code = "import sys; before = list(sys.meta_path); import sparsegate.converter; print(sys.meta_path == before)"
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, timeout=500
    )
    assert found.stdout.strip() == "True", found.stderr
    names = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines() if line.startswith("import time:")}
    assert "sparsegate.converter" in names
    assert not {name.partition(".")[0] for name in names} & {"torch", "transformers", "onnx", "numpy"}


# Our classes


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_auto_classes_compute_the_network_by_hand(
    model_type: str, swapped: Callable[[str], Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = auto(swapped(model_type))
    base = auto(tiny_model(model_type))
    wanted = logits(by_hand(base, {0: exact_for(model_type), 1: "fatrelu(0.25)"}))
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    assert type(model).__name__ == "Sparsegate" + type(base).__name__ and isinstance(model, type(base))
    assert (
        type(model.config).__name__ == "Sparsegate" + type(base.config).__name__
        and model.config.model_type == f"sparsegate_{model_type}"
    )
    assert getattr(model.config, load_arch(model_type).ffn.activation.config) == "sparsegate"
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    again = auto(tmp_path / "again")
    assert torch.equal(logits(again), logits(model)) and again.config.sparsity == model.config.sparsity
    assert open_source(tmp_path / "again").swaps == swaps(model_type)


def test_generate_and_tokenizer(swapped: Callable[[str], Path]) -> None:
    model, tokenizer = auto(swapped("llama")), AutoTokenizer.from_pretrained(swapped("llama"))
    tokens = tokenizer("def add(first):", return_tensors="pt")["input_ids"]
    found = model.generate(tokens, max_new_tokens=12, do_sample=False)
    for _ in range(found.shape[1] - tokens.shape[1]):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, tokens)


def test_a_model_from_its_configuration_alone(swapped: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(swapped("qwen2"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [model.get_submodule(load_arch("qwen2").ffn_module(layer)).swapped for layer in range(2)] == [
        "drelu",
        "fatrelu(0.25)",
    ]
    assert model.config.hidden_act == "sparsegate" == config.hidden_act


def test_half_precision_keeps_exact_zeros(swapped: Callable[[str], Path]) -> None:
    model = load_dense(swapped("llama"), torch.bfloat16)
    found: list[torch.Tensor] = []
    model.get_submodule("model.layers.0.mlp.down_proj").register_forward_pre_hook(
        lambda _, given: found.append(given[0])
    )
    logits(model)
    assert found[0].dtype is torch.bfloat16 and 0.6 < float((found[0] == 0).float().mean()) < 0.9


def test_classes_by_name() -> None:
    for base in supported():
        made = modeling.model_class(base)
        assert (
            getattr(modeling, made.__name__) is made
            and getattr(modeling, made.config_class.__name__) is made.config_class
        )
    with pytest.raises(AttributeError):
        modeling.SparsegateOlmoConfig  # noqa: B018


def test_a_configuration_without_the_key(swapped: Callable[[str], Path], tmp_path: Path) -> None:
    folder = edit(swapped("llama"), tmp_path / "model", lambda raw: raw.pop("sparsity"))
    with pytest.raises(InputError, match='The key "sparsity" must hold'):
        auto(folder)
    with pytest.raises(InputError, match='must have the key "sparsity"'):
        open_source(folder)


# Sources


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi"])
def test_a_swapped_folder_is_a_source(
    model_type: str, swapped: Callable[[str], Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, stock = swapped(model_type), open_source(tiny_model(model_type))
    source = open_source(folder)
    assert source.swaps == swaps(model_type) and not stock.swaps
    assert source.arch is stock.arch and source.arch.activation(source.config) == stock.arch.activation(stock.config)
    assert source.tokenizer()("def add")["input_ids"] == stock.tokenizer()("def add")["input_ids"]
    view = stock_view(folder, tmp_path / "view")
    assert stock_view(folder, tmp_path / "view") == view, "a second time is no error"
    assert torch.equal(logits(auto(view)), logits(auto(tiny_model(model_type)))), (
        "the weights under the base's activation"
    )
    raw, own = (json.loads((path / "config.json").read_text()) for path in (view, tiny_model(model_type)))
    assert raw == own
    assert (
        stock_view(tiny_model(model_type), tmp_path / "none") == tiny_model(model_type)
        and not (tmp_path / "none").exists()
    )


def test_a_plan_on_top_keeps_weights_and_swaps(swapped: Callable[[str], Path], tmp_path: Path) -> None:
    plan: Plan = {
        Site(1): SitePlan(gate=Threshold("gate", uniform_tau(0.3, N), 0.5)),
        Site(0, kind="linear:q_proj"): SitePlan(gate=Threshold("input", torch.zeros(64), 0.9)),
    }
    out = write(swapped("llama"), plan, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (swapped("llama") / "model.safetensors").read_bytes()
    raw, before = (json.loads((folder / "config.json").read_text()) for folder in (out, swapped("llama")))
    assert raw["sparsity"]["sites"] == {
        "layers.0.ffn": before["sparsity"]["sites"]["layers.0.ffn"],
        "layers.0.linear.q_proj": {"score": "input", "density": 0.9},
        "layers.1.ffn": {"score": "gate", "activation": "fatrelu(0.25)", "density": 0.5},
    }
    assert {k: v for k, v in raw.items() if k != "sparsity"} == {k: v for k, v in before.items() if k != "sparsity"}
    model = load(out)
    with dense(model):
        assert torch.equal(logits(model), logits(auto(swapped("llama")))), "ungated it is the swapped model"
    assert torch.equal(logits(auto(out)), logits(auto(swapped("llama")))), "and so it is in transformers"
    assert not torch.equal(logits(model), logits(auto(out)))
    with pytest.raises(
        InputError, match=r"has a plan already \(layers.0.linear.q_proj\)|has a plan already \(layers.1.ffn\)"
    ):
        open_source(out)
    assert open_source(out, sparse=True).swaps == {
        Site(0): swaps("llama")[Site(0)],
        Site(1): SitePlan((Swap("fatrelu(0.25)"),), Exact()),
    }


def test_a_plan_of_another_activation_is_refused(swapped: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"layers.0.ffn's activation must be drelu as in the model, got relu"):
        write(swapped("llama"), {Site(0): SitePlan((Swap("relu"),), Exact())}, tmp_path / "out")


def test_a_stock_checkpoint_with_a_plan_is_no_source(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = write(tiny_model("llama"), {Site(0): SitePlan(gate=PREDICTOR)}, tmp_path / "out")
    raw = json.loads((out / "config.json").read_text())
    assert raw["model_type"] == "llama" and raw["sparsity"]["version"] == 1
    with pytest.raises(InputError, match="sparse already"):
        check_config(raw)
    assert not hasattr(make_config(raw), "sparsity")


def test_a_relu_model_keeps_its_type_and_loses_nothing(tmp_path: Path) -> None:
    stock = make_model("llama", tmp_path / "model", hidden_act="relu")
    out = write(
        stock, {Site(layer): SitePlan((Swap("relu"),), Exact(0.5, 0.5)) for layer in range(2)}, tmp_path / "out"
    )
    model = load(out)
    assert type(auto(out)) is type(auto(stock)) and torch.equal(logits(model), logits(auto(stock)))
    with recording(model) as record:
        logits(model)
    assert record.density() == record.opened_share() and all(0.3 < share < 0.7 for share in record.density().values())
    raw = json.loads((out / "config.json").read_text())
    raw["sparsity"]["base_activation"], raw["hidden_act"] = "relu", "silu"
    (out / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="layers.0.ffn's activation must be silu as in the base model, got relu"):
        load(out)


# New weights


def sharded(folder: Path, out: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size="100KB")
    shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
    return out


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_new_weights_are_written_in_the_sources_files(
    model_type: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_source(sharded(tiny_model(model_type), tmp_path / "source"))
    model = load_dense(source.folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    plan: Plan = {Site(layer): SitePlan((Swap("drelu"),), Exact(0.25, 0.5)) for layer in range(2)}
    (tmp_path / "out").mkdir()
    write_checkpoint(source, plan, tmp_path / "out", model.state_dict())
    found = open_source(tmp_path / "out")
    assert {name: (info.shape, info.file.name) for name, info in found.tensors.items()} == {
        name: (info.shape, info.file.name) for name, info in source.tensors.items()
    } and len({info.file for info in found.tensors.values()}) > 1
    assert {info.dtype for info in found.tensors.values()} == {"F32"} and found.config.dtype == torch.float32
    wanted = logits(by_hand(model, {0: "drelu", 1: "drelu"}))
    torch.testing.assert_close(logits(auto(tmp_path / "out")), wanted, rtol=0, atol=1e-4)
    one = next(iter(source.tensors))
    (tmp_path / "one").mkdir()
    write_checkpoint(source, plan, tmp_path / "one", {one: model.state_dict()[one]})
    changed = [name for name, info in open_source(tmp_path / "one").tensors.items() if info.dtype == "F32"]
    assert changed == [one], "the others stay as they are"


def test_weights_of_another_model_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(tiny_model("llama"))
    for weights, words in (
        ({"x.weight": torch.zeros(1)}, "x.weight, which it has not"),
        ({"model.norm.weight": torch.zeros(65)}, r"\[64\], got \[65\]"),
    ):
        with pytest.raises(InputError, match=words):
            write_checkpoint(source, {}, tmp_path, weights)
    assert not list(tmp_path.iterdir())
