"""Which tokens of an op say something about an executor: those in which no score and no rounded value lies at its
boundary.

An executor computes scores, and the values that an integer kernel rounds, in float32; the reference computes them in
float64. Within these margins the two may fall on either side, which says nothing about either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import gated_mlp, sparse_linear
from .activation import jump
from .quantisation import dequantise, integers
from .vocabulary import GROUP

ROUNDING = 3e-5
"""In units of the step: 127 times the relative rounding errors of float32 sums."""
SUMS = 2.0**-22
"""Of float32 sums, relative to the sum of their absolute terms."""
TERM = 2.0**-25
"""What a float32 sum of products is off by, by chance, relative to the sum of their absolute values: half a bit of a
term of that size.
"""
NEAR = 1e-5
"""Of scores, relative to |tau| + rms of the token's scores."""


def off_boundary(values: NDArray) -> NDArray[np.bool_]:
    """Bool [T]: no value of [T, m, ...], rounded in groups of 32 along the second axis, lies within ROUNDING of a
    boundary.
    """
    near, _ = _at_boundary(values)
    return ~np.any(near.reshape(len(values), -1), axis=1)


def _at_boundary(values: NDArray, error: NDArray | float = 0.0) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Of [T, m, ...], rounded in groups of 32 along the second axis: which values [T, m, ...] lie at a boundary, and
    every value's step [T, m, ...].

    `error` of the values' shape is what they may be off by beside ROUNDING.
    """
    tokens, m = values.shape[:2]
    pad = -m % GROUP
    padded = np.concatenate([values, np.zeros((tokens, pad, *values.shape[2:]))], 1)
    grouped = padded.reshape(tokens, -1, GROUP, *values.shape[2:])
    largest = np.abs(grouped).max(2, keepdims=True)
    steps = np.divide(grouped * 127.0, largest, out=np.zeros_like(grouped), where=largest > 0)
    gap = np.abs(steps - np.floor(steps) - 0.5).reshape(padded.shape)[:, :m]
    step = np.broadcast_to(largest / 127.0, grouped.shape).reshape(padded.shape)[:, :m]
    return (step > 0) & (gap * step <= ROUNDING * step + error), step


def off_threshold(scores: NDArray, tau: NDArray) -> NDArray[np.bool_]:
    """Bool [T]: no score [T, n] lies within NEAR of its threshold [n]; zero, of a ReLU, is exact and may. None lies
    near an infinite one.
    """
    scale = np.abs(tau) + np.sqrt((scores**2).mean(1, keepdims=True))
    with np.errstate(invalid="ignore"):
        far = np.isinf(tau) | (np.abs(scores - tau) > NEAR * scale)
    return (far | ((scores == 0) & (tau >= 0))).all(1)


def off_thresholds(variant: Any, x: NDArray, tensors: Mapping[str, NDArray], integer: bool) -> NDArray[np.bool_]:
    """Bool [T] of x [T, d]: no score lies at its threshold and no gate at the jump of its activation; `integer` as in
    `reference`.

    A SparseLinear compares what it is given, so there every executor sees the same bits.
    """
    if isinstance(variant, sparse_linear.Variant):
        return np.ones(len(x), bool)
    clear = np.ones(len(x), bool)
    if "tau" in variant.inputs:
        scores = gated_mlp.scores(variant, x, tensors, integer=integer)
        clear &= off_threshold(scores, np.asarray(tensors["tau"]).astype(np.float64))
    at = jump(variant.activation)
    if at is not None:
        before = gated_mlp.before_activation(variant, x, tensors, integer)
        clear &= off_threshold(before, np.full(before.shape[1], np.float32(at)))
    return clear


def settled_scores(variant: Any, x: NDArray, tensors: Mapping[str, NDArray]) -> NDArray[np.bool_]:
    """Bool [T] of x [T, d]: tokens in which an integer kernel and its emulation see every score on the same side of its
    threshold.
    """
    clear = off_thresholds(variant, x, tensors, integer=True)
    if isinstance(variant, gated_mlp.Variant) and variant.p == "int8":
        clear &= off_boundary(gated_mlp.hidden(variant, x, tensors, integer=True))
    return clear


def settled(variant: Any, x: NDArray, tensors: Mapping[str, NDArray]) -> NDArray[np.bool_]:
    """Bool [T] of x [T, d]: tokens in which every score and every rounded value is seen on the same side.

    What a SparseLinear rounds are products of two float32 numbers at most: the same bits in the emulation.
    """
    good = settled_scores(variant, x, tensors)
    if isinstance(variant, gated_mlp.Variant) and variant.weights != "float":
        good &= off_boundary(_scaled(variant, x, tensors))
    return good


def tie_energy(variant: Any, x: NDArray, tensors: Mapping[str, NDArray]) -> NDArray[np.float64]:
    """[T] of x [T, d]: the largest squared change of y when every value at a rounding boundary is rounded to the other
    side.

    A step of such a value moves y by the step times its row of integers; steps in one group of columns may add up. A
    value is off by the rounding of the sums that it comes from, which is large beside it where a few channels of x are
    very large.
    """
    if isinstance(variant, sparse_linear.Variant) or variant.weights == "float":
        return np.zeros(len(x))
    scaled = _scaled(variant, x, tensors)
    scale = np.abs(np.asarray(tensors["s_down"]).astype(np.float64))
    error = _product_error(variant, x, tensors, SUMS, integer=True)
    near, step = _at_boundary(scaled, error * scale if scaled.ndim == 2 else error[:, :, None] * scale)
    rows = integers(tensors["w_down"], variant.weights).astype(np.float64)
    groups = near.shape[2] if near.ndim == 3 else 1
    sizes = np.sqrt(np.square(rows.reshape(len(rows), groups, -1)).sum(2))  # [n, groups]
    moved = np.where(near, step, 0.0) * (sizes if near.ndim == 3 else sizes[:, 0])
    return np.square(moved.sum(1)).reshape(len(x), -1).sum(1)


def sum_energy(variant: Any, x: NDArray, tensors: Mapping[str, NDArray]) -> NDArray[np.float64]:
    """[T] of x [T, d]: the squared change of y that the rounding of float32 sums before the activation, or of a linear
    map's, accounts for, where weights are floats.

    Where large terms of a product cancel, what is left is as inexact as they are; such a neuron may be most of a
    token's y. Errors of different neurons and columns are independent, so their squares add up.
    """
    if variant.weights != "float":
        return np.zeros(len(x))
    if isinstance(variant, sparse_linear.Variant):
        size = np.where(sparse_linear.active(variant, x, tensors), np.abs(np.asarray(x).astype(np.float64)), 0.0)
        return np.square(TERM * (size @ np.abs(np.asarray(tensors["w"]).astype(np.float64)))).sum(1)
    error = _product_error(variant, x, tensors, TERM, integer=False)
    kept = np.where(gated_mlp.active(variant, x, tensors), error, 0.0)
    return np.square(kept) @ np.square(_weights(variant, tensors, "down")).sum(1)


def _weights(variant: gated_mlp.Variant, tensors: Mapping[str, NDArray], part: str) -> NDArray[np.float64]:
    """A matrix in float64."""
    role = f"w_{part}"
    return (
        np.asarray(tensors[role]).astype(np.float64)
        if variant.weights == "float"
        else dequantise(tensors[role], tensors[f"s_{part}"], variant.weights)
    )


def _product_error(
    variant: gated_mlp.Variant, x: NDArray, tensors: Mapping[str, NDArray], relative: float, integer: bool
) -> NDArray[np.float64]:
    """[T, n] of x [T, d]: what float32 sums may be off by in z = act(gate) * up: `relative` times the sums of the
    absolute terms.
    """
    size = np.abs(np.asarray(x).astype(np.float64))
    gate, z = gated_mlp.parts(variant, x, tensors, integer=integer)

    def terms(part: str) -> NDArray[np.float64]:
        return size @ np.abs(_weights(variant, tensors, part)).T

    if variant.plain:
        return relative * terms("up")
    up = np.abs(z) / np.maximum(np.abs(gate), 1e-30)
    return relative * (up * terms("gate") + np.abs(gate) * terms("up"))


def _scaled(variant: gated_mlp.Variant, x: NDArray, tensors: Mapping[str, NDArray]) -> NDArray[np.float64]:
    """What a kernel rounds before the sum over w_down's rows: kept z times the rows' scales, [T, n] or [T,
    n, d / 32].
    """
    z = gated_mlp.parts(variant, x, tensors, integer=True)[1]
    z = np.where(gated_mlp.active(variant, x, tensors, integer=True), z, 0.0)
    scale = np.asarray(tensors["s_down"]).astype(np.float64)
    return z * scale if variant.weights == "int8_row" else z[:, :, None] * scale
