"""Chapter 25: counting, keystrokes, differences that are paired by seed and by row, and the keyboard in the page."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from topk_lab import data, models
from topk_lab.data import DataSet, Split
from topk_lab.study import keyboard, suggestions


def words_of(train: list[list[int]], test: list[list[int]], classes: int) -> DataSet:
    """Rows of two tokens of context and the next word."""
    splits = [Split(np.array(rows)[:, :-1], np.array(rows)[:, -1]) for rows in (train, test)]
    nothing: Any = None
    names = tuple("abcdefgh"[:classes])
    return DataSet(splits[0], nothing, splits[1], names, None, np.zeros(classes), (), (), "", {})


def test_counting_equals_a_dictionary_of_counters() -> None:
    rows = np.random.default_rng(0).integers(0, 6, size=(400, 3)).tolist()
    found = words_of(rows[:300], rows[300:], 6)
    for context in range(3):
        hits = Counter[int]()
        for *before, label in rows[300:]:
            listed: list[int] = []
            for length in range(context, -1, -1):
                tail = before[len(before) - length :]
                seen = Counter(row[2] for row in rows[:300] if row[2 - length : 2] == tail)
                listed += [word for word in sorted(seen, key=lambda w: (-seen[w], w)) if word not in listed]
            hits.update(k for k in (1, 3, 5) if label in listed[:k])
        assert keyboard.counted(found, context) == pytest.approx({k: hits[k] / 100 for k in (1, 3, 5)})


def test_the_words_after_some_words() -> None:
    shares, times = keyboard.after("in the", 4)
    assert "beginning" not in shares
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    land = sum(
        verse[place : place + 3] == ["in", "the", "land"]
        for number, verse in enumerate(data.verses())
        for place in range(len(verse))
        if number % 10
    )
    assert shares["land"] * times == pytest.approx(land)


def test_keystrokes_saved_by_hand() -> None:
    ranks, letters = np.array([[0, 2, 3, 1], [3, 3, 3, 0]]), np.array([1, 3, 5, 9])
    assert keyboard.saved(ranks, letters).mean(1) == pytest.approx([(0 + 2 + 8) / 18, 8 / 18])
    assert keyboard.saved(ranks, letters, shown=1).mean(1) == pytest.approx([0, 8 / 18])


def test_differences_are_paired_by_seed_and_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    base = random.integers(0, 6, size=(3, 300)).astype(np.uint8)
    worse = np.where(random.random((3, 300)) < 0.1, 200, base).astype(np.uint8)
    frame = pd.DataFrame([
        {"loss": loss, "seed": seed, "ranks": rows[seed].tobytes(), "data.vocabulary": 10, "model.hidden": 4}
        for loss, rows in (("cross-entropy", base), ("smooth, k = 3", worse))
        for seed in (2, 0, 1)[: 3 if loss == "cross-entropy" else 2]
    ])  # fmt: skip
    letters = np.full(300, 4)
    monkeypatch.setattr(keyboard, "test_rows", lambda vocabulary: (letters, np.arange(300) // 3))
    ((words, part),) = keyboard.conditions(frame)
    found = keyboard.differences(part, ["top3", "keystrokes saved"])["smooth, k = 3"]
    over_seeds, both, draws = found["top3"]
    lost = ((worse >= 3) & (base < 3))[[0, 2]].mean()
    assert words == "10 words, 4 units"
    assert over_seeds.count == 2  # the third seed has no partner
    assert (over_seeds.mean, both.mean) == pytest.approx((-100 * lost, -100 * lost))
    assert both.high < 0
    assert (draws < 0).all()
    assert found["keystrokes saved"][0].mean == pytest.approx(-100 * lost * 3 / 4)
    told = keyboard.told("smooth, k = 3", {"smooth, k = 3": found}, "top3")
    assert told.startswith(f"*smooth, k = 3* is behind cross-entropy in top-3: {both.mean:+.2f} points (")
    assert keyboard.differences(part[part["loss"] != "cross-entropy"], ["top3"]) == {}
    assert len(keyboard.alike(frame.assign(**{"model.hidden": 5}), part)) == 0


def test_the_runs_of_the_last_choice_count() -> None:
    same = {"data.vocabulary": 10, "model.hidden": 4, "loss": "smooth, k = 3", "loss.tau": 0.5}
    rows = [
        {**same, "training.learning_rate": rate, "date": f"2030-01-0{day}", "seed": seed}
        for rate, day, seed in ((0.1, 1, 0), (0.1, 2, 1), (0.2, 3, 0), (0.2, 4, 1))
    ]
    other = {**rows[0], "loss": "cross-entropy", "loss.tau": None, "seed": 7}
    found = keyboard.latest(pd.DataFrame([*rows, other]))
    assert found[["training.learning_rate", "seed"]].to_numpy().tolist() == [[0.2, 0], [0.2, 1], [0.1, 7]]
    assert keyboard.latest(pd.DataFrame(rows[:0], columns=list(rows[0]))).empty


def test_test_rows_follow_the_split() -> None:
    letters, verse = keyboard.test_rows(50)
    found = data.load({"name": "words", "vocabulary": 50})
    assert len(letters) == len(verse) == len(found.test)
    first = [token for token in data.verses()[0] if token in found.classes]
    assert [found.classes[label] for label in found.test.labels[verse == 0]] == first
    assert letters[: len(first)].tolist() == [len(word) for word in first]


# --- the keyboard in the page ---


def test_packed_weights_give_nearly_the_scores_of_the_net() -> None:
    torch.manual_seed(0)
    settings = models.NextWord(name="next_word", embedding=8, hidden=5)
    net = models.NextWordNet(32, 3, settings, 30)
    model = suggestions.model_of(net.state_dict())
    tokens = torch.randint(0, 32, (200, 3))
    with torch.no_grad():
        expected = net(tokens).numpy()
    found = model.scores(tokens.numpy())
    assert np.abs(found - expected).max() < 0.1 * expected.std()  # a wrong order is off by a whole one
    assert np.abs(model.last.whole).max() == suggestions.LEVELS
    assert len(model.tables.text()) == 32 * 15
    assert len(set(suggestions.ALPHABET)) == 2 * suggestions.LEVELS + 1


def test_a_packed_matrix_is_off_by_half_a_level() -> None:
    matrix = np.random.default_rng(0).normal(size=(50, 4)) * [1, 10, 0.01, 0]
    found = suggestions.packed(matrix)
    assert (np.abs(found.values - matrix) <= found.scale * 0.501 + 1e-9).all()


def test_suggestions_begin_as_what_is_typed() -> None:
    names = ["a", "bat", "bee", "bird", ","]
    last = suggestions.packed(np.array([[0.0, b] for b in (1.0, 2.0, 4.0, 3.0, 5.0)]))
    model = suggestions.Model(suggestions.packed(np.zeros((7, 3))), last)
    number = {name: place for place, name in enumerate(names)}
    assert suggestions.suggested(model, "A bat", names) == [",", "bee", "bird"]
    assert suggestions.suggested(model, "A bat", names, "b") == ["bee", "bird", "bat"]
    assert suggestions.context_of("Bee, fly", number).tolist() == [[2, 4, 5]]  # 5: another word
    assert suggestions.context_of("a", number).tolist() == [[6, 6, 0]]  # 6: no word


def test_the_registered_search_stands_alone_once_it_is_there() -> None:
    first = pd.DataFrame({"sweep": ["25_keyboard.first", "25_keyboard.first.tuning", "25_keyboard.units64"]})
    assert len(keyboard.registered_first(first)) == 3
    later = [
        "25_keyboard",
        "25_keyboard.tuning",
        "25_keyboard.long",
        "25_keyboard.long.then",
        "25_keyboard.long.tuning",
    ]
    both = pd.concat([first, pd.DataFrame({"sweep": later})])
    assert set(keyboard.registered_first(both)["sweep"]) == {"25_keyboard", "25_keyboard.tuning", "25_keyboard.units64"}
