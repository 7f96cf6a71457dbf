"""Two gloo processes against one: equal weights with data parallelism and with sharded weights, resume, errors, and
what goes wrong without averaging.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor
from two_processes import RUNS, go, prepare, windows, work

from sparsegate.converter.modeling.distributed import World, processes, same_error, shard, share_of, world
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they found."""
    folder = tmp_path_factory.mktemp("two")
    prepare(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, folder), nprocs=2)
    return folder


@pytest.fixture(scope="module", name="found")
def _found(folder: Path) -> list[dict[str, Any]]:
    return [read_json(folder / f"results.{rank}.json", "results") for rank in range(2)]


@pytest.fixture(scope="module", name="alone")
def _alone(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Tensor], list[dict[str, float]], list[int]]]:
    """The runs of one process."""
    (own := tmp_path_factory.mktemp("one")).joinpath("model").symlink_to(folder / "model")
    return {
        name: go(own, name, **{k: v for k, v in arguments.items() if k != "sharded"})
        for name, arguments in RUNS.items()
    }


def weights(folder: Path, name: str, rank: int = 0) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.{rank}.safetensors")


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys() and one
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


# The same result as one process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("data", 1e-12),
        ("data fp32", 1e-6),
        ("data lora", 1e-10),
        ("fsdp", 1e-12),
        ("fsdp lora", 1e-10),
        ("fsdp muon", 1e-3),
    ],
)
def test_two_processes_are_one_with_the_joint_batch(
    name: str, bound: float, folder: Path, found: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    expected, curve, steps = alone[name]
    assert furthest(weights(folder, name), expected) < bound
    assert [result[name]["steps"] for result in found] == [steps, steps]
    assert weights(folder, name, 1) == {} or "fsdp" not in name


def test_processes_have_unequal_shares() -> None:
    counts = windows().mask.sum(1)
    assert len({int(part.sum()) for part in counts.split(2)}) > 4 and int(counts.sum()) < windows().mask.numel()


@pytest.mark.slow
def test_control_without_averaging_the_processes_drift_apart(folder: Path, alone: dict[str, Any]) -> None:
    assert furthest(weights(folder, "data without averaging"), alone["data"][0]) > 1e-4


@pytest.mark.slow
def test_curve_is_the_joint_one(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    rows, alone_rows = found[1]["data"]["curve"], alone["data"][1]
    assert (
        found[0]["data"]["curve"] == rows
        and len(rows) == len(alone_rows) > 0
        and all(row["rank"] == 0.5 for row in rows)
    ), "figures are averaged"
    for row, expected in zip(rows, alone_rows, strict=True):
        assert (
            row["loss"] == pytest.approx(expected["loss"], rel=1e-12)
            and row["tokens"] == expected["tokens"] == row["memory"] == expected["memory"]
        )


# Resume


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "fsdp muon"])
def test_resumed_runs_end_with_the_same_bits(name: str, folder: Path, found: list[dict[str, Any]]) -> None:
    assert furthest(weights(folder, f"{name} resumed"), weights(folder, name)) == 0.0
    steps = [step for step in range(4, RUNS[name].get("steps", 6)) for _ in range(2)]
    assert all(result[f"{name} resumed"]["steps"] == steps for result in found), (
        "stored after step 4, stopped in step 5"
    )
    left = sorted(path.name for path in (folder / "states" / f"{name} resumed").iterdir())
    assert left == ["header.json", "training.json", "training.safetensors"]


@pytest.mark.slow
def test_a_sharded_state_holds_whole_tensors(folder: Path) -> None:
    stored = load_file(folder / "states" / "fsdp muon resumed" / "training.safetensors")
    final = weights(folder, "fsdp muon")
    assert {name.removesuffix(".value") for name in stored if name.endswith(".value")} == set(final)
    assert all(
        tensor.shape == final[name.rpartition(".")[0]].shape
        for name, tensor in stored.items()
        if not name.endswith(".step")
    )
    assert stored["model.layers.1.mlp.up_proj.weight.momentum_buffer"].shape == (176, 64)


# Single collectives and errors


@pytest.mark.slow
def test_collectives(found: list[dict[str, Any]]) -> None:
    first, second = found
    assert [first["world"], second["world"]] == [[0, 2], [1, 2]] and first["device"] == "cpu"
    for name, expected in {
        "sum": [2.0, 1.0],
        "anywhere": [False, True],
        "text": ["né 1", ""],
        "gradients": [[[2.0] * 3] * 2, [[0.0, 4.0, 8.0], [2.0, 6.0, 10.0]], True],
    }.items():
        assert first[name] == second[name] == expected, name


@pytest.mark.slow
def test_all_processes_meet_the_same_error(found: list[dict[str, Any]]) -> None:
    first, second = found
    assert first["input error"] == second["input error"] == "InputError: the disk is full"
    assert (
        first["other error"] == "KeyError: 'gone'"
        and second["other error"] == "RuntimeError: Process 0 stopped: 'gone'"
    )
    assert (
        first["loss"]
        == second["loss"]
        == "InputError: The training loss must be a finite number, got nan at step 2. Lower the rate."
    )
    windows = (
        "The windows of a micro-batch must divide by the number of processes, got 3 for 2. Change it, or start "
        "another number of processes."
    )
    assert first["windows"] == second["windows"] == f"InputError: {windows}"
    assert first["file"].startswith(("NotADirectoryError", "FileExistsError")) and second["file"].startswith(
        "RuntimeError: Process 0 stopped: "
    )


@pytest.mark.slow
def test_passes_of_sharded_weights_in_bf16(found: list[dict[str, Any]]) -> None:
    error, logits, gradient = found[0]["bf16"]
    assert 1e-4 < error < 0.05 and (logits, gradient) == ("torch.bfloat16", "torch.float32")


# One process


def test_one_process_alone() -> None:
    with processes("cpu") as device:
        assert device == torch.device("cpu") and world() == World(0, 1)
    assert share_of(5, "Rows") == slice(0, 5)
    with pytest.raises(InputError, match=r"got none\. Start with torchrun"):
        shard(torch.nn.Linear(2, 2), [])
    with pytest.raises(KeyError), same_error():
        raise KeyError


def test_half_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(
            InputError, match=r"got WORLD_SIZE but no LOCAL_RANK, MASTER_ADDR, MASTER_PORT\. Start with torchrun"
        ),
        processes("cpu"),
    ):
        pass
    for name, value in {"LOCAL_RANK": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(InputError, match=r"must have a GPU, got 8 for process 9 of this machine"), processes("cuda"):
        pass


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "device must be cpu or cuda, got 'gpu'"), ("cuda", "device cuda must have a CUDA GPU")],
)
def test_a_device_that_is_not_there(device: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=words), processes(device):
        pass
