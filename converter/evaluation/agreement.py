"""Whether the executors of an ONNX folder agree with torch: the ops' bodies and kernels in plain ONNX Runtime, and
onnxruntime-genai.

Equality is judged op by op at each op's own input (`op_agreement`), and end to end by the mean NLL beside what rounding
does to torch (`paired`). A file in less than fp32 is compared with the torch model that holds its rounded weights.
Greedy tokens of a sparse graph are reported and judge nothing: one flip at a threshold changes the text after it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError, explained
from ...runtime_onnx.library import PROVIDERS, executor
from ...runtime_onnx.session import Decoder
from ..arch import load_arch
from ..checkpoint.plan import Plan
from ..checkpoint.source import end_tokens
from ..onnx_export.precision import PRECISIONS, Export
from ..onnx_export.rounded import round_model
from ..onnx_export.stored import StoredOp, stored_ops
from ..text.windows import Batches
from .checks import Check, ExecutorQuality, Quality
from .op_agreement import Watched, judge_ops, judge_rest, open_watched, watch, watched_tokens
from .paired import compare, eight_bits, half_precision, last_bits
from .quality import measure_executor

log = logging.getLogger("sparsegate")
NO_CUDA = "no CUDA device was at hand"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 16, 32
MARGIN = 1e-4
"""Logits: where the two likeliest tokens lie nearer, executors may take either."""
NOISE_SEED = 0


@dataclass(frozen=True)
class Form:
    """How a folder is run here: its precision and target, the executors by name ("body", "kernel") with whether they
    use the library, and what is not run.
    """

    export: Export
    providers: list[str]
    executors: dict[str, bool]
    left_out: list[Check]

    @property
    def cuda(self) -> bool:
        """Whether the graph is one for CUDA, whose activations are in half precision."""
        return self.export.target == "cuda"

    @property
    def rounded(self) -> bool:
        """Whether activations are rounded outside the ops."""
        return self.cuda or PRECISIONS[self.export.precision].bits is not None


def check_onnx(onnx: Path, model: Any, plan: Plan, batches: Batches, export: Export | None = None) -> list[Check]:
    """Equality of every executor of an ONNX folder with the gated torch model, on held-out windows.

    `model` is gated by `plan` and holds the checkpoint's weights; they are rounded in place as the file's are. A graph
    for CUDA without a CUDA device here is run by the CPU as far as that has kernels.
    """
    form = _form(onnx, export or Export())
    arch, precision, target = load_arch(model.config.model_type), form.export.precision, form.export.target
    tokens = watched_tokens(batches, PRECISIONS[precision].bits is not None)
    ops = list(stored_ops(model, plan, arch, precision, target))
    watched, checks = _watched(onnx, form, tokens)
    if form.export != Export():
        round_model(model, plan, arch, precision, target)
    if watched:
        checks += [tally.check(f"{name} ops") for name, tally in judge_ops(model, watched, ops).items()]
        checks += _rest(model, form, watched, ops)
        checks += _end_to_end(onnx, form, list(watched)[-1], model, batches)
    return [*checks, *form.left_out]


def _form(onnx: Path, export: Export) -> Form:
    if export.target == "cuda" and not has_cuda():
        return Form(
            export,
            list(PROVIDERS[:1]),
            {"body on CPU": False},
            [_not_run("kernel", NO_CUDA), _not_run("genai", NO_CUDA)],
        )
    cuda = export.target == "cuda"
    chosen = executor(onnx, PROVIDERS[cuda])
    providers: list[str] = [PROVIDERS[1], PROVIDERS[0]] if cuda else list(PROVIDERS[:1])
    if chosen.kernel:
        return Form(export, providers, {"body": False, "kernel": True}, [])
    return Form(export, providers, {"body": False}, [_not_run("kernel", chosen.reason)])


def _watched(onnx: Path, form: Form, tokens: Tensor) -> tuple[dict[str, Watched], list[Check]]:
    """What the ops of every executor saw, and which executors can't run."""
    watched: dict[str, Watched] = {}
    checks = []
    for name, library in form.executors.items():
        try:
            graph = open_watched(onnx, library, form.providers, form.rounded)
        except Exception as error:  # onnxruntime's exceptions have no public base
            if not form.cuda:
                raise
            checks.append(_not_run(name, str(error).splitlines()[0]))  # the CPU has no kernels for bfloat16
            continue
        watched[name] = watch(graph, tokens)
    return watched, checks


def _rest(model: Any, form: Form, watched: dict[str, Watched], ops: list[StoredOp]) -> list[Check]:
    """Everything outside the ops; a graph in half precision differs there by rounding and is judged end to end."""
    if form.cuda:
        return []
    complete = {op.node for op in ops}
    return [judge_rest(f"{name} logits", model, run, ops) for name, run in watched.items() if complete <= set(run.seen)]


def _end_to_end(onnx: Path, form: Form, name: str, model: Any, batches: Batches) -> list[Check]:
    """The executor that applications get, whole: its NLL beside torch's, and onnxruntime-genai's greedy tokens beside
    torch's.
    """
    library = form.executors[name]
    noise = half_precision if form.cuda else eight_bits if form.rounded else last_bits(NOISE_SEED)
    checks = compare(name, Decoder(onnx, form.providers, library=library), model, batches, noise, form.rounded)
    if form.cuda and not has_cuda():
        return checks
    prompts = _prompts(batches)
    expected = greedy(model, prompts)
    equal = sum(
        _equal(a, b)
        for a, b in zip(genai_tokens(onnx, prompts, library, expected.shape[1]), _ended(expected, model), strict=True)
    )
    note = f"{equal} of {len(prompts)} prompts equal to torch's to the end; reported, not judged"
    return [
        *checks,
        Check(name=f"genai {name} greedy tokens", value=equal, bound=0, passed=True, at_least=True, note=note),
    ]


def _prompts(batches: Batches) -> Tensor:
    rows = batches.tokens[batches.mask.all(1)]
    if len(rows) < 1 or rows.shape[1] < PROMPT_TOKENS + 1:
        raise InputError(
            f"Held-out text must hold a full window of {batches.tokens.shape[1]} tokens, got less. Give more text."
        )
    return rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS, :PROMPT_TOKENS]


@torch.no_grad()
def greedy(model: Any, prompts: Tensor) -> Tensor:
    """Prompts [N, P] with torch's greedy continuation of at most NEW_TOKENS tokens: [N, P + new]."""
    limit = int(getattr(model.config, "max_position_embeddings", 1 << 30))
    new = min(NEW_TOKENS, limit - prompts.shape[1] - 1)
    tokens = prompts.to(model.device)
    out = model(input_ids=tokens, use_cache=True)
    for _ in range(new):
        following = out.logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], dim=1)
        out = model(input_ids=following, past_key_values=out.past_key_values, use_cache=True)
    return tokens.cpu()


def _ended(tokens: Tensor, model: Any) -> list[list[int]]:
    """The new tokens of every row [N, P + new], up to the one that ends a text: onnxruntime-genai stops before it."""
    ends = end_tokens(model)
    rows = [row[PROMPT_TOKENS:].tolist() for row in tokens]
    return [row[: next((k for k, token in enumerate(row) if token in ends), len(row))] for row in rows]


def _equal(tokens: list[int], wanted: list[int]) -> bool:
    return tokens[: len(wanted)] == wanted


def genai_tokens(onnx: Path, prompts: Tensor, library: bool, length: int) -> list[list[int]]:
    """onnxruntime-genai's greedy continuations of prompts [N, P], up to `length` tokens with the prompt."""
    from ...runtime_onnx.generate import load

    try:
        import onnxruntime_genai as genai
    except ImportError:
        raise InputError(
            'Verification must have onnxruntime-genai, got none. Run pip install "sparsegate[cpu]".'
        ) from None
    model = load(onnx, library=library)
    continuations = []
    for row in prompts:
        with explained(str(onnx)):
            parameters = genai.GeneratorParams(model)  # pyright: ignore[reportAttributeAccessIssue]
            parameters.set_search_options(max_length=length, do_sample=False)
            generator = genai.Generator(model, parameters)  # pyright: ignore[reportAttributeAccessIssue]
            generator.append_tokens(row.numpy().astype(np.int32))
            while not generator.is_done():
                generator.generate_next_token()
            continuations.append([int(t) for t in generator.get_sequence(0)][len(row) :])
    return continuations


def check_dense_text(onnx: Path, model: Any, batches: Batches) -> None:
    """Greedy tokens of the dense graph in fp32 in onnxruntime-genai against torch's, up to the first near tie of two
    tokens.

    Raises InputError where they differ: the graph, its configuration or onnxruntime-genai is wrong for this model.
    """
    prompts = _prompts(batches)
    expected = greedy(model, prompts)
    with torch.no_grad():
        top = model(input_ids=expected).logits.float().topk(2, dim=-1).values
    doubtful = (top[..., 0] - top[..., 1] < MARGIN)[:, PROMPT_TOKENS - 1 : -1]
    for number, (actual, wanted) in enumerate(
        zip(genai_tokens(onnx, prompts, False, expected.shape[1]), _ended(expected, model), strict=True)
    ):
        clear = int(doubtful[number].int().argmax()) if bool(doubtful[number].any()) else len(wanted)
        sure = min(clear, len(wanted))
        if actual[:sure] != wanted[:sure]:
            at = next((k for k, (a, b) in enumerate(zip(actual, wanted, strict=False)) if a != b), len(actual))
            raise InputError(
                f"onnxruntime-genai must continue the dense graph as torch does, got another token after {at} of "
                f"{sure}. "
                "Its configuration is wrong for this model: convert another one, or try another version of "
                "onnxruntime-genai."
            )


def has_cuda() -> bool:
    """Whether ONNX Runtime can open a CUDA device here."""
    import onnxruntime

    return PROVIDERS[1] in onnxruntime.get_available_providers() and (
        torch.cuda.is_available() or any(Path("/dev").glob("nvidia[0-9]*"))
    )


def _not_run(name: str, reason: str) -> Check:
    return Check(name=name, value=0, bound=0, passed=True, note=f"not run: {reason}")


@torch.no_grad()
def measure_shipped(
    onnx: Path,
    model: Any,
    batches: Batches,
    export: Export,
    reference_model: Any | None = None,
    count: int | None = None,
    known: Quality | None = None,
) -> ExecutorQuality | None:
    """What an ONNX folder loses against the dense `reference_model` (None: the model itself ungated), by the executor
    that applications get, beside the gated torch model in fp32; on the windows that the torch model's own quality is
    `known` on, else on the first `count`, None: on as many as tell it.

    None in fp32 for the CPU, which is the torch model within LOGIT_BOUND, and where nothing here can run the graph.
    """
    if export == Export():
        return None
    cuda = export.target == "cuda" and has_cuda()
    try:
        decoder = Decoder(
            onnx,
            [PROVIDERS[1], PROVIDERS[0]] if cuda else None,
            library=None if cuda or export.target == "cpu" else False,
        )
    except Exception as error:  # onnxruntime's exceptions have no public base
        if export.target == "cpu":
            raise
        log.warning("The graph for CUDA was not measured, the CPU cannot run it: %s", str(error).splitlines()[0])
        return None
    if known is not None:
        return measure_executor(decoder, model, batches, known.windows, reference_model, nll_torch=known.nll)
    return measure_executor(decoder, model, batches, count, reference_model)
