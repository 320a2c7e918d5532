"""Three uses of a soft top-k (chapter 20): feature choice, experts, nearest neighbours.

    python -m topk_lab.study.uses run                  # what has no record yet; interrupt it and call it again
    python -m topk_lab.study.uses reproduce KEY

Every contender of a use has the same search: CANDIDATES pairs of a learning rate and a temperature (of the L1 head: a
penalty), drawn once for all, tried with one tuning seed and chosen by top-1 on validation rows. Then ten seeds, which
decide the training rows, the first weights and the batches, run on the test images.

Temperatures are those that make the masks equally steep at one half, as in chapter 20.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import topk
from topk_lab import data, records, sweep, train

CHAPTER = "uses"
FEATURES = "cifar100-mobilenet_v2-96px-bd2900e0f611"
OPERATORS = ("logistic", "subset", "sparse", "laplace", "gaussian", "perturbed", "sort")
STEEPNESS = {"sparse": 4.0, "laplace": 2.0, "gaussian": 4 / math.sqrt(2 * math.pi)}
SEEDS, TUNING_SEED, CANDIDATES, ROWS = tuple(range(10)), 1000, 8, 10_000
CHOSEN, EXPERTS, ROUTED, NEAREST = 16, 8, 2, 3
STEPS, BATCH, QUERIES, BESIDE = 200, 250, 100, 300
SAMPLES = {"features": 100, "experts": 20, "neighbours": 10}
"""Draws of the perturbed mask: fewer where every row has a mask of its own."""
Batch = tuple[Tensor, Tensor]


class Split(NamedTuple):
    """Inputs and labels of the three splits."""

    train: Batch
    validation: Batch
    test: Batch


@dataclass(frozen=True)
class Run:
    """One training; `knob` is the temperature, of the L1 head the penalty."""

    use: str
    contender: str
    rate: float
    knob: float
    seed: int

    @property
    def config(self) -> dict[str, Any]:
        """What its record's key hashes."""
        return {"notebook": "20_soft_topk.ipynb", "parameters": {**vars(self), "rows": ROWS, "set": USES[self.use].set}}


def soft(scores: Tensor, k: int, run: Run) -> Tensor:
    """The contender's mask."""
    options: dict[str, Any] = {"perturbed": {"samples": SAMPLES[run.use]}, "sort": {"sorter": "softsort"}}
    heat = STEEPNESS.get(run.contender, 1.0) * run.knob
    return topk.soft_topk(scores, k, method=run.contender, temperature=heat, **options.get(run.contender, {}))


def descend(
    loss: Callable[[Tensor], Tensor], parameters: Iterable[Tensor], rate: float, steps: int, rows: int, batch: int
) -> None:
    """AdamW and one cycle; `loss` gets the numbers of a batch's rows."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    epochs = [torch.randperm(rows).split(batch)[: rows // batch] for _ in range(-(-steps * batch // rows) + 1)]
    for chosen in [chosen for epoch in epochs for chosen in epoch][:steps]:
        optimiser.zero_grad()
        loss(chosen).backward()
        optimiser.step()
        schedule.step()


def hits(scores: Tensor, labels: Tensor, name: str = "top") -> dict[str, float]:
    """Top-1 and top-5 accuracy."""
    ranks = topk.metrics.ranks(scores, labels)
    return {f"{name}{k}": (ranks <= k).double().mean().item() for k in (1, 5)}


# --- (a) which features? ---


class Chooser(nn.Module):
    """A linear head behind a mask over the features, one for all rows."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(0.01 * torch.randn(features))
        self.head = nn.Linear(features, classes)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Scores of the classes."""
        return F.linear(inputs, self.head.weight * mask, self.head.bias)


def choose_features(run: Run, split: Split, place: str) -> dict[str, Any]:
    """Chooses, then fits a new linear head to the chosen features alone: only the choice differs."""
    inputs, labels = split.train
    spread, mean = torch.std_mean(inputs, 0)
    scale = spread.clamp(min=1e-6)
    model, count, found = Chooser(inputs.shape[1], int(labels.max()) + 1), CHOSEN, dict[str, Any]()
    at, asked = (inputs - mean) / scale, getattr(split, place)
    if run.contender == "random":
        ranking = torch.rand(inputs.shape[1])
    elif run.contender == "variance":
        ranking = spread
    elif run.contender == "L1":
        weight, one = model.head.weight, torch.ones(())
        descend(
            lambda b: F.cross_entropy(model(at[b], one), labels[b]) + run.knob * weight.abs().sum(),
            model.head.parameters(), run.rate, STEPS, len(at), BATCH,
        )  # fmt: skip
        ranking = weight.detach().abs().sum(0)
    else:
        descend(
            lambda b: F.cross_entropy(model(at[b], soft(model.scores, count, run)), labels[b]),
            model.parameters(), run.rate, STEPS, len(at), BATCH,
        )  # fmt: skip
        ranking, mask = model.scores.detach(), soft(model.scores, count, run).detach()
        hard = torch.zeros_like(mask).scatter(0, ranking.topk(count).indices, 1.0)
        for name, each in (("soft", mask), ("cut", hard)):
            found |= hits(model((asked[0] - mean) / scale, each).detach(), asked[1], name)
    chosen = ranking.topk(count).indices
    head = fitted(at[:, chosen], labels)
    found |= hits(head(((asked[0] - mean) / scale)[:, chosen]).detach(), asked[1])
    return found | {"chosen": sorted(chosen.tolist())}


def fitted(inputs: Tensor, labels: Tensor) -> nn.Linear:
    """Multinomial logistic regression, by L-BFGS."""
    head = nn.Linear(inputs.shape[1], int(labels.max()) + 1)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(head(inputs), labels) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return head


# --- (b) which experts? ---


class Experts(nn.Module):
    """Small networks beside each other, and a linear gate."""

    def __init__(self, inputs: int, classes: int, hidden: int = 32) -> None:
        super().__init__()
        self.gate = nn.Linear(inputs, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, inputs, hidden) / math.sqrt(inputs))
        self.down = nn.Parameter(torch.randn(EXPERTS, hidden, classes) / math.sqrt(hidden))

    def forward(self, inputs: Tensor, shares: Tensor) -> Tensor:
        """The experts' answers, mixed by these shares (rows, experts)."""
        return torch.einsum("re,erc->rc", shares, (inputs @ self.up).relu() @ self.down)


def kept(shares: Tensor, k: int) -> Tensor:
    """The k largest shares of each row, over their sum."""
    best = shares.topk(k, dim=1)
    return torch.zeros_like(shares).scatter(1, best.indices, best.values / best.values.sum(1, keepdim=True))


def route(run: Run, split: Split, place: str) -> dict[str, Any]:
    """Trains; then two experts answer each row (all of them for the contender "all")."""
    inputs, labels = split.train
    model = Experts(inputs.shape[1], int(labels.max()) + 1)

    def shares(rows: Tensor) -> Tensor:
        gate = model.gate(rows)
        return soft(gate, ROUTED, run) / ROUTED if run.contender in OPERATORS else (gate / run.knob).softmax(1)

    def loss(b: Tensor) -> Tensor:
        share = shares(inputs[b])
        mixed = kept(share, ROUTED) if run.contender.startswith("softmax") else share
        value = F.cross_entropy(model(inputs[b], mixed), labels[b])
        balance = EXPERTS * ((mixed > 0).double().mean(0) / ROUTED * share.mean(0)).sum()
        return value + 0.01 * balance if run.contender == "softmax, balanced" else value

    descend(loss, model.parameters(), run.rate, STEPS, len(inputs), BATCH)
    with torch.no_grad():
        rows, right = getattr(split, place)
        share = shares(rows)
        routed = share if run.contender == "all" else kept(share, ROUTED)
        load = (routed > 0).double().mean(0)
        part = load / load.sum()
        in_use = torch.special.entr(part).sum().exp().item()
        soft_hits = hits(model(rows, share), right, "soft")
        return hits(model(rows, routed), right) | soft_hits | {"load": load.tolist(), "experts in use": in_use}


# --- (c) which neighbours? ---


def near(project: nn.Module, split: Split, place: str) -> dict[str, Any]:
    """Majority among the nearest training rows by cosine; how many is chosen on the validation rows."""
    inputs, labels = split.train
    known = F.normalize(project(inputs))

    def votes(rows: Tensor) -> dict[int, Tensor]:
        parts = [(F.normalize(project(part)) @ known.T).topk(20) for part in rows.split(1000)]
        close, index = (torch.cat(each) for each in zip(*parts, strict=True))
        empty = torch.zeros(len(rows), int(labels.max()) + 1)
        return {k: empty.scatter_add(1, labels[index[:, :k]], 1 + 1e-3 * close[:, :k]) for k in (1, 3, 5, 10, 20)}

    rows, right = split.validation
    by_k = {k: hits(found, right) for k, found in votes(rows).items()}
    best = max(by_k, key=lambda k: by_k[k]["top1"])
    return {"k": best} | (by_k[best] if place == "validation" else hits(votes(split.test[0])[best], split.test[1]))


def neighbours(run: Run, split: Split, place: str) -> dict[str, Any]:
    """Learns a projection such that neighbours share the class; each step has QUERIES rows among others."""
    inputs, labels = split.train
    project: nn.Module = nn.Linear(inputs.shape[1], 64, bias=False)
    head = nn.Linear(64, int(labels.max()) + 1)
    if run.contender == "raw features":
        return near(nn.Identity(), split, place)

    def loss(b: Tensor) -> Tensor:
        points = F.normalize(project(inputs[b]))
        if run.contender == "cross-entropy":
            return F.cross_entropy(head(points) / run.knob, labels[b])
        scores, same = points[:QUERIES] @ points[QUERIES:].T, labels[b[:QUERIES], None] == labels[b[QUERIES:]]
        one = run.contender == "softmax"
        mask = (scores / run.knob).softmax(1) if one else soft(scores, NEAREST, run) / NEAREST
        return -((mask * same).sum(1) + 1e-4).log().mean()

    descend(loss, [*project.parameters(), *head.parameters()], run.rate, STEPS, len(inputs), QUERIES + BESIDE)
    with torch.no_grad():
        rows, right = getattr(split, place)
        own = hits(head(F.normalize(project(rows))), right, "head") if run.contender == "cross-entropy" else {}
        return near(project, split, place) | own


# --- running ---


class Use(NamedTuple):
    """A use: who competes, on which features, and the ranges of the search."""

    train: Callable[[Run, Split, str], dict[str, Any]]
    contenders: tuple[str, ...]
    set: str
    rates: sweep.Range
    knobs: sweep.Range
    untuned: tuple[str, ...] = ()


USES = {
    "features": Use(
        choose_features, (*OPERATORS, "L1", "variance", "random"), FEATURES,
        sweep.Range(log=(0.01, 0.3)), sweep.Range(log=(0.003, 0.3)), ("variance", "random"),
    ),
    "experts": Use(
        route, (*OPERATORS, "softmax", "softmax, balanced", "all"), f"{FEATURES}-pca256",
        sweep.Range(log=(0.001, 0.03)), sweep.Range(log=(0.1, 3.0)),
    ),
    "neighbours": Use(
        neighbours, (*OPERATORS, "softmax", "cross-entropy", "raw features"), f"{FEATURES}-pca256",
        sweep.Range(log=(0.001, 0.03)), sweep.Range(log=(0.01, 0.3)), ("raw features",),
    ),
}  # fmt: skip
PENALTIES = (sweep.Range(log=(1e-5, 1e-2)), sweep.Range(log=(1e-4, 1e-1)))
"""Of the L1 head, which searches both: after the first alone its choice lay near the upper end."""


def candidates(use: str, contender: str) -> list[Run]:
    """The tuning runs; the random numbers are the same for all contenders."""
    it = USES[use]
    if contender in it.untuned:
        return []
    pairs = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(CANDIDATES).tolist()
    ranges = PENALTIES if contender == "L1" else (it.knobs,)
    return [Run(use, contender, it.rates.at(a), knobs.at(b), TUNING_SEED) for knobs in ranges for a, b in pairs]


@cache
def rows_of(name: str, seed: int) -> Split:
    """The seed's training rows; validation and test are the same for all seeds."""
    whole = _whole(name)
    chosen = torch.randperm(len(whole.train[1]), generator=torch.Generator().manual_seed(seed))[:ROWS]
    return Split((whole.train[0][chosen], whole.train[1][chosen]), whole.validation, whole.test)


@cache
def _whole(name: str) -> Split:
    found = data.load({"name": "features", "set": name, "validation": 25})
    parts = (found.train, found.validation, found.test)
    return Split(*((torch.from_numpy(np.array(x.inputs)), torch.from_numpy(x.labels)) for x in parts))


def result(run: Run, place: str) -> dict[str, Any]:
    """One training, measured on the split of this name."""
    torch.manual_seed(run.seed)
    return USES[run.use].train(run, rows_of(USES[run.use].set, run.seed), place)


def record(run: Run) -> records.Row:
    """The run's row: from the table, from the scratch folder, or run now."""
    key = records.key_of(run.config)
    path = sweep.scratch(CHAPTER) / f"{key}.json"
    if key in _committed():
        return _committed()[key]
    if not path.is_file():
        tuning = run.seed == TUNING_SEED
        began = time.monotonic()
        found: dict[str, Any] = {"final": result(run, "validation" if tuning else "test"), "epochs": []}
        found["seconds"] = time.monotonic() - began
        name = f"{CHAPTER}.{run.use}" + ".tuning" * tuning
        records.save(records.row(run.config, found, None, train.provenance("full"), sweep=name), path)
    return records.restore(path)


@cache
def _committed() -> dict[str, records.Row]:
    return {row["key"]: row for row in records.rows(CHAPTER)}


def chosen(use: str, contender: str) -> tuple[float, float]:
    """Rate and knob of the best candidate."""
    tried = candidates(use, contender)
    reached = [json.loads(record(run)["result"])["top1"] for run in tried]
    best = tried[int(np.argmax(reached))] if tried else Run(use, contender, 0.0, 0.0, TUNING_SEED)
    return best.rate, best.knob


def run_all(uses: Iterable[str], seeds: Iterable[int] = SEEDS) -> None:
    """Runs what has no record, seed after seed."""
    for use in uses:
        best = {name: chosen(use, name) for name in tqdm(USES[use].contenders, desc=f"{use}, tuning")}
        for seed in tqdm(seeds, desc=use):
            for name, (rate, knob) in best.items():
                record(Run(use, name, rate, knob, seed))


def frame() -> pd.DataFrame:
    """The records, one column for each setting and each result; `loss` names the contender, as tables expect."""
    runs = records.load(CHAPTER)
    parts = [json.loads(p) | json.loads(r) for p, r in zip(runs["notebook_parameters"], runs["result"], strict=True)]
    found = runs.join(pd.DataFrame(parts, index=runs.index)).rename(columns={"contender": "loss"})
    place = {name: number for use in USES.values() for number, name in enumerate(use.contenders)}
    return found.sort_values("loss", key=lambda names: names.map(place), kind="stable", ignore_index=True)


def reproduce(key: str) -> pd.DataFrame:
    """Runs one record again: metric, then, now."""
    row = next(row for known, row in _committed().items() if known.startswith(key))
    settings = {name: x for name, x in json.loads(row["notebook_parameters"]).items() if name not in ("rows", "set")}
    run = Run(**settings)
    then, now = json.loads(row["result"]), result(run, "validation" if run.seed == TUNING_SEED else "test")
    return pd.DataFrame([(name, then[name], now[name]) for name in now], columns=["metric", "then", "now"])


def main(arguments: list[str] | None = None) -> None:
    """The two commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("run", "reproduce", "gather"))
    parser.add_argument("which", nargs="*", help="uses, or the first digits of a key")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if asked.command == "run":
        run_all(asked.which or USES)
    elif asked.command == "gather":
        print(*sweep.gather(CHAPTER, {}))
    else:
        print(reproduce(asked.which[0]).to_string(index=False))


if __name__ == "__main__":
    main()
