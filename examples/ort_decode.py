"""Greedy text generation from a sparse checkpoint with nothing but onnxruntime, tokenizers and jinja2: the KV-cache
loop, written out.

python examples/ort_decode.py OUT "What is a list?"             # a folder that `sparsegate convert` wrote: an answer in
the model's chat template
    python examples/ort_decode.py OUT "def f(x):" --raw             # the text goes on as it is, the default for a model
    without a template
    python examples/ort_decode.py owner/repo "def f(x):" --raw      # or a Hub repository, downloaded once into
    ./owner--repo

With sparsegate installed its native kernels run the sparse MLPs; without it the same file runs in standard ONNX ops,
and gives the same tokens.
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

        # Real files in a folder of our own: onnxruntime refuses weights that are links into the Hub's cache. Data
        # alone: no library is fetched.
        patterns = [f"onnx/*.{kind}" for kind in ("onnx", "data", "json", "jinja")]
        folder = Path(snapshot_download(model, local_dir=model.replace("/", "--"), allow_patterns=patterns))
    return folder / "onnx" if (folder / "onnx").is_dir() else folder


def open_session(folder: Path) -> ort.InferenceSession:
    """A session with sparsegate's kernels where they are installed and support the model."""
    try:
        from sparsegate.runtime_onnx.library import executor, library_path
    except ImportError:
        print("sparsegate is not installed: standard ONNX ops run", file=sys.stderr)
        return ort.InferenceSession(str(folder / "model.onnx"))
    options, chosen = ort.SessionOptions(), executor(folder)
    if chosen.kernel:
        options.register_custom_ops_library(str(library_path()))
    print(f"runs with {chosen}", file=sys.stderr)
    return ort.InferenceSession(str(folder / "model.onnx"), options)


def chat_text(folder: Path, prompt: str) -> str:
    """What a user says, in the model's chat template. A template comes with the model: jinja2's sandbox keeps it from
    everything but the text.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {name: token for name, token in settings.items() if name.endswith("_token") and isinstance(token, str)}
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    template = environment.from_string((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    return template.render(messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, **special)


def main() -> None:
    """Parse the command line and print the answer, or the prompt with its continuation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub repository")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=64, help="how many to generate at most")
    parser.add_argument(
        "--raw", action="store_true", help="go on with the text instead of answering it in the model's chat template"
    )
    arguments = parser.parse_args()

    folder = find_folder(arguments.model)
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = open_session(folder)
    wanted = {entry.name: entry for entry in session.get_inputs()}
    outputs = [entry.name for entry in session.get_outputs()]

    chat = not arguments.raw and (folder / "chat_template.jinja").is_file()
    # A template writes the special tokens itself; before plain text the tokenizer puts its own.
    ids = (
        tokenizer.encode(chat_text(folder, arguments.prompt), add_special_tokens=False).ids
        if chat
        else tokenizer.encode(arguments.prompt).ids
    )
    shown = len(ids) if chat else 0
    heads, size = config["decoder"]["num_key_value_heads"], config["decoder"]["head_size"]
    cache = {name: np.zeros((1, heads, 0, size), np.float32) for name in wanted if name.startswith("past_key_values.")}
    step = ids  # the whole prompt first, then one token at a time
    for _ in range(min(arguments.tokens, config["context_length"] - len(ids))):
        feeds = {"input_ids": np.array([step]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        feeds["position_ids"] = np.arange(len(ids) - len(step), len(ids))[None]
        results = dict(
            zip(
                outputs,
                session.run(None, {name: value for name, value in feeds.items() if name in wanted} | cache),
                strict=True,
            )
        )
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
        step = [int(results["logits"][0, -1].argmax())]
        if step[0] in ends:
            break
        ids = ids + step
    print(tokenizer.decode(ids[shown:]))


if __name__ == "__main__":
    main()
