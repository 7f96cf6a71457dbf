"""`sparsegate export`: a checkpoint of imported predictors becomes a file and the file a checkpoint again; mistakes are
one line and leave nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from models import TEXT, make_model, put_predictors
from safetensors.torch import load_file
from small_recipe import WITHOUT_SPEED, Done, call_cli, run_cli, small_recipe

from sparsegate.converter.checkpoint.plan import Predictor, SitePlan, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.sparsity import read_sparsity
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.sources.named import resolve
from sparsegate.converter.sources.predictors import Config, imported_plan
from sparsegate.converter.sources.published import normalise

D, N, LAYERS = 64, 176, 2


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    return partial(call_cli, capsys)


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with relu and predictors beside its weights."""
    return put_predictors(make_model("llama", tmp_path_factory.mktemp("relu") / "m", hidden_act="relu"))


def read(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Metadata and tensors by the gguf package's own reader, under llama.cpp's magic."""
    assert path.read_bytes()[:8] == b"PWRI\x03\x00\x00\x00"
    plain = path.with_suffix(".plain")
    plain.write_bytes(b"GGUF" + path.read_bytes()[4:])
    reader = gguf.GGUFReader(plain)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    plain.unlink()
    return fields, tensors


@pytest.fixture(scope="module")
def drelu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mistral with dReLU and predictors beside its weights, as published folders of type bamboo become."""
    folder = tmp_path_factory.mktemp("drelu")
    return normalise(
        put_predictors(make_model("mistral", folder / "base", head_dim=16)), folder / "m", activation="drelu"
    )


def same_but_for_rounding(first: Path, second: Path) -> None:
    """Two files have equal metadata and tensors; fc1 was divided by the norm's weight and multiplied again."""
    (fields, tensors), (fields_again, tensors_again) = read(first), read(second)
    assert tensors.keys() == tensors_again.keys()
    for name, values in tensors.items():
        if ".fc1." in name:
            np.testing.assert_allclose(tensors_again[name], values, rtol=5e-7)
        else:
            assert np.array_equal(tensors_again[name], values), name
    fields.pop("general.name"), fields_again.pop("general.name")
    assert fields == fields_again


def test_a_checkpoint_goes_out_as_the_file_it_came_from(drelu: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    first, second = tmp_path / "m.gguf", tmp_path / "again.gguf"
    done = call("export", drelu, "-o", first, "--precision", "fp32", "--quiet")
    assert done == (0, f"wrote {first}, {first.stat().st_size / 1e6:.1f} MB\n", "")
    source = resolve(str(first), tmp_path / "source")
    (tmp_path / "out").mkdir()
    write_checkpoint(source, imported_plan(source, Config()), tmp_path / "out")
    done = call("export", tmp_path / "out", "-o", second, "--precision", "fp32", "--json", "--quiet")
    size = second.stat().st_size
    assert done.status == 0
    assert json.loads(done.out) == {"output": str(second), "format": "powerinfer", "bytes": size, "side_file": None}
    same_but_for_rounding(first, second)
    fields, tensors = read(first)
    down = load_file(drelu / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float().numpy()
    assert fields["general.architecture"] == "bamboo" and np.array_equal(tensors["blk.1.ffn_down_t.weight"], down.T)


@pytest.mark.slow
def test_a_file_is_converted_and_exported_again(drelu: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    first, second = tmp_path / "m.gguf", tmp_path / "again.gguf"
    assert call("export", drelu, "-o", first, "--precision", "fp32", "--quiet").status == 0
    recipe = small_recipe(first, tmp_path, stages=[{"method": "imported", "config": {}}])
    for told in ("wrote", "up to date"):
        done = run_cli("convert", "--recipe", recipe, "-o", tmp_path / "out", "--quiet", preamble=WITHOUT_SPEED)
        assert done.returncode == 0 and told in done.stdout, done.stderr
    plan, activations = read_sparsity(tmp_path / "out")
    assert set(activations.values()) == {"drelu"} and len(plan) == LAYERS
    for entry in plan.values():
        assert entry.edits and isinstance(entry.gate, Predictor)
        assert not entry.gate.tau.any() and 0 < entry.gate.density < 1
    assert call("export", tmp_path / "out", "-o", second, "--precision", "fp32", "--quiet").status == 0
    same_but_for_rounding(first, second)


def test_the_gpu_gets_what_is_kept_most(relu: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20, encoding="utf-8")
    out = tmp_path / "m.gguf"
    budget = (N * 3 * D * 2 + 1) / (1 << 30)  # the neurons of one layer
    done = call("export", relu, "-o", out, "--vram-budget", repr(budget), "--calibration", text, "-q")
    assert done.status == 0 and done.out.splitlines()[1] == f"wrote {out}.generated.gpuidx", done
    fields, tensors = read(Path(f"{out}.generated.gpuidx"))
    assert fields["split.vram_capacity"] == int(budget * (1 << 30))
    assert sorted(int(tensors[f"blk.{layer}.gpu_idx"].sum()) for layer in range(LAYERS)) == [0, N]
    for layer in range(LAYERS):
        assert np.array_equal(tensors[f"blk.{layer}.gpu_bucket"], np.flatnonzero(tensors[f"blk.{layer}.gpu_idx"]))


def _without(folder: Path) -> list[str]:
    return [str(make_model("llama", folder / "m", hidden_act="relu"))]


def _gated(folder: Path) -> list[str]:
    source = open_source(make_model("llama", folder / "m", hidden_act="relu"))
    (folder / "c").mkdir()
    plan = {
        site: SitePlan(gate=Threshold("gate", uniform_tau(0.1, N), 0.5)) for site in source.arch.sites(source.config)
    }
    write_checkpoint(source, plan, folder / "c")
    return [str(folder / "c")]


def _trained(folder: Path) -> list[str]:
    source = open_source(make_model("llama", folder / "m", hidden_act="relu"))
    (folder / "c").mkdir()
    entry = SitePlan((), Predictor(torch.ones(3, D), torch.ones(N, 3), torch.linspace(0, 1, N), 0.5))
    write_checkpoint(source, {site: entry for site in source.arch.sites(source.config)}, folder / "c")
    return [str(folder / "c"), "--vram-budget", "1"]


def _silu(folder: Path) -> list[str]:
    return [str(put_predictors(make_model("llama", folder / "m")))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda _: ["nothing/here"], "DIR must be a folder, got 'nothing/here'"),
        (
            lambda folder: [str(make_model("llama", folder / "m", hidden_act="relu"))],
            "predictor.fc2.weight, got neither",
        ),
        (_gated, "holds one predictor a layer, got threshold at layers.0.ffn"),
        (_trained, "those that sparsegate trains have one for each neuron"),
        (_silu, "PowerInfer's activation must be relu or drelu in every layer, got silu"),
    ],
)
def test_a_model_without_a_place_in_the_format(
    words: Callable[[Path], list[str]], message: str, call: Callable[..., Done], tmp_path: Path
) -> None:
    arguments = words(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = call("export", *arguments, "-o", tmp_path / "x.gguf", "-q")
    assert done.status == 2 and done.out == "" and message in done.err and done.err.count("\n") == 1, done
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "onnx"], "--format must be powerinfer, got 'onnx'"),
        (["--precision", "int4"], "--precision must be fp16 or fp32, got 'int4'"),
        (["--vram-budget", "-1"], "--vram-budget must be above 0 GiB and at most 1048576, got -1.0"),
        (["--vram-budget", "nan"], "--vram-budget must be above 0 GiB and at most 1048576, got nan"),
        (["--calibration", "text.txt"], "--calibration must be given with --vram-budget, got it alone"),
        (["-o", "there.gguf"], "-o must be a new file, got there.gguf, which exists"),
        (["-o", "none/x.gguf"], "-o must be a new file, got none/x.gguf, in a folder that is not there"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    message: str,
    relu: Path,
    call: Callable[..., Done],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gguf").write_text("theirs")
    done = call("export", relu, *(words if "-o" in words else ["-o", "x.gguf", *words]), "-q")
    assert done.status == 2 and done.out == "" and message in done.err and done.err.count("\n") == 1, done
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there.gguf", "theirs")]


def test_without_the_package(
    relu: Path, call: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = call("export", relu, "-o", tmp_path / "x.gguf", "-q")
    assert done.status == 2 and "Install sparsegate[bench]" in done.err and not any(tmp_path.iterdir())
