"""Everything that is written reads back equal, and everything outside a format's closed vocabulary is
refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_checks import same
from safetensors.torch import load_file, save_file

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.cost import SiteSize, cost
from sparsegate.converter.checkpoint.manifest import (
    File,
    Manifest,
    check_files,
    list_files,
    read_manifest,
    write_manifest,
)
from sparsegate.converter.checkpoint.plan import (
    PLAN,
    Plan,
    Predictor,
    Residual,
    SitePlan,
    Swap,
    Threshold,
    load_plan,
    save_plan,
)
from sparsegate.converter.checkpoint.plan import TENSORS as PLAN_TENSORS
from sparsegate.converter.checkpoint.sparsity import TENSORS, encode, read_sparsity, write_sparsity
from sparsegate.converter.checkpoint.stage import Header, hash_file, is_finished, read_header, write_header, write_json
from sparsegate.converter.methods import load_method, make_config
from sparsegate.converter.pipeline.configs import method_configs
from sparsegate.converter.pipeline.recipe import Flags, Recipe, compile_recipe, make_recipe, read_recipe
from sparsegate.converter.scores import load_score
from sparsegate.converter.stats import load_stat
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

D, N, R = 5, 11, 3
HEADER = Header(
    format="plan",
    parents={"model": "ab" * 32},
    config={"method": "gate", "sparsity": 0.1 + 0.2, "stats": ["a", None]},
    seed=3,
    calibration="cd",
)


def make_plan() -> Plan:
    """Every kind, with and without residual; infinite thresholds included."""
    g = torch.Generator().manual_seed(0)
    tau = torch.randn(N, generator=g)
    tau[0], tau[1] = -3e38, torch.inf
    fc1, fc2, residual = (torch.randn(*shape, generator=g) for shape in ((R, D), (N, R), (R, D)))
    return {
        Site(0): SitePlan(gate=Threshold("gate", tau.abs(), 0.31)),
        Site(1): SitePlan(gate=Predictor(fc1, fc2, tau, 1 / 3, 0.7)),
        Site(10): SitePlan(gate=Predictor(fc1 + 1, fc2.T.contiguous().T, tau, 0.2), residual=Residual(residual)),
    }


def assert_equal(found: Plan, expected: Plan, recall: bool = True) -> None:
    assert list(found) == list(expected)
    assert all(same(found[site], entry, "" if recall else "recall") for site, entry in expected.items())
    tensors = [tensor for entry in found.values() for tensor in entry.tensors().values()]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)


def one_line(error: pytest.ExceptionInfo[InputError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text and ", got " in text and " must " in text and text.endswith("."), text
    for word in words:
        assert word in text, (word, text)


# Plans


def test_plan_round_trip(tmp_path: Path) -> None:
    plan = make_plan() | {Site(2): replace(make_plan()[Site(1)], edits=(Swap("drelu"),))}
    save_plan(tmp_path, plan, HEADER)
    assert_equal(load_plan(tmp_path), plan)
    assert read_header(tmp_path) == HEADER and is_finished(tmp_path, HEADER)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.update(version=3), ("2", "3")),
        (lambda p: p.update(version=1), ("2", "1")),
        (lambda p: p.pop("version"), ("2", "None")),
        (lambda p: p.pop("sites"), ("sites",)),
        (lambda p: p.update(sites=[1]), ("sites", "[1]")),
        (lambda p: p["sites"].update({"layers.0.ffn": []}), ("edits", "gate")),
        (lambda p: p["sites"]["layers.0.ffn"]["gate"].update(kind="mask"), ("threshold", "'mask'")),
        (lambda p: p["sites"]["layers.0.ffn"]["gate"].update(colour="red"), ("density", "colour")),
        (lambda p: p["sites"]["layers.0.ffn"]["gate"].update(tau=1), ("density", "tau")),
        (lambda p: p["sites"]["layers.0.ffn"]["gate"].pop("density"), ("density",)),
        (lambda p: p["sites"]["layers.0.ffn"]["edits"].append({"kind": "prune"}), ("swap", "'prune'")),
        (lambda p: p["sites"]["layers.0.ffn"]["edits"].append({"kind": "swap"}), ("activation",)),
        (lambda p: p["sites"].update({"block.0": p["sites"]["layers.0.ffn"]}), ("layers.3.ffn", "block.0")),
    ],
)
def test_plan_vocabulary_is_closed(tmp_path: Path, change: Callable[[Any], Any], words: tuple[str, ...]) -> None:
    save_plan(tmp_path, make_plan(), HEADER)
    raw = read_json(tmp_path / PLAN, "plan")
    change(raw)
    write_json(tmp_path / PLAN, raw)
    with pytest.raises(InputError) as error:
        load_plan(tmp_path)
    one_line(error, *words)


def test_plan_without_tensors(tmp_path: Path) -> None:
    save_plan(tmp_path, make_plan(), HEADER)
    tensors = load_file(tmp_path / PLAN_TENSORS)
    tensors.pop("layers.1.ffn.predictor.fc2.weight")
    save_file(tensors, tmp_path / PLAN_TENSORS)
    with pytest.raises(InputError) as error:
        load_plan(tmp_path)
    one_line(error, "predictor.fc2.weight")
    (tmp_path / PLAN_TENSORS).write_bytes(b"short")
    with pytest.raises(InputError) as error:
        load_plan(tmp_path)
    one_line(error, "safetensors")


def test_cost_by_hand() -> None:
    gate = SitePlan((), Threshold("gate", torch.zeros(N), 0.4))
    predictor, residual = make_plan()[Site(1)], make_plan()[Site(10)]
    assert cost(gate, SiteSize(D, N, 3), 0.4) == pytest.approx(1 / 3 + 2 / 3 * 0.4)
    assert cost(gate, SiteSize(D, N, 2), 0.4) == pytest.approx(1 / 2 + 1 / 2 * 0.4)
    assert cost(predictor, SiteSize(D, N, 3), 0.4) == pytest.approx((0.4 * 3 * D * N + R * D + N * R) / (3 * D * N))
    assert cost(residual, SiteSize(D, N, 3), 0.4) == pytest.approx((0.4 * 3 * D * N + 2 * R * D + N * R) / (3 * D * N))


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {"model_type": "llama", "auto_map": {"AutoModel": "code.Model"}})
    write_sparsity(tmp_path, make_plan(), "silu")
    return tmp_path


def test_checkpoint_round_trip(checkpoint: Path) -> None:
    plan, activations = read_sparsity(checkpoint)
    assert_equal(plan, make_plan(), recall=False)
    assert activations == dict.fromkeys(("layers.0.ffn", "layers.1.ffn", "layers.10.ffn"), "silu")
    raw = read_json(checkpoint / "config.json", "config")
    assert raw["model_type"] == "llama" and "auto_map" not in raw
    assert raw["sparsity"]["sites"]["layers.10.ffn"] == {
        "score": "predictor",
        "activation": "silu",
        "density": 0.2,
        "rank": R,
        "residual": True,
    }
    assert set(load_file(checkpoint / TENSORS)) >= {
        "layers.10.ffn.residual.weight",
        "layers.1.ffn.predictor.fc1.weight",
        "layers.0.ffn.tau",
    }


def test_encode_refuses_what_the_format_lacks() -> None:
    with pytest.raises(InputError) as error:
        encode({Site(0): SitePlan(gate=Threshold("magnitude", torch.zeros(N), 0.5))}, "silu")
    one_line(error, "magnitude", "gate")
    with pytest.raises(InputError) as error:
        encode({Site(0): SitePlan((Swap("relu"),))}, "silu")
    one_line(error, "got swap", "layers.0.ffn")


def site_fields(raw: dict[str, Any], key: str = "layers.1.ffn") -> dict[str, Any]:
    return raw["sites"][key]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(version=4), ("1 or 2 or 3", "4")),
        (lambda s: s.update(version=2), ("base_activation", "None")),
        (lambda s: s.update(code="x.py"), ("version", "code")),
        (lambda s: s.pop("sites"), ("sites", "None")),
        (lambda s: site_fields(s).update(score="magic"), ("predictor", "'magic'")),
        (lambda s: site_fields(s).update(score=["gate"][0]), ("density", "rank")),
        (lambda s: site_fields(s).update(cls="evil"), ("density", "cls", "1")),
        (lambda s: site_fields(s).pop("activation"), ("activation",)),
        (lambda s: site_fields(s).pop("rank"), ("rank",)),
        (lambda s: site_fields(s).update(rank=R + 1), (str(R + 1), f"[{R}, {D}]")),
        (lambda s: site_fields(s).update(density="half"), ("0 to 1", "half")),
        (lambda s: site_fields(s).update(density=True), ("0 to 1", "True")),
        (lambda s: site_fields(s).update(density=1.0), ("at most 0.909", "1.0")),
        (lambda s: site_fields(s).update(rank=True), ("rank", "True")),
        (lambda s: site_fields(s, "layers.10.ffn").update(residual=1), ("residual", "1")),
        (lambda s: s["sites"].update({"layers.01.ffn": site_fields(s)}), ("spelled layers.1.ffn", "layers.01.ffn")),
        (lambda s: site_fields(s).update(activation=7), ("name", "7")),
        (lambda s: site_fields(s).update(residual=True), ("residual.weight",)),
        (lambda s: site_fields(s, "layers.10.ffn").pop("residual"), ("layers.10.ffn.residual.weight",)),
        (lambda s: s["sites"].update({"layers.1.ffn": 3}), ("object", "3")),
        (lambda s: s["sites"].update({"layers.1.experts.0.ffn": site_fields(s)}), ("layers.3.ffn", "experts")),
        (lambda s: s["sites"].update({"../x": site_fields(s)}), ("layers.3.ffn", "../x")),
        (lambda s: s["sites"].pop("layers.0.ffn"), ("layers.0.ffn.tau",)),
    ],
)
def test_checkpoint_vocabulary_is_closed(
    checkpoint: Path, change: Callable[[Any], Any], words: tuple[str, ...]
) -> None:
    raw = read_json(checkpoint / "config.json", "config")
    change(raw["sparsity"])
    write_json(checkpoint / "config.json", raw)
    with pytest.raises(InputError) as error:
        read_sparsity(checkpoint)
    one_line(error, *words)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("layers.0.ffn.tau", lambda t: t.index_fill(0, torch.tensor([2]), torch.nan), ("NaN",)),
        ("layers.1.ffn.predictor.fc2.weight", lambda t: t.clone().fill_(torch.nan), ("NaN",)),
        ("layers.0.ffn.tau", lambda t: t.index_fill(0, torch.tensor([2]), -torch.inf), ("-inf",)),
        ("layers.0.ffn.tau", lambda t: t.view(torch.int32), ("must be F32", "I32")),
        ("layers.0.ffn.tau", lambda t: t > 0, ("must be F32", "BOOL")),
        ("layers.1.ffn.predictor.fc1.weight", lambda t: t.half(), ("must be F32", "F16")),
        ("layers.1.ffn.predictor.fc1.weight", lambda t: t + torch.inf, ("fc1", "inf")),
        ("layers.10.ffn.residual.weight", lambda t: t - torch.inf, ("residual", "-inf")),
        ("layers.0.ffn.tau", lambda t: torch.full_like(t, torch.inf), ("at most 0", "0.31")),
        ("layers.1.ffn.predictor.fc1.weight", lambda t: t[0], ("fc1", f"[{D}]")),
        ("layers.1.ffn.predictor.fc2.weight", lambda t: t.T.contiguous(), ("fc2", f"[{R}, {N}]")),
        ("layers.1.ffn.predictor.fc2.weight", lambda t: t[:-1].contiguous(), (f"[{N}, r]", f"[{N - 1}, {R}]")),
        ("layers.0.ffn.tau", lambda t: t[None], ("[n]", f"[1, {N}]")),
        ("layers.10.ffn.residual.weight", lambda t: t[:, :-1].contiguous(), (f"[{R}, {D}]", f"[{R}, {D - 1}]")),
        ("layers.0.ffn.colour", lambda t: torch.zeros(1), ("colour",)),
    ],
)
def test_checkpoint_tensors_are_checked(
    checkpoint: Path, name: str, make: Callable[[Any], Any], words: tuple[str, ...]
) -> None:
    tensors = load_file(checkpoint / TENSORS)
    tensors[name] = make(tensors.get(name))
    save_file(tensors, checkpoint / TENSORS)
    with pytest.raises(InputError) as error:
        read_sparsity(checkpoint)
    one_line(error, name.rpartition(".ffn")[0], *words)


def test_checkpoint_without_key_or_file(checkpoint: Path) -> None:
    (checkpoint / TENSORS).unlink()
    with pytest.raises(InputError) as error:
        read_sparsity(checkpoint)
    one_line(error, "sparsity.safetensors")
    write_json(checkpoint / "config.json", {"model_type": "llama"})
    with pytest.raises(InputError) as error:
        read_sparsity(checkpoint)
    one_line(error, "sparsegate convert")


# Headers and folders


@given(
    st.builds(
        Header,
        format=st.text(max_size=5),
        parents=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
        config=st.dictionaries(
            st.text(max_size=4),
            st.none()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.integers()
            | st.lists(st.text(max_size=3), max_size=2),
            max_size=3,
        ),
        seed=st.integers(0, 2**62),
        calibration=st.none() | st.text(max_size=4),
    )
)
@settings(max_examples=50, deadline=None)
def test_header_round_trip(header: Header) -> None:
    again = Header.model_validate_json(json.dumps(header.model_dump(mode="json")))
    assert again == header and again.fingerprint == header.fingerprint


def test_header_on_disk(tmp_path: Path) -> None:
    assert read_header(tmp_path) is None
    write_header(tmp_path, HEADER)
    assert read_header(tmp_path) == HEADER
    for change in (
        {"seed": 4},
        {"calibration": None},
        {"config": {}},
        {"parents": {"model": "x"}},
        {"tool": "9.9"},
        {"version": 2},
        {"format": "stats"},
    ):
        other = HEADER.model_copy(update=change)
        assert not is_finished(tmp_path, other) and other.fingerprint != HEADER.fingerprint, change
    raw = HEADER.model_dump(mode="json")
    for text in ("", "{", "[]", json.dumps(raw | {"extra": 1}), json.dumps(raw | {"seed": "3"})):
        (tmp_path / "header.json").write_text(text)
        assert read_header(tmp_path) is None, text


# Manifests


def make_manifest(folder: Path) -> Manifest:
    return Manifest(
        fingerprint="ff",
        source={"id": None, "revision": None, "fingerprint": "aa"},
        calibration={"sha256": "bb", "tokens": 3, "file": None},
        recipe=Recipe(model="m").model_dump(mode="json"),
        seed=0,
        budget={"max_kl": None, "sparsity": 0.5},
        measured={"kl": 0.1 + 0.2},
        versions={"torch": "2"},
        files=list_files(folder),
    )


def test_manifest_round_trip(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "onnx" / "genai_config.json").write_text("{}")
    manifest = make_manifest(tmp_path)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.files["a.txt"] == File(sha256=hash_file(tmp_path / "a.txt"), size=5)
    assert set(manifest.files) == {"a.txt", "onnx/genai_config.json"} and list_files(tmp_path) == manifest.files, (
        "the manifest does not list itself"
    )
    assert check_files(tmp_path, manifest) == []
    (tmp_path / "a.txt").write_text("jello")
    (tmp_path / "onnx" / "genai_config.json").write_text("{ }")
    assert sorted(line.split()[0] for line in check_files(tmp_path, manifest)) == ["a.txt", "onnx/genai_config.json"]
    (tmp_path / "onnx" / "sparsegate_link.json").write_text("{}")
    assert [line.split()[0] for line in check_files(tmp_path, manifest)] == ["a.txt"], "link edits genai_config.json"
    (tmp_path / "a.txt").unlink()
    assert check_files(tmp_path, manifest) == ["a.txt is missing"]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"version": 2}, ("version 1", "version")), ({"plugin": "x"}, ("plugin",)), ({"seed": None}, ("seed",))],
)
def test_manifest_vocabulary_is_closed(tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]) -> None:
    write_json(tmp_path / "manifest.json", make_manifest(tmp_path).model_dump(mode="json") | change)
    with pytest.raises(InputError) as error:
        read_manifest(tmp_path)
    one_line(error, *words)


# Recipes


def test_recipe_round_trip(tmp_path: Path) -> None:
    recipe = compile_recipe(
        Flags("some/model", "predictor", 0.3, 0.01, 0.2, None, tmp_path / "text.txt", "fp32", "cpu", 7)
    )
    (tmp_path / "r.yaml").write_text(recipe.yaml())
    assert read_recipe(tmp_path / "r.yaml") == recipe
    assert compile_recipe(Flags(recipe=tmp_path / "r.yaml")) == recipe
    assert recipe.stages[0].config == {"sparsity": 0.3} and recipe.seed == 7 and recipe.budget.max_ppl_increase == 0.01
    assert method_configs(recipe) == {
        "predictor": {"predictor": make_config("predictor", {"sparsity": 0.3, "seed": 7})}
    }


def test_recipe_excludes_flags(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(Recipe(model="m").yaml())
    with pytest.raises(InputError) as error:
        compile_recipe(Flags(sparsity=0.5, recipe=tmp_path / "r.yaml", seed=0))
    one_line(error, "sparsity", "seed")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ("model",)),
        ({"model": "m", "version": 2}, ("version", "2", "1")),
        ({"model": "m", "plugin": "x.py"}, ("plugin", "x.py")),
        ({"model": "m", "seed": -1}, ("seed", "-1")),
        ({"model": "m", "stages": []}, ("stages",)),
        ({"model": "m", "stages": [{"method": "gate"}] * 4}, ("stages",)),
        ({"model": "m", "export": {"precision": "fp8"}}, ("export.precision", "fp8", "fp32")),
        ({"model": "m", "budget": {"max_kl": float("nan")}}, ("budget.max_kl", "nan")),
        ({"model": "m", "budget": {"max_ppl_increase": -0.1}}, ("budget.max_ppl_increase", "-0.1")),
        ({"model": "m", "calibration": {"windows": 1}}, ("calibration.windows", "1")),
        ({"model": "m", "calibration": {"length": 8}}, ("calibration.length", "8")),
    ],
)
def test_recipe_vocabulary_is_closed(values: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        make_recipe(values)
    one_line(error, *words)


@pytest.mark.parametrize(
    ("text", "word"),
    [(None, "nothing"), ("- a", "list"), ("a: [", "YAML"), ("", "NoneType"), ("!!python/object:os.system {}", "YAML")],
)
def test_recipe_file_that_is_none(tmp_path: Path, text: str | None, word: str) -> None:
    if text is not None:
        (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read_recipe(tmp_path / "r.yaml")
    one_line(error, word)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_sparsity_lies_between_0_and_1(sparsity: float) -> None:
    with pytest.raises(InputError) as error:
        compile_recipe(Flags(sparsity=sparsity))
    one_line(error, str(sparsity))


def test_unknown_names_are_refused_by_name() -> None:
    for call, words in (
        (lambda: load_score("magic"), ("gate", "magic")),
        (lambda: load_stat("mean:gate"), ("histogram", "mean")),
        (lambda: load_method("magic"), ("predictor", "magic")),
        (lambda: make_config("gate", {"rank": 3}), ("rank", "3")),
        (lambda: make_config("gate", {"sparsity": 1.0}), ("gate.sparsity", "1.0")),
        (lambda: make_config("gate", {"version": 2}), ("gate.version", "2", "1")),
        (lambda: make_config("predictor", {"score": "oracle"}), ("predictor.score", "oracle", "magnitude")),
        (
            lambda: method_configs(make_recipe({"model": "m", "stages": [{"config": {"sparsty": 0.5}}]})),
            ("sparsty", "sparsity"),
        ),
        (lambda: load_arch("gpt2"), ("gpt2", "llama", "converter/arch/gpt2.json")),
    ):
        with pytest.raises(InputError) as error:
            call()
        one_line(error, *words)


# Sites


@given(
    st.builds(
        Site,
        st.integers(0, 10**6),
        st.none() | st.integers(0, 999),
        st.sampled_from(["ffn", "attn", "linear:q_proj", "linear:o_proj"]),
    )
)
@settings(max_examples=100, deadline=None)
def test_site_round_trip(site: Site) -> None:
    assert Site.parse(site.key) == site


@pytest.mark.parametrize(
    "key",
    [
        "",
        "layers.x.ffn",
        "layers.1.ffn ",
        "layers.1",
        "model.layers.1.ffn",
        "layers.-1.ffn",
        "layers.1.mlp",
        "layers.1.linear.",
    ],
)
def test_site_refuses_other_text(key: str) -> None:
    with pytest.raises(InputError):
        Site.parse(key)
