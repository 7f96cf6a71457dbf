"""Greedy answers of the sparse model against the dense model's own: sacrebleu's BLEU, equal answers, and what was
skipped meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ..arch import Arch
from ..arch.site import Site
from ..checkpoint.cost import site_parameters, site_units, weighted
from ..checkpoint.plan import Plan
from ..checkpoint.source import end_tokens
from ..modeling.gated import Recorder, dense, recording
from ..progress import track
from ..text.windows import Batches, read_text
from .records import Answers, Sparsity

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 32, 64
_PROMPTS_AT_ONCE = 8
"""Prompts of one length that are answered together."""


def make_prompts(tokenizer: Any, config: Any, batches: Batches, file: Path | None, new: int) -> list[Tensor]:
    """Prompts as token rows [P]: the lines of a file, or the beginnings of up to PROMPTS windows."""
    if file is None:
        full = batches.tokens[batches.mask.all(1)]
        full = full if len(full) else batches.tokens[:, : int(batches.mask.sum(1).min())]
        rows = list(full[:: max(1, len(full) // PROMPTS)][:PROMPTS, :PROMPT_TOKENS])
    else:
        lines = [line for line in read_text(file).splitlines() if line.strip()]
        rows = [torch.tensor(tokenizer(line)["input_ids"], dtype=torch.int64) for line in lines]
    most = int(getattr(config, "max_position_embeddings", 1 << 30))
    for number, row in enumerate(rows, 1):
        if len(row) + new > most:
            raise InputError(
                f"A prompt and its answer must fit the model's {most} tokens, got {len(row)} + {new} in prompt "
                f"{number}. Lower --max-new-tokens."
            )
    return rows


@dataclass
class Counts:
    """Kept and seen units by site, which has `units` of them a token: while answering after a dense prompt, over the
    prompt when it is masked, while answering then; and prompt positions.
    """

    plan: Plan
    sizes: dict[Site, int]
    units: dict[Site, int]
    answers: Recorder = field(default_factory=Recorder)
    masked_prompt: Recorder = field(default_factory=Recorder)
    masked_answers: Recorder = field(default_factory=Recorder)
    prompt_positions: int = 0

    def summary(self, windows: float, parameters: int) -> Sparsity:
        """Shares weighted by the sites' parameters; `windows` is the sparsity on held-out windows, `parameters` those
        of the whole model.
        """
        dense_prompt = Recorder()
        for site in self.plan:
            dense_prompt.kept[site] = dense_prompt.seen[site] = self.prompt_positions * self.units[site]
        return Sparsity(
            windows=windows,
            answers=self._skipped(self.answers),
            answers_and_prompt=self._skipped(self.answers, dense_prompt),
            masked_answers=self._skipped(self.masked_answers),
            masked_answers_and_prompt=self._skipped(self.masked_answers, self.masked_prompt),
            gated_share=sum(self.sizes.values()) / parameters,
        )

    def _skipped(self, *records: Recorder) -> float:
        density = {}
        for site in self.plan:
            seen = sum(record.seen.get(site, 0) for record in records)
            density[site] = sum(record.kept.get(site, 0) for record in records) / seen if seen else 1.0
        return 1 - weighted(density, self.sizes)


@dataclass(frozen=True)
class Questions:
    """Prompts as token rows [P], read from `source`, and how many tokens an answer may have."""

    source: str
    prompts: list[Tensor]
    new_tokens: int


def compare_answers(
    model: Any,
    plan: Plan,
    arch: Arch,
    questions: Questions,
    tokenizer: Any,
    bleu: Any,
    reference_model: Any | None = None,
) -> tuple[Answers, Counts]:
    """Answers of the dense `reference_model` (None: of the model ungated), and of the sparse one with the prompt
    ungated and masked; scores and counts.
    """
    prompts, new = questions.prompts, questions.new_tokens
    counts = Counts(plan, site_parameters(plan, arch, model.config), site_units(plan, arch, model.config))
    kinds: dict[str, list[list[int]]] = {"dense": [], "decode": [], "all": []}
    order: list[int] = []
    for length in track(sorted({len(row) for row in prompts}), unit="length"):
        same = [k for k, row in enumerate(prompts) if len(row) == length]
        order += same
        for chunk in track(torch.tensor(same).split(_PROMPTS_AT_ONCE), unit="batch"):
            rows = torch.stack([prompts[k] for k in chunk.tolist()])
            with dense(model):
                kinds["dense"] += greedy(model if reference_model is None else reference_model, rows, new)
            kinds["decode"] += greedy(model, rows, new, dense_prompt=True, answers=counts.answers)
            kinds["all"] += greedy(model, rows, new, prompt=counts.masked_prompt, answers=counts.masked_answers)
            counts.prompt_positions += rows.numel()
    texts = {kind: [tokenizer.decode(row, skip_special_tokens=True) for row in rows] for kind, rows in kinds.items()}
    said = [k for k, text in enumerate(texts["dense"]) if text.strip()]
    if not said:
        raise InputError(
            "The dense model must answer a prompt for BLEU, got no text for any. Give other prompts with --prompts "
            "FILE."
        )

    def score(kind: str) -> float:
        return sum(bleu.corpus_bleu([texts[kind][k]], [[texts["dense"][k]]]).score for k in said) / len(said)

    def equal(kind: str) -> float:
        return sum(kinds[kind][k] == kinds["dense"][k] for k in said) / len(said)

    return Answers(
        prompts=len(said),
        empty=len(order) - len(said),
        prompt_tokens=sum(len(prompts[order[k]]) for k in said),
        answer_tokens=sum(len(kinds["dense"][k]) for k in said),
        max_new_tokens=new,
        name=questions.source,
        bleu=score("decode"),
        bleu_all_masked=score("all"),
        bleu_dense=score("dense"),
        equal=equal("decode"),
        equal_all_masked=equal("all"),
    ), counts


@torch.no_grad()
def greedy(
    model: Any,
    prompts: Tensor,
    new: int,
    dense_prompt: bool = False,
    prompt: Recorder | None = None,
    answers: Recorder | None = None,
) -> list[list[int]]:
    """Greedy continuations of prompts [B, P] of at most `new` tokens, each up to, and without, a token that ends a
    text.

    With `dense_prompt` the prompt's pass, which yields the first new token, is not masked. `prompt` and `answers`
    record the prompt's pass and the later ones, of rows that have not ended.
    """
    ends = end_tokens(model)
    continuations: list[list[int]] = [[] for _ in prompts]
    active, tokens, cache = list(range(len(prompts))), prompts.to(model.device), None
    for step in range(new):
        record = prompt if step == 0 else answers
        if step == 0 and dense_prompt:
            with dense(model):
                out = model(input_ids=tokens, use_cache=True)
        elif record is None:
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        else:
            with recording(model) as seen:
                out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            _add(record, seen)
        cache, following = out.past_key_values, out.logits[:, -1].argmax(-1)
        going = [k for k, token in enumerate(following.tolist()) if token not in ends]
        for k in going:
            continuations[active[k]].append(int(following[k]))
        if not going:
            break
        if len(going) < len(active):
            cache.batch_select_indices(torch.tensor(going, device=following.device))
        active, tokens = [active[k] for k in going], following[going][:, None]
    return continuations


def _add(total: Recorder, seen: Recorder) -> None:
    for site, count in seen.seen.items():
        total.seen[site] = total.seen.get(site, 0) + count
        total.kept[site] = total.kept.get(site, 0) + seen.kept[site]


def import_sacrebleu() -> Any:
    """The sacrebleu module. Raises InputError, which names the extra, when it is not installed."""
    try:
        import sacrebleu
    except ImportError:
        raise InputError(
            'sacrebleu must be installed for BLEU, got none. Run pip install "sparsegate[eval]".'
        ) from None
    return sacrebleu
