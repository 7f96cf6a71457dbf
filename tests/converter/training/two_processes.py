"""What two gloo processes run for test_distributed.py, and one process for comparison: small trainings of a model with
tied embeddings and swapped blocks.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from models import make_model
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sparsegate.converter.arch import load_arch
from sparsegate.converter.checkpoint.stage import Header, write_json
from sparsegate.converter.modeling.blocks import swap
from sparsegate.converter.modeling.distributed import (
    anywhere,
    broadcast_text,
    gathered,
    mean_gradients,
    processes,
    same_error,
    shard,
    share_tensors,
    sum_over_processes,
    world,
)
from sparsegate.converter.modeling.lora import add_lora, linear_names, lora_tensors, merge_lora, plain_state
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training import loop as training
from sparsegate.converter.training.loop import train
from sparsegate.converter.training.optimizers import Trained
from sparsegate.converter.training.recompute import checkpointed
from sparsegate.converter.training.settings import Settings
from sparsegate.runtime_onnx.errors import InputError

HEADER = Header(format="test")
Row = dict[str, float]


def windows() -> Batches:
    """16 windows of 12 tokens, most of them padded at the end, so that processes never have equally many positions."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([12, 3, 7, 12, 9, 4, 12, 2, 11, 5, 12, 6, 8, 3, 10, 12])
    return Batches(torch.randint(3, 290, (16, 12), generator=g), torch.arange(12)[None] < lengths[:, None])


class Causal:
    """The next token's cross-entropy, mean over positions that are not padding. In step `cut` it stops; in `nan` the
    second process's loss is no number.
    """

    def __init__(self, model: Any, tensors: dict[str, Tensor], cut: int | None = None, nan: int | None = None) -> None:
        self.model, self.tensors, self.cut, self.nan, self.steps = model, tensors, cut, nan, []
        self.memory = 0.0

    def parameters(self) -> dict[str, Trained]:
        return {name: Trained(tensor, 1.0, "layers.1.mlp" in name) for name, tensor in self.tensors.items()}

    def loss(self, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        if step == self.cut:
            raise KeyboardInterrupt
        self.steps.append(step)
        logits = self.model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits
        each = F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="none").view(mask.shape)
        self.memory += float(sum_over_processes(mask.sum()))
        return (each * mask).sum() / mask.sum() * (float("nan") if step == self.nan and world().rank == 1 else 1.0)

    def after(self, step: int) -> Row:
        return {"rank": float(world().rank), "memory": self.memory}

    def state(self) -> Row:
        return {"memory": self.memory}

    def restore(self, state: Row) -> None:
        self.memory = state["memory"]


def load(folder: Path, dtype: torch.dtype) -> Any:
    """The tiny model, its first block's activation swapped; every process but the first has other values, which must
    not matter.
    """
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval().to(dtype)
    swap(model.model.layers[0].mlp, load_arch("llama"), "drelu")
    if world().rank:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1
    return model


def go(
    folder: Path,
    name: str,
    dtype: torch.dtype = torch.float64,
    optimizer: str = "adamw",
    sharded: bool = False,
    rank: int = 0,
    steps: int = 6,
    rate: float = 3e-3,
    saves: bool = False,
    **objective: Any,
) -> tuple[dict[str, Tensor], list[Row], list[int]]:
    """Train; returns the weights, the curve and the steps begun. `rank` is that of low-rank updates, 0 trains all
    weights.
    """
    model = load(folder, dtype)
    if rank:
        model.requires_grad_(False)
        add_lora(model, linear_names(model, "model.layers."), rank, 8.0, 0)
    if sharded:
        shard(model, model.model.layers)
        assert (
            type(model.model.layers[0].mlp).__name__ == "SwappedLlamaMLP"
            and model.lm_head.weight is model.model.embed_tokens.weight
        )
    elif rank:
        share_tensors(model.parameters())
    found = Causal(model, lora_tensors(model) if rank else dict(model.named_parameters()), **objective)
    settings = Settings(
        steps, 4, rate, 2, accumulate=2, optimizer=optimizer, weight_decay=0.1, save_every=2 if saves else 100
    )  # type: ignore[arg-type]
    with ExitStack() as stack:
        if sharded:
            stack.enter_context(checkpointed(model))
        curve = train(found, windows(), settings, folder / "states" / name, HEADER, lambda level: None)
    assert not any(tensor.isnan().any() for tensor in found.tensors.values())
    whole = {key: gathered(tensor) for key, tensor in found.tensors.items()}
    if rank:
        with torch.no_grad():
            before = model(input_ids=windows().tokens, use_cache=False).logits
            merge_lora(model)
            after = model(input_ids=windows().tokens, use_cache=False).logits
        assert float((after - before).abs().max()) < 1e-10
        whole |= {key: gathered(tensor) for key, tensor in plain_state(model).items()} | {"logits": gathered(after)}
    return {key: value for key, value in whole.items() if value is not None}, curve, found.steps


RUNS: dict[str, dict[str, Any]] = {
    "data": {"steps": 10},
    "data fp32": {"dtype": torch.float32, "rate": 1e-4},
    "data lora": {"rank": 4, "steps": 3},
    "fsdp": {"sharded": True, "steps": 4},
    "fsdp muon": {"sharded": True, "optimizer": "muon"},
    "fsdp lora": {"sharded": True, "rank": 4, "steps": 3},
}
"""What both sides run; one process takes the same without sharding."""


@contextmanager
def _without_averaging() -> Any:
    plain = training.mean_gradients
    training.mean_gradients = lambda tensors: None
    try:
        yield
    finally:
        training.mean_gradients = plain


def _resumed(folder: Path, name: str, **arguments: Any) -> tuple[dict[str, Tensor], list[Row], list[int]]:
    try:
        go(folder, name, saves=True, cut=5, **arguments)
        raise AssertionError("not cut")
    except KeyboardInterrupt:
        return go(folder, name, saves=True, **arguments)


def _message(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _raise(error: Exception, rank: int) -> None:
    with same_error():
        if world().rank == rank:
            raise error


def _small(folder: Path) -> dict[str, Any]:
    """Single collectives, and the errors of each process."""
    here = world()
    one, both, none = (torch.zeros(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    one.grad = torch.full((2, 3), 4.0, dtype=torch.float64) if here.rank else None
    both.grad = torch.arange(6, dtype=torch.float64).view(3, 2).T * (1 + 2 * here.rank)  # not contiguous
    mean_gradients([one, both, none])
    assert one.grad is not None and both.grad is not None
    odd = Settings(6, 3, 3e-3)
    causal = Causal(load(folder, torch.float32), {})
    full = folder / "a file"
    return {
        "world": list(here),
        "sum": sum_over_processes(torch.tensor([1.0, here.rank])).tolist(),
        "anywhere": [anywhere(False), anywhere(here.rank == 1)],
        "text": [broadcast_text(f"né {here.rank}", 1), broadcast_text("" if here.rank == 0 else "x")],
        "gradients": [one.grad.tolist(), both.grad.tolist(), none.grad is None],
        "input error": _message(lambda: _raise(InputError("the disk is full"), 1)),
        "other error": _message(lambda: _raise(KeyError("gone"), 0)),
        "loss": _message(lambda: go(folder, "nan", nan=2)),
        "windows": _message(
            lambda: train(causal, windows(), odd, folder / "states" / "odd", HEADER, lambda level: None)
        ),
        "file": _message(lambda: _save_into_a_file(folder, full)),
    }


def _save_into_a_file(folder: Path, full: Path) -> None:
    model = load(folder, torch.float32)
    objective = Causal(model, {"norm": model.model.norm.weight})
    if world().rank == 0:
        full.write_text("in the way of a folder")
    train(objective, windows(), Settings(4, 4, 1e-3, save_every=2), full / "state", HEADER, lambda level: None)


def work(rank: int, port: int, folder: Path) -> None:
    """One of two processes: runs everything and leaves its results as `<name>.<rank>.safetensors` and
    `results.<rank>.json`.
    """
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    results: dict[str, Any] = {}
    with processes("cpu") as device:
        results |= {"device": str(device), **_small(folder)}

        def keep(name: str, found: tuple[dict[str, Tensor], list[Row], list[int]]) -> None:
            weights, curve, steps = found
            results[name] = {"curve": curve, "steps": steps}
            save_file(weights, folder / f"{name}.{rank}.safetensors")

        for name, arguments in RUNS.items():
            keep(name, go(folder, name, **arguments))
        keep("data resumed", _resumed(folder, "data resumed", **RUNS["data"]))
        keep("fsdp muon resumed", _resumed(folder, "fsdp muon resumed", **RUNS["fsdp muon"]))
        with _without_averaging():
            keep("data without averaging", go(folder, "without", **RUNS["data"]))
        model = load(folder, torch.float32)
        model.requires_grad_(True)
        whole = model(input_ids=windows().tokens, use_cache=False).logits if rank == 0 else None
        shard(model, model.model.layers, torch.bfloat16)
        logits = model(input_ids=windows().tokens, use_cache=False).logits
        logits.float().square().mean().backward()
        if whole is not None:
            results["bf16"] = [
                float((logits.detach().float() - whole.detach()).norm() / whole.norm()),
                str(logits.dtype),
                str(model.lm_head.weight.grad.dtype),
            ]
    write_json(folder / f"results.{rank}.json", results)


def prepare(folder: Path) -> None:
    """The model that everything runs on."""
    make_model("llama", folder / "model", tie_word_embeddings=True)
