"""Levels of the smoothed and polyhedral hinges (`topk.losses.smooth_hinge`): above which a class has a slope.

With z in falling order and S(a) the sum of clip(z_j - a, 0, height), the level is the root of S(a) = k height, a
falling function made of line segments. `levels` finds it from all scores of a row, `Level` where processes share them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topk._cpu import exponentials, squares
from topk.losses.common import not_finite_above, row_dtype, with_tail
from topk.tails import Slice, Sum, Tail, Talk

_STEPS = 64  # at most; a handful is needed
_AT_ONCE = 8


def running_sums(z: Tensor) -> Tensor:
    """The sum of the first u, u = 0, 1, ... (rows, classes + 1)."""
    return torch.nn.functional.pad(z.cumsum(1), (1, 0))


def band(z: Tensor, k: int, height: float, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """low and height (rows,) and gamma p = clip(z - low, 0, height); differentiable. z in falling order.

    variant: "beta_smooth" and "alpha_smooth" with height = gamma / k, or "fixed sum", where p sums to 1 whatever z is.
    Where sum p = 1 the height is given; alpha's, where it is less, follows from z. With u classes above the band, of
    sum a, and m within, of sum b, both are closed forms: what has to be searched for is who is where.
    """
    start, size, u, m, free = _band(z.detach(), k, height, variant).unbind(1)
    place = torch.arange(z.shape[1], device=z.device)
    beyond = place < u[:, None]
    within = (place < (u + m)[:, None]) & ~beyond
    a, b, left = torch.where(beyond, z, 0.0).sum(1), torch.where(within, z, 0.0).sum(1), k - u
    low = torch.where(m > 0.0, (b - left * height) / m.clamp(min=1.0), start)
    if variant == "beta_smooth":
        low = torch.where(free > 0.0, 0.0, low)
    if variant == "alpha_smooth":
        own = torch.where(left > 0.0, (left * b + m * a) / (m * u + left * left).clamp(min=1.0), a / k)
        below = torch.where(left > 0.0, (u * own - a) / left.clamp(min=1.0), start)
        low, size = torch.where(free > 0.0, below, low), torch.where((free > 0.0) & (size > 0.0), own, size)
    p = torch.where(beyond, size[:, None], torch.where(within, z - low[:, None], 0.0))
    return low, size, p


@torch.library.custom_op("topk::hinge_band", mutates_args=())
def _band(z: Tensor, k: int, height: float, variant: str) -> Tensor:
    """low, height, u, m, and 1 where sum p is free (rows, 5)."""
    low, size, u, free = levels(z, k, height, variant)
    if variant == "beta_smooth":
        u = torch.where(free > 0.0, (z >= height).sum(1), u)
    m = (z > low[:, None]).sum(1) - u
    return torch.stack((low, size, u.to(z.dtype), m.clamp(min=0).to(z.dtype), free), 1)


@_band.register_fake
def _(z: Tensor, k: int, height: float, variant: str) -> Tensor:
    return z.new_empty((z.shape[0], 5))


@_band.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], z: Tensor, k: int, height: float, variant: str) -> tuple[Tensor, int]:
    rows = z.movedim(in_dims[0] or 0, 0)
    return _band(rows.flatten(0, 1), k, height, variant).unflatten(0, rows.shape[:2]), 0


def levels(z: Tensor, k: int, height: float, variant: str) -> tuple[Tensor, ...]:
    """low, height, u (of beta where sum p is not free) and where sum p is free, (rows,) each."""
    sums = running_sums(z)
    low, u = low_and_cut(z, sums, k, height)
    size, free = torch.full_like(low, height), torch.zeros_like(low)
    if variant == "beta_smooth":
        free, low = (low < 0.0).to(low.dtype), low.relu()
    elif variant == "alpha_smooth":
        free = (k * low + sums.gather(1, u) - u * (low + height) < 0.0).to(low.dtype)
        rows = free.squeeze(1).nonzero().squeeze(1) if free.is_cpu else slice(None)
        if isinstance(rows, slice) or len(rows):
            found = _free_levels(z[rows], sums[rows], k)
            if isinstance(rows, slice):
                low, size, u = (torch.where(free > 0.0, *pair) for pair in zip(found, (low, size, u), strict=True))
            else:
                low[rows], size[rows], u[rows] = found
    return low.squeeze(1), size.squeeze(1), u.squeeze(1), free.squeeze(1)


def low_and_cut(z: Tensor, sums: Tensor, k: int, height: float) -> tuple[Tensor, Tensor]:
    """The level a at which sum clip(z_j - a, 0, height) = k height, and u, how many are cut off (rows, 1).

    Were the first u cut off, and nobody else, a would be the largest of the (z_{u+1} + ... + z_j - (k - u) height)
    / (j - u). Class j is cut off where the sum at the level z_j - height is below k height: of the first k - 1 a few
    are asked at once, and then of those between two of them.
    """
    parts = max(2, min(_AT_ONCE, 2**13 // z.shape[1]))
    u, span = torch.zeros_like(z[:, :1], dtype=torch.int64), parts ** math.ceil(math.log(k, parts) - 1e-9)
    while span > 1:
        span //= parts
        asked = (u + span * torch.arange(1, min(parts, 1 + (k - 1) // span), device=z.device)).clamp_(max=k - 1)
        above = (z[:, None] - z.gather(1, asked - 1)[..., None] + height).clamp_(0.0, height)
        u = (u + span * (above.sum(2) < k * height).sum(1, keepdim=True)).clamp_(max=k - 1)
    count = torch.arange(z.shape[1] + 1, dtype=z.dtype, device=z.device) - u
    averages = (sums - sums.gather(1, u) - (k - u).to(z.dtype) * height) / count
    return averages.masked_fill_(count <= 0.0, -torch.inf).amax(1, keepdim=True), u


def _free_levels(z: Tensor, sums: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Alpha's low and height where sum p < 1, and u (rows, 1).

    With S(b) the sum of relu(z_j - b), the two levels t <= 0 and h obey S(h) = -k t and S(t) - S(h) = k (h - t): h is
    the largest of the (z_1 + ... + z_u + k t) / u, and for a given u the second equation, too, is a largest average.
    """
    first, total = z[:, :1], z.relu().sum(1, keepdim=True)
    place = torch.arange(z.shape[1] + 1, dtype=z.dtype, device=z.device)
    some, low = sums[:, 1 : k + 1], torch.zeros_like(first)
    for _ in range(min(k, _STEPS)):
        u = ((some + k * low) / place[1 : k + 1]).argmax(1, keepdim=True) + 1
        weight = (k - u) ** 2 + u * (place - u)
        averages = ((u * sums - k * sums.gather(1, u)) / weight).masked_fill_(place < k, -torch.inf)
        before, low = low, torch.where(u < k, torch.minimum(averages.amax(1, keepdim=True), low), low)
        if z.is_cpu and torch.equal(low, before):
            break
    height = (sums.gather(1, u) + k * low) / u - low
    uncut = total >= k * first  # no p_j is at s / k
    low, height, u = low.masked_fill(uncut, 0.0), torch.where(uncut, total / k, height), u.masked_fill(uncut, 0)
    pays = sums[:, k : k + 1] > 0.0
    return torch.where(pays, low, first.relu()), torch.where(pays, height, 0.0), torch.where(pays, u, 0)


# --- classes spread over processes -----------------------------------------------------------------------------------


def at_level(x: Tensor, own: Tensor, k: int, variant: str, margin: float, smoothing: float, tail: Tensor) -> Tensor:
    """The loss (rows,) from listed scores in falling order and `Level`'s numbers, in a form without slope in the level.

    That is the dual: with phi(v) = min(v, height)^2 / 2 + height (v - height)_+ for v > 0, gamma times alpha's and
    beta's loss is the sum of phi(z_j - level) + k height level; polyhedral's average is the level it is taken over, and
    polyhedral_smooth's mask is held.
    """
    beyond, (level, height, count, total, origin) = tail[0], tail[1:6].detach().unbind()
    if variant == "polyhedral":
        best = x[:, :1].detach()
        top = (x == best).to(x.dtype)
        alone = (x * top).nan_to_num(neginf=0.0).sum(1) / top.sum(1) - margin
        ahead = (x - level[:, None]).detach() >= 0.0
        size = ahead.sum(1) + count
        average = level + (torch.where(ahead, x - level[:, None], 0.0).sum(1) + beyond - k * margin) / size.clamp(min=1)
        return margin - own + torch.where(level > best[:, 0] - margin, average, alone)
    if variant == "polyhedral_smooth":
        mask = (x.detach() - level[:, None]).clamp(0.0, margin)
        whole = with_tail(((x - mask) / smoothing).logsumexp(1), beyond[None], origin / smoothing)
        return margin - own + smoothing * whole
    lead = (margin + x - level[:, None]).relu()  # x is relative to y
    part = torch.minimum(lead, height[:, None])
    squares = (part * part / 2 + height[:, None] * (lead - part)).sum(1)
    return (squares + beyond / 2 + k * height * level - total * (own - own.detach())) / smoothing


@dataclass(frozen=True)
class Level(Tail):
    """The level a from which on classes have a slope, where these may be more than the listed ones.

    It is the root of a falling function F, made of line segments. The listed classes alone give a lower bound, and the
    root itself where no other class is above it. Else a sum of three numbers a step, of who is above the level now,
    gives the segment there, whose root is the next level. Numbers: what the loss adds up over the classes that are not
    listed, the level, the height, how many of these are above it, the sum of x - level over them, the shift relative
    to the largest score, and the level relative to the shift.
    """

    k: int
    variant: str
    margin: float
    smoothing: float
    rank: int  # all classes that are not listed are below the shift

    def talk(self, part: Slice) -> Talk:
        """Three numbers a step."""
        z, origin, to_largest = self._listed(part)
        level, height, needed = self._of_listed(z)
        needed &= (level <= origin) & (part.shard.total > self.rank + 1)
        low, high, moves = level, origin, needed
        sums = torch.zeros((3, len(level)), dtype=z.dtype, device=z.device)
        asks = self.variant == "polyhedral_smooth" or bool(needed.any())
        for _ in range(_STEPS if asks else 0):
            sums = (yield Sum(self._sums(part, level - origin))).to(z.dtype)
            found, cap = self._root(z, level, sums[0], sums[1] + origin * sums[0])
            low, high = torch.where(found > level, level, low), torch.where(found < level, level, high)
            found = torch.where((found >= low) & (found <= high), found, (low + high) / 2)
            height = torch.where(needed, cap, height)
            close = 8 * torch.finfo(z.dtype).eps * (level.abs() + self._goal(height))
            close = close + 2 * torch.finfo(part.scores.dtype).eps * (level - origin).abs()  # as x - shift is rounded
            moves = moves & ((found - level).abs() > close)
            if not bool(moves.any()):
                break
            level = torch.where(moves, found, level)
        below = level - origin
        level = below + to_largest if self.of_all else level
        return torch.stack((sums[2], level, height, sums[0], sums[1] - sums[0] * below, to_largest, below))

    @property
    def of_all(self) -> bool:
        """Whether y counts like every other class."""
        return self.variant.startswith("polyhedral")

    def _listed(self, part: Slice) -> tuple[Tensor, Tensor, Tensor]:
        """z of the listed classes, falling, and of the shift, and the shift less the largest score; 0 in dead rows.

        For the variants of all classes z is relative to the shift, else it is margin + x - x_y.
        """
        shift, largest, own = part.shift(self.rank), part.values.amax(1), part.own_scores()
        wide, values = row_dtype(shift), part.values if self.of_all else part.wrong_values()
        x = (values.to(wide) - shift[:, None].to(wide)).sort(dim=1, descending=True).values
        last = x[:, self.k if self.of_all else 0 if self.variant == "beta_smooth" else self.k - 1]
        dead = not_finite_above(largest) | (own == -torch.inf) | (last == -torch.inf)
        origin = torch.zeros_like(last) if self.of_all else self.margin + (shift.to(wide) - own.to(wide))
        origin, to_largest = (torch.where(dead, 0.0, each) for each in (origin, shift.to(wide) - largest.to(wide)))
        return torch.where(dead[:, None], 0.0, x) + origin[:, None], origin, to_largest

    def _goal(self, height: Tensor) -> Tensor:
        """What the parts of the scores above the level, cut off at the height, add up to."""
        return torch.full_like(height, self.k * self.margin) if self.variant == "polyhedral" else self.k * height

    def _height(self) -> float:
        """Where p_j is cut off, unless alpha's sum of p is free."""
        heights = {"polyhedral": math.inf, "polyhedral_smooth": self.margin}
        return heights.get(self.variant, self.smoothing / self.k)

    def _of_listed(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Level and height from the listed classes, and whether others could change anything."""
        k, height = self.k, self._height()
        if self.variant == "polyhedral":
            count = torch.arange(1, z.shape[1] + 1, dtype=z.dtype, device=z.device)
            level = ((z.cumsum(1) - k * self.margin) / count).amax(1)
            return level, torch.full_like(level, height), z[:, 0] - self.margin < 0.0
        variant = "fixed sum" if self.variant == "polyhedral_smooth" else self.variant
        level, found = levels(z, k, height, variant)[:2]
        return level, found, found > 0.0

    def _root(self, z: Tensor, level: Tensor, count: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """The root of F's segment at the level, and the height there."""
        found, height = self._segment(z, level, count, total, level < 0.0)
        if self.variant == "beta_smooth":
            return found.relu(), height
        if self.variant == "alpha_smooth":  # F jumps down at 0, below which the sum of p is free
            crosses = ((level < 0.0) & (found > 0.0)) | ((level > 0.0) & (found < 0.0))
            left = self._segment(z, level, count, total, level <= 0.0)[0].clamp(max=0.0)
            return torch.where(crosses, 0.0, torch.where((level == 0.0) & (found <= 0.0), left, found)), height
        return found, height

    def _segment(self, z: Tensor, level: Tensor, count: Tensor, total: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """The same; `free`: where alpha's height may be lower."""
        k = self.k
        cap, bend = torch.full_like(level, self._height()), torch.zeros_like(level)
        if self.variant == "alpha_smooth":
            place = torch.arange(1, k + 1, dtype=z.dtype, device=z.device)
            sums = z[:, :k].cumsum(1)
            top, u = ((sums + k * level[:, None]) / place).max(1)
            free = free & (top - level < cap)
            cap = torch.where(free, sums.gather(1, u[:, None])[:, 0] / (u + 1), cap)
            bend = torch.where(free, k / (u + 1).to(z.dtype) - 1.0, 0.0)
        height = cap + bend * level
        lead = z - level[:, None]
        above = lead > height[:, None]
        within = (lead > 0.0) & ~above
        size, mass = within.sum(1) + count, torch.where(within, z, 0.0).sum(1) + total
        left = k - above.sum(1)
        goal = left * cap if math.isfinite(self._height()) else self._goal(height)
        found = (mass - goal) / (size + left * bend)
        return torch.where(found.isfinite(), found, level), height

    def _sums(self, part: Slice, below: Tensor) -> Tensor:
        """Over the slice's classes above the level: how many, x - shift, and what the loss adds up (3, rows)."""
        sums, variant = part.scores.new_zeros((3, part.scores.shape[0])), self.variant
        for rows, (lead, field) in part.leads(part.shift(self.rank), part.places, 2):
            border = below[rows, None].to(lead.dtype)
            above = lead >= border if variant == "polyhedral" else lead > border
            torch.sum(above, 1, out=sums[0, rows], dtype=lead.dtype)
            if variant == "polyhedral_smooth":
                torch.sum(self._masked(field.copy_(lead), border), 1, out=sums[2, rows])
            else:
                torch.sub(lead, border, out=field).relu_()
                sums[2, rows] = field.sum(1) if variant == "polyhedral" else squares(field)
            torch.sum(lead.masked_fill_(~above, 0.0), 1, out=sums[1, rows])
        return sums

    def _masked(self, lead: Tensor, border: Tensor) -> Tensor:
        """exp((x - m - shift) / gamma), m the soft top-k, in place."""
        return exponentials(torch.minimum(lead, border, out=lead).div_(self.smoothing))

    def kept(self, slopes: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The slope in what is added up, and the level relative to the shift."""
        return slopes[:1], numbers[-1:]

    def field(self, lead: Tensor, slopes: Tensor, settings: Tensor) -> Tensor:
        """p of the classes that are not listed."""
        if self.variant == "polyhedral":
            return (lead >= settings).to(lead.dtype).mul_(slopes)
        if self.variant == "polyhedral_smooth":
            return self._masked(lead, settings).mul_(slopes / self.smoothing)
        return lead.sub_(settings).relu_().mul_(2.0 * slopes)
