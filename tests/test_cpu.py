"""Selection on the CPU: every way in which torch and numpy share it finds the same scores, in the same order."""

from __future__ import annotations

import pytest
import torch

from topk import _cpu

SELECTORS = {"many threads": (16, False), "three, and numpy": (3, True), "one": (1, False), "one, and numpy": (1, True)}


@pytest.fixture(params=SELECTORS)
def selector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way in which torch and numpy share the selection, for small problems too."""
    threads, vectorised = SELECTORS[request.param]
    monkeypatch.setattr(_cpu, "_WORTH_WHILE", 0)
    monkeypatch.setattr(_cpu, "_numpy_is_vectorised", lambda by_values=False: vectorised)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


@pytest.mark.usefixtures("selector")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("classes", "count"),
    [(5, 5), (65, 65), (70, 1), (83, 5), (1000, 3), (1000, 17), (1003, 17), (1000, 100), (9001, 9)],
)
def test_selection_finds_the_largest(classes: int, count: int, dtype: torch.dtype) -> None:
    scores = torch.randn(7, classes, dtype=dtype)
    scores[1, ::2] = -torch.inf
    scores[2, 1] = torch.inf
    scores[3, classes - 1] = torch.nan
    scores.requires_grad_()
    with torch.device("meta"):  # whatever device new tensors go to
        values, index = (found.detach() for found in _cpu.largest(scores, count))
    expected = scores.detach().topk(count).values
    assert torch.equal(values.nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
    assert torch.equal(scores.detach().gather(1, index).nan_to_num(nan=1e9), values.nan_to_num(nan=1e9))
    assert all(len(set(row.tolist())) == count for row in index)


@pytest.mark.usefixtures("selector")
@pytest.mark.parametrize(("classes", "count"), [(5, 4), (1000, 17), (1000, 999), (2049, 17)])
def test_the_largest_values_of_other_classes(classes: int, count: int) -> None:
    scores, without = torch.randn(400, classes), torch.randint(classes, (400,))  # more than fits one chunk
    scores[1, ::2] = -torch.inf
    scores[2] = scores[2].round()
    scores[3, 1], without[3] = torch.nan, 0
    scores[4, 1], without[4] = torch.inf, 1
    kept = scores.clone()
    with torch.device("meta"):
        every, others = _cpu.largest_values(scores, count), _cpu.largest_values(scores, count, without)
    torch.testing.assert_close(scores, kept, equal_nan=True)
    torch.testing.assert_close(every, scores.topk(count).values, equal_nan=True)
    masked = scores.scatter(1, without[:, None], -torch.inf)
    torch.testing.assert_close(others, masked.topk(count).values, equal_nan=True)


def test_the_selector_is_chosen_by_threads_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "_numpy_is_vectorised", lambda by_values=False: True)
    scores = torch.zeros(256, 1000)
    for threads, count, numpy, groups in ((1, 7, False, True), (1, 50, True, False), (2, 50, True, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert (_cpu._numpy_pays(scores, count), _cpu._grouping_pays(scores, count)) == (numpy, groups)
        for slow in (-torch.inf, torch.nan):  # numpy takes several times as long among equal scores of -inf
            assert not _cpu._numpy_pays(scores.index_fill(1, torch.tensor([3]), slow), 50)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert not _cpu._numpy_pays(scores, 50)
    assert not _cpu._numpy_pays(scores[:2], 50)  # too small for anything but one call


@pytest.mark.usefixtures("selector")
@pytest.mark.parametrize(("classes", "count"), [(5, 5), (80, 5), (83, 5), (1000, 17), (1003, 17), (1000, 100)])
def test_selection_keeps_the_lower_class_of_a_tie(classes: int, count: int) -> None:
    """Whether it is made in one step or, few of many, in two."""
    scores = torch.randn(40, classes)
    scores[10:20] = scores[10:20].mul(2.0).round()
    scores[20:25] = -torch.inf
    scores[25:30, ::3] = torch.inf
    scores[30:] = torch.linspace(-1.0, 1.0, classes)
    scores[35:] *= -1.0
    values, index = _cpu.ordered_topk(scores, count)
    expected = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    torch.testing.assert_close(index, expected, rtol=0, atol=0)
    torch.testing.assert_close(values, scores.gather(1, expected), rtol=0, atol=0)
    strided = _cpu.ordered_topk(torch.stack((scores, scores), 2)[:, :, 1], count)
    torch.testing.assert_close(strided[1], expected, rtol=0, atol=0)
