"""The fair comparison (chapter 26): every loss tuned alike in every condition, differences over seeds and test images,
and the sentences that were written down before the runs (book/preregistration.md), answered together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from topk_lab import figures, report
from topk_lab.records import chapters, ranks_of, rows_of
from topk_lab.study import keyboard
from topk_lab.study.statistics import Interval, hierarchical, mean_of_taken_seeds, t_interval, taken
from topk_lab.sweep import Range, Sweep

Array = np.ndarray[Any, Any]

DRAWS = 2000

CONDITIONS = {
    "fair.linear": "linear head, all images",
    "fair.mlp": "512 hidden units, all images",
    "fair.few_linear": "linear head, 25 images per class",
    "fair.few_mlp": "512 hidden units, 25 images per class",
    "fair.noise_mlp": "512 hidden units, noise 0.8, chosen on noisy labels",
    "fair.noise_mlp_clean": "512 hidden units, noise 0.8, chosen on true labels",
    "fair.tails": "long tail of imbalance 100",
}
"""{sweep: what it is about}, in the order of the tables."""
_ELSEWHERE = {
    "25_keyboard": "next word, 3,000 words and 16 units",
    "14_cifar100.pixels": "the fast network from pixels, to the end of its schedule",
}


# --- the runs ---


def runs(records: str = "committed", profile: str = "full") -> dict[str, pd.DataFrame]:
    """{sweep: its runs}, the tuning's under its name with ".tuning", with a column `loss` that says the contender.

    Cross-entropy may choose label smoothing, and stays cross-entropy.
    """
    frame = named(report.runs("fair", profile, records))
    return {str(name): report.of_sweep(frame, str(name)) for name in frame["sweep"].unique()}


def final_runs(every: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The runs that count, condition after condition, of those that have any."""
    return {name: every[name] for name in CONDITIONS if name in every}


def elsewhere() -> dict[str, pd.DataFrame]:
    """{sweep: its runs} of the sentences whose runs belong to other chapters, as far as there are any."""
    found = {}
    for chapter, sweep in sorted({(s.chapter, s.sweep) for s in SENTENCES if s.chapter != "fair"}):
        frame = report.of_sweep(report.runs(chapter), sweep) if chapter in chapters() else pd.DataFrame()
        if len(frame):
            found[sweep] = named(frame)
    return found


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """Runs of any chapter's random search with the names that losses have here, in `loss`."""
    naming = frame[[name for name in frame if str(name).startswith(("contender", "loss.", "model."))]]
    return frame.assign(loss=[_contender(row) for row in rows_of(naming)])


def _contender(row: Mapping[str, Any]) -> str:
    own = str(row["contender"])
    automatic = own.startswith(str(row["loss.name"]))
    return report.loss_name({**row, "loss.label_smoothing": 0}) if automatic else own


# --- seeds and test images together ---


def draws(first: Array, second: Array, metric: str) -> Array:
    """The difference first - second of a metric in 2,000 samples of seeds and of test images, both with replacement.

    Args:
        first: ranks, counted from 0, of every test image in every run (seeds, images).
        second: the same of the other loss, with the same seeds in the same order.
        metric: "top5" and the like, in points, or "candidates_99": how many guesses 99 % accuracy needs.
    """
    one, other = (_draws_of(ranks.tobytes(), ranks.dtype.str, ranks.shape, metric) for ranks in (first, second))
    return one - other


@lru_cache(maxsize=200)
def _draws_of(ranks: bytes, dtype: str, shape: tuple[int, int], metric: str) -> Array:
    """One loss's metric in every sample; what it is compared with does not matter, so cross-entropy's serves all."""
    runs = np.frombuffer(ranks, dtype=dtype).reshape(shape)
    return mean_of_taken_seeds(_metric(runs, taken(shape[1], DRAWS), metric))


def variances(hits: Array) -> tuple[float, float, float]:
    """Of differences (seeds, images) the variances that belong to seeds, to images and to the rest, none below 0."""
    seeds, images = hits.shape
    of_seeds, of_images = hits.mean(1), hits.mean(0)
    rest = ((hits - of_images - of_seeds[:, None] + hits.mean()) ** 2).sum() / ((seeds - 1) * (images - 1))
    found = of_seeds.var(ddof=1) - rest / images, of_images.var(ddof=1) - rest / seeds
    return max(float(found[0]), 0.0), max(float(found[1]), 0.0), float(rest)


def interval(values: Array, confidence: float = 0.95, mean: float | None = None) -> Interval:
    """The central part of the draws around `mean`, that of the runs, or around their own."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()) if mean is None else mean, float(low), float(high), len(values))


def compared(frame: pd.DataFrame, metric: str, baseline: str = "cross-entropy") -> dict[str, Interval]:
    """{loss: the interval of its difference to the baseline}, over the seeds that both have."""
    by_loss, found = dict(iter(frame.groupby("loss", sort=False))), dict[str, Interval]()
    for loss, group in by_loss.items():
        if loss != baseline and set(group["seed"]) & set(by_loss[baseline]["seed"]):
            mean, drawn = _mean_and_draws(*_common(group, by_loss[baseline]), metric)
            found[str(loss)] = interval(drawn, mean=mean)
    return found


def along_k(frame: pd.DataFrame, numbers: Iterable[int]) -> dict[str, list[Interval]]:
    """{loss: for each number of guesses the interval of its accuracy less that of cross-entropy}."""
    found = [compared(frame, f"top{k}") for k in numbers]
    return {loss: [at[loss] for at in found] for loss in found[0]}


def verdicts(frames: Mapping[str, pd.DataFrame], metric: str, level: float = 0.05) -> list[dict[str, Any]]:
    """A row for every sweep and loss: ahead of cross-entropy, level or behind, by Benjamini and Hochberg over all rows.

    `over seeds` is the paired t interval, `over seeds and images` the interval of the draws.
    """
    rows, p_values = list[dict[str, Any]](), list[float]()
    for name, frame in frames.items():
        base = frame[frame["loss"] == report.BASELINE]
        for loss, group in frame[frame["loss"] != report.BASELINE].groupby("loss", sort=False):
            first, second = _common(group, base)
            drawn = draws(first, second, metric)
            mean, p = _difference(first, second, metric), 2 * min((drawn <= 0).mean(), (drawn >= 0).mean())
            rows.append({"sweep": name, "loss": str(loss), "difference": float(mean.mean()), "over seeds":
                         t_interval(mean), "over seeds and images": interval(drawn)})  # fmt: skip
            p_values.append(float(min(max(p, 1 / DRAWS), 1.0)))
    sure = false_discovery_control(p_values) < level if rows else []
    words = {1: "ahead", -1: "behind"}
    for row, apart in zip(rows, sure, strict=True):
        row["verdict"] = words.get(int(apart) * int(np.sign(row["difference"])), "level")
    return rows


Judged = Mapping[str, Sequence[Mapping[str, Any]]]
"""{"top-5": `verdicts`, "top-1": `verdicts`}, in the same order."""


def both(frames: Mapping[str, pd.DataFrame]) -> Judged:
    """`verdicts` in top-5 and in top-1, each over all conditions together."""
    return {metric: verdicts(frames, metric.replace("-", "")) for metric in ("top-5", "top-1")}


def judged(frames: Mapping[str, pd.DataFrame], shown: Iterable[str]) -> list[dict[str, Any]]:
    """`both` as rows of a table, for the conditions that are shown."""
    return tabled(both(frames), shown)


def tabled(found: Judged, shown: Iterable[str]) -> list[dict[str, Any]]:
    """A row of a table for every condition that is shown and loss."""
    wanted = set(shown)
    return [
        {"condition": CONDITIONS.get(rows[0]["sweep"], rows[0]["sweep"]), "loss": rows[0]["loss"]}
        | {f"{metric} against {report.BASELINE}": _cell(row) for metric, row in zip(found, rows, strict=True)}
        for rows in zip(*found.values(), strict=True)
        if rows[0]["sweep"] in wanted
    ]


def chart(found: Judged, alt: str) -> None:
    """A map a metric, conditions downwards and losses to the right: differences told apart, a dot for the others."""
    rows = next(iter(found.values()))
    losses = list(dict.fromkeys(str(row["loss"]) for row in rows))
    names = [name for name in CONDITIONS if any(row["sweep"] == name for row in rows)]
    maps = {metric: np.full((len(names), len(losses)), np.nan) for metric in found}
    marks = {metric: np.full(cells.shape, "", dtype=object) for metric, cells in maps.items()}
    for metric, each in found.items():
        for row in each:
            at = names.index(row["sweep"]), losses.index(row["loss"])
            maps[metric][at] = row["difference"]
            marks[metric][at] = "•" if row["verdict"] == "level" else f"{row['difference']:+.1f}"
    brief = [loss.replace("differentiable [.5, 0, 0, 0, .5]", "differen- tiable mixture") for loss in losses]
    columns = [fill(loss, 8, break_long_words=False) for loss in brief]
    figures.heat(
        maps, [fill(CONDITIONS[name], 20) for name in names], columns, alt, reach=4, marks=marks, across=1, letters=8,
        size=(4.9, 1.6 + 0.9 * len(names)), label=f"difference to {report.BASELINE}, points",
    )  # fmt: skip


def _cell(row: Mapping[str, Any]) -> str:
    around = row["over seeds and images"]
    difference, low, high = map(report.signed, (row["difference"], around.low, around.high))
    return f"{row['verdict']} {difference} [{low},\u00a0{high}]"


def _difference(first: Array, second: Array, metric: str) -> Array:
    """Seed by seed, on the test set as it is."""
    runs = [_metric(ranks, np.ones((ranks.shape[1], 1), dtype=np.float32), metric)[:, 0] for ranks in (first, second)]
    found: Array = runs[0] - runs[1]
    return found


def _mean_and_draws(first: Array, second: Array, metric: str) -> tuple[float, Array]:
    """The runs' own difference, and its draws."""
    return float(_difference(first, second, metric).mean()), draws(first, second, metric)


def _metric(ranks: Array, weights: Array, metric: str) -> Array:
    """Of every run (seeds, images) on every weighted set of test images (images, sets): (seeds, sets)."""
    kind, number = metric.rsplit("_", 1) if "_" in metric else ("top", metric.removeprefix("top"))
    images = weights[:, 0].sum()
    if kind == "top":
        found: Array = 100 * ((ranks < int(number)).astype(np.float32) @ weights) / images
        return found
    return np.array([_guesses(run, weights, images * (100 - int(number)) / 100) for run in ranks])


def _guesses(ranks: Array, weights: Array, misses: float) -> Array:
    """How many guesses leave at most so many misses, for every set: from the worst ranks down, few images count."""
    runs, missed = np.ones(weights.shape[1]), np.zeros(weights.shape[1])
    for k in range(int(ranks.max()), 0, -1):
        missed += weights[ranks == k].sum(0)
        short = missed > misses  # k guesses are too few: one more
        runs[short & (runs == 1)] = k + 1
        if short.all():
            break
    return runs


def _common(first: pd.DataFrame, second: pd.DataFrame) -> tuple[Array, Array]:
    seeds = sorted(set(first["seed"]) & set(second["seed"]))
    ready = (frame.drop_duplicates("seed").set_index("seed").loc[seeds] for frame in (first, second))
    one, other = map(ranks_of, ready)
    return one, other


# --- better, or easier to tune ---


def expected_best(tried: pd.DataFrame, metric: str) -> dict[str, list[float]]:
    """{loss: the test metric to expect of 1, 2, ... random candidates, the best on validation images being taken}.

    Candidate by candidate, means over the tuning seeds; among n of N candidates without replacement the one that is
    j-th best of all is taken with probability C(N - j, n - 1) / C(N, n). A run that diverged counts as 0.
    """
    found: dict[str, list[float]] = {}
    for loss, group in tried.groupby("loss", sort=False):
        mean = group.fillna({f"validation.{metric}": 0.0, metric: 0.0})
        mean = mean.groupby("candidate")[[f"validation.{metric}", metric]].mean()
        reached = 100 * mean.sort_values(f"validation.{metric}", ascending=False)[metric].to_numpy()
        number = len(reached)
        found[str(loss)] = [
            float(sum(math.comb(number - j, n - 1) * value for j, value in enumerate(reached, 1)))
            / math.comb(number, n)
            for n in range(1, number + 1)
        ]
    return found


def near_an_edge(final: pd.DataFrame, asked: Sweep) -> dict[str, bool]:
    """{loss and setting: whether the chosen value lies in the outer tenth of its range, a twentieth at each end}."""
    found = {}
    for (loss, title), group in final.groupby(["loss", "contender"], sort=False):
        own = next(contender.search for contender in asked.contenders if contender.title() == title)
        for name, axis in {**(asked.tuning.search if asked.tuning else {}), **own}.items():
            if isinstance(axis, Range):
                low, high = axis.log or axis.uniform or (0.0, 1.0)
                value = float(group[name].iloc[0])
                share = math.log(value / low) / math.log(high / low) if axis.log else (value - low) / (high - low)
                found[f"{loss}: {name.split('.')[-1]}"] = not 0.05 <= share <= 0.95
    return found


# --- the sentences ---


@dataclass(frozen=True)
class Sentence:
    """`first` has more than `least` points of `metric` over `second`, in the runs of a sweep."""

    name: str
    chapter: str
    sweep: str
    first: str
    second: str
    metric: str
    least: float = 0.0


SENTENCES = (
    Sentence("S1", "fair", "fair.linear", "smooth, k = 1 and 5", "cross-entropy", "top5"),
    Sentence("S2", "fair", "fair.linear", "smooth, k = 1 and 5", "cross-entropy", "top1", -0.3),
    Sentence("S3", "fair", "fair.mlp", "smooth, k = 1 and 5", "cross-entropy", "top5"),
    Sentence("S4", "fair", "fair.few_linear", "smooth", "cross-entropy", "top5"),
    Sentence("S5", "fair", "fair.few_mlp", "smooth", "cross-entropy", "top5"),
    Sentence("S6", "fair", "fair.noise_mlp_clean", "smooth", "cross-entropy", "top5"),
    Sentence("S7", "fair", "fair.noise_mlp", "smooth", "cross-entropy", "top5"),
    Sentence("S8", "fair", "fair.tails", "cross-entropy adjusted after training", "weighted cross-entropy", "top5"),
    Sentence("S9", "fair", "fair.linear", "transition", "cross-entropy", "top5", -0.3),
    Sentence("S10", "fair", "fair.linear", "cross-entropy", "transition", "candidates_99"),
    Sentence("S11", "25_keyboard", "25_keyboard", "smooth, k = 3", "cross-entropy", "top3"),
    Sentence("S12", "14_cifar100", "14_cifar100.pixels", "smooth, k = 1 and 5", "cross-entropy", "top5"),
)
"""Test sets of CIFAR-100 are balanced, so the macro top-5 accuracy of S8 is the top-5 accuracy."""


def answers(frames: Mapping[str, pd.DataFrame], sentences: Iterable[Sentence] = SENTENCES) -> list[dict[str, Any]]:
    """A row for every sentence: the difference, its interval, the p-value, and held, failed or open by Holm at 5 %.

    Args:
        frames: {sweep: its final runs, with `loss`}; a sentence whose sweep is missing here stays open.
        sentences: read together.
    """
    found, means, against = {}, {}, {}
    asked = list(sentences)
    for sentence in asked:
        runs = frames.get(sentence.sweep)
        parts = [] if runs is None else [runs[runs["loss"] == loss] for loss in (sentence.first, sentence.second)]
        if parts and all(len(part) for part in parts):
            means[sentence.name], drawn = _drawn(sentence, *parts)
            found[sentence.name] = sampled = drawn - sentence.least
            against[sentence.name] = (float((sampled <= 0).mean()), float((sampled >= 0).mean()))
    held = holm({name: p for name, (p, _) in against.items()}, len(asked))
    failed = holm({name: p for name, (_, p) in against.items()}, len(asked))
    rows = []
    for sentence in asked:
        name = sentence.name
        row: dict[str, Any] = {"sentence": name, "answer": "open: runs are missing"}
        if name in found:
            answer = "held" if name in held else "failed" if name in failed else "open"
            row |= {"answer": answer, "difference": interval(found[name] + sentence.least, mean=means[name]),
                    "needed": sentence.least, "p": against[name][0],
                    "seeds": len(_seeds(frames[sentence.sweep], sentence))}  # fmt: skip
        rows.append(row)
    return rows


def _drawn(sentence: Sentence, first: pd.DataFrame, second: pd.DataFrame) -> tuple[float, Array]:
    """The difference and its draws; of next words the rows of a verse stay together, since they share words."""
    one, other = _common(first, second)
    if "data.vocabulary" not in first:
        return _mean_and_draws(one, other, sentence.metric)
    k, verse = int(sentence.metric.removeprefix("top")), keyboard.test_rows(int(first["data.vocabulary"].iloc[0]))[1]
    apart = 100.0 * ((one < k).astype(np.float64) - (other < k))
    around, drawn = hierarchical(apart, groups=verse, draws=DRAWS)
    return around.mean, drawn


def p_value(p: float) -> str:
    """Four digits, as far as the draws tell them."""
    least = 1 / DRAWS
    return f"< {least:g}" if p < least else f"> {1 - least:g}" if p > 1 - least else f"{p:.4f}"


def told(name: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """A sentence as a question, with its answer and the numbers behind it where there are runs.

    Args:
        name: "S1" and the like.
        rows: of `answers`.
    """
    sentence = next(sentence for sentence in SENTENCES if sentence.name == name)
    row = next(row for row in rows if row["sentence"] == name)
    asked = f"**{name}**, {question(sentence)}"
    if "difference" not in row:
        return f"{asked} **Open**: the runs are not finished."
    found = row["difference"]
    guesses = sentence.metric.startswith("candidates")
    size = f"it saves {found.mean:.2f} guesses" if guesses else f"the difference is {report.signed(found.mean)} points"
    around = f"95 % interval {report.low_to_high(found)}, {row['seeds']} seeds"
    return f"{asked} **{row['answer'].capitalize()}**: {size} ({around})."


def question(sentence: Sentence) -> str:
    """The sentence as a question, after the condition it is asked in."""
    return f"{(CONDITIONS | _ELSEWHERE)[sentence.sweep]}: {_question(sentence)}"


def _question(sentence: Sentence) -> str:
    first, second, words = f"*{sentence.first}*", f"*{sentence.second}*", report.metric_name(sentence.metric)
    if sentence.metric.startswith("candidates"):
        return f"does {second} need fewer guesses than {first} for {sentence.metric.removeprefix('candidates_')} %?"
    if sentence.least:
        return f"does {first} lose less than {-sentence.least:g} points of {words} against {second}?"
    return f"is {first} ahead of {second} in {words}?"


def _seeds(runs: pd.DataFrame, sentence: Sentence) -> set[int]:
    first, second = (set(runs.loc[runs["loss"] == loss, "seed"]) for loss in (sentence.first, sentence.second))
    return first & second


def holm(p_values: Mapping[str, float], comparisons: int, level: float = 0.05) -> set[str]:
    """The names that Holm's procedure accepts: the i-th smallest p-value must lie below level / (comparisons + 1 - i).

    A p-value that is no draw of 2,000 counts as one half of a draw.
    """
    accepted = set[str]()
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if max(p, 0.5 / DRAWS) > level / (comparisons - place):
            break
        accepted.add(name)
    return accepted
