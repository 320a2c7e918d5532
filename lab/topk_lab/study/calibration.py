"""Does the minimum of an expected loss have the k likeliest classes in front? Checked by minimising it.

Chapter 2 says why, chapter 27 asks every loss.

For a label distribution q and free scores x, L(x) = sum_y q_y loss(x, y). With T the k likeliest classes (q has a gap
there), x *ranks right* if every class of T has a larger score than every class outside. At q a loss is

    right   if every minimum ranks right,
    open    if some minima rank right and others do not,
    wrong   if none ranks right,

where a minimum is any point found whose value is within `TOLERANCE` of the best, and scores that tie across the border
of T do not rank right. Only losses that are right at every q are top-k calibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import NamedTuple

import torch
from torch import Tensor

from topk_lab.figures import RowLoss, value_and_gradient
from topk_lab.study import descents
from topk_lab.study.contenders import Contender, expected

TOLERANCE = 1e-6
"""How far above the best value found a value may be and still count as a minimum; relative above 1."""
LEAD = 1e-4
"""By how much T must lead to count as ahead."""
RANGE = 100.0
"""Scores stay within -+ this in descents: some losses have no minimum, only an infimum at infinity."""
KINDS = ("uniform", "concentrated", "flat", "near tie", "peaked", "window below half", "k + 1 classes")
GAP = 0.01
"""q_[k] - q_[k+1] is at least this in every distribution; in a near tie it is this."""


# --- label distributions ---


def distributions(kind: str, classes: int, k: int, count: int, generator: torch.Generator) -> Tensor:
    """Random label distributions (count, classes) with a gap after the k-th class, classes in random order.

    ==================  ==============================================================================
    "uniform"           Dirichlet(1)
    "concentrated"      Dirichlet(0.3): few likely classes
    "flat"              Dirichlet(10)
    "near tie"          Dirichlet(3), the k-th and the (k+1)-th moved to their mean +- GAP / 2
    "peaked"            0.85 on one class, Dirichlet(1) of the rest on the others
    "window below half" (made against hinges) nearly equal, the first k a little likelier
    "k + 1 classes"     (made against noise) 0.97 on k + 1 classes, Dirichlet(3) among them
    ==================  ==============================================================================
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    found: list[Tensor] = []
    while len(found) < count:
        q = _draw(kind, classes, k, generator).sort(descending=True).values
        if q[k - 1] - q[k] >= GAP * (1 - 1e-9):
            found.append(q[torch.randperm(classes, generator=generator)])
    return torch.stack(found)


def _draw(kind: str, classes: int, k: int, generator: torch.Generator) -> Tensor:
    if kind == "peaked":
        return torch.cat((torch.tensor([0.85]).double(), 0.15 * _dirichlet(classes - 1, 1.0, generator)))
    if kind == "window below half":
        lift = 0.02 + 0.05 * torch.rand((), generator=generator, dtype=torch.float64)
        raised = _dirichlet(classes, 300.0, generator) + lift * (torch.arange(classes) < k)
        return raised / raised.sum()
    if kind == "k + 1 classes":
        rest = classes - k - 1
        share = 0.97 if rest else 1.0
        likely = share * _dirichlet(k + 1, 3.0, generator)
        return torch.cat((likely, (1 - share) * _dirichlet(rest, 3.0, generator))) if rest else likely
    concentration = {"uniform": 1.0, "concentrated": 0.3, "flat": 10.0, "near tie": 3.0}[kind]
    q = _dirichlet(classes, concentration, generator).sort(descending=True).values
    if kind == "near tie":
        middle = q[k - 1 : k + 1].mean()
        q[k - 1], q[k] = middle + GAP / 2, middle - GAP / 2
    return q


def _dirichlet(classes: int, concentration: float, generator: torch.Generator) -> Tensor:
    alpha = torch.full((classes,), concentration, dtype=torch.float64)
    gamma: Tensor = torch._standard_gamma(alpha, generator=generator)
    return (gamma + 1e-9) / (gamma + 1e-9).sum()


# --- ranking ---


def leads(scores: Tensor, q: Tensor, k: int) -> Tensor:
    """The lowest score of the k likeliest classes minus the highest of the others (...,)."""
    inside = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, q.topk(k).indices.expand_as(scores[..., :k]), True)
    lowest = scores.masked_fill(~inside, torch.inf).amin(-1)
    return lowest - scores.masked_fill(inside, -torch.inf).amax(-1)


def regrets(scores: Tensor, q: Tensor, k: int) -> Tensor:
    """How much top-k accuracy the scores' window loses to the best one; scores within LEAD share their places."""
    border = scores.sort(descending=True).values[..., k - 1 : k]
    ahead, tied = scores > border + LEAD, (scores - border).abs() <= LEAD
    places = (k - ahead.sum(-1)) / tied.sum(-1)
    hit = (q * ahead).sum(-1) + places * (q * tied).sum(-1)
    return q.topk(k).values.sum(-1) - hit


@dataclass(frozen=True)
class Outcome:
    """What was found at each of several distributions (rows,).

    Attributes:
        right, wrong: whether every minimum ranks right, whether none does. Neither: open.
        value: the best value.
        regret: top-k accuracy lost by the worst of the minima.
        rest: largest component of the field at the end, where a field was followed; else 0.
    """

    right: Tensor
    wrong: Tensor
    value: Tensor
    regret: Tensor
    rest: Tensor

    def verdicts(self) -> list[str]:
        """ "right", "wrong" or "open" for every distribution."""
        both = zip(self.right.tolist(), self.wrong.tolist(), strict=True)
        return ["right" if right else "wrong" if wrong else "open" for right, wrong in both]


def judge(values: Tensor, scores: Tensor, q: Tensor, k: int) -> Outcome:
    """Values (rows, points) at scores (rows, points, classes) -> the outcome for q (rows, classes)."""
    best = values.amin(1)
    minimal = values <= (best + TOLERANCE * best.abs().clamp(min=1.0))[:, None]
    every = q[:, None].expand_as(scores)
    ahead = leads(scores, every, k) > LEAD
    lost = torch.where(minimal, regrets(scores, every, k), 0.0).amax(1)
    return Outcome((ahead | ~minimal).all(1), ~(minimal & ahead).any(1), best, lost, torch.zeros_like(best))


# --- piecewise linear losses: every corner ---


def corners(classes: int, k: int, kinks: Sequence[float] = (1.0,), mean_kinks: bool = False) -> Tensor:
    """All corners (points, classes) at which a piecewise linear loss of sorted scores can have its minimum.

    In the gaps g_i = x_[i] - x_[i+1] >= 0 the loss bends where a gap is 0, where x_[i] - x_[j] is one of `kinks`, and,
    with `mean_kinks`, where the mean of alpha's k largest terms is 0; and the gaps are cut off at twice the sum of all
    that, so that every piece is bounded. A corner lies on as many of these planes as there are gaps.
    """
    gaps = classes - 1
    eye = torch.eye(gaps, dtype=torch.float64)
    spans = torch.stack([eye[i:j].sum(0) for i in range(classes) for j in range(i + 1, classes)])
    far = 2.0 * max(kinks) * classes
    planes, levels = [eye, eye], [torch.zeros(gaps), torch.full((gaps,), far)]
    for kink in kinks:
        planes.append(spans)
        levels.append(torch.full((len(spans),), kink))
    if mean_kinks:
        plane, level = _mean_planes(classes, k)
        planes.append(plane)
        levels.append(level)
    plane, level = torch.cat(planes), torch.cat(levels).double()
    chosen = torch.tensor(list(combinations(range(len(plane)), gaps)))
    system, right = plane[chosen], level[chosen]
    regular = torch.linalg.det(system).abs() > 1e-9
    found = torch.linalg.solve(system[regular], right[regular][..., None])[..., 0]
    inside = ((found > -1e-9) & (found < far + 1e-9)).all(1)
    found = torch.unique((found[inside] * 1e9).round() / 1e9, dim=0)
    return torch.cat((found.flip(1).cumsum(1).flip(1), torch.zeros(len(found), 1, dtype=torch.float64)), 1)


def _mean_planes(classes: int, k: int) -> tuple[Tensor, Tensor]:
    """sum over A of (1 + x_j - x_y) = 0 for A the k, and the k - 1, best wrong classes: rows in the gaps, levels."""
    place = torch.tril(torch.ones(classes, classes - 1, dtype=torch.float64), -1).neg()  # x_[i] - x_[1] by the gaps
    rows, levels = [], []
    for y in range(classes):
        wrong = [j for j in range(classes) if j != y]
        for size in (size for size in (k, k - 1) if size):
            rows.append((place[wrong[:size]] - place[y]).sum(0))
            levels.append(-float(size))
    return torch.stack(rows), torch.tensor(levels, dtype=torch.float64)


def _check_corners(contender: Contender, q: Tensor, k: int) -> Outcome:
    """Exact: the best of all corners."""
    dealt, paid = _dealt_corners(contender, q.shape[1], k)
    outcomes = []
    for row in q:
        values = paid @ row
        near = values <= values.min() + TOLERANCE
        outcomes.append(judge(values[near][None], dealt[near][None], row[None], k))
    columns = zip(*((o.right, o.wrong, o.value, o.regret, o.rest) for o in outcomes), strict=True)
    return Outcome(*(torch.cat(column) for column in columns))


def _dealt_corners(contender: Contender, classes: int, k: int) -> tuple[Tensor, Tensor]:
    """Every corner with its scores dealt to the classes in every order, and what each label pays there."""
    points = corners(classes, k, contender.kinks(k), contender.mean_kinks)
    target = torch.arange(classes).repeat(len(points))
    losses = contender.at(k)(points.repeat_interleave(classes, 0), target).reshape(len(points), classes)
    orders = torch.tensor(list(permutations(range(classes))))  # orders[p, i]: the place of class i
    return points[:, orders].reshape(-1, classes), losses[:, orders].reshape(-1, classes)


# --- other losses: descents from many starts ---


def descent_ends(
    contender: Contender, q: Tensor, k: int, starts: int, generator: torch.Generator, steps: int = 100
) -> tuple[Tensor, Tensor]:
    """Values (rows, tries) and scores (rows, tries, classes) where descents end.

    With all scores free, and with two classes tied across the border of T: a wrong minimum lies on such a tie unless it
    is a free minimum too.
    """
    rows, classes = q.shape
    begin, link = _starts(q, k, starts, generator, contender.symmetric)
    tries = begin.shape[1]
    loss, every, flat_link = contender.at(k), q.repeat_interleave(tries, 0), link.reshape(-1, classes)

    def scores_at(points: Tensor, chosen: Tensor) -> Tensor:
        return (RANGE * torch.tanh(points / RANGE)).gather(1, flat_link[chosen])

    def value(points: Tensor, chosen: Tensor) -> Tensor:
        return expected(loss, scores_at(points, chosen), every[chosen])

    points, values = descents.minimise(value, begin.reshape(-1, classes), steps)
    scores = scores_at(points, torch.arange(len(points)))
    return values.reshape(rows, tries), scores.reshape(rows, tries, classes)


def _starts(q: Tensor, k: int, starts: int, generator: torch.Generator, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Starts (rows, tries, classes), and which class's score every class takes: its own, or that of its tie.

    By exchanging scores, the best tie of a symmetric loss is that of the k-th and the (k+1)-th likeliest class.
    """
    rows, classes = q.shape
    order = q.argsort(1, descending=True)
    scale = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)[torch.arange(starts) % 3]
    random = torch.randn((rows, starts, classes), generator=generator, dtype=torch.float64) * scale[:, None]
    inside = torch.zeros_like(q).scatter(1, order[:, :k], 1.0)
    begins = [torch.cat((random, torch.stack((q.log(), 2 * inside, 5 * inside + 0.5 * q.log()), 1)), 1)]
    links = [torch.arange(classes).expand_as(begins[0])]
    pairs = [(k - 1, k)] + [pair for pair in ((0, k), (k - 1, classes - 1)) if not symmetric and pair != (k - 1, k)]
    for first, second in dict.fromkeys(pairs):
        begins.append(torch.cat((torch.stack((q.log(), 2 * inside), 1), random[:, : max(1, starts // 3)]), 1))
        link = torch.arange(classes).repeat(rows, 1)
        link.scatter_(1, order[:, second : second + 1], order[:, first : first + 1])
        links.append(link[:, None].expand_as(begins[-1]))
    return torch.cat(begins, 1), torch.cat(links, 1)


class Ends(NamedTuple):
    """The least values among ends that rank right and those that do not, and the scores (classes,) of the best."""

    right: float
    wrong: float
    best: Tensor


def gap_ends(contender: Contender, q: Tensor, k: int, starts: int, seed: int = 0) -> Ends:
    """How clearly a loss prefers the right window at q (classes,); exact where the search is by corners.

    Each order of the scores is a cone, on which a piecewise linear loss has its least value at a corner: so have the
    orders that rank wrong, ties included.
    """
    if contender.search == "corners":
        points, paid = _dealt_corners(contender, len(q), k)
        values = paid @ q
    else:
        found = descent_ends(contender, q[None], k, starts, torch.Generator().manual_seed(seed))
        values, points = found[0][0], found[1][0]
    ahead = leads(points, q.expand_as(points), k) > LEAD
    return Ends(values[ahead].min().item(), values[~ahead].min().item(), points[values.argmin()])


# --- losses whose field is no gradient: where it comes to rest ---


def _check_field(
    contender: Contender, q: Tensor, k: int, starts: int, generator: torch.Generator, steps: int
) -> Outcome:
    """Right: from every start the field rests at scores that rank right; wrong: from none."""
    rows, classes = q.shape
    scores = 1.5 * torch.randn(rows, starts, classes, generator=generator, dtype=torch.float64)
    scores[:, 0] = 0.01 * scores[:, 0]
    every = q.repeat_interleave(starts, 0)
    ends, rest = follow(contender.at(k), scores.reshape(-1, classes), every, steps)
    value = expected(contender.at(k), ends, every).reshape(rows, starts).amin(1)
    ends = ends.reshape(rows, starts, classes)
    spread = q[:, None].expand_as(ends)
    ahead = leads(ends, spread, k) > LEAD
    lost = regrets(ends, spread, k).amax(1)
    return Outcome(ahead.all(1), ~ahead.any(1), value, lost, rest.reshape(rows, starts).amax(1))


def follow(loss: RowLoss, scores: Tensor, q: Tensor, steps: int, rate: float = 2.0) -> tuple[Tensor, Tensor]:
    """Scores after `steps` steps of falling size against the expected field, and its largest component (rows,)."""
    rows, classes = scores.shape
    target = torch.arange(classes).repeat(rows)
    field = torch.zeros_like(scores)
    for step in range(steps):
        _, each = value_and_gradient(loss, scores.repeat_interleave(classes, 0), target)
        field = torch.einsum("ry,ryi->ri", q, each.reshape(rows, classes, classes))
        scores = scores - rate / (1 + step / 50) * field
    return scores, field.abs().amax(1)


# --- the check ---


def check(contender: Contender, q: Tensor, k: int, starts: int = 6, steps: int = 100, seed: int = 0) -> Outcome:
    """The outcome at every distribution of q (rows, classes); `steps` a descent, four times as many along a field."""
    generator = torch.Generator().manual_seed(seed)
    if contender.search == "corners":
        return _check_corners(contender, q, k)
    if contender.search == "field":
        return _check_field(contender, q, k, starts, generator, 4 * steps)
    return judge(*descent_ends(contender, q, k, starts, generator, steps), q, k)
