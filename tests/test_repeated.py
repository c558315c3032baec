"""One dynamics applied several times in turn (``RepeatedDynamics``): equal to doing so by hand, sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from loopwm.dynamics import DYNAMICS, DepthSchedule, LoopedDynamics, RepeatedDynamics

Z, A, D, MOST, B = 6, 3, 8, 5, 12
TIMES = torch.tensor([3, 1, 5, 2, 2, 1, 4, 5, 3, 1, 2, 4])


def split(action: Tensor) -> tuple[Tensor, Tensor]:
    return action[:, :-1], action[:, -1].round().long()


def made(name: str = "looped", **words) -> RepeatedDynamics:
    torch.manual_seed(0)
    step = DYNAMICS[name](Z, A, D, **words)
    for parameter in step.parameters():  # blocks begin at zero, where one application is like another
        nn.init.normal_(parameter, std=0.3)
    return RepeatedDynamics(step, split, MOST)


def batch(times: Tensor = TIMES) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(1)
    z, once = torch.randn(len(times), Z, generator=stream), torch.randn(len(times), A, generator=stream)
    return z, torch.cat([once, times[:, None].float()], -1)


def by_hand(dynamics: RepeatedDynamics, z: Tensor, action: Tensor, depth) -> tuple[Tensor, Tensor, int, float]:
    """Of one sample: (z' (Z,), h (2 D,), loops, residual)."""
    once, times = split(action)
    total, loops = 0.0, 0
    for _ in range(int(times)):
        out = dynamics.step(z, once, depth)
        z, total, loops = out.z_next, total + out.h, loops + int(out.loops)
    return z[0], torch.cat([out.h, total / MOST], -1)[0], loops, float(out.residual)


@pytest.mark.parametrize("name", DYNAMICS)
@pytest.mark.parametrize("depth", ["int", "tensor", "schedule", "adaptive"])
def test_it_is_the_step_applied_as_often_as_each_sample_asks(name, depth):
    dynamics, (z, action) = made(name), batch()
    each = torch.randint(1, 6, (B,), generator=torch.Generator().manual_seed(2))
    given = {"int": 3, "tensor": each, "schedule": DepthSchedule(each), "adaptive": None}[depth]
    out = dynamics(z, action, given)
    assert out.z_next.shape == (B, Z) and out.h.shape == (B, dynamics.state_dim)
    for i in range(B):
        alone = each[i : i + 1] if depth in ("tensor", "schedule") else given
        z_next, h, loops, residual = by_hand(dynamics, z[i : i + 1], action[i : i + 1], alone)
        torch.testing.assert_close(out.z_next[i], z_next, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.h[i], h, rtol=1e-4, atol=1e-5)
        assert int(out.loops[i]) == loops
        assert float(out.residual[i]) == pytest.approx(residual, rel=1e-3, abs=1e-5)


def test_its_gradients_are_those_of_the_applications_in_turn():
    dynamics, (z, action) = made().double(), (x.double() for x in batch())
    z.requires_grad_(), action.requires_grad_()
    weight = torch.randn(B, Z, generator=torch.Generator().manual_seed(3)).double()

    def gradients(z_next: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((z_next * weight).sum(), (z, action, *dynamics.parameters()), allow_unused=True)

    whole = gradients(dynamics(z, action, 2).z_next)
    alone = gradients(torch.stack([by_hand(dynamics, z[i : i + 1], action[i : i + 1], 2)[0] for i in range(B)]))
    for one, other in zip(whole, alone, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    assert not whole[1][:, -1].any(), "how often is no matter of degree"


def test_samples_that_are_done_leave_the_batch(monkeypatch):
    dynamics, sizes = made(), []
    inner = dynamics.step.forward
    monkeypatch.setattr(dynamics.step, "forward", lambda z, *rest: sizes.append(len(z)) or inner(z, *rest))
    dynamics(*batch(), 2)
    assert sizes == [int((t < TIMES).sum()) for t in range(5)] == [12, 9, 6, 4, 2]


def test_a_training_depth_is_drawn_once_and_serves_every_application():
    dynamics, (z, action) = made(), batch(torch.full((B,), 3))
    depth = dynamics.sample_depth(B, torch.Generator().manual_seed(0))
    assert isinstance(depth, DepthSchedule) and len(set(depth.loops.tolist())) > 1
    assert torch.equal(dynamics(z, action, depth).loops, 3 * depth.loops)
    assert torch.equal(depth.loops, dynamics.step.sample_depth(B, torch.Generator().manual_seed(0)).loops)


def test_it_says_of_its_step_what_that_is_bound_to(monkeypatch):
    dynamics, (z, action) = made(), batch()
    assert dynamics.lipschitz_bound() == dynamics.step.lipschitz_bound() < 1
    for loops in (None, 3):
        measured = dynamics.measured_contraction(z, action, loops)
        assert 0 < measured == dynamics.step.measured_contraction(z, action[:, :-1], loops)
    assert (dynamics.mean_loops, dynamics.max_loops) == (4, 8)
    folds, fold = [], dynamics.step.cell.fold
    monkeypatch.setattr(dynamics.step.cell, "fold", lambda: folds.append(1) or fold())
    with torch.no_grad(), dynamics.frozen():
        dynamics(z, action, 2)
    assert len(folds) == 1, "the weights of all applications are folded once"


def test_the_penalty_is_the_mean_over_the_applications():
    dynamics, (z, action) = made(mode="soft"), batch(torch.full((B,), 2))
    assert made().forward(z, action, 2).penalised is False
    drawn = dynamics(z, action, 2).jacobian_penalty(torch.Generator().manual_seed(5))
    stream, first = torch.Generator().manual_seed(5), dynamics.step(z, action[:, :-1], 2)
    second = dynamics.step(first.z_next, action[:, :-1], 2)
    each = [out.jacobian_penalty(stream) for out in (first, second)]
    torch.testing.assert_close(drawn, (each[0] + each[1]) / 2)


def test_grids_are_repeated_too():
    torch.manual_seed(0)
    dynamics = RepeatedDynamics(LoopedDynamics(Z, A, D, block="conv"), split, MOST)
    z, action = torch.randn(2, Z, 3, 3), torch.tensor([[0.1, 0.2, 0.3, 1.0], [0.4, 0.5, 0.6, 3.0]])
    out = dynamics(z, action, 2)
    assert out.z_next.shape == z.shape and out.h.shape == (2, dynamics.state_dim, 3, 3)


def test_what_it_refuses():
    dynamics, (z, action) = made(), batch()
    with pytest.raises(ValueError, match="take no h0"):
        dynamics(z, action, 2, torch.zeros(B, D))
    for n in (0, 6):
        with pytest.raises(ValueError, match=f"repeated 1 to 5 times, got {n} to {n}"):
            dynamics(z, torch.cat([action[:, :-1], torch.full((B, 1), float(n))], -1), 2)
    for counts in (torch.ones(B - 1, dtype=torch.long), torch.ones(B), torch.ones(B, 1, dtype=torch.long), 3):
        with pytest.raises(ValueError, match="whole number of applications for each of"):
            RepeatedDynamics(dynamics.step, lambda action, n=counts: (action[:, :-1], n), 5)(z, action, 2)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        dynamics(z, action, 0)
    with pytest.raises(ValueError, match="prediction of a world model"):
        made(halting="prediction")
    with pytest.raises(ValueError, match="tensor of integers"):
        dynamics(z, action, torch.tensor(3))
    with pytest.raises(ValueError, match="entries for a batch"):
        dynamics(z, action, torch.ones(B + 1, dtype=torch.long))


def test_it_learns_what_is_made_of_equal_steps_and_goes_on_beyond():
    """A rotation by n times one angle: trained for n up to 3, right at 12."""
    torch.manual_seed(0)
    dynamics = RepeatedDynamics(LoopedDynamics(2, 1, 16, latent_norm=nn.Identity(), mode="linear"), split, 12)
    optimizer, stream = torch.optim.Adam(dynamics.parameters(), 1e-2), torch.Generator().manual_seed(1)

    def turned(n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start = 2 * torch.pi * torch.rand(len(n), generator=stream)
        points = [torch.stack([torch.cos(x), torch.sin(x)], -1) for x in (start, start + 0.3 * n)]
        return points[0], torch.stack([torch.ones(len(n)), n], -1), points[1]

    def error(n: Tensor) -> Tensor:
        z, action, after = turned(n)
        return (dynamics(z, action, 2).z_next - after).square().sum(-1).mean()

    for _ in range(400):
        optimizer.zero_grad()
        error(torch.randint(1, 4, (64,), generator=stream).float()).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(error(torch.full((200,), 3.0)).sqrt()) < 0.05
        assert float(error(torch.full((200,), 12.0)).sqrt()) < 0.2
