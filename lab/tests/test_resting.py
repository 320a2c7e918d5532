"""Resting places against what is proved about them."""

from __future__ import annotations

import torch

from topk_lab.study.contenders import by_name
from topk_lab.study.resting import rest

Q = torch.tensor([[0.4, 0.35, 0.25], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2]], dtype=torch.float64)


def test_cross_entropy_rests_at_q() -> None:
    p, right = rest(by_name("cross-entropy"), 1, Q)
    torch.testing.assert_close(p, Q, atol=1e-4, rtol=0)
    assert right.all()


def test_hinges_rest_at_their_exact_minima() -> None:
    apart = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).softmax(0)
    p, right = rest(by_name("hinge, calibrated"), 1, Q)
    assert right.all()
    torch.testing.assert_close(p[1], apart)
    p, right = rest(by_name("hinge, kth"), 1, Q)
    torch.testing.assert_close(p[0], torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(p[1], apart)
    assert right.tolist()[:2] == [False, True]
    assert not rest(by_name("hinge, beta"), 2, Q)[1][2]


def test_the_smooth_loss_ranks_right() -> None:
    for k in (1, 2):
        p, right = rest(by_name("smooth, tau 1, margin 1"), k, Q)
        assert right.all()
        torch.testing.assert_close(p.sum(1), torch.ones(3, dtype=torch.float64))
