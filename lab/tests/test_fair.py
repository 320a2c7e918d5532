"""The fair comparison's arithmetic, against slow and plain ways."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest

from topk_lab.study import fair
from topk_lab.sweep import Sweep


def ranks(seeds: int, images: int, shift: float, seed: int = 0) -> np.ndarray:
    """Ranks that share images' difficulty and differ by seed."""
    generator = np.random.default_rng(seed)
    difficulty = generator.exponential(4.0, images)
    return np.minimum(difficulty * np.exp(0.1 * generator.standard_normal((seeds, images)) + shift), 255).astype(
        np.uint8
    )


def test_the_interval_covers_both_sources() -> None:
    """The variance of the draws is that of seeds plus that of images, as for a mean over a table of both."""
    first, second = ranks(10, 3000, 0.0), ranks(10, 3000, 0.1, seed=1)
    drawn = fair.draws(first, second, "top5")
    hits = 100.0 * ((first < 5).astype(float) - (second < 5))
    assert float(drawn.mean()) == pytest.approx(hits.mean(), abs=float(4 * drawn.std() / fair.DRAWS**0.5))
    over_seeds, over_images = hits.mean(1).var() / 10, hits.mean(0).var() / 3000
    rest = (hits - hits.mean(0) - hits.mean(1)[:, None] + hits.mean()).var() / 30_000
    assert float(drawn.var()) == pytest.approx(over_seeds + over_images + rest, rel=0.12)


def test_candidates_are_counted_as_the_metric_does() -> None:
    first, second = ranks(3, 2000, 0.0), ranks(3, 2000, 0.4)
    drawn = fair.draws(second, first, "candidates_99")
    plain = [
        np.mean([np.sort(run)[int(np.ceil(0.99 * 2000)) - 1] + 1 for run in x.astype(int)]) for x in (first, second)
    ]
    assert float(drawn.mean()) == pytest.approx(plain[1] - plain[0], abs=float(3 * drawn.std()))
    assert drawn.min() > 0


def test_expected_best_by_enumeration() -> None:
    validation, test = [0.5, 0.7, 0.6, 0.1], [0.51, 0.66, 0.64, 0.2]
    tried = pd.DataFrame({"loss": "a", "candidate": range(4), "validation.top5": validation, "top5": test})
    found = fair.expected_best(tried, "top5")["a"]
    for n in (1, 2, 3, 4):
        chosen = [test[max(part, key=lambda c: validation[c])] for part in itertools.combinations(range(4), n)]
        assert found[n - 1] == pytest.approx(100 * np.mean(chosen))


def test_holm() -> None:
    assert fair.holm({"a": 0.001, "b": 0.02, "c": 0.03}, 3) == {"a", "b", "c"}
    assert fair.holm({"a": 0.001, "b": 0.03, "c": 0.03}, 3) == {"a"}
    assert fair.holm({"a": 0.03}, 2) == set()
    assert fair.holm({"a": 0.0}, 1000) == set(), "2,000 draws do not prove less than their number allows"


def frame(losses: dict[str, np.ndarray]) -> pd.DataFrame:
    rows = [{"loss": name, "seed": seed, "ranks": run.tobytes()} for name, runs in losses.items()
            for seed, run in enumerate(runs)]  # fmt: skip
    return pd.DataFrame(rows)


def test_sentences_hold_fail_or_stay_open() -> None:
    runs = frame({"a": ranks(10, 3000, 0.0), "b": ranks(10, 3000, 0.4), "c": ranks(10, 3000, 0.0, seed=0)})
    asked = [
        fair.Sentence("right", "x", "s", "a", "b", "top5"),
        fair.Sentence("wrong", "x", "s", "b", "a", "top5"),
        fair.Sentence("level", "x", "s", "a", "c", "top5"),
        fair.Sentence("unknown", "x", "t", "a", "b", "top5"),
    ]
    found = {row["sentence"]: row["answer"] for row in fair.answers({"s": runs}, asked)}
    assert found == {"right": "held", "wrong": "failed", "level": "open", "unknown": "open: runs are missing"}


def test_answers_are_told_with_their_numbers() -> None:
    wide = frame({"cross-entropy": ranks(10, 3000, 0.4), "smooth, k = 1 and 5": ranks(10, 3000, 0.0)})
    rows = fair.answers({"fair.linear": wide})
    held = fair.told("S1", rows)
    asked = "**S1**, linear head, all images: is *smooth, k = 1 and 5* ahead of *cross-entropy* in top-5?"
    assert held.startswith(asked)
    assert "**Held**: the difference is +" in held
    assert "points (95 % interval +" in held
    assert held.endswith(", 10 seeds).")
    assert "lose less than 0.3 points of top-1 against *cross-entropy*? **Held**" in fair.told("S2", rows)
    unknown = fair.told("S10", rows)
    assert "does *transition* need fewer guesses than *cross-entropy* for 99 %?" in unknown
    assert unknown.endswith("**Open**: the runs are not finished.")


def test_verdicts_are_shown_for_some_conditions_and_judged_over_all() -> None:
    one = frame({"cross-entropy": ranks(10, 3000, 0.4), "smooth": ranks(10, 3000, 0.0)})
    rows = fair.judged({"fair.linear": one, "fair.mlp": one}, ["fair.mlp"])
    assert [(row["condition"], row["loss"]) for row in rows] == [("512 hidden units, all images", "smooth")]
    assert rows[0]["top-5 against cross-entropy"].startswith("ahead +")
    along = fair.along_k(one, (1, 5))["smooth"]
    assert along[1] == fair.compared(one, "top5")["smooth"]
    assert len(along) == 2


def test_variances_of_seeds_images_and_the_rest() -> None:
    random = np.random.default_rng(0)
    parts = 3.0 * random.normal(size=(500, 1)), 2.0 * random.normal(size=(1, 500)), random.normal(size=(500, 500))
    assert fair.variances(sum(parts[1:], parts[0])) == pytest.approx((9.0, 4.0, 1.0), rel=0.2)
    assert fair.variances(np.ones((3, 4))) == (0.0, 0.0, 0.0)


def test_a_chart_writes_what_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Any] = {}
    monkeypatch.setattr(fair.figures, "heat", lambda *args, **options: shown.update(maps=args[0], **options))
    row = {"sweep": "fair.linear", "loss": "smooth", "difference": 1.26, "verdict": "ahead"}
    other = row | {"sweep": "fair.tails", "loss": "noised", "verdict": "level"}
    fair.chart({"top-5": [row, other], "top-1": [row, other]}, "alt")
    assert shown["marks"]["top-5"].tolist() == [["+1.3", ""], ["", "•"]]
    assert np.isnan(shown["maps"]["top-1"]).tolist() == [[False, True], [True, False]]


def test_only_choices_at_an_end_are_near_it() -> None:
    rates = {"training.learning_rate": {"log": [1e-4, 1.0]}}
    contenders = [
        {"name": "a", "loss": {"name": "smooth"}, "search": {"loss.tau": {"uniform": [0.0, 2.0]}}},
        {"name": "b", "loss": {"name": "cross_entropy"}, "search": {"loss.label_smoothing": [0.0, 0.1]}},
    ]
    asked = Sweep.model_validate({
        "data": {}, "model": {}, "contenders": contenders, "tuning": {"search": rates, "candidates": 8}
    })  # fmt: skip
    chosen = pd.DataFrame({
        "loss": ["a", "b"], "contender": ["a", "b"], "training.learning_rate": [1e-3, 0.9], "loss.tau": [1.95, None],
        "loss.label_smoothing": [None, 0.1],
    })  # fmt: skip
    found = fair.near_an_edge(chosen, asked)
    assert found == {"a: learning_rate": False, "b: learning_rate": True, "a: tau": True}
