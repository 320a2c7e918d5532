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
-log Phi(a_0) when a_0 < 0, holds as well. Where all the intervals of a row together are shorter than `_NEGLIGIBLE`
nothing is done: with a small epsilon the head is all there is.

Elsewhere noise is counted, not drawn: a pure function of (seed, row, class, sample), without host synchronisation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from topk.losses.room import finite_or_zero, row_chunks, wide_type

HEAD = 64
"""The least number of classes of a row that are drawn plainly."""

_NEGLIGIBLE = 1e-12  # expected number of points a row that are not worth looking for
_CHUNK = 2**18  # noised scores worked on at a time on the CPU
_COUNTED_CHUNK = 2**24  # and elsewhere
_ROUNDING = 1.0001  # what the bounds in float32 are lengthened by, so that they stay bounds
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
            cost = max(scores.shape[1], samples * head_size(depth, scores.shape[1]))
            chunks = row_chunks(size, cost, _CHUNK)
            parts += [_drawn(group[rows], generator, depth, epsilon, samples) for rows in chunks]
        else:
            chunks = row_chunks(size, scores.shape[1] * samples, _COUNTED_CHUNK)
            parts += [_counted(group[rows], seed, rows.start, depth, epsilon, samples) for rows in chunks]
    order = torch.cat([part[0] for part in parts])
    value = torch.cat([part[1][:, :, ks] for part in parts], 1)
    index = torch.cat([part[2][:, :, ks] for part in parts], 1)
    return order, value.mean(0, dtype=wide_type(scores)), index.transpose(0, 1).contiguous()


def centre(order: Tensor) -> Tensor:
    """A finite score close to the ones that matter: differences from it keep their digits."""
    deepest = order[:, -1]
    return torch.where(deepest.isfinite(), deepest, finite_or_zero(order[:, 0]))


def head_size(depth: int, classes: int) -> int:
    """How many classes of a row are drawn plainly: all of them where that is not much more work."""
    head = max(HEAD, 4 * depth)
    return head if classes > 4 * head else classes


# --- drawn noise, on the CPU -----------------------------------------------------------------------------------------


def _drawn(
    scores: Tensor, generator: torch.Generator, depth: int, epsilon: float, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest scores (rows, depth); the largest noised ones less `centre`, their classes (samples, rows, depth)."""
    rows, classes = scores.shape
    top, place = scores.topk(head_size(depth, classes), dim=1)
    order = top[:, :depth]
    middle = centre(order)
    noised = torch.randn((samples, *top.shape), generator=generator, dtype=scores.dtype)
    noised.mul_(epsilon).add_(top - middle[:, None])
    value, slot = noised.topk(depth, dim=2)
    index = place.expand(samples, *place.shape).gather(2, slot)
    if top.shape[1] == classes:
        return order, value, index
    # How far the nearest class outside the head is below the level that it would have to reach.
    lowest = value[:, :, -1].amin(0)
    nearest = (lowest - (top[:, -1] - middle)).double() / epsilon
    expected = -torch.special.log_ndtr(nearest)
    open_to_others = (expected * (samples * (classes - top.shape[1])) > _NEGLIGIBLE) & nearest.isfinite()
    chosen = open_to_others.nonzero().squeeze(1)
    if chosen.numel() == 0:
        return order, value, index
    rising = expected * (nearest.clamp(min=0.0).square() / 2).exp()
    if chosen.numel() == rows:
        return order, *_let_in(scores, place, middle, rising, value, index, generator, epsilon)
    some = (scores[chosen], place[chosen], middle[chosen], rising[chosen], value[:, chosen], index[:, chosen])
    new_value, new_index = _let_in(*some, generator, epsilon)
    return order, value.index_copy(1, chosen, new_value), index.index_copy(1, chosen, new_index)


def _let_in(
    scores: Tensor,
    place: Tensor,
    middle: Tensor,
    rising: Tensor,
    value: Tensor,
    index: Tensor,
    generator: torch.Generator,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Merges the head's order statistics with the classes outside `place` that exceed them in some sample."""
    samples, rows, depth = value.shape
    floor = value[:, :, -1]
    lengths = (scores - middle[:, None]).sub_(floor.amin(0)[:, None]).div_(epsilon)
    lengths.clamp_(max=0.0).square_().mul_(-0.5).exp_().mul_((rising * _ROUNDING).to(scores.dtype)[:, None])
    sample, cell, distance = _first_points(lengths.scatter_(1, place, 0.0).flatten(), samples, generator)
    # -log Phi(z) = distance, in the upper tail.
    noise = torch.special.ndtri(-torch.expm1(-distance)).neg_()
    row = cell // scores.shape[1]
    noised = (scores.flatten()[cell] - middle[row]).to(noise.dtype).add_(noise, alpha=epsilon).to(scores.dtype)
    group = sample * rows + row
    counting = (noised > floor.flatten()[group]).nonzero().squeeze(1)
    noised, cell, row, group = noised[counting], cell[counting], row[counting], group[counting]
    # The points come group by group, so that a place in the group is a place in the list less the group's first.
    sizes = torch.bincount(group, minlength=samples * rows)
    slot = torch.arange(group.shape[0]) - (sizes.cumsum(0) - sizes)[group] + depth
    width = depth + int(sizes.max())
    values = value.new_full((samples * rows, width), -torch.inf)
    classes = index.new_zeros((samples * rows, width))
    values[:, :depth], classes[:, :depth] = value.flatten(0, 1), index.flatten(0, 1)
    values[group, slot], classes[group, slot] = noised, cell - row * scores.shape[1]
    best, slot = values.topk(depth, dim=1)
    return best.view(value.shape), classes.gather(1, slot).view(value.shape)


def _first_points(lengths: Tensor, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A Poisson process of unit rate on `samples` copies of the intervals: each interval's first point.

    Returns the copy, the interval and the distance from its start, in the order of the line.
    """
    ends = lengths.cumsum(0, dtype=torch.float64)
    total = ends[-1]
    count = int(torch.poisson(total * samples, generator=generator))
    gaps = torch.empty(count + 1, dtype=torch.float64).exponential_(generator=generator)
    spots = gaps.cumsum(0)
    spots = spots[:-1] * (samples * total / spots[-1])
    copy = (spots / total).long().clamp_(max=samples - 1)
    spots = torch.addcmul(spots, copy, total, value=-1.0)
    interval = torch.searchsorted(ends, spots, right=True).clamp_(max=lengths.shape[0] - 1)
    distance = spots - (ends[interval] - lengths[interval])
    key = copy * lengths.shape[0] + interval
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    first &= lengths[interval] > 0  # rounding at the line's end
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
