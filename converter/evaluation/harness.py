"""EleutherAI's lm-eval on a sparse checkpoint, through its onnxruntime-genai backend with sparsegate's library, beside
the dense torch model.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.generate import load as load_genai
from ..modeling.gated import dense

_BACKEND = "lm_eval.models.onnxruntime_genai"


@dataclass(frozen=True)
class Tasks:
    """Names of lm-eval tasks, and the TaskManager that knows them."""

    names: list[str]
    manager: Any


def find_tasks(text: str) -> Tasks:
    """The tasks in "NAME,FOLDER/NAME": lm-eval's own, and one's own in a folder of YAML files.

    Raises InputError when lm-eval is not installed, too old to run ONNX models, or does not know a task.
    """
    _backend()
    words = [word.strip() for word in text.split(",") if word.strip()]
    folders = [str(Path(word).parent) for word in words if "/" in word]
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"A task of one's own must lie in a folder, got none at {folder}. Give FOLDER/NAME.")
    manager = import_module("lm_eval.tasks").TaskManager(include_path=folders or None)
    names = [Path(word).name if "/" in word else word for word in words]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise InputError(
            f"--lm-eval must name tasks of lm-eval, got {', '.join(unknown) or 'none'}. Run lm-eval ls tasks for the "
            "list."
        )
    return Tasks(names, manager)


def run_tasks(
    onnx: Path, model: Any, tasks: Tasks, limit: int | None = None, reference_model: Any | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {metric: {"dense", "sparse"}}} of the dense `reference_model` in torch (None: of the model without its
    masks) and of the ONNX folder, on the first `limit` examples of each task.
    """
    if not onnx.is_dir():
        raise InputError(f"lm-eval must have the checkpoint's onnx folder, got none at {onnx}. Convert again.")
    simple_evaluate = import_module("lm_eval.evaluator").simple_evaluate
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for side, language_model in (
        ("dense", dense_model(onnx, model if reference_model is None else reference_model)),
        ("sparse", sparse_model(onnx)),
    ):
        results = simple_evaluate(
            model=language_model,
            tasks=tasks.names,
            task_manager=tasks.manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
        )["results"]
        for task, metrics in results.items():
            for metric, value in metrics.items():
                if (
                    "," in metric and isinstance(value, int | float) and np.isfinite(value)
                ):  # "acc,none", not "sample_len"
                    scores.setdefault(task, {}).setdefault(metric.removesuffix(",none"), {})[side] = float(value)
    return scores


def sparse_model(onnx: Path, library: bool | None = None) -> Any:
    """lm-eval's language model over an ONNX folder in onnxruntime-genai; `library` as in
    `runtime_onnx.generate.load`.
    """

    class Sparse(_exact(_backend())):
        def _load(self) -> None:
            self.og = self._import_genai()
            self.model = load_genai(self.model_dir, library=library)

    return Sparse(pretrained=str(onnx))


def dense_model(onnx: Path, model: Any) -> Any:
    """lm-eval's language model over a gated torch model with its masks off; tokenizer and context length are those of
    the ONNX folder.
    """

    class Dense(_exact(_backend())):
        def _load(self) -> None:
            self.model = model

        @torch.no_grad()
        def _forward_logits(self, tokens: list[int]) -> NDArray[np.float32]:
            with dense(model):
                return model(input_ids=torch.tensor([tokens], device=model.device)).logits[0].float().cpu().numpy()

        @torch.no_grad()
        def _generate(self, tokens: list[int], gen_kwargs: dict[str, Any]) -> list[int]:
            most = int(gen_kwargs.get("max_gen_toks", self.max_gen_toks))
            new = min(most, self.max_length - len(tokens))
            sampling = {name: gen_kwargs[name] for name in ("temperature", "top_p", "top_k") if name in gen_kwargs}
            sampled = bool(gen_kwargs.get("do_sample")) and float(sampling.get("temperature", 0)) > 0
            inputs = torch.tensor([tokens], device=model.device)
            with dense(model):
                out = model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=new,
                    do_sample=sampled,
                    **(sampling if sampled else {}),
                )
            return out[0, len(tokens) :].tolist()

    return Dense(pretrained=str(onnx))


def _exact(backend: type) -> type:
    """The backend with every target scored: lm-eval 0.4.13 drops the first target of a window that fills
    the context.
    """

    class Exact(backend):
        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            scores = []
            for key, context, continuation in requests:
                score = score_continuation(self._forward_logits, context, continuation, self.max_length)
                scores.append(score)
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, score)
            return scores

    return Exact


def score_continuation(forward: Any, context: list[int], continuation: list[int], longest: int) -> tuple[float, bool]:
    """Sum of the log-probabilities (nats) of `continuation` after `context`, and whether each is the likeliest token.

    `forward` gives logits [T, V] of T tokens, at most `longest`; what does not fit is cut from the left.
    """
    if not continuation:
        return 0.0, True
    inputs = (context + continuation)[:-1][-longest:]
    targets = np.asarray(continuation[-len(inputs) :])
    logits = np.asarray(forward(inputs), np.float64)[-len(targets) :]
    top = logits.max(-1, keepdims=True)
    scores = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return float(scores[np.arange(len(targets)), targets].sum()), bool((logits.argmax(-1) == targets).all())


def _backend() -> Any:
    installed = "none"
    try:
        import_module("lm_eval")
        installed = "one without its onnxruntime-genai backend"
        return import_module(_BACKEND).ONNXRuntimeGenAILM
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("lm_eval"):
            installed = f"one without {error.name}"
        raise InputError(
            f'--lm-eval must have lm-eval 0.4.13 or later, got {installed}. Run pip install "sparsegate[eval]".'
        ) from None
