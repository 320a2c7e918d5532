"""The expected order statistic E[(x + epsilon Z)_[k+1]] by quadrature (book, chapters 7 and 10).

In units of epsilon, and from a centre, let z be the scores and F(v) = Pr[at most k of the z_i + Z_i exceed v], a sum
over a Poisson-binomial distribution with probabilities P_i(v) = Phi(z_i - v). For any c,

    E = c + integral of (1{v > c} - F(v)) dv,        dE / dz_i = integral of Pr[S without i = k] phi(z_i - v) dv.

Both integrands are smooth but for the step at c, and die off like a normal tail, so the trapezoid rule converges
faster than any power; with c half-way between two nodes it integrates the step exactly. The grid is
c + s/16 * 7 * (j + 1/2), from -7 s below to 8.75 s above: c solves sum P_i = k + 1/2, so that it is near the median,
and s = sqrt(sum P (1 - P)) / sum phi is about the standard deviation, the slower tail being above. The grid moves with
the scores, but E does not depend on it, so that the gradient is taken with the grid held.

A class whose P is below 1e-13 at every node is out of reach and left out where that saves work (on the CPU).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from topk._cpu import row_chunks, squares
from topk.losses import polynomials
from topk.losses.common import finite_or_zero, row_dtype
from topk.tails import Every, Slice, Sum, Tail, Talk

STEPS = tuple(j + 0.5 for j in range(-16, 20))
"""Where the nodes are, in units of their spacing, from c."""

_SPACING = 7.0 / 16.0  # of the nodes, in units of s
_ROOT_STEPS = 5
_OUT_OF_REACH = 7.35  # Phi(-7.35) = 1e-13
_LANES = 2**13  # polynomials advanced together by one step of the recursion
_CHUNK = 2**20  # probabilities worked on at a time


def grid(
    z: Tensor,  # (rows, classes), the (k+1)-th largest at 0
    k: int,
) -> tuple[Tensor, Tensor]:
    """c and the spacing (rows,): safeguarded Newton steps on the logarithm of sum P.

    Any c and s near the ones defined do, for E does not depend on them.
    """
    found = _start(torch.zeros_like(z[:, 0], dtype=row_dtype(z)), k, z.shape[1])
    for _ in range(_ROOT_STEPS):
        found = _towards(found, k, *_moments(z, found[0]))
    return found[0], _spacing(*_moments(z, found[0]))


_Bracket = tuple[Tensor, Tensor, Tensor]  # c, or where it is looked for next, between two bounds


def _start(middle: Tensor, k: int, classes: int) -> _Bracket:
    low = -torch.special.ndtri(torch.full_like(middle, (k + 0.5) / (k + 1)))
    return middle, low, -torch.special.ndtri(torch.full_like(middle, 0.5 / (classes - k)))


def _towards(found: _Bracket, k: int, total: Tensor, variance: Tensor, density: Tensor) -> _Bracket:
    """One step."""
    (middle, low, high), goal = found, k + 0.5
    low, high = torch.where(total > goal, middle, low), torch.where(total < goal, middle, high)
    step = middle + total / density * (total / goal).log()
    return torch.where((step >= low) & (step <= high), step, (low + high) / 2), low, high


def _spacing(total: Tensor, variance: Tensor, density: Tensor) -> Tensor:
    spread = variance.sqrt() / density
    return _SPACING * torch.where(spread.isfinite() & (spread > 0), spread, 1.0)


def _moments(z: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum P, sum P (1 - P) and sum phi (rows,) at one level a row."""
    distance = (level.to(z.dtype)[:, None] - z).mul_(math.sqrt(0.5))
    probability = distance.erfc().mul_(0.5)
    total = probability.sum(1).to(level.dtype)
    variance = total - squares(probability).to(level.dtype)
    density = distance.square_().neg_().exp_().sum(1).to(level.dtype) / math.sqrt(2 * math.pi)
    return total, variance, density


def expected_order(
    scores: Tensor,  # (rows, classes)
    order: Tensor,  # (rows, depth): the largest scores, in order
    centre: Tensor,  # (rows, ks): x_[k+1], or 0 where it is not finite
    ks: list[int],
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """E[(x + epsilon Z)_[k+1]] - centre (rows, ks), -inf where absent; the grids (rows, ks, 3): centre, c, spacing."""
    rows, classes = scores.shape
    rise = scores.new_empty((rows, len(ks)), dtype=row_dtype(scores))
    grids = scores.new_zeros((rows, len(ks), 3), dtype=rise.dtype)
    grids[:, :, 0] = centre
    for here in row_chunks(rows, classes * len(STEPS), _CHUNK):
        for place, k in enumerate(ks):
            z = (scores[here] - centre[here, place, None]) / epsilon
            middle, spacing = grid(z, k)
            nodes = _nodes(middle, spacing)
            near = _within_reach(z, nodes)[0]
            under = _success_counts(near, nodes, k).sum(0).view(nodes.shape)  # F at the nodes
            rise[here, place] = epsilon * _risen(middle, spacing, under)
            grids[here, place, 1:] = torch.stack((middle, spacing), 1)
    return rise.masked_fill(order[:, ks] == -torch.inf, -torch.inf), grids


def _risen(middle: Tensor, spacing: Tensor, under: Tensor) -> Tensor:
    """E (rows,) in units of epsilon, from F at the nodes (rows, nodes)."""
    above = torch.tensor(STEPS, device=under.device) > 0
    return middle + spacing * (above.to(under.dtype) - under).sum(1)


def _nodes(middle: Tensor, spacing: Tensor) -> Tensor:
    return middle[:, None] + spacing[:, None] * torch.tensor(STEPS, dtype=middle.dtype, device=middle.device)


def _within_reach(z: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scores that matter at some node, and their classes; None for all of them."""
    if not z.is_cpu:
        return z, None
    count = int((z > (nodes[:, :1] - _OUT_OF_REACH).to(z.dtype)).sum(1).amax(0)) if z.shape[0] else 0
    if 2 * count > z.shape[1]:
        return z, None
    near = z.topk(max(1, count), dim=1)
    return near.values, near.indices


def _distances(z: Tensor, nodes: Tensor) -> Tensor:
    """v - z for z (..., rows) and nodes (rows, nodes)."""
    return nodes.to(z.dtype) - z.contiguous()[..., None]


def _probabilities(z: Tensor, nodes: Tensor) -> Tensor:
    """Phi(z - v), (..., rows times nodes)."""
    return _distances(z, nodes).mul_(math.sqrt(0.5)).erfc_().mul_(0.5).flatten(-2)


def _success_counts(z: Tensor, nodes: Tensor, k: int) -> Tensor:
    """Pr[S = j] for j = 0..k at every node (k + 1, rows times nodes)."""
    rows, classes = z.shape
    lanes = min(max(1, _LANES // max(1, nodes.numel())), max(1, classes // (4 * (k + 1))))
    steps = -(-classes // lanes)
    padded = torch.nn.functional.pad(z, (0, lanes * steps - classes), value=-torch.inf)
    trials = _probabilities(padded.view(rows, lanes, steps).permute(2, 1, 0), nodes)
    return polynomials.success_counts(trials, k, row_dtype(z))


def expected_order_gradient(
    result: Tensor,
    push: Tensor,
    scores: Tensor,
    grids: Tensor,
    k: int,
    epsilon: float,
    others: Tensor | None = None,  # (rows, k + 1, nodes): Pr[S = j], j = 0..k, over classes that are not here
) -> None:
    """Adds push * dE / dx to `result`, a sum over the nodes of phi(z_i - v) Pr[S without i = k]."""
    rows, classes = scores.shape
    limit = min(classes, _upper_limit(k))
    for here in row_chunks(rows, len(STEPS) * max(classes, limit * (k + 1) // 2), _CHUNK):
        centre, middle, spacing = grids[here].unbind(1)
        nodes = _nodes(middle, spacing)
        z, index = _within_reach((scores[here] - centre.to(scores.dtype)[:, None]) / epsilon, nodes)
        beyond = None if others is None else others[here].movedim(1, 0).flatten(1)
        field = _inclusion_integral(z, nodes, k, limit, beyond)
        field = (field.to(push.dtype) * (push[here] * spacing)[:, None]).to(result.dtype)
        field = field.masked_fill((push[here] == 0)[:, None], 0.0)
        if index is None:
            result[here] += field
        else:
            result[here].scatter_add_(1, index, field)


def _upper_limit(k: int) -> int:
    """With P > 1/2 for more classes than this, Pr[S <= k] < 1e-13: such nodes contribute nothing."""
    return int(2 * k + 16 * math.sqrt(k) + 60)


def _inclusion_integral(z: Tensor, nodes: Tensor, k: int, limit: int, others: Tensor | None) -> Tensor:
    """sum over nodes of phi(z_i - v) Pr[S without i = k] (rows, classes).

    The classes with P > 1/2 at the lowest node are the head: they are left out by prefixes and suffixes. A class of
    the tail is divided out of the product, g_j = f_j / (1 - P) - w g_{j-1} with w = P / (1 - P) <= 1, which does not
    amplify errors.
    """
    rows, classes = z.shape
    size = min(limit, classes)
    if z.is_cpu and rows:
        size = min(size, int((z > nodes[:, :1].to(z.dtype)).sum(1).amax(0)))
    head, index = z.topk(size, dim=1)
    without_head = z.scatter(1, index, -torch.inf)
    tail = _success_counts(without_head, nodes, k)
    tail = tail if others is None else polynomials.product(tail, others)
    full, at_head = _leave_one_out(_probabilities(head.T, nodes).to(tail.dtype), tail)
    odds = _probabilities(without_head.T, nodes).clamp_(max=0.5)
    odds.div_(1.0 - odds)
    coefficients = full.to(z.dtype)
    left_out = coefficients[0].expand_as(odds).clone()
    for coefficient in coefficients[1:]:
        torch.addcmul(coefficient, odds, left_out, value=-1.0, out=left_out)
    left_out.mul_(odds.add_(1.0)).mul_(_densities(z.T, nodes))
    integral = left_out.view(classes, *nodes.shape).sum(2).T.contiguous()
    at_head = at_head.to(z.dtype).mul_(_densities(head.T, nodes)).view(size, *nodes.shape).sum(2)
    return integral.scatter_(1, index, at_head.T)


def _densities(z: Tensor, nodes: Tensor) -> Tensor:
    """phi(z - v), laid out like `_probabilities`."""
    return _distances(z, nodes).square_().mul_(-0.5).exp_().mul_(1.0 / math.sqrt(2 * math.pi)).flatten(-2)


def _leave_one_out(head: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Pr[S = j], j = 0..k, and for every class of the head (size, ...) Pr[S without it = k]: only positive numbers."""
    now = torch.zeros_like(tail)
    now[0] = 1.0
    prefixes = [now]
    for trial in head[:-1]:
        prefixes.append(_with_trial(prefixes[-1], trial))
    now = tail
    left_out = torch.empty_like(head)
    for i in range(head.shape[0] - 1, -1, -1):
        left_out[i] = (prefixes[i] * now.flip(0)).sum(0)
        now = _with_trial(now, head[i])
    return now, left_out


def _with_trial(counts: Tensor, trial: Tensor) -> Tensor:
    """Pr[S = j] with one more trial."""
    longer = counts * (1.0 - trial)
    longer[1:].addcmul_(counts[:-1], trial)
    return longer


# --- classes spread over processes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpectedOrder(Tail):
    """E - x_[k+1] over all classes. The slices' sums give one grid, and at its nodes their counts multiply."""

    k: int
    epsilon: float
    rank: int = 0  # the shift is not used
    whole: ClassVar[bool] = True

    def talk(self, part: Slice) -> Talk:
        """Six sums of three numbers, then k + 1 chances a node; E - centre, the grid, the others' chances."""
        rows, k = part.scores.shape[0], self.k
        centre = finite_or_zero(part.values.topk(k + 1, dim=1).values[:, -1])
        found = _start(torch.zeros_like(centre, dtype=row_dtype(centre)), k, part.shard.total)
        for _ in range(_ROOT_STEPS):
            found = _towards(found, k, *(yield Sum(self._sums(part.scores, centre, found[0]))))
        middle, spacing = found[0], _spacing(*(yield Sum(self._sums(part.scores, centre, found[0]))))
        every = yield Every(self._chances(part.scores, centre, middle, spacing).flatten(0, 1))
        shape = (k + 1, len(STEPS) * rows)
        nothing = torch.zeros_like(every[0]).view(shape)
        nothing[0] = 1.0
        full = others = nothing
        for process, each in enumerate(every):
            full = polynomials.product(full, each.view(shape))
            others = others if process == part.shard.process else polynomials.product(others, each.view(shape))
        rise = self.epsilon * _risen(middle, spacing, full.sum(0).view(len(STEPS), rows).T)
        return torch.cat(
            (torch.stack((rise, centre.to(rise.dtype), middle, spacing)), others.view((k + 1) * len(STEPS), rows))
        )

    def _scaled(self, scores: Tensor, centre: Tensor, width: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of rows, and their scores in units of epsilon; nothing of an empty slice."""
        rows, classes = scores.shape
        for here in row_chunks(rows, classes * width, _CHUNK) if classes else ():
            yield here, (scores[here] - centre[here, None]) / self.epsilon

    def _sums(self, scores: Tensor, centre: Tensor, level: Tensor) -> Tensor:
        """`_moments` of the slice (3, rows)."""
        sums = torch.zeros((3, scores.shape[0]), dtype=level.dtype, device=level.device)
        for here, z in self._scaled(scores, centre):
            sums[:, here] = torch.stack(_moments(z, level[here]))
        return sums

    def _chances(self, scores: Tensor, centre: Tensor, middle: Tensor, spacing: Tensor) -> Tensor:
        """Pr[S = j] of the slice, j = 0..k (k + 1, nodes, rows)."""
        counts = middle.new_zeros((self.k + 1, len(STEPS), scores.shape[0]))
        counts[0] = 1.0
        for here, z in self._scaled(scores, centre, len(STEPS)):
            nodes = _nodes(middle[here], spacing[here])
            found = _success_counts(_within_reach(z, nodes)[0], nodes, self.k)
            counts[:, :, here] = found.view(self.k + 1, *nodes.shape).movedim(2, 1)
        return counts

    def kept(self, slopes: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The slope in E; the grid and the others' chances."""
        return slopes[:1], numbers[1:]

    def add_field(self, result: Tensor, scores: Tensor, shift: Tensor, slopes: Tensor, settings: Tensor) -> None:
        """By the quadrature on this grid."""
        if scores.shape[1]:
            others = settings[:, 3:].unflatten(1, (self.k + 1, -1))
            wide = scores.to(result.dtype)
            expected_order_gradient(result, slopes[:, 0], wide, settings[:, :3], self.k, self.epsilon, others)
