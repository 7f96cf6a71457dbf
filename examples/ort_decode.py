"""Greedy text generation from a sparse checkpoint with nothing but onnxruntime and tokenizers: the KV-cache loop, written out.

    python examples/ort_decode.py OUT "def f(x):"            # a folder that `sparsegate convert` wrote
    python examples/ort_decode.py owner/repo "def f(x):"     # or a Hub repository, downloaded once into ./owner--repo

With sparsegate installed its native kernels run the sparse MLPs; without it the same file runs in standard ONNX ops, and gives the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


def find_folder(model: str) -> Path:
    """The ONNX folder of a checkpoint on disk or on the Hub."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        # Real files in a folder of our own: onnxruntime refuses weights that are links into the Hub's cache.
        folder = Path(snapshot_download(model, local_dir=model.replace("/", "--"), allow_patterns=["onnx/*"]))
    return folder / "onnx" if (folder / "onnx").is_dir() else folder


def open_session(folder: Path) -> ort.InferenceSession:
    """A session with sparsegate's kernels where they are installed and support the model."""
    try:
        from sparsegate.runtime_onnx import executor, library_path
    except ImportError:
        print("sparsegate is not installed: standard ONNX ops run", file=sys.stderr)
        return ort.InferenceSession(str(folder / "model.onnx"))
    options, chosen = ort.SessionOptions(), executor(folder)
    if chosen.kernel:
        options.register_custom_ops_library(str(library_path()))
    print(f"runs with {chosen}", file=sys.stderr)
    return ort.InferenceSession(str(folder / "model.onnx"), options)


def main() -> None:
    """Parse the command line and print the prompt with its continuation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub repository")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=64, help="how many to generate at most")
    arguments = parser.parse_args()

    folder = find_folder(arguments.model)
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = open_session(folder)
    wanted = {entry.name: entry for entry in session.get_inputs()}
    outputs = [entry.name for entry in session.get_outputs()]

    ids = tokenizer.encode(arguments.prompt).ids
    heads, size = config["decoder"]["num_key_value_heads"], config["decoder"]["head_size"]
    cache = {name: np.zeros((1, heads, 0, size), np.float32) for name in wanted if name.startswith("past_key_values.")}
    step = ids  # the whole prompt first, then one token at a time
    for _ in range(min(arguments.tokens, config["context_length"] - len(ids))):
        feeds = {"input_ids": np.array([step]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        feeds["position_ids"] = np.arange(len(ids) - len(step), len(ids))[None]
        results = dict(zip(outputs, session.run(None, {name: value for name, value in feeds.items() if name in wanted} | cache), strict=True))
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
        step = [int(results["logits"][0, -1].argmax())]
        if step[0] in ends:
            break
        ids = ids + step
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main()
