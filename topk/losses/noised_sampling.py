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
-log Phi(a_0) when a_0 < 0, holds as well. Where even -log Phi(a_0) for every class makes few points, as when epsilon
is small, that is b, and no class need be looked at but those with a point.

Elsewhere noise is counted, not drawn: a pure function of (seed, row, class, sample), without host synchronisation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from topk._cpu import CHUNK, largest, row_chunks
from topk.losses.common import finite_or_zero

HEAD = 96
"""The least number of classes of a row that are drawn plainly, unless fewer are enough."""

_SMALLER_HEADS = ((4.0, 0), (1.5, 48))  # where the scores fall so far, in units of epsilon, over 4 depth of them
_BLOCK = 8  # intervals searched together
_PROBES = 4  # rows looked at to choose the head
_FAR_APART = 1e4  # in units of epsilon: where noise no longer tells which of the levels it is added to
_FEW_POINTS = 1 / 32  # a score, below which equal intervals do
_COUNTED_CHUNK = 2**24  # noised scores worked on at a time on other devices
_ROUNDING = 1e-4  # added to the bounds' logarithms, so that they stay bounds in float32
_WORD = 0xFFFFFFFF


class Draws(NamedTuple):
    """What the samples of the noise say of x_[k+1]; differences from the centre keep their digits."""

    best: Tensor  # (rows,): the largest score, without noise
    centre: Tensor  # (rows, ks): a score near x_[k+1], finite
    noised: Tensor  # (rows, samples, ks): the (k+1)-th largest noised score, less the centre
    classes: Tensor  # (rows, samples, ks): whose it is


def draw(
    scores: Tensor,  # (rows, classes)
    seeds: Tensor,  # (groups,): as many equal groups of rows start from their own
    ks: list[int],
    epsilon: float,
    samples: int,
) -> Draws:
    """All k share the noise, but where float32 would lose it between their levels (looked for on the CPU)."""
    if scores.is_cpu and len(ks) > 1 and _far_apart(scores, ks, epsilon):
        apart = [draw(scores, seeds, [k], epsilon, samples) for k in ks]
        columns = list(zip(*apart, strict=True))
        return Draws(apart[0].best, *(torch.cat(column, -1) for column in columns[1:]))
    depth = max(ks) + 1
    size = scores.shape[0] // seeds.shape[0]
    nothing = scores.new_empty((samples, 0, depth))
    parts = [] if size else [(scores[:, 0], scores[:, 0], nothing, nothing.long())]
    for seed, group in zip(seeds, scores.split(size) if size else (), strict=False):
        if scores.is_cpu:
            generator = torch.Generator().manual_seed(int(seed))
            head = head_size(group, depth, epsilon)
            chunks = row_chunks(size, max(scores.shape[1], samples * head), CHUNK)
            parts += [_drawn(group[rows], generator, head, depth, epsilon, samples) for rows in chunks]
        else:
            chunks = row_chunks(size, scores.shape[1] * samples, _COUNTED_CHUNK)
            parts += [_counted(group[rows], seed, rows.start, depth, epsilon, samples) for rows in chunks]
    best, centre, value, index = (
        column[0] if len(column) == 1 else torch.cat(column, dim)
        for column, dim in zip(zip(*parts, strict=True), (0, 0, 1, 1), strict=True)
    )
    noised, classes = (torch.stack([part[:, :, k].T for k in ks], 2) for part in (value, index))
    return Draws(best, centre[:, None].expand(-1, len(ks)), noised, classes)


def _far_apart(scores: Tensor, ks: list[int], epsilon: float) -> bool:
    """Whether the levels of some row are: for certain not, and that is cheap to see, where all scores are close."""
    if scores.numel() == 0 or float(torch.sub(*scores.aminmax()[::-1])) <= _FAR_APART * epsilon:
        return False
    order = largest(scores, max(ks) + 1)[0].to(torch.float64)
    apart = order[:, min(ks)] - order[:, max(ks)]
    return bool(((apart > _FAR_APART * epsilon) & (apart < torch.inf)).any())


def head_size(scores: Tensor, depth: int, epsilon: float) -> int:
    """How many classes of a row to draw plainly: all of them where that is not much more work.

    Few are enough where the scores fall off quickly in units of epsilon. What is chosen depends on the scores alone,
    not on the noise, or it would bias the result.
    """
    rows, classes = scores.shape
    few = 4 * depth
    head = max(HEAD, few)
    if classes <= 4 * head:
        return classes
    probe = scores[:: max(1, rows // _PROBES)].topk(few, dim=1).values
    fall = float((probe[:, depth - 1] - probe[:, -1]).nanmedian())
    return next((max(size, few) for steep, size in _SMALLER_HEADS if fall > steep * epsilon), head)


# --- drawn noise, on the CPU -----------------------------------------------------------------------------------------


def _drawn(
    scores: Tensor, generator: torch.Generator, head: int, depth: int, epsilon: float, samples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest score, centre (rows,), largest noised scores less it, and their classes (samples, rows, depth)."""
    top, place = largest(scores, head)
    middle = finite_or_zero(top[:, depth - 1])
    noised = torch.randn((samples, *top.shape), generator=generator, dtype=scores.dtype, device=scores.device)
    noised.mul_(epsilon).add_(top - middle[:, None])
    value, slot = noised.topk(depth, dim=2)
    index = place.expand(samples, *place.shape).gather(2, slot)
    if head < scores.shape[1]:
        found = _outside(scores, place, top[:, -1], middle, value, generator, epsilon)
        value, index = _merged(value, index, *found) if found[0].numel() else (value, index)
    return top[:, 0], middle, value, index


def _outside(
    scores: Tensor,
    place: Tensor,
    least: Tensor,
    middle: Tensor,
    value: Tensor,
    generator: torch.Generator,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noised score less `middle`, class and sample * rows + row, ascending, of all outside the head that count.

    The head's classes are `place`, its smallest score is `least`, and its largest noised scores are `value`.
    """
    samples, (rows, classes) = value.shape[0], scores.shape
    lowest = value[:, :, -1].amin(0)
    nearest = (lowest - (least - middle)).to(torch.float64) / epsilon
    # In a row that is broken, or has nothing outside its head, this is NaN or 0.
    longest = torch.special.log_ndtr(nearest).neg_().nan_to_num_(nan=0.0)
    if float(longest.sum()) * samples < _FEW_POINTS * rows:
        sample, row, spot = _points(longest * classes, samples, generator)
        if row.numel() == 0:
            return scores[0, :0], row, row
        length = longest[row]
        column = (spot / length).long().clamp_(max=classes - 1)
        distance = spot.sub_(column * length)
        counting = (place[row] != column[:, None]).all(1)
    else:
        depths = scores.sub(middle[:, None]).sub_(lowest[:, None]).div_(math.sqrt(2.0) * epsilon).clamp_(max=0.0)
        highest = (longest.log() + nearest.clamp(min=0.0).square() / 2 + _ROUNDING).nan_to_num_(nan=-torch.inf)
        lengths = torch.addcmul(highest.to(scores.dtype)[:, None], depths, depths, value=-1.0, out=depths).exp_()
        lengths.scatter_(1, place, 0.0)
        if bool((longest == 0.0).any()):
            lengths.masked_fill_((longest == 0.0)[:, None], 0.0)
        sample, cell, distance, counting = _points_of_intervals(lengths.flatten(), samples, generator)
        row = cell // classes
        column = cell - row * classes
    group = sample * rows + row
    key = group * classes + column
    counting[1:] &= key[1:] != key[:-1]  # the first point of an interval is the class's noise
    # -log Phi(z) = distance, in the upper tail.
    noise = torch.special.ndtri(torch.expm1(-distance.clamp_(min=1e-14)).neg_()).to(scores.dtype)
    noised = (scores[row, column] - middle[row]).sub_(noise, alpha=epsilon)
    counting &= noised > value[:, :, -1].flatten()[group]
    chosen = counting.nonzero().squeeze(1)
    return noised[chosen], column[chosen], group[chosen]


def _points(sizes: Tensor, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A Poisson process of unit rate on `samples` copies of consecutive stretches of these sizes.

    Returns every point's copy, its stretch and its distance from the stretch's start, in the order of the line.
    """
    ends = sizes.cumsum(0)
    total = float(ends[-1])
    count = int(torch.poisson(ends[-1:] * samples, generator=generator))
    spots = ends.new_empty(count + 1).exponential_(generator=generator).cumsum_(0)
    spots = spots[:-1] * (samples * total / float(spots[-1]))
    copy = (spots / total).long().clamp_(max=samples - 1) if total > 0.0 else spots.long()
    spots.sub_(copy, alpha=total)
    stretch = torch.searchsorted(ends, spots, right=True).clamp_(max=ends.shape[0] - 1)
    return copy, stretch, spots.sub_(ends[stretch]).add_(sizes[stretch])


def _points_of_intervals(
    lengths: Tensor, samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copy, interval and distance from its start, and whether that is right: rounding may miss a block's end."""
    short = -lengths.shape[0] % _BLOCK
    blocks = (pad(lengths, (0, short)) if short else lengths).view(-1, _BLOCK)
    copy, block, spot = _points(blocks.sum(1, dtype=torch.float64), samples, generator)
    inside = blocks.index_select(0, block)
    ends = inside.cumsum(1, dtype=torch.float64)
    interval = (ends <= spot[:, None]).sum(1, keepdim=True).clamp_(max=_BLOCK - 1)
    length = inside.gather(1, interval).squeeze(1)
    distance = spot - (ends.gather(1, interval).squeeze(1) - length)
    return copy, interval.squeeze(1) + block * _BLOCK, distance, length > 0


def _merged(value: Tensor, index: Tensor, noised: Tensor, column: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The order statistics once more, with further noised scores, listed in ascending order of their group."""
    samples, rows, depth = value.shape
    sizes = torch.bincount(group, minlength=samples * rows)
    slot = torch.arange(group.shape[0], device=group.device) - (sizes.cumsum(0) - sizes)[group]
    values = value.new_full((samples * rows, depth + int(sizes.max())), -torch.inf)
    indices = index.new_zeros(values.shape)
    values[:, :depth], indices[:, :depth] = value.flatten(0, 1), index.flatten(0, 1)
    values[group, depth + slot], indices[group, depth + slot] = noised, column
    best, slot = values.topk(depth, dim=1)
    return best.view(value.shape), indices.gather(1, slot).view(value.shape)


# --- counted noise, on other devices ---------------------------------------------------------------------------------


def _counted(
    scores: Tensor, seed: Tensor, first_row: int, depth: int, epsilon: float, samples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_drawn`, from noise that depends on nothing but the seed and the place; every class is noised."""
    order = scores.topk(depth, dim=1).values
    middle = finite_or_zero(order[:, -1])
    noise = counted_normals(seed, first_row, scores.shape[0], scores.shape[1], samples).to(scores.dtype)
    value, index = noise.mul_(epsilon).add_(scores - middle[:, None]).topk(depth, dim=2)
    return order[:, 0], middle, value, index


def counted_normals(
    seed: Tensor, first_row: int, rows: int, classes: int, samples: int, first_class: int = 0
) -> Tensor:
    """Normals (samples, rows, classes) by Philox 4x32-10 and Box-Muller, in float32.

    The key is the seed's low and high 32 bits, the counter (class, row, samples // 4, 0); of its four words the first
    two make the normals of samples 0 and 1 (mod 4), the other two those of 2 and 3.
    """
    device = seed.device
    block = torch.arange((samples + 3) // 4, device=device)[:, None, None]
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    column = torch.arange(first_class, first_class + classes, device=device)
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
