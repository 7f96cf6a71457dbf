"""Train the small code model that sparsegate carries: a Llama-architecture model of 2.4 M parameters on the Python
standard library's source.

Nothing is downloaded: corpus and licence come from the interpreter that runs this file.

python examples/pretrain.py prepare  --work WORK          corpus, splits, tokenizer, 5-gram baseline
    python examples/pretrain.py train    --work WORK --steps N   resumes from the last checkpoint; a warm-up, constant,
    linear-decay schedule, so that
                                                               N may be changed on resume as long as the decay has not
                                                               begun;
                                                               --activation drelu trains relu(gate) * relu(up) in place
                                                               of silu(gate) * up
    python examples/pretrain.py export   --work WORK --out DIR  weights in fp16 safetensors, tokenizer, calibration and
    held-out text, training record

Splits are chosen by the sha256 of a module's path: bucket 0 of 50 is held out, bucket 1 is calibration text, the rest
is trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sysconfig
import time
from pathlib import Path

import numpy as np

VOCAB = 2048
SEQUENCE = 512  # positions of the model, and of a window while the rate decays
SHORT = 256  # positions of a window before that: attention is half of the cost
TOKENS_PER_STEP = 4096
END_OF_TEXT = "<|endoftext|>"
SPLIT_BUCKETS = 50
DECAY_SHARE = 0.3
WARM_UP = 100
CHAT_TEMPLATE = "{% for message in messages %}# {{ message['content'] }}\n{% endfor %}"


def split_of(relative_path: str) -> str:
    bucket = int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % SPLIT_BUCKETS
    return {0: "heldout", 1: "calibration"}.get(bucket, "train")


def read_corpus() -> dict[str, list[tuple[str, str]]]:
    """Every UTF-8 module of the standard library as (relative path, text), by split, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "calibration": [], "heldout": []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if "site-packages" in relative or "__pycache__" in relative:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\0" not in text:
            splits[split_of(relative)].append((relative, text))
    return splits


def corpus_hash(splits: dict[str, list[tuple[str, str]]]) -> str:
    digest = hashlib.sha256()
    for split in sorted(splits):
        for relative, text in splits[split]:
            digest.update(f"{split}\0{relative}\0".encode())
            digest.update(text.encode())
    return digest.hexdigest()


def train_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def five_gram_bits(train: np.ndarray, heldout: np.ndarray) -> float:
    """Total bits of `heldout` under an interpolated 5-gram with Witten-Bell smoothing (Chen and Goodman 1998, eq. 15)
    counted on `train`; ids [N].
    """
    probability = np.full(len(heldout), 1.0 / VOCAB)
    bits = int(math.ceil(math.log2(VOCAB)))
    for order in range(1, 6):

        def pack(ids: np.ndarray, length: int, end: int) -> np.ndarray:
            # key of the `length` tokens that stop `end` tokens before each position; positions without enough history
            # are cut by the caller
            keys = np.zeros(len(ids), dtype=np.uint64)
            for back in range(length - 1 + end, end - 1, -1):
                keys = (keys << np.uint64(bits)) | np.concatenate(
                    [np.zeros(back, np.uint64), ids[: len(ids) - back].astype(np.uint64)]
                )
            return keys

        def counts(table: np.ndarray, number: np.ndarray, keys: np.ndarray) -> np.ndarray:
            at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
            return np.where(table[at] == keys, number[at], 0)

        grams, gram_count = np.unique(pack(train, order, 0)[order - 1 :], return_counts=True)
        contexts, context_start, distinct = np.unique(grams >> np.uint64(bits), return_index=True, return_counts=True)
        context_count = np.add.reduceat(gram_count, context_start)
        keys = pack(heldout, order, 0)
        history = keys >> np.uint64(bits)
        c_gram, c_context, types = (
            counts(grams, gram_count, keys),
            counts(contexts, context_count, history),
            counts(contexts, distinct, history),
        )
        known = (c_context > 0) & (np.arange(len(heldout)) >= order - 1)
        mixed = (c_gram + types * probability) / np.maximum(c_context + types, 1)
        probability = np.where(known, mixed, probability)
    return float(-np.log2(probability).sum())


def prepare(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    splits = read_corpus()
    tokenizer = train_tokenizer([text for _, text in splits["train"]])
    tokenizer.save(str(work / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids, size = {}, {}
    for split, modules in splits.items():
        encoded = tokenizer.encode_batch([text for _, text in modules])
        ids[split] = np.array([i for e in encoded for i in [*e.ids, end]], dtype=np.uint16)
        size[split] = sum(len(text.encode()) for _, text in modules)
        np.save(work / f"{split}.npy", ids[split])
    for split, limit in (("calibration", 700_000), ("heldout", 400_000)):
        text = ""
        for _, module in splits[split]:
            if len(text) + len(module) <= limit:
                text += module + "\n"
        (work / f"{split}.txt").write_text(text, encoding="utf-8")
    record = {
        "corpus_sha256": corpus_hash(splits),
        "python": sysconfig.get_python_version(),
        "bytes": size,
        "tokens": {k: len(v) for k, v in ids.items()},
        "five_gram_bits_per_byte": five_gram_bits(ids["train"], ids["heldout"]) / size["heldout"],
    }
    (work / "corpus.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def build_model(activation: str = "silu"):
    """The model; with `activation` drelu its networks compute relu(gate x) * relu(up x) (Turbo Sparse, arXiv
    2406.05955, section 3).
    """
    from torch.nn.functional import relu
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=SEQUENCE,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attention_bias=False,
    )
    model = LlamaForCausalLM(config)
    if activation == "drelu":
        for block in model.model.layers:
            block.mlp.forward = lambda x, mlp=block.mlp: mlp.down_proj(relu(mlp.gate_proj(x)) * relu(mlp.up_proj(x)))
    return model


def rate(step: int, steps: int) -> float:
    decay = max(1, int(steps * DECAY_SHARE))
    return min(1.0, (step + 1) / WARM_UP, max(0.0, (steps - step) / decay))


def batch(ids: np.ndarray, step: int, length: int, seed: int = 0) -> np.ndarray:
    """Windows [TOKENS_PER_STEP / length, length] of step `step`: every epoch has its own order and its own offset, both
    from its number and the seed.
    """
    windows, rows = (len(ids) - 1) // length - 1, TOKENS_PER_STEP // length
    picked = []
    for k in range(step * rows, (step + 1) * rows):
        epoch, within = divmod(k, windows)
        random = np.random.default_rng(epoch + 1000 * seed)
        start = random.permutation(windows)[within] * length + int(random.integers(length))
        picked.append(ids[start : start + length])
    return np.stack(picked)


def heldout_bits(model, ids: np.ndarray, size: int, windows: int | None = None) -> float:
    """Bits per byte on held-out ids [N], in windows of SEQUENCE; the first token of a window is given, and its bits are
    charged at the uniform rate.
    """
    import torch

    total = len(ids) // SEQUENCE
    picked = range(total) if windows is None else np.linspace(0, total - 1, windows).astype(int)
    nats, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for w in picked:
            x = torch.from_numpy(ids[w * SEQUENCE : (w + 1) * SEQUENCE].astype(np.int64))[None]
            loss = model(input_ids=x, labels=x).loss
            nats += float(loss) * (SEQUENCE - 1) + math.log(VOCAB)
            tokens += SEQUENCE
    model.train()
    return nats / math.log(2) / (size * tokens / len(ids))


def train(
    work: Path, steps: int, minutes: float, peak_muon: float, peak_adam: float, activation: str = "silu", seed: int = 0
) -> None:
    import torch

    record = json.loads((work / "corpus.json").read_text())
    ids, heldout = np.load(work / "train.npy"), np.load(work / "heldout.npy")
    torch.manual_seed(seed)
    model = build_model(activation)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=peak_muon, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak_adam, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [peak_muon, peak_adam]
    step, seconds, curve = 0, 0.0, []
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds, curve = state["step"], state["seconds"], state["curve"]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "step": step,
            "seconds": seconds,
            "curve": curve,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    began = last = time.time()
    while step < steps and (time.time() - began) < minutes * 60:
        x = torch.from_numpy(
            batch(ids, step, SHORT if step < steps - int(steps * DECAY_SHARE) else SEQUENCE, seed).astype(np.int64)
        )
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        now = time.time()
        seconds, last = seconds + now - last, now
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f} seconds {seconds:.0f}", flush=True)
        if step % 500 == 0 or step == steps:
            curve.append(
                {
                    "step": step,
                    "seconds": round(seconds),
                    "heldout_bits_per_byte": heldout_bits(model, heldout, record["bytes"]["heldout"], 100),
                }
            )
            print(json.dumps(curve[-1]), flush=True)
            save()
    save()


def export(work: Path, out: Path) -> None:
    import torch
    from transformers import PreTrainedTokenizerFast

    state = torch.load(work / "checkpoint.pt", weights_only=True)
    model = build_model()
    model.load_state_dict(state["model"])
    model = model.half()
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = SEQUENCE
    tokenizer.save_pretrained(out)
    record = json.loads((work / "corpus.json").read_text())
    bits = heldout_bits(model.float(), np.load(work / "heldout.npy"), record["bytes"]["heldout"])
    record |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": state["step"],
        "tokens_per_step": TOKENS_PER_STEP,
        "seconds": round(state["seconds"]),
        "heldout_bits_per_byte": bits,
        "curve": state["curve"],
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    for split in ("calibration", "heldout"):
        (out / f"{split}.txt").write_bytes((work / f"{split}.txt").read_bytes())
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.exists():
        (out / "LICENSE.PSF.txt").write_bytes(licence.read_bytes())
    for path in out.iterdir():
        path.chmod(0o644)
    print(f"{bits:.4f} bits per byte; the 5-gram needs {record['five_gram_bits_per_byte']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["prepare", "train", "export"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--muon-rate", type=float, default=4e-3)
    parser.add_argument("--adam-rate", type=float, default=4e-3)
    parser.add_argument(
        "--activation",
        choices=["silu", "drelu"],
        default="silu",
        help="drelu is for comparing the two; export writes silu only",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.stage == "prepare":
        prepare(args.work)
    elif args.stage == "train":
        train(args.work, args.steps, args.minutes, args.muon_rate, args.adam_rate, args.activation, args.seed)
    else:
        if args.out is None:
            parser.error("--out must name a folder, got nothing. Add --out DIR.")
        export(args.work, args.out)


if __name__ == "__main__":
    main()
