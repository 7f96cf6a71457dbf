"""What `convert` and `eval` measured, each as the one JSON that tables, plots and the model card are made from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from ...runtime_onnx.bench.record import machine
from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import read_json
from ..checkpoint.fields import Strict
from ..checkpoint.manifest import File, read_manifest, write_manifest
from ..checkpoint.stage import VERSION, hash_file, write_json
from .long_record import LongContext

EVALUATION = "report/eval.json"
"""The evaluation's place in a checkpoint folder."""

RESULTS = "report/report.json"
"""The report's place in a checkpoint folder."""


class Record(Strict):
    """A result with a file of its own."""

    def save(self, path: Path) -> None:
        """Write the result as JSON, in a folder that is made when it is not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.model_dump(mode="json"))


Stored = TypeVar("Stored", bound=Record)


def read_stored(form: type[Stored], path: Path, what: str, remedy: str) -> Stored:
    """The result in a JSON file. Raises InputError, which names the first wrong field and the remedy, when the file is
    missing or has another form.
    """
    value = read_json(path, what)
    try:
        return form.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(
            f"{what} must have the form of version 1, got {path} ({place}: {first['msg']}). {remedy}"
        ) from None


class Machine(Strict):
    """Where it was measured; `cores` are the logical ones that the process may use."""

    cpu: str
    cores: int
    os: str
    memory_bytes: int | None = None
    gpu: str | None = None


class Text(Strict):
    """Tokens that were read: how many, sha256 of the token batches, a name for people, and the Hub dataset when it is
    one.
    """

    tokens: int
    hash: str | None = None
    name: str | None = None
    dataset: str | None = None


class Speed(Strict):
    """How the speeds were taken: one sequence, dense and sparse in turns.

    `precision` of the sparse model's gated weights and `baseline` of the dense model's (None: the same), `threads` None
    for the runtime's own choice; `disturbed` when other load made every pair of runs wait.
    """

    runtime: str = "onnxruntime"
    precision: str
    baseline: str | None = None
    provider: str
    threads: int | None
    prompt_tokens: int
    new_tokens: int
    executor: str | None = None
    command: str | None = None
    commit: str | None = None
    disturbed: bool = False


class Row(Strict):
    """One model's quality and speed on the held-out text.

    Attributes:
        nll: Nats per token; `kl` (dense to this one) too.
        nll_error: Standard error of the paired difference of NLL to dense.
        agreement: Share of equal argmax tokens.
        density: Mean realised share of kept units.
        cost: Bytes touched per token relative to the dense MLP, predictors included.
        block_cost: The same relative to all linear maps of the blocks.
        read_share: The same relative to those and the output head.
        decode_ratio: Median, over back-to-back pairs, of the speed relative to dense; `prefill_ratio` likewise.
        bench: The samples behind the speeds.
    """

    method: str
    nll: float
    perplexity: float
    kl: float
    nll_error: float | None = Field(default=None, ge=0)
    agreement: float = Field(ge=0, le=1)
    density: float = Field(ge=0, le=1)
    cost: float = Field(ge=0)
    block_cost: float | None = Field(default=None, ge=0)
    read_share: float | None = Field(default=None, ge=0)
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    decode_ratio: float | None = Field(default=None, gt=0)
    prefill_ratio: float | None = Field(default=None, gt=0)
    selected: bool = False
    bench: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Row:
        if not math.isclose(math.exp(self.nll), self.perplexity, rel_tol=1e-3):
            raise ValueError(f"perplexity must be exp(nll), got {self.perplexity} for {self.nll}")
        if self.method.startswith("oracle"):
            raise ValueError("an oracle must not stand among the methods")
        return self


class OnnxRow(Strict):
    """What an ONNX file in less than fp32 loses on the evaluation text, as it is shipped.

    Attributes:
        precision: As asked for.
        executor: That ran it.
        bytes: Of graph and weights.
        kl: Nats per token, from the dense model in fp32.
        agreement: Share of equal argmax tokens, to that model.
        nll_dense: That model's, on the same tokens.
        nll_error: Standard error of the paired difference to it.
        rise: Of the sparse file, the mean paired difference of NLL to the dense file.
        rise_error: Standard error of `rise`.
        cost: Bytes that the MLPs touch per token, relative to dense ones in the same precision.
        read_share: Bytes of blocks and output head, relative to dense ones in fp32.
    """

    model: Literal["dense", "sparse"]
    precision: str
    executor: str
    bytes: int
    tokens: int
    nll: float
    perplexity: float
    kl: float
    nll_error: float | None = Field(default=None, ge=0)
    nll_dense: float | None = None
    rise: float | None = None
    rise_error: float | None = Field(default=None, ge=0)
    agreement: float = Field(ge=0, le=1)
    cost: float = Field(ge=0)
    read_share: float | None = Field(default=None, ge=0)


class DenseReference(Strict):
    """A dense ONNX graph in fewer bits, measured in the same run: what a sparse model has to be better than.

    Attributes:
        nll: Nats per token.
        nll_dense: Of the dense model in fp32, on the same `tokens`.
        nll_error: Standard error of their paired difference.
        kl: Nats per token, from that model.
        agreement: Share of equal argmax tokens, to that model.
        bytes: Of the file.
        read_share: Bytes that a token reads of blocks and output head, relative to the graph in fp32.
        decode_ratio: Median over `pairs` back-to-back pairs of the speed relative to that graph; `prefill_ratio`
            likewise. None where nothing was timed.
        disturbed: Other load made every pair wait.
    """

    precision: Literal["int8", "int4"]
    tokens: int = Field(ge=1)
    nll_dense: float
    nll: float
    nll_error: float | None = Field(default=None, ge=0)
    kl: float
    agreement: float = Field(ge=0, le=1)
    bytes: int = Field(ge=0)
    read_share: float = Field(ge=0)
    decode_ratio: float | None = Field(default=None, gt=0)
    prefill_ratio: float | None = Field(default=None, gt=0)
    pairs: int | None = None
    disturbed: bool = False


class Layer(Strict):
    """One site. Densities: `density_target` asked for, `density_calibrated` on held-out calibration tokens,
    `density_realised` on the evaluation text.
    """

    site: str
    density_target: float | None = None
    density_calibrated: float
    density_realised: float
    recall: float | None = None
    rank: int | None = None
    cost: float | None = None


class ReportCheck(Strict):
    """A measured value, its bound (an upper one, or a lower one when `at_least`), whether it holds, and a note on what
    was compared.
    """

    name: str
    value: float
    bound: float
    passed: bool
    note: str = ""
    at_least: bool = False


class StageTime(Strict):
    """Seconds that a stage of the conversion took and was expected to take, None where nothing was. `resumed`: an
    earlier run had done all of it, which takes 0 seconds, or a part of it; then nothing is compared.
    """

    name: str
    expected_seconds: float | None = Field(default=None, ge=0)
    seconds: float = Field(ge=0)
    resumed: bool = False


class Report(Record):
    """All measurements of one conversion.

    Attributes:
        model: The Hub id (then `revision` is its commit) or the name of the source folder.
        swapped: Its activation was changed before. The row of the method dense is then this model with nothing skipped:
            tables call it ungated.
        updated: Weights of the chosen one were trained together with what selects.
        rotated: They are those of the model after a rotation of its residual stream.
        stages: Times of all stages before the report itself; absent in older reports.
        unused_tensors: Names in the source's files that its class does not have.
        time_notes: What was cut or left out to stay within a time.
        long: What the chosen row loses over long windows, where it was measured.
    """

    version: Literal[1] = 1
    model: str
    revision: str | None = None
    swapped: bool = False
    updated: bool = False
    rotated: bool = False
    tool: str = VERSION
    date: str
    command: str
    machine: Machine
    versions: dict[str, str]
    recipe: dict[str, Any]
    calibration: Text
    evaluation: Text | None = None
    speed: Speed | None = None
    speed_note: str = ""
    rows: list[Row]
    onnx: list[OnnxRow] = []
    references: list[DenseReference] = []
    layers: list[Layer] = []
    checks: list[ReportCheck] = []
    stages: list[StageTime] = []
    unused_tensors: list[str] = []
    time_notes: list[str] = []
    long: LongContext | None = None

    @model_validator(mode="after")
    def _check(self) -> Report:
        if sum(row.method == "dense" for row in self.rows) != 1:
            raise ValueError("rows must hold exactly one of the method dense")
        if sum(row.selected for row in self.rows) > 1:
            raise ValueError("at most one row may be selected")
        if len({reference.precision for reference in self.references}) < len(self.references):
            raise ValueError("references must hold each precision once")
        if any(row.decode_ratio is not None for row in self.rows) and (
            self.speed is None or self.dense.decode_tokens_per_second is None
        ):
            raise ValueError("a speed ratio needs the dense model's speed and the conditions in `speed`")
        return self

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a report. Raises InputError when the file is missing or has another form."""
        return read_stored(cls, path, "The report", "Convert again.")

    @property
    def dense(self) -> Row:
        """The baseline's row."""
        return next(row for row in self.rows if row.method == "dense")

    @property
    def chosen(self) -> Row:
        """The checkpoint's own row: the selected one, else the only sparse one, else the baseline."""
        sparse = [row for row in self.rows if row.method != "dense"]
        return next((row for row in self.rows if row.selected), sparse[0] if len(sparse) == 1 else self.dense)


def this_machine() -> Machine:
    """The machine that runs this process."""
    facts = machine()
    return Machine(cpu=facts["cpu"], cores=facts["cpus"], os=facts["system"], memory_bytes=facts["memory_bytes"])


def record_files(folder: Path, *names: str) -> None:
    """Rewrite the manifest of a checkpoint folder, last, with the present bytes of the named files; all other files
    stay as they were recorded.
    """
    manifest = read_manifest(folder)
    files = {name: File(sha256=hash_file(folder / name), size=(folder / name).stat().st_size) for name in names}
    write_manifest(folder, manifest.model_copy(update={"files": dict(sorted((manifest.files | files).items()))}))


class Measured(Strict):
    """One executor on `tokens` held-out tokens.

    Attributes:
        nll: Nats per token.
        kl: From dense torch to it, in nats per token.
        agreement: Share of equal argmax to dense.
        nll_dense: NLL of what is compared with, on the same tokens.
        nll_error: Standard error of the paired difference to it; None of one window, or not stored by an older version.
        nll_torch: NLL of the sparse torch model, on the same tokens.
        note: Why an executor did not run; its numbers are absent then.
    """

    executor: str
    tokens: int = 0
    nll: float | None = None
    nll_dense: float | None = None
    nll_error: float | None = Field(default=None, ge=0)
    nll_torch: float | None = None
    kl: float | None = None
    agreement: float | None = Field(default=None, ge=0, le=1)
    note: str = ""


class Answers(Strict):
    """Greedy answers of the sparse model against the dense model's own: sacrebleu's corpus BLEU, 0 to 100, mean over
    prompts.

    Attributes:
        bleu: The prompt's pass is dense, which yields the first answer token, and every later pass is masked (arXiv
            2406.06562, its released protocol).
        bleu_all_masked: The prompt is masked too.
        bleu_dense: The dense answers against themselves: below 100 where answers have fewer than four words.
        equal: Share of answers equal token by token; `equal_all_masked` likewise.
        empty: Prompts to which the dense model says nothing. They are left out.
    """

    prompts: int
    empty: int = 0
    prompt_tokens: int
    answer_tokens: int
    max_new_tokens: int
    name: str
    bleu: float = Field(ge=0, le=100 + 1e-6)
    bleu_all_masked: float = Field(ge=0, le=100 + 1e-6)
    bleu_dense: float = Field(ge=0, le=100 + 1e-6)
    equal: float = Field(ge=0, le=1)
    equal_all_masked: float = Field(ge=0, le=1)


class Sparsity(Strict):
    """Share of weights skipped, each site counted by its parameters and only sites that are masked.

    Attributes:
        windows: Every position of the held-out windows.
        answers: Of the answers with a dense prompt, on masked passes alone.
        answers_and_prompt: The same with the prompt's positions counted as dense.
        masked_answers: As `answers`, with everything masked.
        masked_answers_and_prompt: As `answers_and_prompt`, with everything masked.
        gated_share: Part of the model's parameters that these sites hold.
    """

    windows: float
    answers: float
    answers_and_prompt: float
    masked_answers: float
    masked_answers_and_prompt: float
    gated_share: float = Field(ge=0, le=1)


class Evaluation(Record):
    """Everything that `eval` measured.

    Attributes:
        against: What everything is compared with: the checkpoint's own dense model; the dense source where weights or
            activations were changed; without that one, the changed model with nothing masked.
        cost: Bytes touched per token relative to the dense MLPs.
        block_cost: The same relative to all linear maps of the blocks.
        predictor_cost: Part of `cost` that predictors and residuals add.
        tasks: Metrics of lm-eval by task and metric, dense torch and sparse ONNX.
        long: What is lost over long windows, where it was measured.
    """

    version: Literal[1] = 1
    model: str
    tool: str = VERSION
    date: str
    command: str
    machine: Machine
    versions: dict[str, str]
    text: Text
    against: Literal["dense torch", "dense source", "ungated torch"] = "dense torch"
    nll_dense: float
    executors: list[Measured]
    density: float = Field(ge=0, le=1)
    cost: float = Field(ge=0)
    block_cost: float = Field(ge=0)
    predictor_cost: float = Field(ge=0)
    site_density: dict[str, float]
    site_cost: dict[str, float]
    sparsity: Sparsity
    answers: Answers
    tasks: dict[str, dict[str, dict[str, float]]] = {}
    long: LongContext | None = None

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read an evaluation. Raises InputError when the file is missing or has another form."""
        return read_stored(cls, path, "The evaluation", "Run sparsegate eval again.")
