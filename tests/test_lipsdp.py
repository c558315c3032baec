"""Mode lipsdp: one inequality for the whole loop, against every pattern of open units and against its own LMI."""

import itertools
import math

import pytest
import torch
from test_dynamics import (
    DOUBLE,
    WEIGHTS,
    A,
    D,
    Z,
    adversarial,
    generator,
    inputs,
    jacobian_norm,
    loop_for,
    looped,
    sigma,
)

from loopwm.dynamics import DYNAMICS, LoopedDynamics
from loopwm.dynamics.cell import LoopCell
from loopwm.dynamics.lipsdp import inverse_root, joint_factor, joint_scale

SMALL, UNITS = 3, 6


def parts(seed: int, scale: float = 1.0, units: int = UNITS, decay: float | None = None) -> list[torch.Tensor]:
    """W1 (W, D), W2 (D, W), Abar (D,) and log multipliers (W,) in float64."""
    stream = generator(seed)
    read, write = (torch.randn(units, SMALL, generator=stream, dtype=DOUBLE) * scale for _ in range(2))
    slow = torch.rand(SMALL, generator=stream, dtype=DOUBLE) if decay is None else torch.full((SMALL,), decay).double()
    return [read, write.t(), slow, torch.randn(units, generator=stream, dtype=DOUBLE)]


def true_factor(read: torch.Tensor, write: torch.Tensor, decay: torch.Tensor) -> float:
    """The largest ||Abar + W2 P W1|| over P in [0, 1]^W: a norm is convex in P, so it is largest at a corner."""
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(read))), dtype=DOUBLE)
    maps = torch.diag(decay) + torch.einsum("dw,pw,we->pde", write, corners, read)
    return float(torch.linalg.matrix_norm(maps, 2).max())


def promised(decay: torch.Tensor, gamma: float) -> float:
    return float(decay.max() + gamma * (1.0 - decay.max()))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scale", [0.05, 0.3, 3.0, 1e3])
def test_no_pattern_of_units_is_beyond_the_factor(seed, scale):
    read, write, decay, multipliers = parts(seed, scale)
    shrink = joint_scale(read, write, decay, multipliers, 0.9)
    assert 0.0 < float(shrink) <= 1.0
    read, write = read * shrink, write * shrink
    bound = joint_factor(read, write, decay, multipliers)
    assert true_factor(read, write, decay) <= bound <= promised(decay, 0.9)


def test_weights_that_contract_are_left_alone():
    read, write, decay, multipliers = parts(0, 0.05, decay=0.3)
    assert float(joint_scale(read, write, decay, multipliers, 0.9)) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_the_factor_is_the_smallest_for_which_the_published_matrix_is_not_negative(seed):
    """The LMI of LipSDP itself, in (h, units, h'): [[rho^2, -W1^T L, Abar], [., 2 L, W2^T], [., ., 1]]."""
    read, write, decay, multipliers = parts(seed, 0.3)
    shrink = joint_scale(read, write, decay, multipliers, 0.9)
    read, write, weights = read * shrink, write * shrink, torch.diag(multipliers.exp())
    rho = joint_factor(read, write, decay, multipliers)

    def smallest_eigenvalue(factor: float) -> float:
        one = torch.eye(SMALL, dtype=DOUBLE)
        rows = [
            torch.cat([factor**2 * one, -read.t() @ weights, torch.diag(decay)], 1),
            torch.cat([-weights @ read, 2.0 * weights, write.t()], 1),
            torch.cat([torch.diag(decay), write, one], 1),
        ]
        return float(torch.linalg.eigvalsh(torch.cat(rows))[0])

    assert smallest_eigenvalue(rho) >= -1e-9 > smallest_eigenvalue(rho * (1.0 - 1e-3))


def test_the_bound_is_reached():
    """Ascent on weights and multipliers comes near the promised factor: nothing is given away but the margin."""
    torch.manual_seed(0)
    read, write, decay, multipliers = parts(0, 0.3)
    free = [read.requires_grad_(), write.detach().clone().requires_grad_(), multipliers.requires_grad_()]
    ascent = torch.optim.Adam(free, lr=0.02, maximize=True)
    for _ in range(400):
        ascent.zero_grad()
        shrink = joint_scale(free[0], free[1], decay, free[2], 0.9)
        torch.linalg.matrix_norm(torch.diag(decay) + free[1] @ free[0] * shrink**2, 2).backward()
        ascent.step()
    read, write, multipliers = (x.detach() for x in free)
    shrink = joint_scale(read, write, decay, multipliers, 0.9)
    assert true_factor(read * shrink, write * shrink, decay) > 0.99 * promised(decay, 0.9)


def test_a_block_that_pulls_back_has_more_room_than_norms_leave_it():
    """W2 = -W1^T with orthonormal rows: up to 1 + Abar is a contraction, norms stop at gamma (1 - Abar)."""
    decay, gamma = torch.full((SMALL,), 0.6, dtype=DOUBLE), 0.95
    read = 10.0 * torch.linalg.qr(torch.randn(SMALL, SMALL, generator=generator(), dtype=DOUBLE))[0]
    even = torch.zeros(SMALL, dtype=DOUBLE)
    shrink = joint_scale(read, -read.t(), decay, even, gamma)
    pull = sigma(read * shrink) ** 2
    assert pull == pytest.approx(promised(decay, gamma) + 0.6, rel=2e-2)  # a flat spectrum: the norm is bounded loosely
    assert pull > 4.0 * gamma * 0.4
    assert true_factor(read * shrink, -read.t() * shrink, decay) <= promised(decay, gamma)


def test_where_the_multipliers_prove_nothing_the_norms_do():
    """W2 alone too large for its multipliers: no rho fulfils the inequality."""
    read, write, decay, multipliers = parts(0, 3.0)
    assert joint_factor(read, write, decay, multipliers) is None


def test_the_root_is_the_roots():
    decay, rho = torch.tensor([0.0, 0.5, 0.94999], dtype=DOUBLE), torch.tensor(0.95, dtype=DOUBLE)
    first, mixed, last = inverse_root(decay, rho)
    for i, a in enumerate(decay.tolist()):
        root = torch.tensor([[first[i], mixed[i]], [mixed[i], last[i]]], dtype=DOUBLE)
        matrix = torch.tensor([[0.95**2, a], [a, 1.0]], dtype=DOUBLE)
        torch.testing.assert_close(root @ matrix @ root, torch.eye(2, dtype=DOUBLE), atol=1e-9, rtol=0)


def test_the_scale_has_the_right_gradient():
    read, write, decay, multipliers = parts(3, 1.0)
    free = [x.requires_grad_() for x in (read, write.contiguous(), decay, multipliers)]
    # The bound is a little above the norm, and has the norm's gradient.
    assert torch.autograd.gradcheck(lambda *x: joint_scale(*x, 0.9), free, eps=1e-6, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_one_loop_contracts_at_least_as_the_bound_says(weights, activation):
    dynamics = WEIGHTS[weights]({"activation": activation, "mode": "lipsdp"})
    bound = dynamics.lipschitz_bound()
    assert 0.0 < bound < 1.0
    with torch.no_grad():
        for seed in range(5):
            h, e = torch.randn(2, 1, D, generator=generator(seed), dtype=DOUBLE) * 10 ** (seed - 2)
            assert jacobian_norm(loop_for(dynamics, e), h[0]) <= bound + 1e-12
    assert adversarial(dynamics, activation, seed=1) <= bound + 1e-12


@pytest.mark.parametrize("log_dt", [0.0, -8.0], ids=["fast", "slow"])
def test_the_promise_is_kept_in_float32(log_dt):
    """Decays next to one make K nearly singular: where rounding is magnified most."""
    for seed in range(20):
        torch.manual_seed(seed)
        dynamics = LoopedDynamics(Z, A, D, mode="lipsdp")
        with torch.no_grad():
            dynamics.cell.log_dt.add_(log_dt + 0.01 * torch.randn(D))
            for weight in (dynamics.cell.read.weight, dynamics.cell.write.weight, dynamics.cell.log_multipliers):
                weight.copy_(3.0 * torch.randn(weight.shape))
            decay = dynamics.cell.decay().double()
        assert dynamics.lipschitz_bound() <= promised(decay, 0.95) < 1.0


def test_training_that_wants_to_grow_stays_below_the_bound():
    torch.manual_seed(0)
    dynamics = LoopedDynamics(Z, A, D, mode="lipsdp")
    adam = torch.optim.Adam(dynamics.parameters(), lr=0.3)
    z, action = (x.float() for x in inputs(16))
    for _ in range(60):
        adam.zero_grad()
        (-dynamics(z, action, 4).h.square().mean()).backward()
        adam.step()
        assert dynamics.lipschitz_bound() < 1.0
    assert sigma(dynamics.cell.read.weight) > 2.0, "training pushed against the bound"
    assert dynamics.cell.log_multipliers.std() > 0.1, "the multipliers are learnt"
    assert dynamics.measured_contraction(z, action, 20) <= dynamics.lipschitz_bound() * (1 + 1e-3)
    found = max(adversarial(dynamics.double(), "relu", seed) for seed in range(3))
    assert 0.5 * dynamics.lipschitz_bound() < found <= dynamics.lipschitz_bound()


def test_all_starts_reach_one_fixed_point_within_the_certified_distance():
    dynamics = looped(scale=2.0, mode="lipsdp")
    h = torch.randn(6, D, generator=generator(), dtype=DOUBLE) * torch.logspace(-2, 2, 6, dtype=DOUBLE).unsqueeze(1)
    with torch.no_grad():
        loop = loop_for(dynamics, torch.randn(1, D, generator=generator(5), dtype=DOUBLE).expand(6, D))
        states = [h]
        for _ in range(1500):
            states.append(loop(states[-1]))
        fixed = states[-1]
        torch.testing.assert_close(fixed, fixed[:1].expand_as(fixed), rtol=0, atol=1e-9)
        for t in range(1, 60):
            true = torch.linalg.vector_norm(states[t] - fixed, dim=-1)
            assert (dynamics.distance_to_fixed_point(states[t], states[t] - states[t - 1]) >= true - 1e-9).all()


def test_it_may_halt_by_its_certificate():
    z, action = inputs(4)
    out = looped(mode="lipsdp", halting="certified", halt_tolerance=1e-6, max_loops=900)(z, action)
    assert 1 < int(out.loops.max()) < 900
    rest = looped(mode="lipsdp")(z, action, 2000)
    assert (torch.linalg.vector_norm(out.h - rest.h, dim=-1) <= 1e-6).all()


def test_weights_that_are_no_numbers_certify_nothing():
    dynamics = looped(mode="lipsdp")
    with torch.no_grad():
        dynamics.cell.log_multipliers[0] = math.nan
    assert dynamics.lipschitz_bound() == math.inf


@pytest.mark.parametrize("block", ["conv", "rank", "transformer"])
def test_other_blocks_say_that_they_lack_it(block):
    with pytest.raises(ValueError, match=f"block '{block}' has no mode 'lipsdp'.*choose from.*linear"):
        LoopedDynamics(Z, A, D, block=block, mode="lipsdp")


def test_an_activation_of_other_slopes_is_refused():
    with pytest.raises(ValueError, match="mode 'lipsdp' needs an activation of slopes in .0, 1.: relu, tanh"):
        LoopCell(D, D, mode="lipsdp", activation="silu")


def test_controls_count_its_multipliers():
    loop, thin = (DYNAMICS[name](Z, A, D, 2, 4, mode="lipsdp") for name in ("looped", "deep_thin"))
    size, thinner = (sum(p.numel() for p in m.parameters()) for m in (loop, thin))
    assert 0.9 * size < thinner <= size
