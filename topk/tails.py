"""What a loss asks about the classes beyond a row's head, where processes share the classes (`topk.shards`).

A tail *talks*: it yields numbers of its slice, (numbers, rows), and gets back their sum over the slices (`Sum`), or
those of every slice (`Every`). What all tails of a loss yield in one round travels in one message. At the end it
returns the numbers that the loss's definition takes as `tail`. From a loss's slopes in these the gradient of a slice
follows without a message: a function of x - shift and a few numbers a row.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from topk._cpu import buffers, chunks, exponentials, exponents, row_chunks, squares
from topk.losses import polynomials
from topk.losses.common import finite_or_zero, row_dtype

if TYPE_CHECKING:
    from topk.shards import ClassShard

_TILT_STEPS = 16
_COUNT_CHUNK = 2**17  # scores whose chances are worked on at a time


class Sum(NamedTuple):
    """Asks for the sum over the slices."""

    numbers: Tensor  # (numbers, rows)


class Every(NamedTuple):
    """Asks for a list with the numbers of every slice, in the order of the processes."""

    numbers: Tensor  # (numbers, rows)


Talk = Generator[Sum | Every, Any, Tensor]


@dataclass(frozen=True)
class Slice:
    """The rows of one process, as its tails see them."""

    scores: Tensor  # (rows, classes of the slice)
    places: Tensor  # (rows, listed): where these are in the slice, or its size for those that it has not
    values: Tensor  # (rows, listed): their scores
    own: Tensor  # (rows,): where y is among them
    shard: ClassShard

    @property
    def at_target(self) -> Tensor:
        """Where the slice has y (rows, 1)."""
        return self.places.gather(1, self.own[:, None])

    def own_scores(self) -> Tensor:
        """x_y (rows,)."""
        return self.values.gather(1, self.own[:, None]).squeeze(1)

    def wrong_values(self) -> Tensor:
        """The listed scores, with -inf for y's."""
        return self.values.scatter(1, self.own[:, None], -torch.inf)

    def shift(self, rank: int) -> Tensor:
        """The row's largest score, or the rank-th of the classes other than y; 0 where that is not finite."""
        if rank == 0:
            return finite_or_zero(self.values.amax(1))
        wrong = self.wrong_values()
        return finite_or_zero(wrong.topk(min(rank, wrong.shape[1]), dim=1).values[:, -1])

    def leads(
        self, shift: Tensor, hidden: Tensor, spaces: int = 1, instead: float | None = -torch.inf
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """Chunks of rows: x - shift, with `instead` at the hidden places, and further work spaces, all one wider."""
        rows, classes = self.scores.shape
        if rows == 0 or classes == 0:
            return
        kept = buffers(self.scores, spaces, width=classes + 1)
        for part in chunks(self.scores):
            first, *others = (space[: part.stop - part.start] for space in kept)
            torch.sub(self.scores[part], shift[part, None], out=first[:, :classes])
            first[:, classes] = 0.0  # the column of classes that are elsewhere
            if instead is not None:
                first.scatter_(1, hidden[part], instead)[:, classes] = instead
            yield part, [first, *others]


class Tail:
    """What a loss asks about the classes that are not listed, and what it makes of the answer."""

    rank: int  # of the shift, see `Slice.shift`
    whole: ClassVar[bool] = False  # whether the field counts at the listed classes as well

    def talk(self, part: Slice) -> Talk:
        """Gives the numbers (numbers, rows) that the definition takes as `tail`."""
        raise NotImplementedError

    def kept(self, slopes: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """What `field` needs: slopes, which the gradient that comes from above multiplies, and settings."""
        return slopes, numbers[:0]

    def field(self, lead: Tensor, slopes: Tensor, settings: Tensor) -> Tensor:
        """The gradient (rows, classes) from lead = min(x - shift, 0), which it may write into."""
        raise NotImplementedError

    def add_field(self, result: Tensor, scores: Tensor, shift: Tensor, slopes: Tensor, settings: Tensor) -> None:
        """Adds the gradient to `result` (rows, classes); slopes and settings are (rows, numbers)."""
        for part in chunks(scores) if scores.shape[1] else ():
            lead = (scores[part].to(result.dtype) - shift[part, None]).clamp_(max=0.0)
            result[part] += self.field(lead, slopes[part].to(result.dtype), settings[part].to(result.dtype))


def in_step(shard: ClassShard, talks: Sequence[Talk]) -> list[Tensor]:
    """What the talks return; what they ask for in one round is one message, or one of each kind."""
    results: dict[int, Tensor] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(talks)))
    while answers:
        asked: dict[int, Sum | Every] = {}
        for place, answer in answers.items():
            try:
                asked[place] = talks[place].send(answer)
            except StopIteration as stop:
                results[place] = stop.value
        answers = _answered(shard, asked, Sum) | _answered(shard, asked, Every)
    return [results[place] for place in range(len(talks))]


def _answered(shard: ClassShard, asked: dict[int, Sum | Every], kind: type) -> dict[int, Any]:
    mine = {place: each.numbers for place, each in asked.items() if isinstance(each, kind)}
    if not mine:
        return {}
    sizes, message = [len(numbers) for numbers in mine.values()], torch.cat([*mine.values()])
    if kind is Sum:
        return dict(zip(mine, shard.added(message).split(sizes), strict=True))
    found = [each.split(sizes) for each in shard.gathered(message)]
    return {place: [each[order] for each in found] for order, place in enumerate(mine)}


# --- sums of powers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerSums(Tail):
    """Sums of exp(m rate (x - shift)), m = 1..powers."""

    rate: float
    powers: int = 1
    rank: int = 0

    def talk(self, part: Slice) -> Talk:
        """One sum."""
        sums = part.scores.new_zeros((self.powers, part.scores.shape[0]))
        for rows, (odds, power) in part.leads(part.shift(self.rank), part.places, 2, instead=None):
            exponentials(odds if self.rate == 1.0 else odds.mul_(self.rate))[:, -1] = 0.0
            power.copy_(odds.scatter_(1, part.places[rows], 0.0))
            for m in range(self.powers):
                torch.sum(power, 1, out=sums[m, rows])
                power.mul_(odds)
        numbers: Tensor = yield Sum(sums)
        return numbers

    def field(self, lead: Tensor, slopes: Tensor, settings: Tensor) -> Tensor:
        """A polynomial in exp(rate lead)."""
        return _polynomial(exponentials(lead.mul_(self.rate)), slopes, self.rate)


def _polynomial(odds: Tensor, slopes: Tensor, rate: float) -> Tensor:
    """sum of m rate slope_m odds^m."""
    degree = torch.arange(1, slopes.shape[1] + 1, device=odds.device)
    columns = (slopes * degree * rate).unsqueeze(-1).unbind(1)
    field = odds * columns[-1]
    for column in columns[-2::-1]:
        field.add_(column).mul_(odds)
    return field


@dataclass(frozen=True)
class SumAndMean(Tail):
    """The sum of exp(x - shift), the sum of x - shift over the classes that are not masked, and their number."""

    rank: int = 0

    def talk(self, part: Slice) -> Talk:
        """One sum."""
        sums = part.scores.new_zeros((3, part.scores.shape[0]))
        for rows, (lead, field) in part.leads(part.shift(self.rank), part.places, 2):
            torch.gt(lead, -torch.inf, out=field)
            torch.sum(field, 1, out=sums[2, rows])
            torch.sum(exponentials(field.copy_(lead)), 1, out=sums[0, rows])
            torch.sum(lead.masked_fill_(lead == -torch.inf, 0.0), 1, out=sums[1, rows])
        numbers: Tensor = yield Sum(sums)
        return numbers

    def field(self, lead: Tensor, slopes: Tensor, settings: Tensor) -> Tensor:
        """An exponential and a constant."""
        constant = slopes[:, 1:2] * (lead > -torch.inf)
        return exponentials(lead).mul_(slopes[:, :1]).add_(constant)


# --- counts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts(Tail):
    """The chances of 0..k successes where a class succeeds at the odds exp(rate (x - shift) + tilt), and the tilt."""

    rate: float
    k: int
    rank: int

    def talk(self, part: Slice) -> Talk:
        """A few sums of two numbers find a common tilt; then the slices' counts (k + 1, rows) are multiplied."""
        scores, shift, (rows, classes) = part.scores, part.shift(self.rank), part.scores.shape
        tilt = yield from self._tilt(part, shift)
        counts = scores.new_zeros((self.k + 1, rows), dtype=row_dtype(scores))
        counts[0] = 1.0
        for here in row_chunks(rows, classes, _COUNT_CHUNK) if classes else ():
            lanes = polynomials.lanes_for(here.stop - here.start, classes, self.k)
            width = -(-classes // lanes) * lanes
            chances = self._chances(scores[here], part.places[here], shift[here], tilt[here], width)
            trials = chances.view(-1, lanes, width // lanes).permute(2, 1, 0).contiguous()
            counts[:, here] = polynomials.success_counts(trials, self.k, counts.dtype)
        first, *others = yield Every(counts)
        for other in others:
            first = polynomials.product(first, other)
        return torch.cat((first, tilt[None].to(first.dtype)))

    def _tilt(self, part: Slice, shift: Tensor) -> Talk:
        """The tilt (rows,) at which about k - 1/2 of the wrong classes succeed, as `smooth._balance` finds it."""
        goal = self.k - 0.5
        low = torch.full_like(shift, -math.log(max(1, 2 * (part.shard.total - self.k) + 1)))
        high = torch.full_like(shift, math.log(2 * self.k - 1))
        tilt = torch.zeros_like(shift)
        for done in range(_TILT_STEPS):
            mean, variance = yield Sum(self._moments(part, shift, tilt))
            low, high = torch.where(mean < goal, tilt, low), torch.where(mean > goal, tilt, high)
            if done >= 3 and not bool(((mean - goal) ** 2 > 4 * variance + 0.25).any()):
                break  # the sums, and so the answer, are the same on all processes
            step = tilt - (mean - goal) / variance
            tilt = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
        return tilt

    def _moments(self, part: Slice, shift: Tensor, tilt: Tensor) -> Tensor:
        """Mean and variance (2, rows) of the number of the slice's successes."""
        scores, hidden, (rows, classes) = part.scores, part.at_target, part.scores.shape
        found = scores.new_zeros((2, rows))
        for here in row_chunks(rows, classes, _COUNT_CHUNK) if classes else ():
            chances = self._chances(scores[here], hidden[here], shift[here], tilt[here], classes)
            found[0, here] = chances.sum(1)
            found[1, here] = found[0, here] - squares(chances)
        return found

    def _chances(self, scores: Tensor, hidden: Tensor, shift: Tensor, tilt: Tensor, width: int) -> Tensor:
        """Of every class, success's; 0 at the hidden places, of which the slice's size stands for elsewhere."""
        rows, classes = scores.shape
        chances = scores.new_zeros((rows, max(width, classes + 1)))
        odds = exponents(scores, shift, self.rate, chances[:, :classes])
        odds.add_(tilt[:, None]).sigmoid_()
        return chances.scatter_(1, hidden, 0.0)[:, :width]

    def kept(self, slopes: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes in the power sums (k, rows), from slopes in the counts; and the tilt.

        Up to a common factor, which changes no loss, counts are elementary symmetric polynomials e_j of the tilted
        odds, and the derivative of e_j in the m-th power sum is (-1)^(m-1) e_{j-m} / m.
        """
        k = self.k
        powers = [(slopes[m:-1] * numbers[: k + 1 - m]).sum(0) * ((-1) ** (m - 1) / m) for m in range(1, k + 1)]
        return torch.stack(powers), numbers[-1:]

    def field(self, lead: Tensor, slopes: Tensor, settings: Tensor) -> Tensor:
        """A polynomial in the odds."""
        odds = exponentials(lead.mul_(self.rate).add_(settings).clamp_(max=0.0))
        return _polynomial(odds, slopes, self.rate)
