"""Every row of every table keeps the promise of its kind, so that a new row cannot be half a thing."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from models import MODEL_TYPES
from pydantic import BaseModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from sparsegate.converter import methods, scores, stats
from sparsegate.converter import methods as converter_methods
from sparsegate.converter.arch import ACTIVATIONS, load_arch, supported
from sparsegate.converter.arch.site import Site
from sparsegate.converter.bundled import BUNDLED_MODEL
from sparsegate.converter.checkpoint import plan as plans
from sparsegate.converter.checkpoint.cost import COSTS, EDIT_COSTS, SiteSize, cost
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.sparsity import WRITERS, encode
from sparsegate.converter.cli import VERBS
from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.modeling.blocks import ACTIVATIONS as TORCH_ACTIVATIONS
from sparsegate.converter.modeling.blocks import Parts
from sparsegate.converter.modeling.gated import EDITORS, EXECUTORS
from sparsegate.converter.onnx_export.emit import EDIT_EMITTERS, EMITTERS, emit
from sparsegate.converter.sources.named import SOURCES, Fetched
from sparsegate.runtime_onnx.ops import OPS

ROOT = Path(__file__).parent.parent
PHASES = ("pre", "mid", "post", "in", "prompt", "oracle")
FUTURE = {"label", "grad", "grad_path", "o_grad", "o_grad_path"}
"""Fields of Context that only someone who knows the next token has."""
RESIDUAL = plans.Residual(torch.randn(3, 5))
SITE_PLANS = {
    "threshold": plans.SitePlan((), plans.Threshold("gate", torch.rand(7), 0.5)),
    "predictor": plans.SitePlan(
        (), plans.Predictor(torch.randn(3, 5), torch.randn(7, 3), torch.randn(7), 0.5), RESIDUAL
    ),
    "exact": plans.SitePlan((plans.Swap("drelu"),), plans.Exact(0.25, 0.5)),
}
CONSUMERS = {
    "gates": (plans.GATES, (WRITERS, COSTS, EXECUTORS, EMITTERS)),
    "edits": (plans.EDITS, (EDIT_COSTS, EDITORS, EDIT_EMITTERS)),
}
"""Of each kind of part: its table, and what writes, counts, executes and emits it, a row for every kind."""


def check_source(source: Any) -> None:
    assert (
        isinstance(source, tuple)
        and len(source) == 3
        and all(isinstance(text, str) and text.strip() for text in source)
    )
    assert "arXiv" in source[0] or "doi" in source[0].lower()


@pytest.mark.parametrize("name", scores.SCORES)
def test_score(name: str) -> None:
    module = scores.load_score(name)
    check_source(module.SOURCE)
    assert module.PHASE in PHASES
    fields = {field.name for field in dataclasses.fields(scores.Context)}
    assert module.NEEDS and set(module.NEEDS) <= fields
    assert not FUTURE & set(module.NEEDS) or module.PHASE == "oracle", "a score that sees a label is an oracle"
    assert list(inspect.signature(module.score).parameters) == ["context"]
    tokens, units, hidden, heads, width = 6, 9, 4, 3, 5
    shapes = {"x": (tokens, hidden), "label": (tokens,), **dict.fromkeys(("gate", "up", "z", "grad"), (tokens, units))}
    shapes |= {
        "grad_path": (2, tokens, units),
        "o_grad_path": (2, tokens, heads, width),
        **dict.fromkeys(("up_moment", "prompt"), (units,)),
    }
    shapes |= dict.fromkeys(("o", "o_grad"), (tokens, heads, width))

    def context(needs: tuple[str, ...]) -> scores.Context:
        return scores.Context(**{need: torch.rand(shapes.get(need, (units, hidden))) for need in needs})

    scored = hidden if getattr(module, "KIND", "ffn") == "linear" else units
    assert module.score(context(module.NEEDS)).shape == (tokens, scored), "a score must do with what NEEDS names"
    if hasattr(module, "score_heads"):
        assert set(module.HEAD_NEEDS) <= fields and (FUTURE & set(module.HEAD_NEEDS) == set()) == (
            module.PHASE != "oracle"
        )
        assert module.score_heads(context(module.HEAD_NEEDS)).shape == (tokens, heads)


@pytest.mark.parametrize("name", stats.STATS)
def test_statistic(name: str) -> None:
    module, score = stats.load_stat(f"{name}:gate")
    assert score == "gate"
    assert [list(inspect.signature(getattr(module, f)).parameters) for f in ("init", "update", "finish")] == [
        ["setup"],
        ["state", "x", "score", "positions"],
        ["state"],
    ]


@pytest.mark.parametrize("name", methods.METHODS)
def test_method(name: str) -> None:
    module = methods.load_method(name)
    check_source(module.SOURCE)
    assert issubclass(module.Config, BaseModel)
    assert get_args(module.Config.model_fields["version"].annotation) == (1,)
    assert module.Config.model_config.get("extra") == "forbid"
    assert list(inspect.signature(module.plan).parameters)[:3] == ["stats", "arch", "config"]
    for need in methods.needs(name, module.Config()):
        _, score = stats.load_stat(need)
        assert scores.load_score(score).PHASE != "oracle", "no method is made from an oracle"
    assert hasattr(module, "start") == isinstance(getattr(module.Config(), "tune", None), Tune), (
        "what is trained end to end says how"
    )
    assert not hasattr(module, "start") or 0 < module.start(module.Config()) <= 1
    kinds = (converter_methods.NEURON_METHODS, converter_methods.LINEAR_METHODS, converter_methods.OF_ZEROS)
    assert sum(name in kind for kind in kinds) == 1, "auto and joined methods know every row"
    assert ("sparsity" in module.Config.model_fields) == (methods.METHODS[name].decides is None)
    form = methods.METHODS[name].trained_form
    assert form is None or (methods.METHODS[form].kind == methods.METHODS[name].kind and form != name)
    assert form is None or hasattr(methods.load_method(form), "start"), "a trained form is trained"
    assert not hasattr(module, "plan_tokens") or hasattr(module, "rank"), "what plan trains has a size"


@pytest.mark.parametrize("name", SOURCES)
def test_source(name: str, tiny_model: Any, tmp_path: Path) -> None:
    """What a row knows, no row before it takes; what it gives is a folder of a model."""
    (tmp_path / "m.gguf").write_bytes(b"PWRI" + bytes(4))
    named = {
        "bundled": BUNDLED_MODEL,
        "hub": "owner/name",
        "powerinfer": str(tmp_path / "m.gguf"),
        "folder": str(tiny_model("llama")),
    }[name]
    assert next(kind for kind, row in SOURCES.items() if row.is_named(named)) == name
    assert list(SOURCES)[-1] == "folder", "which takes everything"
    if name in ("bundled", "folder"):  # the others have files of tests: they need a server, or a whole file
        fetched = SOURCES[name].fetch(named, tmp_path / "work")
        assert isinstance(fetched, Fetched) and open_source(fetched.folder) and not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", VERBS)
def test_verb(name: str) -> None:
    module, text = VERBS[name]
    function = getattr(import_module(module, "sparsegate.converter.cli"), name)
    assert inspect.isfunction(function) and text.endswith(".")


@pytest.mark.parametrize("name", OPS)
def test_op(name: str) -> None:
    module = import_module(OPS[name])
    assert (
        OPS[name].rpartition(".")[2] == name
        and module.NAME.lower() == name.replace("_", "")
        and module.DOMAIN == "ai.sparsegate"
    )
    for function in ("function", "reference", "traffic", "active", "scores"):
        assert callable(getattr(module, function))
    assert module.BOUNDS
    assert (ROOT / "runtime_onnx" / "csrc" / f"{name}.cc").is_file()
    assert name in (ROOT / "runtime_onnx" / "csrc" / "ops.inc").read_text(encoding="utf-8") or module.NAME in (
        ROOT / "runtime_onnx" / "csrc" / "ops.inc"
    ).read_text(encoding="utf-8")
    assert (ROOT / "tests" / "runtime_onnx" / f"test_{name}.py").is_file()


def test_no_file_without_a_row() -> None:
    for table, folder, extra in (
        (methods.METHODS, "methods", {".low_rank", ".thresholds", ".tune"}),
        (scores.SCORES, "scores", set()),
        (stats.STATS, "stats", {".collect", ".bins", ".oracle"}),
    ):
        place = ROOT / "converter" / folder
        files = {
            "." + ".".join(path.relative_to(place).with_suffix("").parts)
            for path in place.rglob("*.py")
            if path.stem != "__init__"
        }
        assert files - extra == {getattr(row, "module", row) for row in table.values()}, folder
    verbs = {path.stem for path in (ROOT / "converter" / "cli").glob("*.py")} - {"__init__", "interruption", "output"}
    assert verbs == {row.strip(".") for row, _ in VERBS.values()}


@pytest.mark.parametrize("kind", plans.GATES)
def test_gate_is_executed_emitted_counted_and_encoded(kind: str) -> None:
    entry = SITE_PLANS[kind]
    gate = entry.gating
    assert type(gate) is plans.GATES[kind] and plans.kind_of(gate) == kind
    parts = Parts(torch.randn(2, 7), torch.randn(2, 7), torch.randn(2, 7))
    gate_scores, _ = EXECUTORS[type(gate)](gate, parts, torch.randn(2, 5))
    assert gate_scores.shape == (2, 7)
    emission = emit(Site(0), entry, 5, 7)
    assert emission.score == gate.score
    assert all(tensor.shape == (7,) for role, tensor in emission.tensors.items() if role == "tau")
    assert 0 < cost(entry, SiteSize(5, 7, 3), 0.5) < 2
    key, tensors = encode({Site(0): entry}, "silu")
    assert key["sites"]["layers.0.ffn"]["score"] == gate.score
    assert {name.removeprefix("layers.0.ffn.") for name in tensors} == set(entry.tensors())


@pytest.mark.parametrize("part", CONSUMERS)
def test_every_kind_has_a_row_for_every_consumer(part: str) -> None:
    table, consumers = CONSUMERS[part]
    kinds = set(table.values())
    assert all(set(rows) == kinds for rows in consumers)
    assert set(SITE_PLANS) == set(plans.GATES)
    assert kinds == set(get_args(plans.Gate) if part == "gates" else (plans.Edit,)), "the type and the table agree"


def test_architectures_are_the_tested_ones() -> None:
    assert set(supported()) == set(MODEL_TYPES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_architecture_matches_transformers(model_type: str, tiny_model: Any) -> None:
    arch = load_arch(model_type)
    config = AutoConfig.from_pretrained(tiny_model(model_type))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state: dict[str, Tensor] = model.state_dict()
    sizes = [arch.size(config, space) for space in ("layers", "hidden", "units", "vocab")]
    assert len(set(sizes)) == 4, "sizes must differ, else a swapped space passes"
    for site in arch.sites(config):
        module = model.get_submodule(arch.ffn_module(site.layer))
        prefix = arch.block_prefix(site.layer)
        named = {
            prefix + weight.name: arch.shape(config, weight)
            for weight in arch.weights
            if not weight.optional or prefix + weight.name in state
        }
        for name, shape in named.items():
            assert tuple(state[name].shape) == shape, name
        held = {arch.ffn_module(site.layer) + "." + name for name, _ in module.named_parameters()}
        assert held == set(named), "the file must name every weight of the network and no other"
        for part in (arch.ffn.gate, arch.ffn.up, arch.ffn.gate_up, arch.ffn.down):
            assert part is None or hasattr(module, part)
    assert (
        model.get_input_embeddings().weight.shape
        == state[arch.embedding].shape
        == (arch.size(config, "vocab"), arch.size(config, "hidden"))
    )
    assert model.get_decoder().layers is not None and arch.activation(config) in TORCH_ACTIVATIONS
    assert set(arch.ffn.onnx) == ({"up", "down"} if arch.ffn.kind == "plain" else {"gate", "up", "down"})
    assert set(arch.attn.onnx) in ({"qkv", "o"}, {"q", "k", "v", "o"})


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_transformers(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 241)
    torch.testing.assert_close(TORCH_ACTIVATIONS[ACTIVATIONS[name]](x), ACT2FN[name](x), rtol=1e-5, atol=1e-6)


def test_readme_names_every_method() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## How it decides")[1].split("\n\n")[1]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert {name.strip() for row in rows for name in row.split(",")} == {*methods.NAMED, *methods.JOINED}


NAMING = {
    "fatrelu": {
        "runtime_onnx/ops/vocabulary.py": "its row",
        "runtime_onnx/ops/activation.py": "its function, spelling and jump",
        "runtime_onnx/ops/gated_mlp_body.py": "its ONNX ops",
        "converter/modeling/blocks.py": "its torch function",
        "converter/sources/published.py": "other systems' word for it",
    },
    "bf16": {
        "converter/onnx_export/precision.py": "its row",
        "converter/checkpoint/fields.py": "the precision of passes in training",
        "converter/modeling/distributed.py": "what decides on that",
        "converter/onnx_export/tensors.py": "advice",
        "converter/evaluation/speed/gguf_file.py": "llama.cpp's format beside it",
        "converter/evaluation/speed/peers.py": "torch's precision beside it",
        "converter/report/roofline.py": "its colour",
        "converter/report/speed.py": "its goal",
        "runtime_onnx/bench/folders.py": "onnx's dtype of it",
        "runtime_onnx/bench/op_graphs.py": "the op's row",
    },
    "exact": {
        "runtime_onnx/ops/gated_mlp.py": "its row",
        "runtime_onnx/bench/relu_case.py": "its case",
        "converter/checkpoint/plan.py": "the score of an entry",
        "converter/checkpoint/sparsity.py": "its fields in a checkpoint",
        "converter/onnx_export/emit.py": "its emitter",
        "converter/methods/__init__.py": "the method's row",
        "converter/evaluation/speed/model.py": "the role of a graph",
        "converter/report/html.py": "a filter of another meaning",
    },
}
"""What adding one more of a kind touches, told by one that is there: an activation, a precision, a score of the op. The
files that name it, and what for.
"""


@pytest.mark.parametrize("name", NAMING)
def test_few_files_name_one_of_a_table(name: str) -> None:
    """Word for word, docstrings and comments too; "exact", which is an English word, in quotes."""
    word = re.compile(rf'"{name}"' if name == "exact" else rf"\b{name}\b")
    files = [path for tree in ("converter", "runtime_onnx") for path in (ROOT / tree).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix() for path in files if word.search(path.read_text(encoding="utf-8"))}
    assert found == set(NAMING[name])
