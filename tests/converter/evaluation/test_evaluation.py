"""Evaluation against brute force: batched quality, answers without a cache, sparsity counted by hand, sacrebleu called
directly, lm-eval's scores.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from models import VOCAB
from small_recipe import call_cli, small_recipe
from stored_results import EVALUATION
from torch import Tensor

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.cost import predictor_cost
from sparsegate.converter.checkpoint.manifest import check_files, read_manifest
from sparsegate.converter.checkpoint.plan import Plan, Predictor, Threshold, uniform_tau
from sparsegate.converter.evaluation import answers, harness
from sparsegate.converter.evaluation.quality import Reference, groups, measure_quality
from sparsegate.converter.evaluation.records import Evaluation
from sparsegate.converter.modeling.gated import apply_plan, dense, load, load_dense
from sparsegate.converter.pipeline import candidates
from sparsegate.converter.pipeline import evaluate as evaluation
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.evaluate import evaluate
from sparsegate.converter.report import html
from sparsegate.converter.report.evaluation import executor_cells
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.session import Decoder

D, N, R = 64, 176, 6
NEVER = uniform_tau(float("inf"), N)


def mixed_plan() -> Plan:
    """Neurons of layer 0, and input channels of two linears of layer 1 that differ in size."""
    return {
        Site(0): [Threshold("gate", uniform_tau(0.25, N), 0.5)],
        Site(1, kind="linear:q_proj"): [Threshold("input", uniform_tau(0.5, D), 0.5)],
        Site(1, kind="linear:down_proj"): [Threshold("input", uniform_tau(0.05, N), 0.5)],
    }


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Any:
    found = load_dense(tiny_model("llama"))
    arch = load_arch("llama")
    return apply_plan(found, mixed_plan(), arch, arch.activation(found.config))


def text_windows(rows: int = 5, length: int = 24) -> Batches:
    tokens = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[-1, 9:] = False
    return Batches(tokens, mask)


def kept(model: Any, rows: Tensor) -> dict[Site, Tensor]:
    """Kept units [B, T] of every site of `mixed_plan`, from hooks on the modules' own inputs."""
    arch, found, hooks = load_arch("llama"), {}, []
    for site, (entry,) in mixed_plan().items():
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


# quality


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
        module for module in model.modules() if type(module.__dict__.get("forward")).__name__ in ("_Gated", "_Masked")
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
    found, counts = answers.compare_answers(model, plan, load_arch("llama"), Words(), prompts, new, sacrebleu, "words")
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
    found, _ = answers.compare_answers(model, mixed_plan(), load_arch("llama"), Words(), prompts, 5, sacrebleu, "words")
    assert found.empty == sum(row == first[0] for row in first) and found.prompts == 4 - found.empty
    with pytest.raises(InputError, match="must answer a prompt"):
        answers.compare_answers(model, mixed_plan(), load_arch("llama"), Words(), prompts[:1], 5, sacrebleu, "words")


def test_predictor_cost_is_the_part_of_predictors_and_residuals(model: Any) -> None:
    arch = load_arch("llama")
    fc1, fc2 = torch.zeros(R, D), torch.zeros(N, R)
    plan: Plan = {
        Site(0): [Predictor(fc1, fc2, NEVER, 0.5, torch.zeros(R, D))],
        Site(1): [Threshold("gate", NEVER, 0.5, fc1, torch.zeros(R, D))],
    }
    assert predictor_cost(plan, arch, model.config) == pytest.approx((R * (D + N + D) + 2 * R * D) / (2 * 3 * D * N))
    assert predictor_cost(mixed_plan(), arch, model.config) == 0


# the whole verb


@pytest.fixture(scope="module")
def converted(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted tiny Llama, its text beside it; copy it before changing anything in it."""
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "_speed", lambda base, onnx, texts: {})
        return convert(recipe=small_recipe(tiny_model("llama"), folder), output=folder / "out").folder


def test_evaluate_measures_what_convert_measured_and_records_it(converted: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", converted.parent / "text.txt"
    shutil.copytree(converted, out)
    before = read_manifest(out)
    found = evaluate(out, text=text, max_new_tokens=6, command="sparsegate eval out")
    rows = {row.executor: row for row in found.executors}
    assert set(rows) == {"torch", "ONNX body", "ONNX kernel"}
    for name in ("nll", "nll_dense", "nll_error", "kl", "agreement"):
        assert getattr(rows["torch"], name) == pytest.approx(
            before.measured[name], abs=1e-6
        )  # its own text: the same held-out part
    assert (found.nll_dense, found.density, found.cost) == pytest.approx(
        tuple(before.measured[name] for name in ("nll_dense", "density", "cost")), abs=1e-6
    )
    for name in ("ONNX body", "ONNX kernel"):
        assert rows[name].nll == pytest.approx(rows[name].nll_torch, abs=1e-3) and rows[name].tokens > 0
        assert rows[name].nll_dense and rows[name].nll_error
    assert found.text.name == "text.txt, held out" and found.model == before.recipe["model"]
    assert found.sparsity.windows == pytest.approx(1 - found.density)
    assert Evaluation.load(out / "report" / "eval.json") == found
    after = read_manifest(out)
    assert check_files(out, after) == [] and set(after.files) == {*before.files, "report/eval.json"}
    assert {name: after.files[name] for name in before.files} == before.files


def test_the_table_has_the_change_and_its_error() -> None:
    torch_row, body = (
        {"nll_dense": dense, "nll_error": error} for dense, error in ((2.0078125, 0.0031), (2.01, 0.0052))
    )
    first, second, third = EVALUATION["executors"]
    found = Evaluation.model_validate(EVALUATION | {"executors": [first | torch_row, second | body, third]})
    header, rows = executor_cells(found)
    place = [header.index(name) for name in ("change", "± of its change")]
    assert [[row[k] for k in place] for row in rows] == [
        ["-", "-"],
        ["0.1022", "0.0031"],
        ["0.1130", "0.0052"],
        ["-", "-"],
    ]
    header, _ = executor_cells(Evaluation.model_validate(EVALUATION))
    assert "change" not in header and "± of its change" not in header, "an older evaluation has none"


def test_one_window_has_no_error(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(converted, out)
    found = evaluate(out, text=converted.parent / "text.txt", windows=1, max_new_tokens=2)
    assert [row.nll_error for row in found.executors] == [None, None, None]


def test_evaluate_takes_other_texts_and_prompts(
    converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    shutil.copytree(converted, out)
    shutil.rmtree(out / "onnx")
    prompts.write_text("import os\n\nvalue_1 = \ndef f(x):\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "sparsegate"):
        found = evaluate(out, windows=2, prompts=prompts, max_new_tokens=4)
    assert "--text" in caplog.text
    assert found.text.name == "Python standard library modules, held out" and found.text.tokens == 2 * 47
    assert (found.answers.prompts + found.answers.empty, found.answers.name, found.answers.max_new_tokens) == (
        3,
        "prompts.txt",
        4,
    )
    assert [row.executor for row in found.executors] == ["torch", "ONNX"] and "not run" in found.executors[1].note
    other = tmp_path / "other.txt"
    other.write_text((converted.parent / "text.txt").read_text(encoding="utf-8") + "x = 1\n", encoding="utf-8")
    assert (
        evaluate(out, text=other, windows=1000, max_new_tokens=2).text.tokens > 5 * 47
    )  # no text of its own: the whole of it


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 10_000}, "Lower --max-new-tokens"),
        ({"text": "nothing.txt"}, "nothing.txt"),
        ({"prompts": "nothing.txt"}, "nothing.txt"),
        ({"limit": -1}, "limit must be at least 1"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(
    arguments: dict[str, Any], said: str, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsegate.converter.pipeline.evaluate.measure_quality", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match=said):
        evaluate(converted, **arguments)
    assert not (converted / "report" / "eval.json").exists()


def test_extras_that_are_not_installed_are_named(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r'lm-eval 0.4.13 or later, got none. Run pip install "sparsegate\[eval\]"'):
        evaluate(converted, lm_eval="hellaswag")
    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(InputError, match="got one without its onnxruntime-genai backend"):
        evaluate(converted, lm_eval="hellaswag")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(InputError, match=r"sacrebleu must be installed .*sparsegate\[eval\]"):
        evaluate(converted)


# the command line


def test_every_flag_of_eval_and_report_arrives(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, calls, real = Evaluation.model_validate(EVALUATION), [], inspect.signature(evaluation.evaluate)

    def fake(*arguments: Any, **named: Any) -> Evaluation:
        calls.append(dict(real.bind(*arguments, **named).arguments))
        return found

    monkeypatch.setattr(evaluation, "evaluate", fake)
    words = [
        "d",
        "--text",
        "t",
        "--windows",
        "3",
        "--prompts",
        "p",
        "--max-new-tokens",
        "5",
        "--lm-eval",
        "a,b",
        "--limit",
        "7",
        "--source",
        "s",
    ]
    assert json.loads(call_cli(capsys, "eval", *words, "--json").out) == found.model_dump(mode="json")
    assert set(calls[0]) == set(real.parameters) and calls[0].pop("command").startswith("sparsegate eval d --text t ")
    wanted = {
        "model": "d",
        "text": Path("t"),
        "windows": 3,
        "prompts": Path("p"),
        "max_new_tokens": 5,
        "lm_eval": "a,b",
        "limit": 7,
        "source": "s",
    }
    assert calls == [wanted]
    text = call_cli(capsys, "eval", "d").out
    assert all(
        part in text
        for part in ("ONNX kernel", "not run: no library", "53.73", "34.0 %", "layers.1.linear.q_proj", "hellaswag")
    )
    monkeypatch.setattr(html, "make_report", lambda folder: folder / "page")
    assert call_cli(capsys, "report", "d").out == f"wrote {Path('d/page')}\n"


def test_eval_report_and_verify_of_a_checkpoint(
    converted: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(converted, out)
    done = call_cli(capsys, "eval", out, "--text", converted.parent / "text.txt", "--max-new-tokens", "4")
    assert done.status == 0 and "ONNX kernel" in done.out and "BLEU against dense" in done.out
    page = out / "report" / "index.html"
    assert "Greedy answers" not in page.read_text(encoding="utf-8")  # convert's page
    assert call_cli(capsys, "report", out) == (0, f"wrote {page}\n", "")
    assert "Greedy answers" in page.read_text(encoding="utf-8")
    assert "ok     files" in call_cli(capsys, "verify", out).out


# lm-eval


def test_scores_of_continuations_are_sums_of_log_probabilities() -> None:
    table = np.random.default_rng(0).normal(size=(50, 50)) * 3
    calls: list[list[int]] = []

    def forward(tokens: list[int]) -> np.ndarray:
        calls.append(tokens)
        return table[tokens]

    def log_p(before: int, token: int) -> float:
        return table[before, token] - math.log(sum(math.exp(value) for value in table[before]))

    assert harness.score_continuation(forward, [3, 4], [5, 6], 99) == (
        pytest.approx(log_p(4, 5) + log_p(5, 6), abs=1e-12),
        False,
    )
    assert calls[-1] == [3, 4, 5]  # the last target is no input
    likeliest = [int(table[4].argmax())]
    assert harness.score_continuation(forward, [3, 4], [*likeliest, int(table[likeliest[0]].argmax())], 99)[1] is True
    # a window that fills the context: one token of context, as many targets as inputs, none dropped
    assert harness.score_continuation(forward, [1], [2, 3, 4], 3)[0] == pytest.approx(
        log_p(1, 2) + log_p(2, 3) + log_p(3, 4), abs=1e-12
    )
    # too long a continuation loses its beginning
    assert harness.score_continuation(forward, [1], [2, 3, 4], 2)[0] == pytest.approx(
        log_p(2, 3) + log_p(3, 4), abs=1e-12
    )
    assert harness.score_continuation(forward, [1], [], 2) == (0.0, True)


def stand_in() -> ModuleType:
    """The part of lm-eval's onnxruntime-genai backend that the adapter builds on, for machines without lm-eval."""
    module = ModuleType("lm_eval.models.onnxruntime_genai")

    class ONNXRuntimeGenAILM:
        def __init__(self, pretrained: str) -> None:
            self.model_dir = Path(pretrained)
            self.max_length = json.loads((self.model_dir / "genai_config.json").read_text())["model"]["context_length"]
            self.cache_hook = ModuleType("hook")
            self.cache_hook.add_partial = lambda *_: None  # type: ignore[attr-defined]
            self._load()

        def _import_genai(self) -> Any:
            return importlib.import_module("onnxruntime_genai")

        def _load(self) -> None:
            raise AssertionError("the adapter opens the model itself")

        def _forward_logits(self, tokens: list[int]) -> np.ndarray:
            parameters = self.og.GeneratorParams(self.model)  # type: ignore[attr-defined]
            parameters.set_search_options(max_length=len(tokens), do_sample=False)
            generator = self.og.Generator(self.model, parameters)  # type: ignore[attr-defined]
            generator.append_tokens(np.asarray(tokens, np.int32))
            return np.asarray(generator.get_output("logits"), np.float32)[0]

    module.ONNXRuntimeGenAILM = ONNXRuntimeGenAILM  # type: ignore[attr-defined]
    return module


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's backend where it is installed, else the stand-in."""
    if importlib.util.find_spec("lm_eval") is None:
        for name in ("lm_eval", "lm_eval.models"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "lm_eval.models.onnxruntime_genai", stand_in())


def test_lm_eval_scores_in_onnxruntime_genai_are_those_of_the_decoder_and_of_dense_torch(
    backend: None, converted: Path
) -> None:
    tokens = text_windows().tokens[0].tolist()
    requests = [
        (None, tokens[:10], tokens[10:]),
        (None, tokens[:1], tokens[1:5]),
        (("a", "b"), tokens[:20], tokens[20:]),
    ]
    decoder, sparse = Decoder(converted / "onnx"), load(converted)

    def expected(logits: Callable[[list[int]], Tensor]) -> list[float]:
        found = []
        for _, context, continuation in requests:
            scores = logits(context + continuation).double().log_softmax(-1)
            found.append(sum(float(scores[len(context) - 1 + k, token]) for k, token in enumerate(continuation)))
        return found

    def in_onnx(ids: list[int]) -> Tensor:
        decoder.reset()
        return torch.from_numpy(decoder(ids))

    def in_torch(ids: list[int]) -> Tensor:
        with torch.no_grad(), dense(sparse):
            return sparse(input_ids=torch.tensor([ids])).logits[0]

    for library in (None, False):
        found = harness.sparse_model(converted / "onnx", library)._loglikelihood_tokens(requests)
        assert [score for score, _ in found] == pytest.approx(expected(in_onnx), abs=1e-3)
    plain = harness.dense_model(converted / "onnx", sparse)._loglikelihood_tokens(requests)
    assert [score for score, _ in plain] == pytest.approx(expected(in_torch), abs=1e-4)
    assert abs(plain[0][0] - found[0][0]) > 1e-2


def test_lm_eval_metrics_stand_beside_the_dense_models(
    backend: None, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, seen = ModuleType("lm_eval.evaluator"), []

    def simple_evaluate(model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
        seen.append((type(model).__name__, tasks, options["limit"]))
        score, greedy = model._loglikelihood_tokens([(None, [5, 6], [7])])[0]
        return {
            "results": {
                "mine": {
                    "alias": "mine",
                    "sample_len": 4,
                    "acc,none": score,
                    "acc_stderr,none": "N/A",
                    "match,strict": greedy,
                }
            }
        }

    evaluator.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", evaluator)
    found = harness.run_tasks(converted / "onnx", load(converted), harness.Tasks(["mine"], None), 4)
    assert [row for row in seen] == [("Dense", ["mine"], 4), ("Sparse", ["mine"], 4)]
    assert set(found) == {"mine"} and set(found["mine"]) == {"acc", "match,strict"}
    assert (
        set(found["mine"]["acc"]) == {"dense", "sparse"}
        and found["mine"]["acc"]["dense"] != found["mine"]["acc"]["sparse"]
    )
    with pytest.raises(InputError, match="onnx folder"):
        harness.run_tasks(converted / "nothing", load(converted), harness.Tasks(["mine"], None))
