"""The noised hinge's kernels, interpreted: their noise draw by draw, then everything else against the torch path."""

from __future__ import annotations

import math
from typing import Any

import brute_force as reference
import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import TYPES, compare, compare_special_rows, random_scores
from torch import Tensor

from topk import noised_topk_loss
from topk.kernels import common, noised
from topk.losses.noised import LOSS, Options
from topk_lab.study.traffic import kernel_traffic

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about what a kernel masks afterwards

WITHOUT_NOISE = {"epsilon": 0.0}


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WIDEST", 16)
    monkeypatch.setattr(common, "STREAMED", 32)


def run(scores: Tensor, target: Tensor, seeds: Tensor, *options: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    """Forward's results and the gradient, straight from the kernels."""
    options, margins = Options(*options), torch.ones(scores.shape[0])
    loss, *saved = noised.forward(scores, target, options, -100, margins, seeds)
    gradient = noised.backward(torch.ones_like(loss), scores, target, options, -100, tuple(saved), margins, seeds)
    return (loss, *saved), gradient


def by_definition(
    scores: Tensor, target: Tensor, noise: Tensor, ks: list[int], weights: list[float], epsilon: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, gradient and the (k + 1)-th classes (rows, samples, ks) from given noise (rows, classes, samples)."""
    order = (scores.double()[:, :, None] + epsilon * noise).sort(dim=1, descending=True, stable=True).indices
    leaf = scores.double().requires_grad_()
    pairs = list(zip(ks, weights, strict=True))
    losses = torch.stack(
        [
            sum(
                (p * reference.noised_topk_loss(x, int(y), k, z, epsilon, scale=scale) for k, p in pairs),
                torch.zeros(()),
            )
            for x, y, z in zip(leaf, target, noise, strict=True)
        ]
    )
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient, order[:, ks].permute(0, 2, 1)


# --- the noise -------------------------------------------------------------------------------------------------------


@triton.jit
def _noise(out_ptr, seed_ptr, CLASSES: tl.constexpr, WIDTH: tl.constexpr):
    row, four = tl.program_id(0) // 2, tl.program_id(0) % 2
    columns = tl.arange(0, CLASSES)[None, :, None]
    zeros = (columns * 0).to(tl.float32)
    noise = noised._noised(zeros, columns, tl.load(seed_ptr), row, four, 1.0, WIDTH, True)
    samples = 4 * four + tl.arange(0, WIDTH)[:, None, None]
    tl.store(out_ptr + (row * CLASSES + columns) * 8 + samples, noise)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**63 - 2])
def test_noise_equals_its_slow_twin(seed: int, width: int) -> None:
    rows, classes = 3, 8
    out = torch.zeros(rows, classes, 8)
    _noise[(2 * rows,)](out, torch.tensor([seed]), CLASSES=classes, WIDTH=width)
    drawn = torch.tensor([sample % 4 < width for sample in range(8)])
    slow = reference.philox_normals(seed, rows, classes, 8)
    torch.testing.assert_close(out.double()[:, :, drawn], slow[:, :, drawn], rtol=1e-5, atol=3e-6)


@triton.jit
def _normals_of_words(ones_ptr, others_ptr, out_ptr, COUNT: tl.constexpr):
    lanes = tl.arange(0, COUNT)
    first, second = noised._normals(tl.load(ones_ptr + lanes), tl.load(others_ptr + lanes), 1.0)
    tl.store(out_ptr + lanes, first)
    tl.store(out_ptr + COUNT + lanes, second)


def test_normals_everywhere_on_the_circle_and_at_both_ends_of_the_radius() -> None:
    count = 4096
    ends = torch.tensor([0, 1, 2, 2**32 - 1, 2**32 - 2, 2**31])
    ones = torch.cat((ends, torch.randint(2**32, (count - len(ends),))))
    others = torch.linspace(0, 2**32 - 1, count, dtype=torch.float64).long()
    out = torch.empty(2, count)
    _normals_of_words[(1,)](ones.to(torch.uint32), others.to(torch.uint32), out, COUNT=count)
    uniform = ((ones.float() + 0.5) * 2.0**-32).double()
    radius, angle = (-2.0 * uniform.log()).sqrt(), others.float().double() * (2.0 * math.pi / 2.0**32)
    exact = torch.stack((radius * angle.cos(), radius * angle.sin()))
    assert (out.double() - exact).abs().max() < 4e-6
    assert radius.max() < noised._LARGEST_NORMAL.value


# --- noised losses, draw by draw -------------------------------------------------------------------------------------

DRAWN: list[tuple[list[int], list[float], float, int, float]] = [
    ([5], [1.0], 1.0, 5, 1.0),
    ([1], [1.0], 0.3, 2, 2.0),
    ([1, 3, 15], [0.5, 0.25, 0.25], 0.7, 7, 1.0),  # 3 left over from a group of four; 16 of 32 groups
    ([2, 17], [0.5, 0.5], 2.0, 1, 1.0),  # too many for the groups: by bisection
]


@pytest.mark.parametrize("options", DRAWN, ids=str)
@pytest.mark.parametrize("widest", [8192, 16], ids=["whole", "streamed"])
def test_draw_by_draw(options: tuple[Any, ...], widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WIDEST", widest)
    ks, weights, epsilon, samples, scale = options
    scores, target = random_scores(4, 45), torch.randint(45, (4,))
    noise = reference.philox_normals(11, 4, 45, samples)
    (loss, _, kept), gradient = run(scores, target, torch.tensor([11]), *options)
    losses, slopes, found = by_definition(scores, target, noise, ks, weights, epsilon, scale)
    assert torch.equal(kept.long(), found)
    torch.testing.assert_close(loss.double(), losses, rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(gradient.double(), slopes, rtol=1e-6, atol=1e-6)
    active = losses > 0
    assert active.any()
    assert gradient[active].sum(1).abs().max() < 1e-5  # as much pulls as pushes


def test_every_cut_of_the_rows_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, target, seeds = random_scores(2, 70), torch.randint(70, (2,)), torch.tensor([3])
    options = ([1, 4], [0.5, 0.5], 1.0, 5, 1.0)
    expected = run(scores, target, seeds, *options)
    for widest, streamed, thread in ((16, 16, 8), (64, 32, 1), (8192, 4096, 1)):
        monkeypatch.setattr(common, "WIDEST", widest)
        monkeypatch.setattr(common, "STREAMED", streamed)
        monkeypatch.setattr(noised, "_THREAD", thread)
        results = run(scores, target, seeds, *options)
        assert all(torch.equal(a, b) for a, b in zip(expected[0], results[0], strict=True))
        assert torch.equal(expected[1], results[1])


@pytest.mark.parametrize("crowded", [False, True])
def test_two_of_the_largest_in_a_column_are_found(crowded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that streams is drawn once, and again where a column of its tiles lost a score that is large enough."""
    monkeypatch.setattr(common, "WIDEST", 256)
    scores, target = 3.0 * random_scores(3, 700), torch.randint(700, (3,))
    scores[:, [5, 120, 230, 333]] += 20.0
    if crowded:
        scores[:, 5 + 512] = scores[:, 5]
    noise = reference.philox_normals(7, 3, 700, 4)
    options = ([1, 4], [0.5, 0.5], 1.0, 4, 1.0)
    with kernel_traffic() as moved:
        kept = run(scores, target, torch.tensor([7]), *options)[0][2]
    assert torch.equal(kept.long(), by_definition(scores, target, noise, *options[:3], 1.0)[2])
    assert 3 * 4 * 700 < moved.loaded - 3 * 4 * 700 * crowded < 2 * 3 * 4 * 700


def test_tiles_out_of_reach_are_passed_over_rightly(short_tiles: None) -> None:
    """With little noise most tiles are not drawn; what they hold could not have mattered."""
    scores, target = 3.0 * random_scores(3, 130), torch.randint(130, (3,))
    noise = reference.philox_normals(5, 3, 130, 4)
    kept = run(scores, target, torch.tensor([5]), [2], [1.0], 0.05, 4, 1.0)[0][2]
    assert torch.equal(kept.long(), by_definition(scores, target, noise, [2], [1.0], 0.05, 1.0)[2])


def test_groups_of_rows_start_again_from_their_own_seed() -> None:
    scores, target = random_scores(6, 20), torch.randint(20, (6,))
    options = ([3], [1.0], 1.0, 2, 1.0)
    (loss, _, kept), gradient = run(scores, target, torch.tensor([4, 2**40 + 1, 4]), *options)
    for group, seed in enumerate((4, 2**40 + 1, 4)):
        part = slice(2 * group, 2 * group + 2)
        (alone, _, found), slopes = run(scores[part], target[part], torch.tensor([seed]), *options)
        assert torch.equal(loss[part], alone)
        assert torch.equal(kept[part], found)
        assert torch.equal(gradient[part], slopes)


def test_draws_that_hit_the_same_class_add_up() -> None:
    scores = torch.tensor([[50.0, 40.0, 30.0, 0.0], [50.0, 40.0, 30.0, 0.0]])
    target = torch.tensor([3, 1])  # the second row's own class is hit, which cancels
    (loss, _, _), gradient = run(scores, target, torch.tensor([1]), [1], [1.0], 1e-3, 40, 1.0)
    torch.testing.assert_close(loss, torch.tensor([41.0, 1.0]), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]))


def test_ties_between_noised_scores_go_to_the_lower_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores so large that the noise is rounded away: the samples are the scores themselves."""
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0, 2.0]).mul(1e8).repeat(7)[None, :40]
    target = torch.tensor([39])
    scores[0, 39] = 0.0  # the noise is added to the scores less this one
    order = scores.sort(descending=True, stable=True).indices[0]
    for widest in (8192, 16):
        monkeypatch.setattr(common, "WIDEST", widest)
        for k in (2, 9, 20, 30):
            assert run(scores, target, torch.tensor([1]), [k], [1.0], 1.0, 1, 1.0)[0][2].item() == order[k]


@pytest.mark.slow
def test_distribution_is_that_of_the_torch_path() -> None:
    """Which class is (k + 1)-th, by a chi-square test, and the mean loss; the torch path draws 500 times as often."""
    rows, samples, options = 6, 48, ([2], [1.0], 1.5)
    row = random_scores(1, 12)
    target = row.argmin(1).expand(rows)  # so that the hinge is always open
    ones, seeds = torch.ones(rows), torch.tensor([17])
    (ours, _, kept), _ = run(row.expand(rows, 12), target, seeds, *options, samples, 1.0)
    often = (*options, 500 * samples, 1.0)
    theirs, _, drawn = LOSS.forward(row.repeat(rows, 1), target, Options(*often), ones, seeds)
    expected = drawn.flatten().bincount(minlength=12) / 500.0
    usual = expected >= 5.0
    assert usual.sum() >= 6
    found = kept.flatten().bincount(minlength=12).double()
    excess = ((found - expected).square() / expected)[usual].sum()
    assert excess < usual.sum() + 4.0 * math.sqrt(2.0 * usual.sum())
    assert abs(ours.mean() - theirs.mean()) < 4.0 * ours.std() / math.sqrt(rows)


# --- through the public function -------------------------------------------------------------------------------------

NOISELESS: list[dict[str, Any]] = [
    {"k": 1},
    {"k": 5, "margins": 2.5, "scale": 3.0},
    {"k": {1: 0.5, 3: 0.25, 20: 0.25}},
    {"k": 4, "margins": torch.linspace(0.0, 2.0, 33)},
]


@pytest.mark.parametrize("options", NOISELESS, ids=str)
def test_without_noise_against_the_torch_path(options: dict[str, Any]) -> None:
    compare(noised_topk_loss, random_scores(7, 33), torch.randint(33, (7,)), **WITHOUT_NOISE, **options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_special_rows(dtype: torch.dtype) -> None:
    compare_special_rows(noised_topk_loss, 12, dtype, k={1: 0.5, 3: 0.5}, **WITHOUT_NOISE)


def test_special_rows_in_streams(short_tiles: None) -> None:
    compare_special_rows(noised_topk_loss, 37, torch.float32, k={2: 0.5, 6: 0.5}, **WITHOUT_NOISE)


@pytest.mark.parametrize("classes", [5, 6, 32, 33, 1000])
def test_numbers_of_classes(classes: int) -> None:
    compare(noised_topk_loss, random_scores(3, classes), torch.randint(classes, (3,)), k=5, **WITHOUT_NOISE)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_numbers_of_rows(rows: int) -> None:
    compare(noised_topk_loss, random_scores(rows, 9), torch.randint(9, (rows,)), k=2, **WITHOUT_NOISE)


def test_a_row_that_must_be_streamed_at_full_width() -> None:
    compare(noised_topk_loss, random_scores(1, 9001), torch.tensor([4711]), k=3, **WITHOUT_NOISE)


def test_scores_of_any_strides_and_a_gradient_without() -> None:
    target = torch.randint(8, (4,))
    compare(noised_topk_loss, random_scores(8, 4).t(), target, torch.ones(()).expand(4), k=2, **WITHOUT_NOISE)
    compare(noised_topk_loss, random_scores(8, 20)[::2, 2:18:2], target, k=2, **WITHOUT_NOISE)
    compare(noised_topk_loss, random_scores(1, 8).expand(4, 8), target, k=2, **WITHOUT_NOISE)


@pytest.mark.parametrize(
    "widest", [pytest.param(8192, id="whole"), pytest.param(16, id="streamed", marks=pytest.mark.slow)]
)
def test_special_rows_with_noise(widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's noise does not touch its neighbours, whatever they hold."""
    monkeypatch.setattr(common, "WIDEST", widest)
    usual = random_scores(7, 20)
    target = torch.tensor([1, 2, 3, 4, 5, -100, 20])
    scores = usual.clone()
    scores[0, 7], scores[1, 2] = torch.nan, torch.inf
    scores[2, 5:] = -torch.inf  # no (k + 1)-th score
    scores[3, 4] = -torch.inf
    scores[5] = torch.nan
    options = ([6], [1.0], 1.0, 5, 1.0)
    (loss, _, _), gradient = run(scores, target, torch.tensor([9]), *options)
    (alone, _, _), slopes = run(usual, target, torch.tensor([9]), *options)
    assert loss[[0, 1, 6]].isnan().all()
    assert gradient[[0, 1, 6]].isnan().all()
    assert loss[2] == 0.0
    assert loss[3] == torch.inf
    assert loss[5] == 0.0
    assert (gradient[[2, 5]] == 0.0).all()
    assert gradient[3, 4] == 0.0
    assert gradient[3].sum() == pytest.approx(1.0)
    assert loss[4] == alone[4]
    assert torch.equal(gradient[4], slopes[4])


def test_second_derivatives_do_not_draw_again() -> None:
    scores, target = random_scores(3, 12).requires_grad_(), torch.tensor([0, 5, 11])
    loss = noised_topk_loss(scores, target, 2, samples=3, backend="triton", reduction="sum")
    (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
    (bent,) = torch.autograd.grad(gradient.square().sum(), scores)
    assert gradient.abs().sum() > 0
    assert (bent == 0.0).all()


def test_quadrature_has_no_kernel() -> None:
    scores, target = random_scores(3, 12), torch.tensor([0, 5, 11])
    with pytest.raises(RuntimeError, match="quadrature"):
        noised_topk_loss(scores, target, 2, samples=None, backend="triton")
    assert noised_topk_loss(scores, target, 2, samples=None).isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("classes", [100, 1000, 20000])
def test_on_a_gpu_the_draws_are_those_of_the_torch_path(classes: int) -> None:
    """Both count their noise in the same way; a device's fast logarithm may swap a few almost equal scores."""
    scores, target = random_scores(40, classes).cuda(), torch.randint(classes, (40,)).cuda()
    tensors = (torch.ones(40, device="cuda"), torch.tensor([2**33 + 1], device="cuda"))
    options = Options([1, 5], [0.5, 0.5], 1.0, 7, 1.0)
    loss, _, kept = noised.forward(scores, target, options, -100, *tensors)
    losses, _, found = LOSS.forward(scores, target, options, *tensors)
    assert (kept == found).float().mean() > 0.995
    torch.testing.assert_close(loss, losses, rtol=1e-4, atol=1e-4)
