"""Distribution functions of the threshold masks in Triton, and a Newton step for b.

All are symmetric. Shares near 1 are told by what they lack, so that a sum has the digits of what is not settled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from topk.kernels.common import exponential


@triton.jit
def shares(z, METHOD: tl.constexpr):
    """min(F, 1 - F) with the sign of 1/2 - F, whether F > 1/2, and F'."""
    if METHOD == "sparse":
        head = z > 0.5
        q = tl.maximum(tl.minimum(z, 1.0 - z), 0.0)
        density = ((z >= 0.0) & (z <= 1.0)).to(tl.float32)
    else:
        head = z > 0.0
        size = tl.abs(z)
        if METHOD == "gaussian":
            size = tl.minimum(size, 20.0)  # beyond, q is 0
            bell = exponential(-0.5 * size * size)
            q = bell * _tail_over_bell(size)
            density = bell * 0.3989422804
        else:
            odds = exponential(-size)
            if METHOD == "logistic":
                inverse = 1.0 / (1.0 + odds)
                q = odds * inverse
                density = q * inverse
            else:
                q = 0.5 * odds
                density = q
    return tl.where(head, -q, q), head, density


@triton.jit
def _tail_over_bell(z):
    """Phi(-z) exp(z^2 / 2), z >= 0, to 1e-7: (z + 4) times it is nearly a polynomial in (z - 4) / (z + 4)."""
    inverse = 1.0 / (z + 4.0)
    s = (z - 4.0) * inverse
    value = -0.000156740115 * s + 0.000129039423
    value = value * s + 0.00156255207
    value = value * s - 0.00347560786
    value = value * s - 0.00751137481
    value = value * s + 0.0603949566
    value = value * s - 0.186526923
    value = value * s + 0.387137628
    value = value * s - 0.607896391
    value = value * s + 0.755285125
    return value * inverse


@triton.jit
def quantile(p, METHOD: tl.constexpr):
    """Q(p) less the median, to some per cent."""
    if METHOD == "logistic":
        result = tl.log(p / (1.0 - p))
    elif METHOD == "laplace":
        result = tl.where(p < 0.5, tl.log(2.0 * p), -tl.log(2.0 - 2.0 * p))
    elif METHOD == "sparse":
        result = p - 0.5
    else:
        result = normal_quantile(p)
    return result


@triton.jit
def normal_quantile(p):
    """Tukey's: off by 0.01 in the middle, by a tenth of it at 1e-6."""
    return 4.91 * (tl.exp(0.14 * tl.log(p)) - tl.exp(0.14 * tl.log(1.0 - p)))


@triton.jit
def newton(excess, slope, k, others, METHOD: tl.constexpr):
    """What a Newton step adds to the level: for the sum or, where F is smooth, for the logit of sum / n."""
    slope = tl.maximum(slope, 1e-30)
    if METHOD == "sparse":
        step = excess / slope
    else:
        hits = tl.maximum(k + excess, 1e-20)
        misses = tl.maximum(others - excess, 1e-20)
        more = tl.maximum(excess * (k + others) / (k * misses), -1.0 + 1e-20)  # the quotient of the odds, less 1
        small = more * (1.0 - more * (0.5 - more * 0.33333333))
        change = tl.where(tl.abs(more) < 1e-2, small, tl.log(1.0 + more))
        step = change * hits * (misses / ((k + others) * slope))
    return step


@triton.jit
def arrived(excess, step, allowed, METHOD: tl.constexpr):
    """Whether a step leaves nothing to be done: of a smooth F one so short that its square is below float32."""
    if METHOD == "sparse":
        there = tl.abs(excess) <= allowed
    else:
        there = (tl.abs(step) <= 5e-4) & (tl.abs(excess) <= 1e5 * allowed)
    return there
