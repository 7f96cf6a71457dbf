"""Quality, answers and what they cost against brute force: windows one by one, answers without a cache, sparsity
counted by hand, sacrebleu called directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from evaluated import NEVER, D, N, R, mixed_plan, text_windows
from models import VOCAB
from plan_checks import gates
from torch import Tensor

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.cost import predictor_cost
from sparsegate.converter.checkpoint.plan import Plan, Predictor, Residual, SitePlan, Threshold
from sparsegate.converter.evaluation import answers
from sparsegate.converter.evaluation.quality import Reference, groups, measure_quality
from sparsegate.converter.modeling.gated import dense
from sparsegate.runtime_onnx.errors import InputError


def kept(model: Any, rows: Tensor) -> dict[Site, Tensor]:
    """Kept units [B, T] of every site of `mixed_plan`, from hooks on the modules' own inputs."""
    arch, found, hooks = load_arch("llama"), {}, []
    for site, entry in gates(mixed_plan()).items():
        name = (
            arch.ffn_module(0)
            if site.kind == "ffn"
            else arch.block_prefix(1) + arch.linears()[site.kind.removeprefix("linear:")][0]
        )

        def see(module: Any, inputs: tuple[Tensor, ...], site: Site = site, entry: Any = entry) -> None:
            score = torch.nn.functional.silu(module.gate_proj(inputs[0])) if site.kind == "ffn" else inputs[0]
            found[site] = (score.abs() > entry.tau).sum(-1)

        hooks.append(model.get_submodule(name).register_forward_pre_hook(see))
    with torch.no_grad():
        model(input_ids=rows)
    for hook in hooks:
        hook.remove()
    return found


SIZES = {Site(0): 3 * D * N, Site(1, kind="linear:q_proj"): D * D, Site(1, kind="linear:down_proj"): D * N}
UNITS = {Site(0): N, Site(1, kind="linear:q_proj"): D, Site(1, kind="linear:down_proj"): N}


def mean_share(counts: dict[Site, float], positions: float) -> float:
    """Sites weighted by their parameters; `counts` are kept units over all positions."""
    return sum(SIZES[site] * count / positions / UNITS[site] for site, count in counts.items()) / sum(SIZES.values())


@torch.no_grad()
def test_quality_of_windows_together_is_that_of_windows_one_by_one(model: Any) -> None:
    batches = text_windows()
    found = measure_quality(model, mixed_plan(), batches)
    sums, tokens, counts, positions = np.zeros(4), 0, dict.fromkeys(SIZES, 0.0), 0
    for row, mask in zip(batches.tokens, batches.mask, strict=True):
        row = row[mask][None]
        with dense(model):
            p = model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
        q = model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
        for t, token in enumerate(row[0, 1:]):
            sums += [
                -p[t, token].item(),
                -q[t, token].item(),
                (p[t].exp() * (p[t] - q[t])).sum().item(),
                float(p[t].argmax() == q[t].argmax()),
            ]
            tokens += 1
        for site, count in kept(model, row).items():
            counts[site] += float(count.sum())
        positions += row.numel()
    assert found.tokens == tokens == 4 * 23 + 8
    assert (found.nll_dense, found.nll, found.kl, found.agreement) == pytest.approx(tuple(sums / tokens), abs=2e-6)
    assert found.nll != found.nll_dense and 0.05 < found.density < 0.95
    assert found.density == pytest.approx(mean_share(counts, positions), abs=1e-12)
    shares = {site: counts[site] / positions / UNITS[site] for site in counts}
    assert found.site_density == pytest.approx({site.key: share for site, share in shares.items()})
    ffn, q_proj, down = shares.values()
    mlp = ((1 + 2 * ffn) / 3 + (2 + down) / 3) / 2  # layer 0 by neurons; in layer 1 gate and up stay whole
    assert found.cost == pytest.approx(mlp)
    config, parts = model.config, (D * D, D * D * model.config.num_key_value_heads // model.config.num_attention_heads)
    attention = 2 * parts[0] + 2 * parts[1]
    touched = 2 * attention - parts[0] * (1 - q_proj) + D * N * (1 + 2 * ffn + 2 + down)
    assert found.block_cost == pytest.approx(touched / (2 * (attention + 3 * D * N))) and config.num_hidden_layers == 2
    reference = Reference(model, batches, keep_bytes=1e9)
    assert [measure_quality(model, mixed_plan(), batches, reference=reference) for _ in range(2)] == [found] * 2
    assert [len(row) for group in groups(batches) for row in group] == [24, 24, 24, 24, 9]


# answers


@contextmanager
def masked_from(model: Any, start: int) -> Iterator[None]:
    """Masks act on positions from `start` on, in one pass over the whole sequence and without a cache."""
    gated = [
        module
        for module in model.modules()
        if type(module.__dict__.get("forward")).__name__ in ("_Gated", "_MaskedLinear")
    ]
    saved = [module.__dict__["forward"] for module in gated]

    def split(forward: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            forward.enabled = False
            first = forward(x[:, :start])
            forward.enabled = True
            return torch.cat([first, forward(x[:, start:])], 1) if x.shape[1] > start else first

        return run

    for module, forward in zip(gated, saved, strict=True):
        module.forward = split(forward)
    try:
        yield
    finally:
        for module, forward in zip(gated, saved, strict=True):
            module.forward = forward


@torch.no_grad()
def by_hand(model: Any, prompt: Tensor, new: int, start: int) -> list[int]:
    """Greedy tokens, each from a pass over everything before it; masks from position `start` on."""
    row = prompt[None]
    for _ in range(new):
        with masked_from(model, start):
            row = torch.cat([row, model(input_ids=row).logits[:, -1:].argmax(-1)], 1)
    return row[0, len(prompt) :].tolist()


def test_answers_keep_exactly_the_prompt_dense(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, new = text_windows().tokens[:3, :6], 12
    monkeypatch.setattr(model.generation_config, "eos_token_id", -1)
    with dense(model):
        plain = answers.greedy(model, prompts, new)
    policy = answers.greedy(model, prompts, new, dense_prompt=True)
    everything = answers.greedy(model, prompts, new)
    for k, prompt in enumerate(prompts):
        assert plain[k] == by_hand(model, prompt, new, 99)
        assert policy[k] == by_hand(model, prompt, new, len(prompt))
        assert everything[k] == by_hand(model, prompt, new, 0)
        assert policy[k][0] == plain[k][0]
    assert plain != policy != everything != plain
    at = next(k for k in range(2, new) if policy[1][k] not in policy[1][:k])
    end = policy[1][at]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, VOCAB + 1])
    shorter = answers.greedy(
        model, prompts, new, dense_prompt=True
    )  # a row that ends leaves the batch, the others stay as they are
    assert shorter == [row[: row.index(end)] if end in row else row for row in policy] and len(shorter[1]) == at


class Words:
    """A tokenizer whose every token is a word."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(f"w{token}" for token in tokens)


def test_bleu_is_sacrebleus_and_sparsity_is_what_can_be_counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.generation_config, "eos_token_id", -1)
    tokens, new, plan = text_windows().tokens, 10, mixed_plan()
    prompts = [tokens[0, :6], tokens[1, :9], tokens[2, :6], tokens[3, :3]]
    questions = answers.Questions("words", prompts, new)
    found, counts = answers.compare_answers(model, plan, load_arch("llama"), questions, Words(), sacrebleu)
    rows = {
        start: [by_hand(model, prompt, new, len(prompt) if start is None else start) for prompt in prompts]
        for start in (99, None, 0)
    }
    texts = {start: [Words().decode(row, True) for row in found_rows] for start, found_rows in rows.items()}

    def mean(start: int | None) -> float:
        return sum(sacrebleu.corpus_bleu([a], [[b]]).score for a, b in zip(texts[start], texts[99], strict=True)) / 4

    assert (found.bleu, found.bleu_all_masked, found.bleu_dense) == pytest.approx((mean(None), mean(0), 100.0))
    assert 0 < found.bleu < 100
    assert found.equal == sum(a == b for a, b in zip(rows[None], rows[99], strict=True)) / 4
    assert (found.prompts, found.empty, found.prompt_tokens, found.answer_tokens) == (4, 0, 24, 40)

    policy, everything, prompt_all = (dict.fromkeys(SIZES, 0.0) for _ in range(3))
    for prompt, dense_first, masked in zip(prompts, rows[None], rows[0], strict=True):
        start = len(prompt)
        with masked_from(model, start):
            # the hooks see the module's input with the prompt before it dense; the last token is never fed
            for site, count in kept(model, torch.tensor([prompt.tolist() + dense_first[:-1]])).items():
                policy[site] += float(count[:, start:].sum())
        for site, count in kept(model, torch.tensor([prompt.tolist() + masked[:-1]])).items():
            everything[site] += float(count[:, start:].sum())
            prompt_all[site] += float(count[:, :start].sum())
    fed, read = 4 * (new - 1), 24
    summary = counts.summary(0.5, 1_000_000)
    assert summary.answers == pytest.approx(1 - mean_share(policy, fed))
    assert summary.answers_and_prompt == pytest.approx((1 - mean_share(policy, fed)) * fed / (fed + read))
    assert summary.masked_answers == pytest.approx(1 - mean_share(everything, fed))
    assert summary.masked_answers_and_prompt == pytest.approx(
        1 - mean_share({s: everything[s] + prompt_all[s] for s in SIZES}, fed + read)
    )
    assert summary.windows == 0.5 and summary.gated_share == sum(SIZES.values()) / 1e6
    assert (
        len({summary.answers, summary.answers_and_prompt, summary.masked_answers, summary.masked_answers_and_prompt})
        == 4
    )


def test_prompts_that_get_no_answer_are_left_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = list(text_windows().tokens[:4, :6])
    with dense(model):
        first = answers.greedy(model, torch.stack(prompts), 1)
    monkeypatch.setattr(model.generation_config, "eos_token_id", first[0][0])
    questions = answers.Questions("words", prompts, 5)
    found, _ = answers.compare_answers(model, mixed_plan(), load_arch("llama"), questions, Words(), sacrebleu)
    assert found.empty == sum(row == first[0] for row in first) and found.prompts == 4 - found.empty
    with pytest.raises(InputError, match="must answer a prompt"):
        questions = answers.Questions("words", prompts[:1], 5)
        answers.compare_answers(model, mixed_plan(), load_arch("llama"), questions, Words(), sacrebleu)


def test_predictor_cost_is_the_part_of_predictors_and_residuals(model: Any) -> None:
    arch = load_arch("llama")
    fc1, fc2 = torch.zeros(R, D), torch.zeros(N, R)
    plan: Plan = {
        Site(0): SitePlan(gate=Predictor(fc1, fc2, NEVER, 0.5), residual=Residual(torch.zeros(R, D))),
        Site(1): SitePlan(gate=Threshold("gate", NEVER, 0.5), residual=Residual(torch.zeros(R, D), fc1)),
    }
    assert predictor_cost(plan, arch, model.config) == pytest.approx((R * (D + N + D) + 2 * R * D) / (2 * 3 * D * N))
    assert predictor_cost(mixed_plan(), arch, model.config) == 0
