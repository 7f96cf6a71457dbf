"""Libraries that talk while they work, kept silent for as long as a verb runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_TALKATIVE = ("onnxscript", "onnx_ir", "datasets", "lm_eval", "torch.onnx")
"""Loggers that warn of what a person can't mend."""


@contextmanager
def silenced(bars: bool = False) -> Iterator[None]:
    """Log lines below errors, Python warnings and progress bars of the libraries are switched off inside the block, and
    are as before after it.

    `bars` leaves those of the Hub's transfers, which are the only sight of a download.
    """
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack.enter_context(_hub(bars))
        stack.enter_context(_transformers())
        for name in _TALKATIVE:
            stack.enter_context(_level(name))
        yield


@contextmanager
def _hub(bars: bool) -> Iterator[None]:
    from huggingface_hub import utils

    before = utils.are_progress_bars_disabled()
    if not bars:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        (utils.disable_progress_bars if before else utils.enable_progress_bars)()


@contextmanager
def _transformers() -> Iterator[None]:
    """Its reports on loaded weights, generation's warnings and the bar over the weights; its switch for bars also moves
    the Hub's, which are put back.
    """
    from huggingface_hub import utils
    from transformers.utils import logging as switches

    level, active, hub = (
        switches.get_verbosity(),
        switches.is_progress_bar_enabled(),
        utils.are_progress_bars_disabled(),
    )
    switches.set_verbosity_error()
    switches.disable_progress_bar()
    if not hub:
        utils.enable_progress_bars()
    try:
        yield
    finally:
        switches.set_verbosity(level)
        if active:
            switches.enable_progress_bar()


@contextmanager
def _level(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def datasets_silenced() -> Iterator[None]:
    """The bars of the optional library datasets are switched off inside the block. It takes a second to import, so only
    what reads data sets does so.
    """
    try:
        from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars  # type: ignore[import-not-found]
    except ImportError:
        yield
        return
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
