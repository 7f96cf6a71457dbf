"""Peak memory of the calibration pass, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import VOCAB
from safetensors.torch import save_file

LAYERS, HIDDEN, UNITS, WINDOWS, LENGTH = 16, 512, 2048, 8, 64
MIB = 2**20
CHILD = """
import json, sys
from pathlib import Path
import torch
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.stats import collect as walk

def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

tiny, model, out, windows, length = *map(Path, sys.argv[1:4]), *map(int, sys.argv[4:6])
walk.TOKENS_AT_ONCE = 128
tokens = torch.randint(3, 290, (windows, length), generator=torch.Generator().manual_seed(0))
batches = Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))
names = ["histogram:gate", "samples:magnitude"]
walk.collect(open_source(tiny), batches, names, out / "tiny")
load_dense(tiny)
before = peak()
found = walk.collect(open_source(model), batches, names, out / "model")
after = peak()
assert len(found) == 16 and all(int(s["histogram:gate.count"].sum()) for s in found.values())
kept = load_dense(model)
print(json.dumps([after - before, peak() - before]))
"""


@pytest.fixture(scope="module")
def large_model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 16 blocks of 16 MiB in fp32, stored as bf16 in four shards, in the tiny model's vocabulary."""
    folder = shutil.copytree(tiny_model("llama"), tmp_path_factory.mktemp("large") / "model")
    (folder / "model.safetensors").unlink()
    raw = json.loads((folder / "config.json").read_text())
    raw |= {
        "hidden_size": HIDDEN,
        "intermediate_size": UNITS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (UNITS, HIDDEN), "mlp.up_proj": (UNITS, HIDDEN), "mlp.down_proj": (HIDDEN, UNITS)}
    g, weight_map = torch.Generator().manual_seed(0), {}
    for shard in range(4):
        tensors = {}
        for layer in range(shard * 4, shard * 4 + 4):
            prefix = f"model.layers.{layer}."
            tensors |= {
                f"{prefix}{name}.weight": torch.randn(shape, generator=g).mul_(shape[1] ** -0.5).bfloat16()
                for name, shape in shapes.items()
            }
            tensors |= {
                f"{prefix}{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)
                for name in ("input_layernorm", "post_attention_layernorm")
            }
        if shard == 0:
            tensors |= {
                f"{name}.weight": torch.randn(VOCAB, HIDDEN, generator=g).bfloat16()
                for name in ("model.embed_tokens", "lm_head")
            }
            tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        file = f"model-0000{shard + 1}-of-00004.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from /proc")
def test_peak_memory_is_bounded_by_two_blocks(
    large_model: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """The bound is that of `estimate.Estimate`; loading the whole model afterwards, the control, breaks it.

    The allocator is told to give back what is freed, as it does by itself with the larger tensors of real models.
    """
    block = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * UNITS)
    hidden = 4 * WINDOWS * LENGTH * HIDDEN
    batch = 4 * 128 * (4 * HIDDEN + 5 * UNITS)
    bound = 2 * block + 2 * hidden + batch
    assert bound < LAYERS * block / 4, "well below the model in fp32"
    arguments = [tiny_model("llama"), large_model, tmp_path, WINDOWS, LENGTH]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    walked, whole = json.loads(done.stdout)
    assert walked <= bound < whole, (
        f"MiB: walk {walked / MIB:.1f}, bound {bound / MIB:.1f}, whole model {whole / MIB:.1f}; a block is "
        f"{block / MIB:.1f}"
    )
