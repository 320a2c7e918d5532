"""Sampled order statistics of noised scores, (x + epsilon Z)_[k+1] (book, chapter 7).

Plainly that takes one normal a class and sample. On the CPU, where drawing them is most of the work, only the
`head` of a row, its few largest scores, is drawn plainly; the others are let in by *thinning*, which is exact:

Let L be the smallest, over the samples, of the K-th largest noised score of the head. Another class i can count in
some sample only if Z_i > a_i = (L - x_i) / epsilon. Now -log Phi(a) is the mean number of points beyond a of a
Poisson process whose largest point is standard normal, for no point lies beyond a with probability Phi(a). So lay
intervals of length b_i >= -log Phi(a_i) end to end, one for each class and sample, and run a Poisson process of unit
rate along that line: the first point of an interval, at distance t from its start, is Z_i with -log Phi(Z_i) = t,
and an interval without a point is a Z_i too low to matter. Only the points are visited, a few dozen a row.

For b we need no normal distribution function a class: g(a) = -log Phi(a) exp(a^2 / 2) falls, so that

    -log Phi(a) <= g(a_0) exp(-a^2 / 2),     0 <= a_0 <= a,     a_0 that of the head's smallest score.

(With h = phi / Phi, -h' = h (a + h) >= a h, hence h(a) >= a times the integral of h from a on, which is a times
-log Phi(a); and g' = exp(a^2/2) (a (-log Phi(a)) - h(a)).) For a < 0 the bound at max(a, 0), with g read as
-log Phi(a_0) when a_0 < 0, holds as well. Classes so far down that all of them together are `_NEGLIGIBLE` are left
out; with a small epsilon hardly any others remain.

Elsewhere noise is counted, not drawn: a pure function of (seed, row, class, sample), without host synchronisation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from topk.losses.room import finite_or_zero, row_chunks, wide_type

HEAD = 96
"""The least number of classes of a row that are drawn plainly, unless fewer are enough."""

_BLOCK = 16  # intervals searched together
_PROBES = 8  # rows looked at to choose the head
_NEGLIGIBLE = 1e-12  # expected number of points a row that are not looked for
_CHUNK = 2**18  # noised scores worked on at a time on the CPU
_COUNTED_CHUNK = 2**24  # and elsewhere
_ROUNDING = 1e-4  # added to the bounds' logarithms, so that they stay bounds in float32
_WORD = 0xFFFFFFFF


def sampled_order(
    scores: Tensor, seeds: Tensor, ks: list[int], epsilon: float, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The max(ks) + 1 largest scores, the mean noised x_[k+1] less their `centre` (rows, ks), its classes.

    The classes (rows, samples, ks) are indices. Each of the groups of rows restarts from its own seed.
    """
    depth = max(ks) + 1
    size = scores.shape[0] // seeds.shape[0]
    parts = [(scores[:0, :depth], scores.new_empty((samples, 0, depth)), seeds.new_empty((samples, 0, depth)))]
    for seed, group in zip(seeds, scores.split(size) if size else (), strict=False):
        if scores.is_cpu:
            generator = torch.Generator().manual_seed(int(seed))
            head = head_size(group, depth, epsilon)
            chunks = row_chunks(size, max(scores.shape[1], samples * head), _CHUNK)
            parts += [_drawn(group[rows], generator, head, depth, epsilon, samples) for rows in chunks]
        else:
            chunks = row_chunks(size, scores.shape[1] * samples, _COUNTED_CHUNK)
            parts += [_counted(group[rows], seed, rows.start, depth, epsilon, samples) for rows in chunks]
    order, value, index = (
        torch.cat(column, dim) for column, dim in zip(zip(*parts, strict=True), (0, 1, 1), strict=True)
    )
    rise = torch.stack([value[:, :, k].mean(0, dtype=wide_type(scores)) for k in ks], 1)
    return order, rise, torch.stack([index[:, :, k].T for k in ks], 2)


def centre(order: Tensor) -> Tensor:
    """A finite score close to the ones that matter: differences from it keep their digits."""
    deepest = order[:, -1]
    return torch.where(deepest.isfinite(), deepest, finite_or_zero(order[:, 0]))


def head_size(scores: Tensor, depth: int, epsilon: float) -> int:
    """How many classes of a row to draw plainly: all of them where that is not much more work.

    Fewer are enough where the scores fall off quickly in units of epsilon; as many as 1/64 of the classes torch.topk
    finds in half the time. What is chosen depends on the scores alone, not on the noise, or it would bias the result.
    """
    rows, classes = scores.shape
    head, few = max(HEAD, 4 * depth), classes // 64
    if classes <= 4 * head:
        return classes
    if not 2 * depth <= few < head:
        return head
    probe = scores[:: max(1, rows // _PROBES)].topk(few, dim=1).values
    fall = (probe[:, depth - 1] - probe[:, -1]).nanmedian()
    return few if bool(fall > epsilon) else head


# --- drawn noise, on the CPU -----------------------------------------------------------------------------------------


def _drawn(
    scores: Tensor, generator: torch.Generator, head: int, depth: int, epsilon: float, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest scores (rows, depth); the largest noised ones less `centre`, their classes (samples, rows, depth)."""
    top, place = scores.topk(head, dim=1, sorted=False)
    order = top.topk(depth, dim=1).values
    middle = centre(order)
    noised = torch.randn((samples, *top.shape), generator=generator, dtype=scores.dtype)
    noised.mul_(epsilon).add_(top - middle[:, None])
    value, slot = noised.topk(depth, dim=2)
    index = place.expand(samples, *place.shape).gather(2, slot)
    if head == scores.shape[1]:
        return order, value, index
    return order, *_let_in(scores - middle[:, None], top.amin(1) - middle, place, value, index, generator, epsilon)


def _let_in(
    scores: Tensor,
    least: Tensor,
    place: Tensor,
    value: Tensor,
    index: Tensor,
    generator: torch.Generator,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Merges the head's order statistics with the classes outside `place` that exceed them in some sample.

    `least` is the head's smallest score; like `scores` and `value` it is less `centre`.
    """
    samples, rows, _ = value.shape
    lowest = value[:, :, -1].amin(0)
    reach = epsilon * math.sqrt(2.0 * math.log(samples * scores.shape[1] / _NEGLIGIBLE))
    others = (scores > (lowest - reach)[:, None]).scatter_(1, place, False)
    within_reach = int(others.sum())
    if within_reach == 0:
        return value, index
    nearest = (lowest - least).to(torch.float64) / epsilon
    highest = (-torch.special.log_ndtr(nearest)).log() + nearest.clamp(min=0.0).square() / 2 + _ROUNDING
    highest = highest.to(scores.dtype).nan_to_num_(nan=-torch.inf)  # a row that is broken anyway
    if within_reach < scores.numel() // 8:
        cells = others.flatten().nonzero().squeeze(1)
        row = cells // scores.shape[1]
        depths = (scores.flatten()[cells] - lowest[row]).div_(math.sqrt(2.0) * epsilon).clamp_(max=0.0)
        lengths = torch.addcmul(highest[row], depths, depths, value=-1.0).exp_()
        sample, interval, distance = _first_points(lengths, samples, generator)
        cell = cells[interval]
    else:
        depths = (scores - lowest[:, None]).div_(math.sqrt(2.0) * epsilon).clamp_(max=0.0)
        lengths = torch.addcmul(highest[:, None], depths, depths, value=-1.0, out=depths).exp_()
        lengths.masked_fill_(others.logical_not_(), 0.0)
        sample, cell, distance = _first_points(lengths.flatten(), samples, generator)
    row = cell // scores.shape[1]
    # -log Phi(z) = distance, in the upper tail.
    noise = torch.special.ndtri(-torch.expm1(-distance)).neg_()
    noised = scores.flatten()[cell].add_(noise.to(scores.dtype), alpha=epsilon)
    return _merged(value, index, noised, cell - row * scores.shape[1], sample * rows + row)


def _merged(value: Tensor, index: Tensor, noised: Tensor, classes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The order statistics once more, with further classes of the groups, which are listed in ascending order."""
    samples, rows, depth = value.shape
    counting = (noised > value[:, :, -1].flatten()[group]).nonzero().squeeze(1)
    noised, classes, group = noised[counting], classes[counting], group[counting]
    sizes = torch.bincount(group, minlength=samples * rows)
    slot = torch.arange(group.shape[0]) - (sizes.cumsum(0) - sizes)[group]
    values = value.new_full((samples * rows, depth + int(sizes.max())), -torch.inf)
    indices = index.new_zeros(values.shape)
    values[:, :depth], indices[:, :depth] = value.flatten(0, 1), index.flatten(0, 1)
    values[group, depth + slot], indices[group, depth + slot] = noised, classes
    best, slot = values.topk(depth, dim=1)
    return best.view(value.shape), indices.gather(1, slot).view(value.shape)


def _first_points(lengths: Tensor, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A Poisson process of unit rate on `samples` copies of the intervals: each interval's first point.

    Returns the copy, the interval and the distance from its start, in the order of the line.
    """
    blocks = pad(lengths, (0, -lengths.shape[0] % _BLOCK)).view(-1, _BLOCK)
    sizes = blocks.sum(1, dtype=torch.float64)
    ends = sizes.cumsum(0)
    total = ends[-1]
    count = int(torch.poisson(total * samples, generator=generator))
    gaps = torch.empty(count + 1, dtype=torch.float64).exponential_(generator=generator)
    spots = gaps.cumsum(0)
    spots = spots[:-1] * (samples * total / spots[-1])
    copy = (spots / total).long().clamp_(max=samples - 1)
    spots = torch.addcmul(spots, copy, total, value=-1.0)
    block = torch.searchsorted(ends, spots, right=True).clamp_(max=ends.shape[0] - 1)
    spots = spots - (ends[block] - sizes[block])
    ends = blocks.index_select(0, block).cumsum(1, dtype=torch.float64)
    interval = (ends <= spots[:, None]).sum(1).clamp_(max=_BLOCK - 1)
    ends = ends.gather(1, interval[:, None]).squeeze(1)
    interval += block * _BLOCK
    distance = spots - (ends - blocks.flatten()[interval])
    key = copy * blocks.numel() + interval
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    first &= blocks.flatten()[interval] > 0  # rounding at a block's end
    chosen = first.nonzero().squeeze(1)
    return copy[chosen], interval[chosen], distance[chosen].clamp_(min=1e-14)


# --- counted noise, on other devices ---------------------------------------------------------------------------------


def _counted(
    scores: Tensor, seed: Tensor, first_row: int, depth: int, epsilon: float, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_drawn`, from noise that depends on nothing but the seed and the place; every class is noised."""
    order = scores.topk(depth, dim=1).values
    noise = counted_normals(seed, first_row, scores.shape[0], scores.shape[1], samples).to(scores.dtype)
    value, index = noise.mul_(epsilon).add_(scores - centre(order)[:, None]).topk(depth, dim=2)
    return order, value, index


def counted_normals(seed: Tensor, first_row: int, rows: int, classes: int, samples: int) -> Tensor:
    """Normals (samples, rows, classes) by Philox 4x32-10 and Box-Muller, in float32.

    The key is the seed's low and high 32 bits, the counter (class, row, samples // 4, 0); of its four words the first
    two make the normals of samples 0 and 1 (mod 4), the other two those of 2 and 3.
    """
    device = seed.device
    block = torch.arange((samples + 3) // 4, device=device)[:, None, None]
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    column = torch.arange(classes, device=device)
    shape = (block.shape[0], rows, classes)
    words = [column.expand(shape), row.expand(shape), block.expand(shape), torch.zeros_like(block).expand(shape)]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(10):
        left, right = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        high_left, high_right = (left >> 32) & _WORD, (right >> 32) & _WORD
        words = [high_right ^ words[1] ^ key[0], right & _WORD, high_left ^ words[3] ^ key[1], left & _WORD]
        key = [(key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD]
    normals = []
    for one, other in ((words[0], words[1]), (words[2], words[3])):
        radius = ((one.float() + 0.5) * 2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = other.float() * (2.0 * math.pi * 2.0**-32)
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, 1).flatten(0, 1)[:samples]
