"""Quality, checks and answers of checkpoints with swapped activations: against the dense source, and honest
without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB, make_model
from test_swap import N

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.cost import mlp_cost
from sparsegate.converter.checkpoint.plan import Exact, Plan, SitePlan, Swap, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.evaluation import answers
from sparsegate.converter.evaluation.checks import check_source, read_plan
from sparsegate.converter.evaluation.quality import measure_executor, measure_quality
from sparsegate.converter.modeling.gated import dense, load, load_dense
from sparsegate.converter.report.evaluation import answer_cells, executor_cells
from sparsegate.converter.text.windows import Batches

BATCHES = Batches(
    torch.randint(3, VOCAB, (5, 24), generator=torch.Generator().manual_seed(7)), torch.ones(5, 24, dtype=torch.bool)
)
PLAN: Plan = {
    Site(0): SitePlan((Swap("drelu"),), Exact(0.25, 0.5)),
    Site(1): SitePlan((Swap("drelu"),), Threshold("gate", uniform_tau(0.3, N), 0.3)),
}


def write(folder: Path, out: Path, plan: Plan) -> Path:
    out.mkdir()
    write_checkpoint(open_source(folder), plan, out)
    return out


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny_model("llama"), tmp_path_factory.mktemp("swapped") / "out", PLAN)


@torch.no_grad()
def losses(model: Any) -> torch.Tensor:
    return model(input_ids=BATCHES.tokens).logits[:, :-1].double().log_softmax(-1)


def nll(p: torch.Tensor) -> float:
    return float(-p.gather(-1, BATCHES.tokens[:, 1:, None]).mean())


def test_quality_is_measured_against_the_source(folder: Path, tiny_model: Callable[[str], Path]) -> None:
    model, original = load(folder), load_dense(tiny_model("llama"))
    found = measure_quality(model, read_plan(folder), BATCHES, reference_model=original)
    p, q = losses(original), losses(model)
    assert (found.nll_dense, found.nll) == pytest.approx((nll(p), nll(q)), abs=1e-5)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5) and found.kl > 0.1
    alone = measure_quality(model, read_plan(folder), BATCHES)
    with dense(model):
        ungated = losses(model)
    assert alone.nll_dense == pytest.approx(nll(ungated), abs=1e-5) and abs(alone.nll_dense - found.nll_dense) > 0.01
    assert alone.kl == pytest.approx(float((ungated.exp() * (ungated - q)).sum(-1).mean()), abs=1e-5)


def test_cost_counts_realised_zeros(folder: Path) -> None:
    model, z, gates = load(folder), [], []
    module = model.get_submodule("model.layers.0.mlp")
    module.down_proj.register_forward_pre_hook(lambda _, given: z.append(given[0]))
    module.gate_proj.register_forward_hook(lambda *given: gates.append(given[2]))
    losses(model)
    density, opened = float((z[0] != 0).double().mean()), float((gates[0] > 0).double().mean())
    found = measure_quality(model, read_plan(folder), BATCHES)
    assert found.site_density["layers.0.ffn"] == pytest.approx(density) and found.site_opened == {
        "layers.0.ffn": pytest.approx(opened)
    }
    assert found.site_cost["layers.0.ffn"] == pytest.approx((1 + opened + density) / 3)
    other = (1 + 2 * found.site_density["layers.1.ffn"]) / 3
    assert found.cost == pytest.approx(((1 + opened + density) / 3 + other) / 2)
    assert abs(found.cost - mlp_cost(PLAN, load_arch("llama"), model.config)) > 1e-3, "not the calibrated shares"


class _Echo:
    """An executor that is the dense source in torch."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def reset(self) -> None:
        """Every call starts anew."""

    @torch.no_grad()
    def __call__(self, ids: Any) -> Any:
        return self.model(input_ids=torch.as_tensor(ids)[None]).logits[0].numpy()


def test_executors_are_compared_with_the_source_too(folder: Path, tiny_model: Callable[[str], Path]) -> None:
    model, original = load(folder), load_dense(tiny_model("llama"))
    found = measure_executor(_Echo(original), model, BATCHES, reference_model=original)  # type: ignore[arg-type]
    assert (
        found.kl == pytest.approx(0, abs=1e-6)
        and found.agreement == 1
        and found.nll != pytest.approx(found.nll_torch, abs=1e-3)
    )
    assert measure_executor(_Echo(original), model, BATCHES).kl > 0.1  # type: ignore[arg-type]


def test_the_source_check_compares_sizes(folder: Path, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, count = load(folder), len(load_dense(tiny_model("llama")).state_dict())
    same = check_source(model, tiny_model("llama"), BATCHES)
    assert same.passed and f"{count} of {count} tensors are the source's" in same.note and same.name == "dense sizes"
    reseeded = check_source(model, make_model("llama", tmp_path / "seed", seed=1), BATCHES)
    assert reseeded.passed and f" 0 of {count} tensors" in reseeded.note, "trained weights are no error"
    stock = load_dense(tiny_model("llama"))
    assert (
        check_source(stock, tmp_path / "seed", BATCHES, trained=True).passed
        and not check_source(stock, tmp_path / "seed", BATCHES).passed
    )
    for other, word in (
        (make_model("llama", tmp_path / "wide", intermediate_size=192), "units"),
        (tiny_model("qwen3"), "model type llama for qwen3"),
    ):
        found = check_source(model, other, BATCHES)
        assert not found.passed and word in found.note


class _Words:
    """Stands in for a tokenizer and for sacrebleu: words are ids, and a text's score is whether it equals its
    reference.
    """

    def decode(self, row: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, row))

    def corpus_bleu(self, texts: list[str], references: list[list[str]]) -> Any:
        return type("Score", (), {"score": 100.0 * (texts == references[0])})


def test_answers_are_compared_with_the_source(folder: Path, tiny_model: Callable[[str], Path]) -> None:
    model, original, arch = load(folder), load_dense(tiny_model("llama")), load_arch("llama")
    rows = [row[:8] for row in BATCHES.tokens]
    questions = answers.Questions("text", rows, 6)
    against, counts = answers.compare_answers(model, read_plan(folder), arch, questions, _Words(), _Words(), original)
    wanted = answers.greedy(original, torch.stack(rows), 6)
    masked = answers.greedy(model, torch.stack(rows), 6)
    assert (
        against.equal_all_masked == pytest.approx(sum(a == b for a, b in zip(masked, wanted, strict=True)) / 5)
        and against.equal_all_masked < 1
    )
    ungated, _ = answers.compare_answers(model, {Site(0): PLAN[Site(0)]}, arch, questions, _Words(), _Words(), model)
    assert ungated.equal_all_masked == 1, "compared with itself it is itself"
    shares = counts.summary(0.5, 10**6)
    assert shares.answers_and_prompt < shares.masked_answers_and_prompt


@pytest.mark.parametrize(
    ("against", "row", "word"),
    [
        ("dense torch", "dense torch", "dense"),
        ("dense source", "dense source", "dense"),
        ("ungated torch", "ungated torch", "ungated"),
    ],
)
def test_tables_name_what_is_compared_with(against: str, row: str, word: str) -> None:
    from stored_results import EVALUATION

    from sparsegate.converter.evaluation.records import Evaluation

    found = Evaluation.model_validate(json.loads(json.dumps(EVALUATION)) | {"against": against})
    header, body = executor_cells(found)
    assert body[0][0] == row and f"KL to {word}" in header and answer_cells(found)[0][1] == f"BLEU against {word}"
