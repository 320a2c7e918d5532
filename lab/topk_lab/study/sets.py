"""Sets of classes whose size varies (chapter "From k to sets"): scores of strangeness, thresholds, what is measured.

Every set of that chapter is {i : strangeness_i <= t}, with one threshold t for all rows. What differs is the
strangeness, computed from the probabilities p of a row, its classes in falling order:

    "rank"      the class's place, 1, 2, ...: sets of a fixed size
    "lac"       1 - p_i: one threshold on the probability, the average-k sets
    "aps"       the probability of the classes down to i, i included
    "raps"      the same + penalty * max(0, place - free)

and how t is chosen: for a coverage (`conformal_threshold`) or for a mean size (`size_threshold`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

import topk
from topk_lab import data as data_sets
from topk_lab import report, train

KINDS = ("rank", "lac", "aps", "raps")
COVERAGES = (0.90, 0.95, 0.99)
LOSSES = (
    "cross-entropy",
    "smooth",
    "smooth, k = 1 and 5",
    "transition",
    "noised",
    "differentiable [.5, 0, 0, 0, .5]",
    "calibrated hinge",
)
PENALTIES = (0.001, 0.01, 0.1)
FREE = 5
"""Places that RAPS does not penalise."""
SIZES = (1, 2, 5, 10)
OFFERED = (1, 2, 3, 5, 10, 20, 50)
"""Sizes that a learnt selector may choose from."""
PRICES = (0.05, 0.1, 0.2)
"""What log k costs it, where a miss costs 1."""


# --- strangeness and thresholds ---


def strangeness(p: Tensor, kind: str, penalty: float = 0.0) -> Tensor:
    """Of every class of every row (rows, classes), from probabilities; see this module's description."""
    if kind == "lac":
        return 1.0 - p
    order = p.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(p).scatter_(1, order, torch.arange(1.0, p.shape[1] + 1, dtype=p.dtype).expand_as(p))
    if kind == "rank":
        return place
    down_to = torch.empty_like(p).scatter_(1, order, p.gather(1, order).cumsum(1))
    return down_to if kind == "aps" else down_to + penalty * (place - FREE).clamp(min=0)


def conformal_threshold(own: Tensor, miss: float) -> float:
    """The threshold that covers the next row with probability >= 1 - miss: of M rows' own strangeness the
    ceil((M + 1)(1 - miss))-th smallest, infinite where M is too small for it.
    """
    place = math.ceil((len(own) + 1) * (1 - miss) - 1e-9)
    return float(own.sort().values[place - 1]) if place <= len(own) else math.inf


def size_threshold(strange: Tensor, size: float) -> float:
    """The threshold at which the sets of these rows have this mean size: the (size * rows)-th smallest of all."""
    return float(strange.flatten().kthvalue(max(1, round(size * len(strange)))).values)


def of_right_class(values: Tensor, labels: Tensor) -> Tensor:
    """(rows,)."""
    return values.gather(1, labels[:, None])[:, 0]


def measured(strange: Tensor, labels: Tensor, threshold: float) -> dict[str, float]:
    """Share of rows whose set holds the right class, and the mean size of the sets."""
    covered = of_right_class(strange, labels) <= threshold
    sizes = (strange <= threshold).sum(1)
    return {"covered": covered.double().mean().item(), "size": sizes.double().mean().item()}


def fitted_temperature(scores: Tensor, labels: Tensor) -> float:
    """The T > 0 with the least cross-entropy of scores / T."""
    scores = scores.double()

    def loss(log_t: float) -> float:
        return F.cross_entropy(scores / math.exp(log_t), labels).item()

    return math.exp(minimize_scalar(loss, bounds=(-5.0, 5.0), method="bounded").x)


# --- sizes learnt per row (Cortes, Mao, Mohri, Zhong 2024) ---


def sizes_cost(rank: Tensor, sizes: Tensor, price: float) -> Tensor:
    """[the first k miss] + price * log k, of every row and every size on offer (rows, sizes)."""
    return (rank[:, None] > sizes).double() + price * sizes.double().log()


def learnt_sizes(p: Tensor, cost: Tensor, *, steps: int = 200, seed: int = 0) -> nn.Module:
    """A selector r trained with the cost-sensitive log loss: sum over sizes of (1 - cost) * -log softmax(r)."""
    torch.manual_seed(seed)
    selector = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, cost.shape[1]))
    optimiser = torch.optim.Adam(selector.parameters(), lr=0.01, weight_decay=1e-4)
    worth, inputs = (1.0 - cost / cost.max()).float(), selector_inputs(p)
    for _ in range(steps):
        loss = -(worth * selector(inputs).log_softmax(1)).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return selector


def selector_inputs(p: Tensor) -> Tensor:
    """The twenty largest probabilities' logarithms, in order."""
    return p.topk(20, dim=1).values.clamp(min=1e-8).log().float()


# --- conformal training (Stutz et al. 2022) ---


def set_size_loss(scores: Tensor, labels: Tensor, miss: float = 0.05, temperature: float = 0.5) -> Tensor:
    """log of the mean soft size of the second half's sets, their threshold taken from the first half.

    The threshold b is soft, too: with the logistic mask of `soft_topk`, sigma((s_m - b) / T) sums to (1 - miss) M over
    the log-probabilities s_m of the M right classes. A class counts sigma((log p_i - b) / T).
    """
    logs = scores.log_softmax(1)
    own, half = of_right_class(logs, labels), len(labels) // 2
    shares = topk.soft_topk(own[:half], (1 - miss) * half, method="logistic", temperature=temperature)
    inner = shares.detach().sub(0.5).abs().argmin()  # any element gives b; this one without rounding
    b = own[inner] - temperature * torch.logit(shares[inner])
    return torch.sigmoid((logs[half:] - b) / temperature).sum(1).mean().log()


def tuned_further(
    model: nn.Module, split: data_sets.Split, loss: Any, *, epochs: int = 2, rate: float = 1e-3, seed: int = 0
) -> nn.Module:
    """The head after some more epochs of AdamW with this loss, batches of 500."""
    inputs, labels = torch.from_numpy(split.inputs[:]), torch.from_numpy(split.labels)
    luck = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=luck).split(500):
            value = loss(model(inputs[batch]), labels[batch])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
    return model


# --- the comparison ---


def heads(
    seeds: Sequence[int], names: Sequence[str] = LOSSES, data: Mapping[str, Any] | None = None
) -> list[tuple[str, int, train.Config]]:
    """The linear heads of chapter 14, with the settings that its tuning chose: (loss, seed, configuration).

    `data` is what they are trained on in place of chapter 14's features.
    """
    frame = report.of_sweep(report.runs("14_cifar100"), "14_cifar100")
    found = []
    for name in names:
        plain = train.Config.of_record(frame[frame["loss"] == name].iloc[0]["config"]).plain()
        plain["data"] = data or plain["data"]
        found += [(name, seed, train.Config.model_validate(plain | {"seed": seed})) for seed in seeds]
    return found


def head_and_scores(config: train.Config) -> tuple[nn.Module, Tensor]:
    """The trained head, and the scores of the test rows."""
    kept: list[nn.Module] = []
    split = data_sets.load(config.data)
    train.train(config, data=split, threads=1, progress=False, keep=kept.append)
    return kept[0], scores_of(kept[0], split.test)


@torch.no_grad()
def scores_of(model: nn.Module, split: data_sets.Split) -> Tensor:
    """(rows, classes)."""
    scores: Tensor = model.eval()(torch.from_numpy(split.inputs[:]))
    return scores


def split_rows(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A quarter of the rows for settings, a quarter for thresholds, half to measure; drawn anew for each seed."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[: rows // 4], order[rows // 4 : rows // 2], order[rows // 2 :]


def compared(scores: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    """Everything that is measured on one head's scores of the test rows, by names such as "lac.95.size"."""
    settings, calibration, test = split_rows(len(labels), seed)
    temperature = fitted_temperature(scores[settings], labels[settings])
    p = (scores.double() / temperature).softmax(1)
    found: dict[str, Any] = {"temperature": temperature, "penalty": _penalty(p[settings], labels[settings])}
    for kind in KINDS:
        strange = strangeness(p, kind, found["penalty"])
        own = of_right_class(strange, labels)[calibration]
        goals = {f"{round(100 * share)}": conformal_threshold(own, 1 - share) for share in COVERAGES}
        if kind in ("rank", "lac"):
            goals |= {f"mean {size}": size_threshold(strange[calibration], size) for size in SIZES}
        for goal, threshold in goals.items():
            at = measured(strange[test], labels[test], threshold)
            found |= {f"{kind}.{goal}.{name}": value for name, value in at.items()}
    return found | _learnt(p, labels, settings, test, seed)


def _penalty(p: Tensor, labels: Tensor) -> float:
    """Of RAPS: the one with the smallest sets at 90 %."""

    def size(penalty: float) -> float:
        strange = strangeness(p, "raps", penalty)
        return measured(strange, labels, conformal_threshold(of_right_class(strange, labels), 0.1))["size"]

    return min(PENALTIES, key=size)


def _learnt(p: Tensor, labels: Tensor, settings: Tensor, test: Tensor, seed: int) -> dict[str, float]:
    """Coverage and mean size of learnt sizes, and the coverage of average-k sets of the same mean size."""
    offered, rank = torch.tensor(OFFERED), topk.metrics.ranks(p, labels)
    strange, found = strangeness(p[test], "lac"), dict[str, float]()
    for price in PRICES:
        selector = learnt_sizes(p[settings], sizes_cost(rank[settings], offered, price), seed=seed)
        sizes = offered[selector(selector_inputs(p[test])).argmax(1)]
        mean = sizes.double().mean().item()
        alike = measured(strange, labels[test], size_threshold(strange, mean))["covered"]
        covered = (rank[test] <= sizes).double().mean().item()
        at = {"covered": covered, "size": mean, "average": alike}
        found |= {f"learnt.{price}.{name}": value for name, value in at.items()}
    return found


def comparison(seeds: Sequence[int], data: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """One row a loss and seed."""
    rows = []
    for name, seed, config in heads(seeds, data=data):
        _, scores = head_and_scores(config)
        labels = torch.from_numpy(data_sets.load(config.data).test.labels)
        rows.append({"loss": name, "seed": seed} | compared(scores, labels, seed))
    return rows


def further(seeds: Sequence[int], data: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Two losses' heads as trained, after more epochs of cross-entropy, and after conformal training."""
    rows = []
    for name, seed, config in heads(seeds, LOSSES[:2], data):
        split = data_sets.load(config.data)
        labels = torch.from_numpy(split.test.labels)
        head, scores = head_and_scores(config)
        state = {key: value.clone() for key, value in head.state_dict().items()}
        found = {"as trained": scores}
        for title, loss in (("more cross-entropy", F.cross_entropy), ("conformal training", set_size_loss)):
            head.load_state_dict(state)
            found[title] = scores_of(tuned_further(head, split.train, loss, seed=seed), split.test)
        rows += [{"loss": name, "seed": seed, "then": title} | compared(x, labels, seed) for title, x in found.items()]
    return rows
