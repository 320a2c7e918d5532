"""Chapter 25: what a keyboard's three words are worth, from records, and what counting alone reaches.

A run's `ranks` say of every test row how many words score above the right one. From them follow the top-k accuracies
and the keystrokes saved; two runs on the same rows are compared row by row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from topk_lab import data, records, report
from topk_lab.data import Array, DataSet
from topk_lab.page import table
from topk_lab.study.statistics import Interval, hierarchical, t_interval

CHAPTER = "25_keyboard"
SHOWN = 3
"""Words above the keys."""
CONDITION = ("data.vocabulary", "model.hidden")


# --- the text ---


def after(words: str, count: int) -> tuple[dict[str, float], int]:
    """{next word: its share}, the `count` commonest after these words in the training verses; how often they occur."""
    before = words.split()
    found: Counter[str] = Counter()
    for verse in (verse for number, verse in enumerate(data.verses()) if number % 10):
        for end in range(len(before), len(verse)):
            if verse[end - len(before) : end] == before:
                found[verse[end]] += 1
    total = found.total()
    return {word: times / total for word, times in found.most_common(count)}, total


@lru_cache(maxsize=2)
def test_rows(vocabulary: int) -> tuple[Array, Array]:
    """For every row of the words' test split the letters of its word and the number of its verse."""
    found = data.load({"name": "words", "vocabulary": vocabulary})
    known = set(found.classes)
    rows = [sum(token in known for token in verse) for verse in data.verses()[::10]]
    letters = np.array([len(word) for word in found.classes])
    return letters[found.test.labels], np.repeat(np.arange(len(rows)), rows)


def counted(found: DataSet, context: int) -> dict[int, float]:
    """{k: the test accuracy of k guesses} without a model: the words seen most often after the last `context` tokens.

    Where fewer than k words were seen there, the list is filled from the last `context - 1` tokens, and so on.
    """
    most, tokens = 5, len(found.classes) + 2
    listed, filled = np.full((len(found.test), most), -1), np.zeros(len(found.test), dtype=np.int64)
    for length in range(context, -1, -1):
        before, test = (_coded(split.inputs, length, tokens) for split in (found.train, found.test))
        for words in _commonest(before, found.train.labels, test, most).T:
            new = (words >= 0) & (listed != words[:, None]).all(1) & (filled < most)
            listed[new, filled[new]] = words[new]
            filled += new
    hits = np.cumsum(listed == found.test.labels[:, None], axis=1).mean(0)
    return {k: float(hits[k - 1]) for k in (1, SHOWN, most)}


def _coded(inputs: Array, length: int, tokens: int) -> Array:
    """The last `length` tokens of every row as one number."""
    code: Array = np.zeros(len(inputs), dtype=np.int64)
    for column in range(inputs.shape[1] - length, inputs.shape[1]):
        code = code * tokens + inputs[:, column]
    return code


def _commonest(before: Array, labels: Array, asked: Array, most: int) -> Array:
    """The words seen most often after each of `asked`, (rows, most), the lower number first of equals; -1 for none."""
    pairs, times = np.unique(np.stack([before, labels], 1), axis=0, return_counts=True)
    pairs = pairs[np.lexsort((pairs[:, 1], -times, pairs[:, 0]))]
    codes, starts = np.unique(pairs[:, 0], return_index=True)
    ends = np.append(starts[1:], len(pairs))
    at = np.minimum(np.searchsorted(codes, asked), len(codes) - 1)
    places = starts[at][:, None] + np.arange(most)
    there = (codes[at] == asked)[:, None] & (places < ends[at][:, None])
    return np.where(there, pairs[np.minimum(places, len(pairs) - 1), 1], -1)


# --- what a row counts for ---


def saved(ranks: Array, lengths: Array, shown: int = SHOWN) -> Array:
    """For every row the keystrokes saved, as a share of the mean length: letters - 1 where the word is shown, else 0.

    ranks (..., rows) counts from 0, lengths (rows,) are letters; the mean over rows is

        sum (length - 1) [rank < shown] / sum length.
    """
    found: Array = (ranks < shown) * ((lengths - 1) / lengths.mean())
    return found


def values_of(frame: pd.DataFrame, metric: str, lengths: Array) -> Array:
    """What each row of each run counts for, in per cent, (runs, rows): `top<k>` or `keystrokes saved`."""
    ranks = records.ranks_of(frame)
    if metric == "keystrokes saved":
        return 100 * saved(ranks, lengths)
    return 100.0 * (ranks < int(metric.removeprefix("top")))


# --- comparing ---

Difference = tuple[Interval, Interval, Array]
"""The interval over seeds, that over seeds and verses, and the draws behind the second."""


def conditions(runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """("3,000 words, 16 units", its runs), the smallest first."""
    return [
        (f"{words:,.0f} words, {units:.0f} units", part.reset_index(drop=True))
        for (words, units), part in runs.groupby(list(CONDITION))
    ]


def registered_first(runs: pd.DataFrame) -> pd.DataFrame:
    """Without the longer search, and without the first look once the search that S11 asks about has runs that count."""
    others = [f"{CHAPTER}.long"] + [f"{CHAPTER}.first"] * int((runs["sweep"] == CHAPTER).any())
    return runs[~runs["sweep"].str.startswith(tuple(others))].reset_index(drop=True)


def latest(runs: pd.DataFrame) -> pd.DataFrame:
    """Of each loss and condition the runs of the last choice of settings: a longer search may choose anew."""
    settings = [str(name) for name in runs if str(name).startswith(("loss.", "training."))]
    kept = list[pd.DataFrame]()
    for _, group in runs.sort_values("date", kind="stable").groupby([*CONDITION, "loss"], sort=False):
        choice = group[settings].map(str).agg(" ".join, axis=1)
        kept.append(group[choice == choice.iloc[-1]])
    return pd.concat(kept, ignore_index=True) if kept else runs


def there(runs: pd.DataFrame) -> str:
    """How many of the runs that the chapter's sweeps ask for, tuning aside, have a record."""
    asked = sum(about["runs"] for about in records.sweeps(CHAPTER) if not about["sweep"].endswith((".tuning", ".then")))
    return f"*Drawn from {len(runs)} of the {asked} runs that this chapter asks for.*"


def alike(others: pd.DataFrame, part: pd.DataFrame) -> pd.DataFrame:
    """Those of the other runs that have this part's condition."""
    same = (others[list(CONDITION)] == part[list(CONDITION)].iloc[0]).all(axis=1)
    return others[same].reset_index(drop=True)


def differences(part: pd.DataFrame, metrics: Sequence[str]) -> dict[str, dict[str, Difference]]:
    """{loss: {metric: its difference to cross-entropy}} in points, for the runs of one condition.

    Runs are paired by their seed, and row by row. Verses are drawn whole, since their rows share words.
    """
    letters, verse = test_rows(int(part["data.vocabulary"].iloc[0]))
    by_loss = {str(loss): runs.set_index("seed") for loss, runs in part.groupby("loss", sort=False)}
    base, found = by_loss.pop(report.BASELINE, part[:0]), dict[str, dict[str, Difference]]()
    for loss, own in by_loss.items():
        common = sorted(set(own.index) & set(base.index))
        for metric in metrics if common else ():
            apart = values_of(own.loc[common], metric, letters) - values_of(base.loc[common], metric, letters)
            both, draws = hierarchical(apart, groups=verse)
            found.setdefault(loss, {})[metric] = (t_interval(apart.mean(1)), both, draws)
    return found


def told(loss: str, found: Mapping[str, Mapping[str, Difference]], metric: str) -> str:
    """A sentence of `differences`: ahead of cross-entropy, level with it or behind, by how much, and the interval."""
    _, both, _ = found[loss][metric]
    where = ("level with", "ahead of", "behind")[both.side]
    return (
        f"*{loss}* is {where} {report.BASELINE} in {report.metric_name(metric)}: {both.mean:+.2f} points "
        f"({both.low:+.2f} to {both.high:+.2f})."
    )


def compared(found: Mapping[str, Mapping[str, Difference]]) -> None:
    """A row for every loss and metric: its difference to cross-entropy with both intervals."""
    table([
        {
            "loss": loss, "what": report.metric_name(metric), "seeds": seeds.count, "difference": f"{seeds.mean:+.2f}",
            "over seeds": f"{seeds.low:+.2f} to {seeds.high:+.2f}",
            "over seeds and verses": f"{both.low:+.2f} to {both.high:+.2f}",
        }
        for loss, by in found.items()
        for metric, (seeds, both, _) in by.items()
    ])  # fmt: skip


def absolute(part: pd.DataFrame, metrics: Sequence[str]) -> None:
    """A row for every loss: the mean of each metric over its seeds in per cent, with half the interval over seeds."""
    letters, _ = test_rows(int(part["data.vocabulary"].iloc[0]))
    table([
        {"loss": loss, "seeds": len(runs)}
        | {
            f"{report.metric_name(metric)} (%)": str(t_interval(values_of(runs, metric, letters).mean(1)))
            for metric in metrics
        }
        for loss, runs in part.groupby("loss", sort=False)
    ])  # fmt: skip
