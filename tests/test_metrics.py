"""Ranks and top-k accuracies against sorting, against torchmetrics, in streams and over processes."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brute_force as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from topk import metrics
from topk.metrics import TopKMeter

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def theirs(*arguments: Any, **options: Any) -> torch.Tensor:
    """torchmetrics' accuracy; imported here, since the processes below need none."""
    from torchmetrics.functional.classification import multiclass_accuracy

    return multiclass_accuracy(*arguments, **options)


def by_sorting(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.stack([reference.rank(row, int(y)) for row, y in zip(scores, target, strict=True)])


@st.composite
def batches(draw: st.DrawFn, least_rows: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores from few values, so that ties abound, sometimes infinite."""
    rows, classes = draw(st.integers(least_rows, 6)), draw(st.integers(1, 7))
    value = st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 0.5, 1.0, math.inf])
    scores = draw(st.lists(st.lists(value, min_size=classes, max_size=classes), min_size=rows, max_size=rows))
    target = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    return torch.tensor(scores).reshape(rows, classes), torch.tensor(target, dtype=torch.int64)


# --- ranks -----------------------------------------------------------------------------------------------------------


@given(batches(least_rows=1), st.sampled_from(TYPES))
def test_ranks_equal_sorting(batch: tuple[torch.Tensor, torch.Tensor], kind: torch.dtype) -> None:
    scores, target = batch
    assert torch.equal(metrics.ranks(scores.to(kind), target), by_sorting(scores, target))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("classes", [1, 2, 3, 17, 1000])
def test_ranks_of_gaussian_scores_equal_sorting(classes: int, kind: torch.dtype) -> None:
    scores = torch.randn(33, classes).to(kind)  # in half types many of a thousand scores are equal
    target = torch.randint(classes, (33,))
    assert torch.equal(metrics.ranks(scores, target), by_sorting(scores, target))


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0])
    found = [int(metrics.ranks(scores, torch.tensor(y))) for y in range(5)]
    assert found == [1, 4, 2, 5, 3]
    assert metrics.ranks(torch.zeros(4, 4), torch.arange(4)).tolist() == [1, 2, 3, 4]
    assert metrics.ranks(torch.tensor([-0.0, 0.0]), torch.tensor(1)) == 2  # -0 equals 0


def test_rows_with_nan_are_never_hits_and_leave_others_alone() -> None:
    scores = torch.tensor([[math.nan, 1.0, 2.0], [0.0, 1.0, math.nan], [0.0, 1.0, 2.0], [math.nan] * 3])
    target = torch.tensor([2, 2, 2, 0])
    assert metrics.ranks(scores, target).tolist() == [4, 4, 1, 4]
    assert metrics.topk_accuracy(scores, target, (1, 3)) == {1: 0.25, 3: 0.25}
    assert metrics.candidates_for(scores, target, 0.25) == 1
    assert metrics.candidates_for(scores, target, 0.5) == 4


def test_infinite_scores_are_compared_like_others() -> None:
    inf = math.inf
    scores = torch.tensor([[-inf, 0.0, -inf], [inf, 0.0, inf], [-inf, -inf, -inf]])
    assert metrics.ranks(scores, torch.tensor([0, 0, 0])).tolist() == [2, 1, 1]
    assert metrics.ranks(scores, torch.tensor([2, 2, 2])).tolist() == [3, 2, 3]
    assert metrics.ranks(scores, torch.tensor([1, 1, 1])).tolist() == [1, 3, 2]


@given(batches(least_rows=1), st.randoms(use_true_random=False))
def test_permuting_classes_moves_ranks_only_within_ties(
    batch: tuple[torch.Tensor, torch.Tensor], random: object
) -> None:
    scores, target = batch
    order = list(range(scores.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    inverse = torch.tensor(order).argsort()
    moved = metrics.ranks(scores[:, order], inverse[target])
    own = scores.gather(1, target[:, None])
    assert bool((moved >= 1 + (scores > own).sum(1)).all())
    assert bool((moved <= (scores >= own).sum(1)).all())
    distinct = scores + 100.0 * torch.arange(scores.shape[1]) if bool(scores.isfinite().all()) else None
    if distinct is not None:
        assert torch.equal(metrics.ranks(distinct[:, order], inverse[target]), metrics.ranks(distinct, target))


@given(batches())
def test_increasing_maps_change_nothing(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, target = batch
    expected = metrics.ranks(scores, target)
    for image in (3 * scores + 1, scores.exp(), scores.atan(), scores.double() ** 3):
        assert torch.equal(metrics.ranks(image, target), expected)


@pytest.mark.parametrize("shape", [(), (4,), (0,), (2, 3), (2, 3, 2), (0, 5)])
def test_shapes_follow_the_losses(shape: tuple[int, ...]) -> None:
    target = torch.randint(7, shape)
    scores = torch.randn((*shape[:1], 7, *shape[1:]))
    found = metrics.ranks(scores, target)
    assert found.shape == target.shape
    assert found.dtype == torch.int64
    rows = scores.movedim(1, -1).reshape(-1, 7) if shape else scores[None]
    assert torch.equal(found.flatten(), metrics.ranks(rows, target.flatten()))


def test_many_rows_and_strides() -> None:
    """More rows than one chunk takes, and scores that are neither contiguous nor free of gradients."""
    scores = torch.randn(300, 1500).clamp(max=1.5).T.requires_grad_()
    target = torch.randint(300, (1500,))
    expected = 1 + (scores > scores.gather(1, target[:, None])).sum(1)
    expected += ((scores == scores.gather(1, target[:, None])) & (torch.arange(300) < target[:, None])).sum(1)
    found = metrics.ranks(scores, target)
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("index_type", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_of_target(index_type: torch.dtype) -> None:
    scores = torch.randn(5, 9)
    target = torch.randint(9, (5,))
    assert torch.equal(metrics.ranks(scores, target.to(index_type)), metrics.ranks(scores, target))


# --- accuracies ------------------------------------------------------------------------------------------------------


@given(batches(least_rows=1))
def test_accuracy_is_monotone_and_right_for_any_batch(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, target = batch
    rows, classes = scores.shape
    ks = range(1, classes + 1)
    accuracy = metrics.topk_accuracy(scores, target, ks)
    assert list(accuracy) == list(ks)
    expected = [int((by_sorting(scores, target) <= k).sum()) / rows for k in ks]
    assert [value.item() for value in accuracy.values()] == expected
    assert expected == sorted(expected)
    assert expected[-1] == 1.0
    assert metrics.topk_curve(scores, target).tolist() == expected
    macro = [value.item() for value in metrics.macro_topk_accuracy(scores, target, ks).values()]
    assert macro == sorted(macro)
    assert macro[-1] == 1.0


def test_results_are_float64_scalars_keyed_by_k() -> None:
    accuracy = metrics.topk_accuracy(torch.eye(10), torch.arange(10))
    assert list(accuracy) == [1, 5]
    assert all(value.shape == () and value.dtype == torch.float64 for value in accuracy.values())
    assert list(metrics.topk_accuracy(torch.eye(10), torch.arange(10), 3)) == [3]
    assert list(metrics.topk_accuracy(torch.eye(10), torch.arange(10), [5, 1, 5])) == [5, 1]


def test_batch_of_one_equals_the_row() -> None:
    scores, target = torch.randn(20, 6), torch.randint(6, (20,))
    single = [metrics.topk_accuracy(scores[i : i + 1], target[i : i + 1], 2)[2] for i in range(20)]
    alone = [metrics.topk_accuracy(scores[i], target[i], 2)[2] for i in range(20)]
    whole = metrics.topk_accuracy(scores, target, 2)[2]
    assert single == alone
    torch.testing.assert_close(torch.stack(single).mean(), whole)


def test_no_rows_give_nan() -> None:
    nothing = torch.randn(0, 6), torch.zeros(0, dtype=torch.int64)
    ignored = torch.randn(3, 6), torch.full((3,), -100)
    for scores, target in (nothing, ignored):
        assert all(value.isnan() for value in metrics.topk_accuracy(scores, target).values())
        assert all(value.isnan() for value in metrics.macro_topk_accuracy(scores, target).values())
        assert metrics.topk_curve(scores, target).isnan().all()
        with pytest.raises(ValueError, match="at least one row"):
            metrics.candidates_for(scores, target)


@pytest.mark.parametrize("ignore_index", [-100, -1, 2, 255])
def test_ignored_rows_count_for_nothing(ignore_index: int) -> None:
    scores, target = torch.randn(50, 7), torch.randint(7, (50,))
    target[::3] = ignore_index
    scores[::6] = math.nan
    kept = target != ignore_index
    options = {"ignore_index": ignore_index}
    pair = scores[kept], target[kept]
    assert metrics.topk_accuracy(scores, target, (1, 3), **options) == metrics.topk_accuracy(*pair, (1, 3))
    assert metrics.macro_topk_accuracy(scores, target, (1, 3), **options) == metrics.macro_topk_accuracy(*pair, (1, 3))
    assert metrics.candidates_for(scores, target, 0.8, **options) == metrics.candidates_for(*pair, 0.8)
    groups = [0, 0, 1, 1, 1, 2, 2]
    found = metrics.group_topk_accuracy(scores, target, groups, **options)
    torch.testing.assert_close(found, metrics.group_topk_accuracy(*pair, groups), equal_nan=True)
    assert (metrics.ranks(scores, target, ignore_index=ignore_index)[~kept] == 8).all()


def test_macro_and_groups_by_hand() -> None:
    scores = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3], [0, 1, 2, 3]])
    target = torch.tensor([0, 0, 1, 2, 0])  # ranks 1, 1, 2, 2, 4; class 3 does not occur
    assert metrics.macro_topk_accuracy(scores, target, (1, 2)) == {1: pytest.approx(2 / 9), 2: pytest.approx(8 / 9)}
    groups = ["many", "few", "few", "none"]
    found = metrics.group_topk_accuracy(scores, target, groups, (1, 2))
    assert list(found) == ["many", "few", "none"]
    assert found["many"] == {1: pytest.approx(2 / 3), 2: pytest.approx(2 / 3)}
    assert found["few"] == {1: 0.0, 2: 1.0}
    assert found["none"][1].isnan()
    by_class = metrics.group_topk_accuracy(scores, target, torch.tensor([7, 7, 7, 1]), 1, macro=True)
    assert by_class[7] == {1: pytest.approx(2 / 9)}


def test_shot_groups() -> None:
    assert metrics.shot_groups(torch.tensor([101, 100, 20, 19, 0])) == ["many", "medium", "medium", "few", "few"]
    assert metrics.shot_groups([5, 3, 1], many=4, few=2) == ["many", "medium", "few"]
    with pytest.raises(ValueError, match="many must be at least few, got many=3, few=9"):
        metrics.shot_groups([1], many=3, few=9)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_equals_torchmetrics(k: int) -> None:
    """On scores without ties. torchmetrics' macro top-1, unlike its top-2, counts classes that were guessed but do not
    occur as misses, so its top-2 can fall below its top-1: with every class present both definitions agree.
    """
    scores, target = torch.randn(200, 12), torch.cat((torch.arange(12), torch.randint(12, (188,))))
    for average, ours in (("micro", metrics.topk_accuracy), ("macro", metrics.macro_topk_accuracy)):
        expected = theirs(scores, target, num_classes=12, average=average, top_k=k)
        torch.testing.assert_close(ours(scores, target, k)[k].float(), expected)
    expected = theirs(scores, target, num_classes=12, average=None, top_k=k)
    torch.testing.assert_close(TopKMeter(12, k).update(scores, target).per_class()[k].float(), expected)
    holes = torch.where(target % 3 == 0, -100, target)
    expected = theirs(scores, holes, num_classes=12, average="micro", top_k=k, ignore_index=-100)
    torch.testing.assert_close(metrics.topk_accuracy(scores, holes, k)[k].float(), expected)


def test_macro_with_absent_classes_differs_from_torchmetrics_only_at_top_1() -> None:
    scores, target = torch.eye(4)[[0, 1, 2, 3]], torch.tensor([0, 1, 1, 1])
    ours = metrics.macro_topk_accuracy(scores, target, (1, 2))
    assert ours[1] == pytest.approx(2 / 3)  # class 0: 1 of 1, class 1: 1 of 3
    expected = (1 + 1 / 3) / 4  # classes 2 and 3 were guessed, so they enter as 0
    assert theirs(scores, target, 4, "macro", 1) == pytest.approx(expected)
    assert ours[2] >= ours[1]


# --- candidates ------------------------------------------------------------------------------------------------------


def with_ranks(wanted: list[int], classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores that fall with the class index, so that the target's rank is its index plus one."""
    return torch.arange(classes, 0, -1.0).expand(len(wanted), classes), torch.tensor(wanted) - 1


def test_candidates_need_exactly_the_accuracy() -> None:
    assert metrics.candidates_for(*with_ranks([1] * 99 + [7], 10), 0.99) == 1
    assert metrics.candidates_for(*with_ranks([1] * 98 + [4, 7], 10), 0.99) == 4
    assert metrics.candidates_for(*with_ranks([1] * 99 + [7], 10), 0.991) == 7
    assert metrics.candidates_for(*with_ranks([1] * 99 + [7], 10), 1.0) == 7
    assert metrics.candidates_for(*with_ranks([1] * 99 + [7], 10), 1) == 7
    assert metrics.candidates_for(*with_ranks([3], 3), 1e-300) == 3


def test_candidates_take_every_decimal_at_its_word() -> None:
    """h of 100 reach h / 100 however the decimal rounds: in binary 0.07 * 100 is more than 7, 0.99 * 100 under 99."""
    for hits in range(1, 101):
        batch = with_ranks([1] * hits + [2] * (100 - hits), 2)
        assert metrics.candidates_for(*batch, hits / 100) == 1
        assert metrics.candidates_for(*batch, math.nextafter(hits / 100, 2) if hits < 100 else 1.0) == 1 + (hits < 100)


@given(batches(least_rows=1), st.floats(0.0, 1.0, exclude_min=True))
def test_candidates_are_the_first_k_that_suffices(batch: tuple[torch.Tensor, torch.Tensor], accuracy: float) -> None:
    k = metrics.candidates_for(*batch, accuracy)
    curve = metrics.topk_curve(*batch).tolist()
    assert curve[k - 1] >= accuracy
    assert k == 1 or curve[k - 2] < accuracy


@pytest.mark.parametrize("accuracy", [0.0, -0.1, 1.0000001, 99, math.nan, math.inf])
def test_candidates_refuse_accuracies_outside(accuracy: float) -> None:
    with pytest.raises(ValueError, match="accuracy must be a finite number > 0 and <= 1, got"):
        metrics.candidates_for(torch.randn(2, 3), torch.tensor([0, 1]), accuracy)
    with pytest.raises(TypeError, match=r"accuracy must be a number, got '0\.99'"):
        metrics.candidates_for(torch.randn(2, 3), torch.tensor([0, 1]), "0.99")  # type: ignore[arg-type]


# --- streaming -------------------------------------------------------------------------------------------------------


def everything(meter: TopKMeter) -> dict[str, object]:
    groups = [i % 3 for i in range(meter.classes)]
    return {
        "accuracy": meter.accuracy(),
        "curve": meter.curve(),
        "candidates": meter.candidates(0.8),
        "per_class": meter.per_class(),
        "macro": meter.macro(),
        "by_group": meter.by_group(groups),
        "group_macro": meter.by_group(groups, macro=True),
    }


def same(left: TopKMeter, right: TopKMeter) -> None:
    torch.testing.assert_close(everything(left), everything(right), rtol=0, atol=0, equal_nan=True)


def a_stream() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(101, 8, generator=generator).round(decimals=1)
    target = torch.randint(7, (101,), generator=generator)
    target[5:9] = -100
    scores[20, 3] = math.nan
    return scores, target


@settings(max_examples=25)
@given(st.lists(st.integers(0, 101), max_size=6))
def test_any_partition_gives_the_same_counts(cuts: list[int]) -> None:
    scores, target = a_stream()
    whole = TopKMeter(8, (1, 3)).update(scores, target)
    parts, merged = TopKMeter(8, (1, 3)), TopKMeter(8, (1, 3))
    bounds = [0, *sorted(cuts), 101]
    for start, stop in itertools.pairwise(bounds):
        parts.update(scores[start:stop], target[start:stop])
        merged.merge(TopKMeter(8, (1, 3)).update(scores[start:stop], target[start:stop]))
    same(parts, whole)
    same(merged, whole)
    assert parts.rows == whole.rows == 97


def test_meter_equals_one_shot() -> None:
    scores, target = a_stream()
    meter = TopKMeter(8, (1, 3)).update(scores, target)
    assert meter.accuracy() == metrics.topk_accuracy(scores, target, (1, 3))
    assert meter.accuracy(range(1, 9)) == metrics.topk_accuracy(scores, target, range(1, 9))
    assert meter.macro() == metrics.macro_topk_accuracy(scores, target, (1, 3))
    assert meter.macro(3) == metrics.macro_topk_accuracy(scores, target, 3)
    assert torch.equal(meter.curve(), metrics.topk_curve(scores, target))
    assert meter.candidates(0.9) == metrics.candidates_for(scores, target, 0.9)


def test_saving_copying_and_resetting() -> None:
    scores, target = a_stream()
    meter = TopKMeter(8, (1, 3)).update(scores, target)
    restored = TopKMeter(8, (1, 3))
    restored.load_state_dict(meter.state_dict())
    for other in (restored, pickle.loads(pickle.dumps(meter)), copy.deepcopy(meter), meter.reduce()):
        same(other, meter)
        other.update(scores, target)
        assert other.rows == 2 * meter.rows
    assert repr(meter) == "TopKMeter(classes=8, ks=(1, 3), by_class=True, ignore_index=-100, device='cpu')"
    assert meter.reset().rows == 0
    assert meter.accuracy()[1].isnan()


def test_state_survives_torch_save(tmp_path: Path) -> None:
    meter = TopKMeter(8, (1, 3)).update(*a_stream())
    torch.save(meter.state_dict(), tmp_path / "meter.pt")
    restored = TopKMeter(8, (1, 3))
    restored.load_state_dict(torch.load(tmp_path / "meter.pt", weights_only=True))
    same(restored, meter)


def test_the_counts_stay_small_at_many_classes() -> None:
    meter = TopKMeter(200_000, (1, 5, 20))
    scores = torch.randn(4, 200_000)
    meter.update(scores, scores.argmax(1))
    assert meter.accuracy() == {1: 1.0, 5: 1.0, 20: 1.0}
    assert meter.macro()[5] == 1.0
    assert meter.state_dict()["counts"].nbytes <= 8 * (200_002 + 200_000 * 4)
    light = TopKMeter(200_000, by_class=False).update(scores, scores.argmax(1))
    assert light.state_dict()["counts"].nbytes <= 8 * 200_002
    with pytest.raises(RuntimeError, match="by_class=True"):
        light.macro()


def _count_a_share(process: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=2)
    scores, target = a_stream()
    share = slice(0, 70) if process == 0 else slice(70, None)
    meter = TopKMeter(8, (1, 3)).update(scores[share], target[share])
    total = meter.reduce()
    again = meter.reduce()  # the meter kept its own share, so this is no double count
    assert torch.equal(total.curve(), again.curve())
    torch.save(total.state_dict(), f"{folder}/total{process}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path, start_processes: Callable[..., None]) -> None:
    start_processes(_count_a_share, str(tmp_path), processes=2)
    whole = TopKMeter(8, (1, 3)).update(*a_stream())
    for process in range(2):
        total = TopKMeter(8, (1, 3))
        total.load_state_dict(torch.load(tmp_path / f"total{process}.pt"))
        same(total, whole)


@pytest.mark.gpu
def test_cuda_equals_the_cpu_without_waiting() -> None:
    scores, target = a_stream()
    expected = TopKMeter(8, (1, 3)).update(scores, target)
    far = scores.cuda(), target.cuda()
    meter = TopKMeter(8, (1, 3)).update(*far)
    assert meter.device.type == "cuda"
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.topk_accuracy(*far)
        metrics.macro_topk_accuracy(*far)
        meter.update(*far)
        meter.accuracy()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(meter.to("cpu"), expected.merge(expected))


# --- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ks", "error", "message"),
    [
        (7, ValueError, "every k of ks must be at most the number of classes, 6, got 7"),
        ((1, 7), ValueError, "every k of ks must be at most the number of classes, 6, got 7"),
        ((0,), ValueError, "every k of ks must be at least 1, got 0"),
        ((1, 2.0), TypeError, "every k of ks must be an int, got 2.0"),
        (True, TypeError, "every k of ks must be an int, got True"),
        ("5", TypeError, "every k of ks must be an int, got '5'"),
        (None, TypeError, "every k of ks must be an int, got None"),
    ],
)
def test_wrong_ks(ks: object, error: type[Exception], message: str) -> None:
    scores, target = torch.randn(4, 6), torch.randint(6, (4,))
    for call in (metrics.topk_accuracy, metrics.macro_topk_accuracy):
        with pytest.raises(error, match=message):
            call(scores, target, ks)  # type: ignore[operator]
    with pytest.raises(error, match=message):
        TopKMeter(6, ks)  # type: ignore[arg-type]


def test_wrong_targets_and_shapes() -> None:
    scores = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"target must hold class indices from 0 to 5 .*, got 6 at position 2"):
        metrics.topk_accuracy(scores, torch.tensor([0, 1, 6, 0]))
    with pytest.raises(ValueError, match=r"got -100 at position 1"):
        metrics.ranks(scores, torch.tensor([0, -100, 5, 0]), ignore_index=-1)
    with pytest.raises(ValueError, match="target must have shape"):
        metrics.ranks(scores, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="target must hold class indices"):
        metrics.ranks(scores, torch.zeros(4))
    with pytest.raises(TypeError, match="ignore_index must be an int, got None"):
        metrics.ranks(scores, torch.zeros(4, dtype=torch.int64), ignore_index=None)  # type: ignore[arg-type]


def test_wrong_meters_and_groups() -> None:
    scores, target = torch.randn(4, 6), torch.randint(6, (4,))
    meter = TopKMeter(6, (1, 3)).update(scores, target)
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        TopKMeter(0)
    with pytest.raises(ValueError, match="scores must have 6 classes, as the meter, got 5"):
        meter.update(scores[:, :5], torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="other must have the settings"):
        meter.merge(TopKMeter(6, (1, 4)))
    with pytest.raises(TypeError, match="other must be a TopKMeter, got int"):
        meter.merge(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state must have the settings"):
        meter.load_state_dict(TopKMeter(7, (1, 3)).state_dict())
    with pytest.raises(ValueError, match=r"ks must be among those the meter counts by class, \(1, 3\), got 2"):
        meter.macro(2)
    with pytest.raises(ValueError, match="groups must name the group of each of the 6 classes, got 2 entries"):
        meter.by_group([0, 1])
    with pytest.raises(TypeError, match="groups must be a tensor or a sequence"):
        meter.by_group({"many": [0]})  # type: ignore[arg-type]


def test_autkc_is_the_mean_of_the_curve() -> None:
    scores, target = torch.randn(50, 9), torch.randint(9, (50,))
    rank = metrics.ranks(scores, target).double()
    for k, value in metrics.autkc(scores, target, (1, 3, 9)).items():
        torch.testing.assert_close(value, ((k + 1 - rank).clamp(min=0) / k).mean())
        accuracies = metrics.topk_accuracy(scores, target, range(1, k + 1))
        torch.testing.assert_close(value, torch.stack([*accuracies.values()]).mean())
    target[:10] = -100
    torch.testing.assert_close(metrics.autkc(scores, target, 3)[3], metrics.autkc(scores[10:], target[10:], 3)[3])
    with pytest.raises(ValueError, match="every k of ks must be at most the number of classes, 9, got 10"):
        metrics.autkc(scores, target, 10)
