"""The smooth loss, k > 6: Pr[S = k] and Pr[S = k - 1] from a few nodes on a circle.

With P_i the tilted probabilities of the wrong classes,

    Pr[S = j] = 1/M sum over m of phi(2 pi m / M) exp(-2 pi i j m / M),    phi(t) = prod (1 + P_i (e^{it} - 1)),

but for the chances of j + M, j - M, ..., which are below float32 once M is some 6 standard deviations. The same
deviation bounds |phi(t)| by exp(-var (1 - cos t)), so of a large M few nodes matter: 8 at k = 50, 6 at k = 1000. A node
costs a product over the classes, in any order. Success and failure are treated alike: with q = min(P, 1 - P), every
class with P > 1/2 contributes e^{it} (counted, exact) times its own factor 1 + q (e^{-it} - 1), and products are kept
as what they differ from 1 by.
"""

from __future__ import annotations

import triton
import triton.language as tl

from topk.kernels.common import finite_or_zero
from topk.kernels.smooth_sift import tile_of
from topk.kernels.smooth_tilt import signed_odds

NODES = tl.constexpr(32)
"""Lanes for the nodes of a row: at most 23 are in use, the one at 0 included."""

SPREAD = tl.constexpr(8.0)
"""The variance of S from which on a Chebyshev series serves both sides of P = 1/2."""


@triton.jit
def circle_of(variance, k):
    """The number of nodes on the whole circle, odd, and how many on its upper half are not negligible."""
    terms = terms_of_chances(variance)
    wide = variance >= SPREAD
    circle = tl.where(wide, terms | 1, tl.minimum(2 * terms + 1, (terms + k + 2) | 1))  # none is below Pr[S = 0]
    half_sine = tl.sqrt(tl.minimum(8.5 / variance, 1.0))  # var (1 - cos t) = 17 at twice that angle
    angle = half_sine + 0.5708 * half_sine * half_sine * half_sine
    last = tl.ceil(angle * circle.to(tl.float32) * 0.31830989).to(tl.int32)
    return circle, tl.where(wide, tl.minimum(last, circle // 2), circle // 2)


@triton.jit
def terms_of_chances(variance):
    """How far from k Pr[S = j] is worth counting."""
    return tl.ceil(6.0 * tl.sqrt(variance) + 5.0).to(tl.int32)


@triton.jit
def sine_and_cosine(turns):
    """Of a full turn times `turns`, |turns| <= 1/2: Taylor series of half the angle, and the double-angle formulas.

    Returns the sine and 1 - cosine.
    """
    angle = turns * 3.14159265358979
    square = angle * angle
    sine = 1.6059044e-10 * square - 2.5052108e-8
    sine = sine * square + 2.7557319e-6
    sine = sine * square - 1.9841270e-4
    sine = sine * square + 8.3333333e-3
    sine = sine * square - 0.16666667
    sine = angle + angle * square * sine
    cosine = -1.1470746e-11 * square + 2.0876757e-9
    cosine = cosine * square - 2.7557319e-7
    cosine = cosine * square + 2.4801587e-5
    cosine = cosine * square - 1.3888889e-3
    cosine = cosine * square + 4.1666667e-2
    cosine = 1.0 + square * (cosine * square - 0.5)
    return 2.0 * sine * cosine, 2.0 * sine * sine


@triton.jit
def turns(product, circle):
    """product / circle less the nearest integer, of integers as floats: the product's multiples of a turn are exact."""
    return (product - circle * tl.floor(product / circle + 0.5)) / circle


@triton.jit
def _times(real, imag, other_real, other_imag):
    """(1 + a)(1 + b) - 1, in real and imaginary parts, each an addition and two fused products."""
    return (
        real + other_real + real * other_real - imag * other_imag,
        imag + other_imag + real * other_imag + imag * other_real,
    )


@triton.jit
def nodes_of(
    signed,  # (ROWS, BLOCK) and
    heads,  # (ROWS,), of a row that does not stream, or of what a sifted row kept
    source,
    center,
    shift,
    variance,
    rate,
    limit,
    rest,
    lanes,
    k,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """The product less 1 of the factors 1 + q (e^{it} - 1) at the nodes, real and imaginary parts (ROWS, NODES), and
    the heads (ROWS,), P > 1/2. A head has -t in the place of t.

    Where the power sums of what a row was sifted of tell all its digits, they do; else the row is read again.
    """
    real = tl.zeros((ROWS, NODES), tl.float32)
    imag = tl.zeros((ROWS, NODES), tl.float32)
    circle, count = circle_of(variance, k)
    if STREAMS:
        again = True
        end = source[2]
        if rest is not None:
            real, imag, left = _product_of_rest(rest, lanes, (finite_or_zero(limit) - center) * rate + shift, circle)
            again = tl.max(left, 0) > 2e-7
            end = tl.where(again, end, 1)
        if again:
            real, imag = tl.zeros_like(real), tl.zeros_like(imag)
            heads = tl.zeros_like(heads)
        for start in range(0, end, BLOCK):
            if again:
                signed, head = signed_odds(tile_of(None, source, start, BLOCK, True), center, shift, rate)
                heads += tl.sum(head.to(tl.int32), 1)
            real, imag = _multiplied(real, imag, signed, circle, count, ROWS, BLOCK)
    else:
        real, imag = _multiplied(real, imag, signed, circle, count, ROWS, BLOCK)
    return real, imag, heads, circle, count


@triton.jit
def _product_of_rest(rest, lanes, log_odds, circle):
    """The same product over the scores sifted out, and what its logarithm may be off by (ROWS,).

    With w = P / (1 - P), and p_m the sum of w^m, of which four are known, the logarithm is

        sum of log((1 + w e^{it}) / (1 + w)) = sum over m of -(-1)^m p_m (e^{imt} - 1) / m.
    """
    size = circle.to(tl.float32)[:, None]
    node = tl.arange(0, NODES)[None, :].to(tl.float32)
    odds = tl.exp(tl.minimum(log_odds, 0.0))  # at the limit, the largest of them
    real = tl.zeros((rest.shape[0], NODES), tl.float32)
    imag = tl.zeros((rest.shape[0], NODES), tl.float32)
    power = tl.zeros_like(odds) + 1.0
    total = tl.zeros_like(odds)
    for m in tl.static_range(1, 5):
        power *= odds
        total = tl.sum(tl.where(lanes == m, rest, 0.0), 1) * power
        sine, less = sine_and_cosine(turns(node * m, size))
        share = (total * (1.0 / m if m % 2 == 1 else -1.0 / m))[:, None]
        real -= share * less
        imag += share * sine
    turned_by = imag * 0.15915494309189535
    sine, less = sine_and_cosine(turned_by - tl.floor(turned_by + 0.5))
    length = tl.exp(real)
    return length * (1.0 - less) - 1.0, length * sine, 0.4 * total * odds / (1.0 - odds)


@triton.jit
def _multiplied(real, imag, signed, circle, count, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The products at the nodes with a tile's factors multiplied in, four classes at a time.

    The product of several factors is 1 + C A(C) + i sin t B(C) with C = 1 - cos t and sin^2 t = C (2 - C): of one class
    A = -q and B = q, negative for a head, and of two together

        A = A_1 + A_2 + C A_1 A_2 - (2 - C) B_1 B_2,      B = B_1 + B_2 + C (A_1 B_2 + A_2 B_1).
    """
    lanes = tl.arange(0, real.shape[1])[None, :]
    evens, odds = tl.split(tl.reshape(signed, (ROWS, BLOCK // 4, 2, 2)))
    one, third = tl.split(evens)
    other, fourth = tl.split(odds)
    a0, a1, b0, b1 = _two(one, other)
    c0, c1, d0, d1 = _two(third, fourth)
    square, cross, top = b0 * d0, b0 * d1 + b1 * d0, b1 * d1
    real0 = a0 + c0 - 2.0 * square
    real1 = a1 + c1 + a0 * c0 + square - 2.0 * cross
    real2 = a0 * c1 + a1 * c0 + cross - 2.0 * top
    real3 = a1 * c1 + top
    imag0 = b0 + d0
    imag1 = b1 + d1 + a0 * d0 + c0 * b0
    imag2 = a0 * d1 + a1 * d0 + c0 * b1 + c1 * b0
    imag3 = a1 * d1 + c1 * b1
    for m in range(1, tl.max(count, 0) + 1):
        sine, rest = sine_and_cosine(m / circle.to(tl.float32))
        sine, rest = sine[:, None], rest[:, None]
        factor_real = (((real3 * rest + real2) * rest + real1) * rest + real0) * rest
        factor_imag = (((imag3 * rest + imag2) * rest + imag1) * rest + imag0) * sine
        all_real, all_imag = tl.reduce((factor_real, factor_imag), 1, _times)
        more_real, more_imag = _times(real, imag, all_real[:, None], all_imag[:, None])
        real = tl.where(lanes == m, more_real, real)
        imag = tl.where(lanes == m, more_imag, imag)
    return real, imag


@triton.jit
def _two(one, other):
    """A and B of two classes, two coefficients each; `one` and `other`: q, negative for a head."""
    size_one, size_other, both = tl.abs(one), tl.abs(other), one * other
    constant, linear = -(size_one + size_other + 2.0 * both), size_one * size_other + both
    return constant, linear, one + other, -(one * size_other + other * size_one)


@triton.jit
def turned(real, imag, lanes, steps, circle):
    """The nodes' values turned by `steps` nodes each, real part; lanes (ROWS, NODES)."""
    sine, rest = sine_and_cosine(turns(lanes * steps[:, None], circle[:, None]))
    return real - (real * rest + imag * sine), imag - (imag * rest - real * sine)


@triton.jit
def chances(real, imag, steps, circle, count, live):
    """Pr[S = k] and Pr[S = k - 1] (1 for rows that do not count), and the nodes' weights. steps: heads - k."""
    lanes = tl.arange(0, NODES)[None, :]
    m = lanes.to(tl.float32)
    size = circle.to(tl.float32)
    steps = modulo(steps, circle)
    weight = tl.where(lanes <= count[:, None], tl.where(lanes == 0, 1.0, 2.0), 0.0) / size[:, None]
    of_k, _ = turned(real, imag, m, steps, size)
    of_less, _ = turned(real, imag, m, steps + 1.0, size)
    chance = tl.sum(weight * of_k, 1)
    chance_less = tl.sum(weight * of_less, 1)
    return tl.where(live, chance, 1.0), tl.where(live, chance_less, 1.0), weight


@triton.jit
def modulo(steps, circle):
    """steps as a float within one circle of 0, so that products with a node's number stay exact."""
    return (steps - steps // circle * circle).to(tl.float32)
