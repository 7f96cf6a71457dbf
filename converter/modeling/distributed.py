"""Several processes under torchrun: what they sum, what only the first of them does, and weights that they share out
(FSDP2).

Everything here does nothing where there is one process. Collectives must be called by all processes in the same order.
An error that only one process meets outside `same_error` ends that process, and torchrun then ends the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...runtime_onnx.errors import InputError

_BUCKET = 1 << 24  # elements that are summed in one call
_PATIENCE = timedelta(hours=12)  # the first process may sample text or write files for long while the others wait
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class World(NamedTuple):
    """The processes that work together: this one's number, from 0, and how many there are."""

    rank: int
    size: int


def world() -> World:
    """The processes that `processes` has started, or this one alone."""
    return World(dist.get_rank(), dist.get_world_size()) if _started() else World(0, 1)


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, and leave them at the end; yields the device of this one:
    "cpu", or its own of the GPUs for "cuda".

    CPU tensors go by gloo and CUDA tensors by nccl. After an error the processes are not waited for. Raises InputError
    when only a part of torchrun's environment is there, when a machine has fewer GPUs than processes, and for one
    process as `check_device`.
    """
    present = [name for name in _NEEDED if name in os.environ]
    if "WORLD_SIZE" not in present:
        check_device(device)
        yield torch.device(device)
        return
    if len(present) < len(_NEEDED):
        missing = ", ".join(name for name in _NEEDED if name not in present)
        raise InputError(
            f"The environment of several processes must be torchrun's, got WORLD_SIZE but no {missing}. Start with "
            "torchrun."
        )
    kind, local = torch.device(device).type, int(os.environ["LOCAL_RANK"])
    local_device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(
                f"Every process must have a GPU, got {torch.cuda.device_count()} for process {local + 1} of this "
                "machine. Start fewer processes."
            )
        torch.cuda.set_device(local_device)
    dist.init_process_group(_BACKENDS[kind], timeout=_PATIENCE, device_id=local_device if kind == "cuda" else None)
    yield local_device
    dist.destroy_process_group()


def check_device(device: str) -> None:
    """Raise InputError unless torch can compute on `device`, "cpu" or "cuda"."""
    if device not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, got {device!r}. Choose one of these.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda must have a CUDA GPU and a CUDA build of torch, got none. Use --device cpu.")


def check_started() -> None:
    """Raises InputError where weights cannot be shared out, because no processes were started."""
    if not _started():
        raise InputError(
            "Weights must be shared out over processes that torchrun started, got none. Start with torchrun, also for "
            "one process."
        )


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of every process's `tensor` (same shape and dtype everywhere), on each of them; a new tensor without
    gradient where there are several.
    """
    if world().size == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def anywhere(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    return bool(sum_over_processes(torch.tensor(int(flag))))


def broadcast_text(text: str, source: int = 0) -> str:
    """The text of process `source`, on every process."""
    if world().size == 1:
        return text
    raw = text.encode() if world().rank == source else b""
    length = torch.tensor(len(raw))
    dist.broadcast(length, source)
    encoded = torch.zeros(int(length), dtype=torch.uint8)
    if raw:
        encoded = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    if int(length):
        dist.broadcast(encoded, source)
    return bytes(encoded.tolist()).decode()


@contextmanager
def same_error() -> Iterator[None]:
    """All processes leave the block together, and where one raised an InputError there, all raise that of the first of
    those.

    Other errors pass through on their own process, and the others raise RuntimeError. The block itself must not call
    collectives.
    """
    here, raised = world(), None
    try:
        yield
    except Exception as error:
        raised = error
    if here.size > 1:
        codes = torch.zeros(here.size, dtype=torch.int64)
        codes[here.rank] = 0 if raised is None else 1 if isinstance(raised, InputError) else 2
        outcomes = sum_over_processes(codes).tolist()
        if any(outcomes):
            first = outcomes.index(1) if 1 in outcomes else outcomes.index(2)
            text = broadcast_text(str(raised), first)
            if outcomes[here.rank] < 2:
                raise (
                    InputError(text) if 1 in outcomes else RuntimeError(f"Process {first} stopped: {text}")
                ) from raised
    if raised is not None:
        raise raised


def share_tensors(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values; what is sharded is left alone."""
    if world().size == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            if not is_sharded(tensor):
                held = tensor.detach().contiguous()
                dist.broadcast(held, 0)
                tensor.copy_(held)


def mean_gradients(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor's gradient by its mean over the processes; one without a gradient counts as 0 where another
    process has one.

    Gradients of sharded tensors are means already.
    """
    size = world().size
    plain = [tensor for tensor in tensors if not is_sharded(tensor)] if size > 1 else []
    if not plain:
        return
    present = sum_over_processes(
        torch.tensor([tensor.grad is not None for tensor in plain], dtype=torch.int64)
    ).tolist()
    gradients = []
    for tensor, count in zip(plain, present, strict=True):
        if count:
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            gradients.append(tensor.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= size
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in order, cut where dtype or device changes or `_BUCKET` elements are full."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (
            (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)
            or sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET
        ):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def clip_gradients(tensors: Iterable[Tensor], most: float) -> Tensor:
    """Scale all gradients so that their joint Euclidean norm is at most `most`; returns the norm before, a scalar that
    is the same on every process.
    """
    tensors = list(tensors)
    if not any(is_sharded(tensor) for tensor in tensors):
        return torch.nn.utils.clip_grad_norm_(tensors, most)
    gradients = [(_local(tensor.grad), is_sharded(tensor)) for tensor in tensors if tensor.grad is not None]
    precise = torch.float64 if any(gradient.dtype == torch.float64 for gradient, _ in gradients) else torch.float32
    zero = gradients[0][0].new_zeros((), dtype=precise)
    split = sum((gradient.to(precise).square().sum() for gradient, shared in gradients if shared), zero)
    whole = sum((gradient.to(precise).square().sum() for gradient, shared in gradients if not shared), zero)
    norm = (sum_over_processes(cast(Tensor, split)) + whole).sqrt()
    for gradient, _ in gradients:
        gradient.mul_((most / (norm + 1e-6)).clamp(max=1.0).to(gradient.dtype))
    return norm


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is shared out over the processes."""
    if not _started():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor | None:
    """A copy of the whole tensor in the first process's memory; None on the others, which hold no more than this one
    tensor meanwhile.
    """
    whole = cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor
    return whole.detach().cpu().clone() if world().rank == 0 else None


@torch.no_grad()
def scatter(value: Tensor | None, into: Tensor) -> None:
    """The inverse of `gathered`: fill `into` on every process with the first process's `value`, which is None on the
    others.
    """
    if world().size == 1 and not is_sharded(into):
        assert value is not None
        into.copy_(value)
        return
    device = _local(into).device
    whole = (
        torch.empty(into.shape, dtype=into.dtype, device=device)
        if value is None
        else value.to(device, into.dtype).contiguous()
    )
    if is_sharded(into):
        from torch.distributed.tensor import distribute_tensor

        sharded = cast(Any, into)
        _local(into).copy_(distribute_tensor(whole, sharded.device_mesh, sharded.placements).to_local())
    else:
        dist.broadcast(whole, 0)
        into.copy_(whole)


def shard(model: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype | None = None) -> None:
    """Share every parameter of `model` out over the processes (fully_shard, FSDP2): each of `blocks` is put together
    only while it works, the rest, tied embeddings included, for the whole pass. `model` may lie on the CPU; its parts
    go to this process's GPU one by one.

    The values are the first process's. Parameters become new tensors: name what is to be trained after this. `dtype` is
    that of the passes (None: the parameters'); shards, gradients and their sums stay in the parameters' own. Raises
    InputError without started processes.
    """
    check_started()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = "cuda" if dist.get_backend(dist.group.WORLD) != "gloo" else "cpu"
    mesh = init_device_mesh(kind, (world().size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    for part in [*blocks, model]:
        part.to(torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else kind)
        share_tensors([*part.parameters(), *part.buffers()])
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def share_of(count: int, what: str) -> slice:
    """This process's part of `count` equal things in order. Raises InputError when they do not divide by the number of
    processes.
    """
    here = world()
    if count % here.size:
        raise InputError(
            f"{what} must divide by the number of processes, got {count} for {here.size}. Change it, or start another "
            "number of processes."
        )
    return slice(here.rank * count // here.size, (here.rank + 1) * count // here.size)


def in_bf16(precision: str, device: torch.device) -> bool:
    """Whether passes of a `precision` (fp32, bf16 or auto) run in bfloat16 on the device; auto where that pays."""
    return precision == "bf16" or (precision == "auto" and multiplies_bf16(device))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively, so that training in it pays."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"))
