"""`eval`: quality on held-out text in every executor, BLEU of the sparse model's answers against the dense model's own,
realised sparsity, lm-eval tasks.

What it measures is stored in DIR/report/eval.json; the manifest is rewritten last.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.library import executor
from ...runtime_onnx.session import Decoder
from ..bundled import BUNDLED, BUNDLED_MODEL, HELDOUT_TEXT
from ..checkpoint.cost import predictor_cost
from ..checkpoint.manifest import MANIFEST, Manifest, check_links, installed_versions, read_manifest
from ..checkpoint.plan import Plan
from ..checkpoint.source import Source, open_source
from ..checkpoint.stage import hash_file
from ..evaluation.answers import NEW_TOKENS, Counts, Questions, compare_answers, import_sacrebleu, make_prompts
from ..evaluation.checks import ExecutorQuality, Quality, read_plan
from ..evaluation.harness import Tasks, find_tasks, run_tasks
from ..evaluation.long_context import SHORTEST, LongTests
from ..evaluation.quality import ERROR, MOST_TOKENS, measure_executor, measure_quality
from ..evaluation.records import EVALUATION, Answers, Evaluation, Measured, Text, record_files, this_machine
from ..modeling.gated import gates_of, load, load_dense
from ..progress import job, stage
from ..sources.hub import download, home_folder, is_hub_id, local_folder
from ..text.documents import read_whole
from ..text.windows import Batches, make_batches, make_long_batches, read_text
from .recipe import Recipe, make_recipe, training_stages
from .texts import EARLIER_WINDOWS, HELDOUT_SHARE, HELDOUT_WINDOWS, LONG, write_out

log = logging.getLogger("sparsegate")


@dataclass(frozen=True)
class _Order:
    """What a person wants measured: the parameters of `evaluate`."""

    model: str | Path
    text: Path | None
    windows: int | None
    prompts: Path | None
    max_new_tokens: int
    tasks: str | None
    limit: int | None
    command: str
    source: str | Path | None
    long: int | None = None


@dataclass(frozen=True)
class _EvaluationInputs:
    """What is measured: the checkpoint with its plan and model, the windows and the name of their text, the questions,
    the dense model to compare with (None: the checkpoint ungated), and what tasks and scores are computed by.
    """

    folder: Path
    checkpoint: Source
    manifest: Manifest
    plan: Plan
    model: Any
    tokenizer: Any
    batches: Batches
    text_name: str
    questions: Questions
    reference_model: Any | None
    bleu: Any
    tasks: Tasks | None
    long: Batches | None = None

    @property
    def onnx(self) -> Path:
        """The ONNX folder."""
        return self.folder / "onnx"

    @property
    def recipe(self) -> Recipe:
        """What the checkpoint was made by."""
        return make_recipe(self.manifest.recipe, f"{MANIFEST}'s recipe")


@job()
def evaluate(
    model: str | Path,
    text: str | Path | None = None,
    windows: int | None = None,
    prompts: str | Path | None = None,
    max_new_tokens: int = NEW_TOKENS,
    lm_eval: str | None = None,
    limit: int | None = None,
    command: str = "sparsegate eval",
    source: str | Path | None = None,
    long: int | None = None,
) -> Evaluation:
    """Measure a sparse checkpoint, folder or Hub id, and store the result in the folder (not for a Hub id). The
    parameters are the flags of the command line.

    Args:
        model: Sparse checkpoint.
        text: UTF-8 file to measure on; of the text that the checkpoint was calibrated on, only the last fifth is used.
        Default: the text that comes with
            sparsegate, in the windows that `convert` measured on.
        windows: Windows of that text, all of which are measured. Default: as many as tell the loss.
        prompts: UTF-8 file with one prompt a line; default: the beginnings of windows.
        max_new_tokens: Most tokens of an answer.
        lm_eval: Task names of lm-eval, with commas between; FOLDER/NAME is a task of one's own in FOLDER.
        limit: Most examples of each lm-eval task.
        command: The command for the record.
        source: The dense model that the checkpoint was made from, folder or Hub id, to compare with where weights or
        activations were changed. Default: the
            checkpoint itself ungated, which is that model where neither was.
        long: Most tokens of the windows that loss by position, repetitions and needles are measured in, in torch: they
            are of the largest power of two that the model and the text allow. Default: none of it.

    Raises InputError for every user's mistake, before anything is measured where that can be known.
    """
    text, prompts = (None if name is None else Path(name) for name in (text, prompts))
    order = _Order(model, text, windows, prompts, max_new_tokens, lm_eval, limit, command, source, long)
    with stage("open"):
        opened = _opened(order)
    sparse, batches, reference = opened.model, opened.batches, opened.reference_model
    with stage("quality"):
        quality = _quality(order, opened)
    over_long = None
    if opened.long is not None:
        with stage("long context"):
            tests = LongTests(sparse, opened.long, opened.tokenizer, reference, opened.manifest.seed)
            over_long = tests.measured(gates_of(sparse))
    with stage("answers"):
        answers, counts = _answers(opened)
    with stage("executors"):
        executors = _executors(opened.onnx, sparse, batches, reference)
    tasks = {}
    if opened.tasks is not None:
        with stage("tasks"):
            tasks = run_tasks(opened.onnx, sparse, opened.tasks, limit, reference)
    measured = _evaluation(order, opened, quality, [_torch(quality), *executors], answers, counts, tasks)
    measured = measured.model_copy(update={"long": over_long})
    if not is_hub_id(str(model)):
        measured.save(opened.folder / EVALUATION)
        record_files(opened.folder, EVALUATION)
    return measured


def _opened(order: _Order) -> _EvaluationInputs:
    counts = (
        ("windows", order.windows),
        ("max_new_tokens", order.max_new_tokens),
        ("limit", order.limit),
    )
    for name, number in counts:
        if number is not None and number < 1:
            raise InputError(f"{name} must be at least 1, got {number}. Choose a larger number.")
    if order.long is not None and order.long < SHORTEST:
        raise InputError(f"long must be at least {SHORTEST} tokens, got {order.long}. Choose a larger number.")
    folder = local_folder(order.model)
    if not folder.is_dir():
        raise InputError(
            f"DIR must be a sparse checkpoint or a Hub id, got {str(order.model)!r}, which is neither. Check the "
            "spelling."
        )
    manifest = read_manifest(folder)
    if not is_hub_id(str(order.model)):
        check_links(folder)
    bleu = import_sacrebleu()
    tasks = None if order.tasks is None else find_tasks(order.tasks)
    plan, checkpoint = read_plan(folder), open_source(folder, sparse=True)
    tokenizer, config = checkpoint.tokenizer(), checkpoint.config
    words, text_name = _words(tokenizer, manifest, order.text)
    batches, long = _batches(order, tokenizer, config, manifest, words)
    prompts = make_prompts(tokenizer, config, batches, order.prompts, order.max_new_tokens)
    reference_model = None if order.source is None else _dense(order.source, config)
    return _EvaluationInputs(
        folder=folder,
        checkpoint=checkpoint,
        manifest=manifest,
        plan=plan,
        model=load(folder),
        tokenizer=tokenizer,
        batches=batches,
        text_name=text_name,
        questions=Questions(text_name if order.prompts is None else order.prompts.name, prompts, order.max_new_tokens),
        reference_model=reference_model,
        bleu=bleu,
        tasks=tasks,
        long=long,
    )


def _quality(order: _Order, opened: _EvaluationInputs) -> Quality:
    error = ERROR if order.windows is None and order.text is not None else 0.0
    quality = measure_quality(
        opened.model,
        opened.plan,
        opened.batches,
        reference_model=opened.reference_model,
        error=error,
        most=MOST_TOKENS if error else opened.batches.count,
    )
    if not all(map(math.isfinite, (quality.nll_dense, quality.nll, quality.kl))):
        raise InputError(
            f"The loss of {opened.folder.name} must be a number, got NLL {quality.nll} and KL {quality.kl}. "
            "Run sparsegate verify on it."
        )
    return quality


def _answers(opened: _EvaluationInputs) -> tuple[Answers, Counts]:
    return compare_answers(
        opened.model,
        opened.plan,
        opened.checkpoint.arch,
        opened.questions,
        opened.tokenizer,
        opened.bleu,
        opened.reference_model,
    )


def _torch(quality: Quality) -> Measured:
    """The row of the gated torch model."""
    return Measured(
        executor="torch",
        tokens=quality.tokens,
        nll=quality.nll,
        nll_dense=quality.nll_dense,
        nll_error=_error(quality),
        nll_torch=quality.nll,
        kl=quality.kl,
        agreement=quality.agreement,
    )


def _evaluation(
    order: _Order,
    opened: _EvaluationInputs,
    quality: Quality,
    executors: list[Measured],
    answers: Answers,
    counts: Counts,
    tasks: dict[str, dict[str, dict[str, float]]],
) -> Evaluation:
    checkpoint = opened.checkpoint
    assert quality.block_cost is not None
    return Evaluation(
        model=str(opened.manifest.recipe.get("model", opened.folder.name)),
        date=datetime.now(UTC).date().isoformat(),
        command=order.command,
        machine=this_machine(),
        versions=installed_versions(),
        text=Text(tokens=quality.tokens, hash=opened.batches.sha256, name=opened.text_name),
        nll_dense=quality.nll_dense,
        against=_against(checkpoint, opened.recipe, order.source),
        executors=executors,
        density=quality.density,
        cost=quality.cost,
        block_cost=quality.block_cost,
        predictor_cost=predictor_cost(opened.plan, checkpoint.arch, checkpoint.config),
        site_density=quality.site_density,
        site_cost=quality.site_cost,
        sparsity=counts.summary(1 - quality.density, sum(p.numel() for p in opened.model.parameters())),
        answers=answers,
        tasks=tasks,
    )


def _dense(source: str | Path, config: Any) -> Any:
    """The dense model to compare with. Raises InputError for one of another vocabulary."""
    if is_hub_id(str(source)):
        opened = open_source(download(str(source), home_folder("dense", str(source))).folder)
    else:
        opened = open_source(BUNDLED if str(source) == BUNDLED_MODEL else source)
    if opened.config.vocab_size != config.vocab_size:
        raise InputError(
            f"--source must have the checkpoint's vocabulary of {config.vocab_size}, got {opened.config.vocab_size}. "
            "Give the model it was made from."
        )
    return load_dense(opened.folder)


def _against(
    opened: Source, recipe: Recipe, source: str | Path | None
) -> Literal["dense torch", "dense source", "ungated torch"]:
    """The honest name of what is compared with: a checkpoint with other activations or trained weights holds no dense
    model.
    """
    if source is not None:
        return "dense source"
    return "ungated torch" if opened.swaps or training_stages(recipe) else "dense torch"


def _words(tokenizer: Any, manifest: Manifest, text: Path | None) -> tuple[str, str]:
    """The text to measure on, and its name for people."""
    text_hash = manifest.calibration.get("file")
    if text is None:
        if text_hash is not None:
            log.warning("Measured on the text that comes with sparsegate; give the checkpoint's own with --text FILE.")
        return read_text(HELDOUT_TEXT), "Python standard library modules, held out"
    words = read_whole(text, lambda conversations: write_out(tokenizer, conversations))[0]
    if text_hash is not None and hash_file(text) == text_hash:
        return words[int(len(words) * (1 - HELDOUT_SHARE)) :], f"{text.name}, held out"
    return words, text.name


def _batches(
    order: _Order, tokenizer: Any, config: Any, manifest: Manifest, words: str
) -> tuple[Batches, Batches | None]:
    """Windows to measure on, and long ones where they are to be measured too."""
    recipe = make_recipe(manifest.recipe, f"{MANIFEST}'s recipe")
    positions = int(getattr(config, "max_position_embeddings", None) or max(order.long or 0, recipe.calibration.length))
    windows = order.windows
    if order.text is None:
        windows = windows or int(manifest.measured.get("windows", EARLIER_WINDOWS[recipe.searches]))
    count, length, seed = windows or HELDOUT_WINDOWS, min(recipe.calibration.length, positions), manifest.seed + 1
    batches = make_batches(tokenizer, words, count, length, seed, "The text", text_order=False)
    if order.long is None:
        return batches, None
    return batches, make_long_batches(tokenizer, words, LONG["windows"], min(order.long, positions), seed, "The text")


def _executors(onnx: Path, model: Any, batches: Batches, reference_model: Any | None) -> list[Measured]:
    """The ONNX folder's body and kernel, as far as they are there."""
    if not onnx.is_dir():
        return [Measured(executor="ONNX", note="not run: the checkpoint has no onnx folder")]
    chosen, rows = executor(onnx), []
    for name, library in (("ONNX body", False), ("ONNX kernel", True)):
        if library and not chosen.kernel:
            rows.append(Measured(executor=name, note=f"not run: {chosen.reason}"))
            continue
        quality = measure_executor(Decoder(onnx, library=library), model, batches, reference_model=reference_model)
        measured: dict[str, Any] = quality.model_dump(include=set(Measured.model_fields)) | {
            "nll_error": _error(quality)
        }
        rows.append(Measured(executor=name, **measured))
    return rows


def _error(quality: Quality | ExecutorQuality) -> float | None:
    """The standard error of the mean difference to dense; a single window has none."""
    return quality.nll_error if quality.windows > 1 else None
