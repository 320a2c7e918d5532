"""The smooth loss, k > 6: its slopes d rho / d u, a smooth function of P, from two short series a row.

Where the variance of S is at least 8 they are q (1 - q) times a Chebyshev series in 2 P - 1, whose coefficients fall as
tan(t / 4)^d: 12 terms at most, 7 at k = 50. It is kept as a polynomial, one operation a term where a Chebyshev series
takes two; that loses no digits, since the coefficients of T_d grow as 2.4^d, and nodes beyond the t at which
2.4 tan(t / 4) = 1 have a weight below exp(-8). Where the variance is less, Pr[S = j] itself dies out after some
6 sqrt(var) + 5 terms, and leaving a class out of the polynomial gives the series

    w (r_0 - r_1 w + r_2 w^2 - ...),   r_j = f_{k-1-j} / f_k - f_{k-2-j} / f_{k-1},   f_j = Pr[S = j],

for w = P / (1 - P) <= 1, and its mirror image in 1 / w for the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from topk.kernels.common import exponential, reciprocal
from topk.kernels.smooth_circle import NODES, SPREAD, modulo, sine_and_cosine, terms_of_chances, turned, turns

TERMS = tl.constexpr(24)
"""Of a series, on either side of P = 1/2."""

_USUAL = tl.constexpr(8)  # terms of a polynomial, for variances from 22 on


def _doubled_chebyshev(count: int) -> tuple[int, ...]:
    """The coefficients of 2 T_d(v / 2), d < count, one after the other, each from the constant one on."""
    rows = [[2], [0, 1]]
    for _ in range(2, count):
        rows.append([a - b for a, b in zip([0, *rows[-1]], rows[-2] + [0, 0], strict=True)])
    return tuple(number for row in rows for number in row + [0] * (count - len(row)))


_SIGN = tl.constexpr(-(2**31))
_CHEBYSHEV = tl.constexpr(_doubled_chebyshev(TERMS.value // 2))


@triton.jit
def store_series(record, inside, real, imag, steps, circle, count, weight, variance, up, down, k, ROWS: tl.constexpr):
    """The number of terms, negative for a polynomial in P, and their coefficients times the loss's slope."""
    wide = variance >= SPREAD
    terms = tl.where(wide, _terms_of_chebyshev(variance), terms_of_chances(variance))
    tl.store(record, tl.where(wide, -terms, terms).to(tl.float32), mask=inside)
    if tl.max((inside & wide).to(tl.int32), 0) > 0:
        _store_chebyshev(record + 1, inside & wide, real, imag, steps, circle, weight, up, down)
    if tl.max((inside & (wide == 0)).to(tl.int32), 0) > 0:
        _store_powers(record + 1, inside & (wide == 0), real, imag, steps, circle, count, up, down, k, ROWS)


@triton.jit
def _terms_of_chebyshev(variance):
    return tl.ceil(3.0 + 23.0 / tl.sqrt(variance)).to(tl.int32)


@triton.jit
def _store_chebyshev(record, here, real, imag, steps, circle, weight, up, down):
    """sum over nodes of Re(2 i g sin(t/2) (2 - [d = 0]) (-i tan(t/4))^d), g the node's part of the slopes.

    Those are the terms of T_d(s); they are stored as those of (2 s)^j.
    """
    lanes = tl.arange(0, NODES)[None, :]
    m = lanes.to(tl.float32)
    size = circle.to(tl.float32)
    steps = modulo(steps, circle)
    real_k, imag_k = turned(real, imag, m, steps, size)
    real_less, imag_less = turned(real, imag, m, steps + 1.0, size)
    # half the angle: its sine, and the tangent of half of that
    half_sine, half_rest = sine_and_cosine(tl.minimum(m / size[:, None], 1.0) * 0.5)
    # Past the last node the divisor may round to 0: what has no weight must not become NaN.
    tangent = tl.where(weight > 0.0, half_sine / (2.0 - half_rest), 0.0)
    factor = 2.0 * weight * half_sine
    part_real = factor * (real_k * up[:, None] - real_less * down[:, None])
    part_imag = factor * (imag_k * up[:, None] - imag_less * down[:, None])
    power = tl.where(weight > 0.0, 1.0, 0.0)
    rest = tl.arange(0, 64)[None, :]
    unused = here[:, None] & (rest >= TERMS // 2) & (rest < 2 * TERMS)
    tl.store(record[:, None] + rest, tl.zeros_like(rest).to(tl.float32), mask=unused)
    series = ()
    for d in tl.static_range(TERMS // 2):
        value = tl.sum((part_imag if d % 2 == 0 else part_real) * power, 1)
        series = series + (-value if d % 4 == 0 or d % 4 == 3 else value,)
        power *= tangent
    for j in tl.static_range(TERMS // 2):
        value = series[j]
        for d in tl.static_range(j + 2, TERMS // 2, 2):
            value += _CHEBYSHEV[d * (TERMS // 2) + j] * series[d]
        tl.store(record + j, value, mask=here)


@triton.jit
def _store_powers(record, here, real, imag, steps, circle, count, up, down, k, ROWS: tl.constexpr):
    """The coefficients in w for P <= 1/2, then those in 1 / w for P > 1/2."""
    lanes = tl.arange(0, 64)[None, :]
    head = lanes >= 32
    j = lanes % 32
    size = circle.to(tl.float32)[:, None]
    turn = modulo(steps, circle)[:, None] + tl.where(head, -1 - j, 1 + j).to(tl.float32)
    chances = tl.zeros((ROWS, 64), tl.float32) + 1.0
    chances_less = tl.zeros((ROWS, 64), tl.float32) + 1.0
    nodes = tl.arange(0, NODES)[None, :]
    for m in range(1, tl.max(count, 0) + 1):
        node_real = tl.sum(tl.where(nodes == m, real, 0.0), 1)[:, None]
        node_imag = tl.sum(tl.where(nodes == m, imag, 0.0), 1)[:, None]
        twice = tl.where(m <= count, 2.0, 0.0)[:, None]
        sine, rest = sine_and_cosine(m / size)
        next_real = node_real - (node_real * rest + node_imag * sine)
        next_imag = node_imag - (node_imag * rest - node_real * sine)
        sine, rest = sine_and_cosine(turns(m * turn, size))
        chances += twice * (node_real - (node_real * rest + node_imag * sine))
        chances_less += twice * (next_real - (next_real * rest + next_imag * sine))
    room = (k - tl.zeros_like(steps))[:, None] - j  # k: one for all rows, or one a row
    chances = tl.where(head | (room > 0), chances, 0.0)
    chances_less = tl.where(head | (room > 1), chances_less, 0.0)
    sign = tl.where((lanes % 2 == 1) != head, -1.0, 1.0)
    values = sign * (chances * up[:, None] - chances_less * down[:, None]) / size
    kept = here[:, None] & (j < TERMS)
    tl.store(record[:, None] + tl.where(head, TERMS, 0) + j, values, mask=kept)


@triton.jit
def slopes_of(record, x, used, tau, k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The slopes (ROWS, BLOCK) that a record tells of, y's excepted."""
    center = tl.load(record, mask=used, other=0.0)
    shift = tl.load(record + 1, mask=used, other=0.0)
    terms = tl.load(record + 2, mask=used, other=0.0).to(tl.int32)
    rate = 1.0 / (k * tau) + tl.zeros_like(center)  # tau: one for all rows, or one a row
    log_odds = (x - center[:, None]) * rate[:, None] + shift[:, None]
    odds = exponential(-tl.abs(log_odds))
    head = log_odds > 0.0
    slopes = tl.zeros((ROWS, BLOCK), tl.float32)
    if tl.max(terms, 0) > 0:
        slopes += _power_series(record + 3, odds, head, terms, ROWS, BLOCK)
    if tl.min(terms, 0) < 0:
        slopes += _polynomial(record + 3, odds, log_odds, terms, ROWS, BLOCK)
    return slopes


@triton.jit
def _power_series(record, odds, head, terms, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """odds (r_0 + r_1 odds + ...), from the coefficients of either side; 0 in rows with another series."""
    value = tl.zeros((ROWS, BLOCK), tl.float32)
    last = tl.max(terms, 0)
    for step in range(last):
        j = last - 1 - step
        tail_term = tl.load(record + j, mask=j < terms, other=0.0)
        head_term = tl.load(record + j + TERMS, mask=j < terms, other=0.0)
        value = value * odds + tl.where(head, head_term[:, None], tail_term[:, None])
    return value * odds


@triton.jit
def _polynomial(record, odds, log_odds, terms, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """q (1 - q) (a_0 + a_1 v + ...), v = 4 P - 2, which has the sign of the log-odds; 0 in rows with another series."""
    q = odds * reciprocal(1.0 + odds)
    sign = log_odds.to(tl.int32, bitcast=True) & _SIGN
    v = ((2.0 - 4.0 * q).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    value = tl.zeros((ROWS, BLOCK), tl.float32)
    if tl.min(terms, 0) < -_USUAL:
        value = _more_terms(value, v, record, terms, TERMS // 2, _USUAL)
    return _more_terms(value, v, record, terms, _USUAL, 0) * (q - q * q)


@triton.jit
def _more_terms(value, v, record, terms, FROM: tl.constexpr, TO: tl.constexpr):
    """By Horner, from the term before FROM down to the one at TO."""
    for step in tl.static_range(FROM - TO):
        term = tl.load(record + FROM - 1 - step, mask=terms < 0, other=0.0)
        value = value * v + term[:, None]
    return value
