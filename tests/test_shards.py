"""Classes spread over two, three and four processes give what one process gives.

Four processes are started once; each checks what it gets and counts what it sends.
"""

from __future__ import annotations

import copy
import functools
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import topk
from topk.losses.noised_quadrature import STEPS
from topk.losses.noised_sampling import counted_normals
from topk.losses.ranking import SURROGATES

CLASSES, ROWS, FEATURES = 29, 12, 5
CUTS = {2: (0, 20, 29), 3: (0, 5, 5, 29), 4: (0, 1, 11, 12, 29)}  # uneven, and one of three is empty
VARIANTS = ("calibrated", "kth", "alpha", "beta", "smooth_limit", "entropy", "topk_entropy", "polyhedral")
SMOOTHED = ("alpha_smooth", "beta_smooth", "polyhedral_smooth")

Check = Callable[[topk.ClassShard, int], None]  # of this process's slice, which ends before that class


def criteria() -> dict[str, nn.Module]:
    """Copies of all, since each tries its options when it is made."""
    return copy.deepcopy(_criteria())


@functools.cache
def _criteria() -> dict[str, nn.Module]:
    margins = torch.linspace(0.1, 2.0, CLASSES)
    return {
        "smooth": topk.SmoothTopKLoss(3),
        "smooth, many k": topk.SmoothTopKLoss({1: 0.5, 8: 0.5}, tau=0.3),
        "transition": topk.TransitionTopKLoss({1: 0.5, 3: 0.5}),
        "transition, fixed": topk.TransitionTopKLoss(3, transition=0.5),
        "transition, smoothed": topk.TransitionTopKLoss({1: 0.5, 3: 0.5}, label_smoothing=0.2),
        "transition, called": topk.TransitionTopKLoss({1: 0.5, 3: 0.5}, transition=_by_margin),
        "smooth, k > 10": topk.SmoothTopKLoss(11, tau=0.4),
        "smooth, k above and below": topk.SmoothTopKLoss({2: 0.3, 10: 0.4, 12: 0.1, 27: 0.2}, tau=0.3),
        "noised, without noise": topk.NoisedTopKLoss(3, epsilon=0.0, margins=margins),
        "noised, exact": topk.NoisedTopKLoss({1: 0.5, 3: 0.5}, epsilon=0.7, samples=None, margins=margins),
        "focal": topk.FocalLoss(),
        "ldam": topk.LDAMLoss(margins=margins, scale=3.0),
        **{f"autkc, {name}": topk.AUTKCLoss({1: 0.5, 3: 0.5}, surrogate=name) for name in SURROGATES},
        "ldr": topk.LDRLoss(temperature=0.7),
        "ldr, adaptive": topk.LDRLoss(temperature=0.7, alpha=1.5),
        "softmax at k": topk.SoftmaxAtKLoss({1: 0.5, 3: 0.5}, temperature=0.8),
        "differentiable": topk.DifferentiableTopKLoss(3, m=6),
        "differentiable, all": topk.DifferentiableTopKLoss(3, m=40),
        "differentiable, softmax over all": topk.DifferentiableTopKLoss(
            {1: 0.5, 3: 0.5}, m=6, top1="cross_entropy", cross_entropy_over="all"
        ),
        "no k counts": topk.SmoothTopKLoss(CLASSES),
        **{f"hinge, {name}": topk.TopKHingeLoss({1: 0.5, 3: 0.5}, variant=name) for name in VARIANTS},
        **{f"hinge, {name}": topk.TopKHingeLoss({1: 0.5, 3: 0.5}, variant=name) for name in SMOOTHED},
        **{  # on more classes than the head has
            f"hinge, {name}, many slopes": topk.TopKHingeLoss(3, variant=name, margin=8.0, smoothing=50.0)
            for name in ("polyhedral", *SMOOTHED)
        },
    }


def _by_margin(margin: Tensor) -> Tensor:
    return (margin / 3.0).sigmoid().nan_to_num()


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with ties across the cuts, masked classes and rows that are broken, targets, and upstream gradients."""
    generator = torch.Generator().manual_seed(0)
    scores = 2.0 * torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=generator)
    scores[3:6] = scores[3:6].round()
    scores[6, 4:9], scores[7, 1:20] = -torch.inf, -torch.inf  # row 7's target is class 20
    scores[7, 21:] = -torch.inf
    scores[8, 21], scores[9, 2] = torch.nan, torch.inf
    target = torch.arange(ROWS) * 7 % CLASSES
    target[2] = -100
    scores[2, 3] = torch.nan  # an ignored row may hold anything
    scores[10, target[10]] = -torch.inf
    return scores.to(dtype), target, torch.randn(ROWS, dtype=torch.float64, generator=generator).to(dtype)


def same(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


@contextmanager
def counted(operations: tuple[str, ...] = ("all_gather", "all_reduce")) -> Iterator[list[tuple[str, int]]]:
    """What was sent: the operation and the bytes of this process's part."""
    sent: list[tuple[str, int]] = []
    kept = {name: getattr(dist, name) for name in operations}

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            message = arguments[1] if name == "all_gather" else arguments[0]
            sent.append((name, message.numel() * message.element_size()))
            return kept[name](*arguments, **keywords)

        return call

    for name in operations:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name in operations:
            setattr(dist, name, kept[name])


def losses_equal(shard: topk.ClassShard, stop: int) -> None:
    """In other types for three processes alone, of which one has no class."""
    types = ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2.0**-8))
    for dtype, tolerance in types[: 3 if shard.processes == 3 else 1]:
        scores, target, upstream = problem(dtype)
        for name, loss in criteria().items():
            loss.reduction = "none"
            whole, local = (x.clone().requires_grad_() for x in (scores, scores[:, shard.start : stop]))
            with torch.autocast("cpu", enabled=dtype is torch.bfloat16):
                expected, found = loss(whole, target), topk.sharded_loss(loss, local, target, shard)
                same(found.detach(), expected.detach(), min(tolerance, 2e-6), name)
            (gradient,) = torch.autograd.grad(expected, whole, upstream.to(expected.dtype))
            gradient[10] = 0.0  # the loss of an impossible target is +inf; its slices get no gradient
            (slopes,) = torch.autograd.grad(found, local, upstream.to(found.dtype))
            same(slopes, gradient[:, shard.start : stop], tolerance, name)
    loss = topk.TransitionTopKLoss(3, weight=torch.linspace(0.5, 2.0, CLASSES))
    usual, scores = [0, 1, 2, 3, 4, 5, 6, 11], problem(torch.float32)[0]
    for reduction in ("mean", "sum"):
        loss.reduction = reduction
        local = scores[usual, shard.start : stop]
        same(topk.sharded_loss(loss, local, target[usual], shard), loss(scores[usual], target[usual]), 2e-6)


def noise_is_that_of_one_process(shard: topk.ClassShard, stop: int) -> None:
    """Against sorting the noised scores of all classes."""
    k, samples, epsilon, seed = {1: 0.5, 3: 0.5}, 5, 0.7, 11
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        scores, target, _ = problem(dtype)
        loss = topk.NoisedTopKLoss(k, epsilon=epsilon, samples=samples, margins=2.0, scale=0.8, reduction="none")
        local = scores[:, shard.start : stop].clone().requires_grad_()
        torch.manual_seed(seed)
        drawn = torch.randint(2**63 - 1, (1,))[0]
        torch.manual_seed(seed)
        found = topk.sharded_loss(loss, local, target, shard)
        whole = scores.clone().requires_grad_()
        noise = epsilon * counted_normals(drawn, 0, ROWS, CLASSES, samples).to(dtype)
        order = (whole + noise).sort(dim=2, descending=True).values
        safe = target.clamp(min=0)
        own = whole.gather(1, safe[:, None])[:, 0]
        expected = sum(share * (0.8 * (2.0 + order[:, :, k].mean(0) - own)).relu() for k, share in loss.k.items())
        broken = ~(whole.detach().amax(1) < torch.inf)
        expected = torch.where(broken, torch.nan, expected)
        expected = torch.where(target == -100, 0.0, expected)
        same(found.detach(), expected.detach(), tolerance)
        usual = ~broken & (target != -100) & (own > -torch.inf)
        (gradient,) = torch.autograd.grad(expected[usual].sum() * 2.0, whole)
        (slopes,) = torch.autograd.grad(2.0 * found.sum(), local)
        same(slopes[usual], gradient[usual, shard.start : stop], tolerance)
        assert slopes[broken & (target != -100)].isnan().all()
        assert (slopes[target == -100] == 0).all()


def messages_are_few(shard: topk.ClassShard, stop: int) -> None:
    scores, target, _ = problem(torch.float32)
    local = scores[:, shard.start : stop].requires_grad_()
    loss, k = criteria(), 3
    for name, reductions in (("hinge, kth", 0), ("smooth", k), ("transition, fixed", 1)):
        with counted() as sent:
            topk.sharded_loss(loss[name], local, target, shard).backward()
        head = ("all_gather", 4 * ROWS * (2 * (k + 1) + 1))  # k + 1 scores and classes, and the target's score
        assert sent == [head, ("all_reduce", 4 * ROWS * reductions)][: 1 + (reductions > 0)]
    usual = [0, 1, 3, 4, 5, 6, 11]
    scores, target = scores[usual], target[usual]
    rows, k = len(usual), 11
    with counted() as sent:
        topk.sharded_loss(loss["smooth, k > 10"], scores[:, shard.start : stop], target, shard)
    head, *steps, last = sent
    assert head == ("all_gather", 4 * rows * (2 * (2 * k + 1) + 1))
    assert last == ("all_gather", 8 * rows * (k + 1))  # chances in float64
    assert {*steps} == {("all_reduce", 4 * rows * 2)}
    assert 4 <= len(steps) <= 8
    with counted() as sent:
        topk.sharded_loss(topk.NoisedTopKLoss(3, samples=5), scores[:, shard.start : stop], target, shard)
    assert sent == [("all_gather", 4 * rows * (5 * 4 * 3 + 1))]  # score, noise and class of each sample's best
    assert _sums(loss["transition, smoothed"], scores, target, shard, stop) == [3]
    assert len(_sums(loss["ldr, adaptive"], scores, target, shard, stop, numbers=3)) in range(3, 8)
    *grid, counts = _sums(loss["noised, exact"], scores, target, shard, stop)
    assert grid == [2 * 2 * 3] * 6  # in float64, for two ks
    assert counts == 2 * len(STEPS) * ((1 + 1) + (3 + 1))
    for name in ("polyhedral", *SMOOTHED):
        found = _sums(loss[f"hinge, {name}"], 4.0 * scores, target, shard, stop)
        assert len(found) == (name == "polyhedral_smooth")
        assert len(_sums(loss[f"hinge, {name}, many slopes"], scores, target, shard, stop, numbers=3)) in range(2, 8)
    target = problem(torch.float32)[1]
    weight, features = torch.randn(stop - shard.start, FEATURES, requires_grad=True), torch.randn(ROWS, FEATURES)
    with counted() as sent:
        topk.linear_loss(loss["smooth"], features.requires_grad_(), weight, target, chunk=4, shard=shard).backward()
    assert [name for name, _ in sent] == ["all_gather", "all_reduce"] * 3 + ["all_reduce"]
    assert sent[-1][1] == 4 * ROWS * FEATURES  # the features' gradient, once


def _sums(
    loss: nn.Module, scores: Tensor, target: Tensor, shard: topk.ClassShard, stop: int, numbers: int | None = None
) -> list[int]:
    """How many 32-bit numbers a row every message after the heads' has; backward sends none."""
    with counted() as sent:
        topk.sharded_loss(loss, scores[:, shard.start : stop].clone().requires_grad_(), target, shard).backward()
    found = [size // (4 * len(scores)) for _, size in sent[1:]]
    assert numbers is None or {*found} == {numbers}
    return found


def last_layers_equal(shard: topk.ClassShard, stop: int) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = ((ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    whole = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    target, upstream = problem(torch.float64)[1:]
    mine = slice(shard.start, stop)
    losses = [
        "smooth",
        "smooth, k > 10",
        "hinge, beta",
        "differentiable",
        "ldr",
        "transition, smoothed",
        "noised, exact",
    ]
    losses += ["hinge, alpha_smooth, many slopes", "hinge, polyhedral_smooth"]
    for place, name in enumerate(losses):
        for reduction in ("mean", "none") if place < 4 else ("mean",):
            loss = criteria()[name]
            loss.reduction = reduction
            local = [whole[0].detach().requires_grad_(), *(x.detach()[mine].requires_grad_() for x in whole[1:])]
            expected = loss(F.linear(*whole), target)
            found = topk.linear_loss(loss, *local[:2], target, bias=local[2], chunk=5, shard=shard)
            same(found.detach(), expected.detach(), 1e-12)
            weights = upstream if reduction == "none" else upstream[0]
            wanted = torch.autograd.grad(expected, whole, weights)
            for place, gradient in enumerate(torch.autograd.grad(found, local, weights)):
                same(gradient, wanted[place] if place == 0 else wanted[place][mine], 1e-12)
    q = 0.3 * F.one_hot(target.clamp(min=0), CLASSES).double() + 0.7 * F.one_hot((target + 9) % CLASSES, CLASSES)
    smooth = criteria()["smooth"]
    expected, found = smooth(F.linear(*whole), q), topk.linear_loss(smooth, *local[:2], q, bias=local[2], shard=shard)
    wanted = torch.autograd.grad(expected, whole)
    for place, gradient in enumerate(torch.autograd.grad(found, local)):
        same(gradient, wanted[place] if place == 0 else wanted[place][mine], 1e-12)
    cosines = topk.linear_loss(criteria()["ldam"], *local[:2], target, cosine_scale=4.0, shard=shard)
    same(cosines, topk.linear_loss(criteria()["ldam"], *whole[:2], target, cosine_scale=4.0), 1e-12)


def modules_hold_a_slice(shard: topk.ClassShard, stop: int) -> None:
    whole = topk.LinearTopKLoss(criteria()["smooth"], FEATURES, CLASSES).double()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(torch.linspace(-2.0, 2.0, parameter.numel()).sin().view_as(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an empty slice nothing is to be initialised
        mine = topk.LinearTopKLoss(criteria()["smooth"], FEATURES, stop - shard.start, shard=shard).double()
    mine.load_state_dict({name: tensor[shard.start : stop] for name, tensor in whole.state_dict().items()})
    features, target = (
        torch.linspace(-9.0, 9.0, ROWS * FEATURES).cos().double().view(ROWS, -1),
        problem(torch.float64)[1],
    )
    expected, found = (module(features, target) for module in (whole, mine))
    same(found, expected, 1e-12)
    for value in (expected, found, 2.0 * mine(features, target)):  # the second time they accumulate
        value.backward()
    for one, all_of_them in zip(mine.parameters(), whole.parameters(), strict=True):
        same(one.grad, 3.0 * all_of_them.grad[shard.start : stop], 1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = (module.float()(features.float(), target) for module in (whole, mine))
    same(found, expected, 2e-6)
    whole, mine = whole.double(), mine.double()
    ranks = topk.metrics.ranks(mine.scores(features), target, shard=mine.shard)
    assert torch.equal(ranks, topk.metrics.ranks(whole.scores(features), target))
    with pytest.raises(ValueError, match="classes must end by class 29"):
        topk.LinearTopKLoss(criteria()["smooth"], FEATURES, CLASSES, shard=topk.ClassShard(3, CLASSES))


def probabilities_are_taken(shard: topk.ClassShard, stop: int) -> None:
    scores, target, upstream = problem(torch.float64)
    usual = [0, 1, 3, 4, 5, 11]
    scores, target, upstream = scores[usual], target[usual], upstream[usual]
    q = 0.3 * F.one_hot(target, CLASSES).double() + 0.7 * F.one_hot((target + 9) % CLASSES, CLASSES)
    for name, loss in criteria().items():
        loss.reduction = "none"
        whole, local = (x.clone().requires_grad_() for x in (scores, scores[:, shard.start : stop]))
        expected, found = loss(whole, q), topk.sharded_loss(loss, local, q, shard)
        same(found.detach(), expected.detach(), 1e-12, name)
        (gradient,) = torch.autograd.grad(expected, whole, upstream)
        same(torch.autograd.grad(found, local, upstream)[0], gradient[:, shard.start : stop], 1e-12, name)


def rows_without_a_target_count_nothing(shard: topk.ClassShard, stop: int) -> None:
    """No row at all, or rows that are ignored and hold nothing but NaN."""
    for name, loss in criteria().items():
        loss.reduction = "sum"
        for target in (torch.zeros(0, dtype=torch.int64), torch.full((2,), -100)):
            local = torch.full((len(target), stop - shard.start), torch.nan).requires_grad_()
            value = topk.sharded_loss(loss, local, target, shard)
            assert value == 0.0, name
            assert (torch.autograd.grad(value, local)[0] == 0.0).all(), name


def metrics_equal(shard: topk.ClassShard, stop: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scores, target, _ = problem(dtype)
        local = scores[:, shard.start : stop]
        assert torch.equal(topk.metrics.ranks(local, target, shard=shard), topk.metrics.ranks(scores, target))
        found = topk.metrics.topk_accuracy(local, target, (1, 3, CLASSES), shard=shard)
        assert found == topk.metrics.topk_accuracy(scores, target, (1, 3, CLASSES))


def dtensors_are_taken(shard: topk.ClassShard, stop: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    scores, target, _ = problem(torch.float64)
    usual = [0, 1, 3, 4, 5, 6, 11]
    scores, target = scores[usual], target[usual]
    accuracy = topk.TransitionTopKLoss({1: 0.5, 3: 0.5}, transition="accuracy", momentum=0.5)
    for name, loss in {**criteria(), "transition, accuracy": accuracy}.items():
        alone = copy.deepcopy(loss)
        whole, along = scores.clone().requires_grad_(), Shard(1) if name == "smooth" else Shard(-1)
        cut = distribute_tensor(scores, mesh, [along]).requires_grad_()
        expected, found = alone(whole, target), loss(cut, target)
        same(found.detach(), expected.detach(), 1e-12, name)
        found.backward()
        expected.backward()
        same(cut.grad.full_tensor(), whole.grad, 1e-12, name)
    assert torch.equal(topk.metrics.ranks(cut, target), topk.metrics.ranks(scores, target))
    assert topk.metrics.topk_accuracy(cut, target, (1, 3)) == topk.metrics.topk_accuracy(scores, target, (1, 3))
    loss, possible = criteria()["smooth"], [0, 1, 2, 3, 4, 6]  # row 5 has masked classes
    q = F.one_hot(target[possible], CLASSES).double()
    q = 0.4 * q + 0.6 * q.roll(4, 1)
    along = distribute_tensor(scores[possible], mesh, [Shard(-1)])
    for soft in (q, distribute_tensor(q, mesh, [Shard(-1)])):
        same(loss(along, soft), loss(scores[possible], q), 1e-12)
    with pytest.raises(ValueError, match="scores as a DTensor must be"):
        loss(distribute_tensor(scores, mesh, [Replicate()]), target)
    layer = torch.randn(CLASSES, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight, bias = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (layer, layer[:, 0].contiguous()))
    features = scores[:, :FEATURES].clone().requires_grad_()
    alike = distribute_tensor(features.detach(), mesh, [Replicate()]).requires_grad_()
    inputs = [features.detach().requires_grad_(), layer.requires_grad_(), layer[:, 0].detach().requires_grad_()]
    expected = criteria()["ldr"](F.linear(*inputs), target)
    wanted = torch.autograd.grad(expected, inputs)
    for given in (features, alike):
        found = topk.linear_loss(criteria()["ldr"], given, weight, target, bias=bias)
        same(found.detach(), expected.detach(), 1e-12)
        for one, other in zip(torch.autograd.grad(found, (given, weight, bias)), wanted, strict=True):
            same(one.full_tensor() if isinstance(one, DTensor) else one, other, 1e-12)
    with pytest.raises(ValueError, match="bias must be a DTensor"):
        topk.linear_loss(criteria()["ldr"], features, weight, target, bias=layer[:, 0])
    split = topk.LinearTopKLoss(criteria()["ldr"], FEATURES, CLASSES).double()
    split.load_state_dict({"linear.weight": inputs[1], "linear.bias": inputs[2]})
    found = parallelize_module(split, mesh, {"linear": ColwiseParallel()})(features, target)
    same(found.detach(), expected.detach(), 1e-12)
    found.backward()
    same(split.linear.weight.grad.full_tensor(), wanted[1], 1e-12)
    with pytest.raises(ValueError, match="weight as a DTensor must be"):
        topk.linear_loss(criteria()["ldr"], features, distribute_tensor(layer.detach(), mesh, [Shard(1)]), target)


def what_cannot_be_is_refused(shard: topk.ClassShard, stop: int) -> None:
    scores, target, _ = problem(torch.float64)
    local = scores[:, shard.start : stop]
    with pytest.raises(ValueError, match="scores must end by class 29"):
        topk.sharded_loss(criteria()["smooth"], scores, target, topk.ClassShard(3, CLASSES))
    with pytest.raises(ValueError, match="target must hold class indices from 0 to 28"):
        topk.sharded_loss(criteria()["smooth"], local, target + CLASSES, shard)
    with pytest.raises(ValueError, match="start must be at most total"):
        topk.ClassShard(30, 29)


CHECKS: tuple[Check, ...] = (
    losses_equal,
    noise_is_that_of_one_process,
    messages_are_few,
    last_layers_equal,
    modules_hold_a_slice,
    probabilities_are_taken,
    rows_without_a_target_count_nothing,
    metrics_equal,
    dtensors_are_taken,
    what_cannot_be_is_refused,
)


WORLDS = {
    dtensors_are_taken: (4,),
    probabilities_are_taken: (3,),
    rows_without_a_target_count_nothing: (2,),
}  # for all others every one of `CUTS`


def _process(rank: int, port: int) -> None:
    """All checks in the groups of the first two, three and four processes."""
    torch.set_num_threads(1)
    most = max(CUTS)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=most)
    for world, cuts in CUTS.items():
        group = dist.new_group([*range(world)])
        for check in CHECKS:
            if rank < world and world in WORLDS.get(check, CUTS):
                try:
                    check(topk.ClassShard(cuts[rank], CLASSES, group), cuts[rank + 1])
                except Exception as error:
                    raise AssertionError(f"{check.__name__} fails in process {rank} of {world}") from error
    dist.destroy_process_group()


UNDER_TORCHRUN = """
import torch, topk
import torch.distributed as dist

dist.init_process_group("gloo")
rank, cuts = dist.get_rank(), (0, 7, 20)
shard = topk.ClassShard(cuts[rank], 20)
generator = torch.Generator().manual_seed(0)
features, weight = torch.randn(6, 4, generator=generator), torch.randn(20, 4, generator=generator)
target, loss = torch.arange(6) * 3, topk.SmoothTopKLoss(11)
mine = weight[cuts[rank] : cuts[rank + 1]].clone().requires_grad_()
whole = weight.clone().requires_grad_()
found = topk.linear_loss(loss, features, mine, target, shard=shard)
expected = loss(features @ whole.T, target)
torch.testing.assert_close(found, expected)
found.backward()
expected.backward()
torch.testing.assert_close(mine.grad, whole.grad[cuts[rank] : cuts[rank + 1]])
print("equal")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_torchrun_starts_them(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(UNDER_TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("equal") == 2


def test_processes_together_equal_one(start_processes: Callable[..., None]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_process, port, processes=max(CUTS))
