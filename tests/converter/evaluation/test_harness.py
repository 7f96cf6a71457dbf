"""lm-eval's scores in ONNX Runtime against sums of log-probabilities, the decoder and dense torch."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from evaluated import text_windows
from torch import Tensor

from sparsegate.converter.evaluation import harness
from sparsegate.converter.modeling.gated import dense, load
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.session import Decoder


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
