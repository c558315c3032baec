"""The rank block: its equation by hand, its certificate in the sup norm, its gradients, and what the norm is for."""

import math

import pytest
import torch
from torch.autograd.functional import jacobian

from loopwm.dynamics import AndersonSolver, LoopedDynamics, StackedDynamics
from loopwm.dynamics.adaptive import loop_adaptive
from loopwm.dynamics.base import sample_norm
from loopwm.dynamics.gradients import ImplicitGradient, adjoint_iterations, dual_order
from loopwm.dynamics.halting.steps import _CertifiedRun
from loopwm.dynamics.rank import START_WEIGHT, RankCell, RankLoop, UnitRowSum, _duels, _RankStep, rank_step

Z, A, D, K = 3, 2, 4, 3
DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def made(scale: float = 1.0, seed: int = 0, **kw) -> LoopedDynamics:
    """Random values everywhere: a fresh cell is sparse, and hides what a dense one would show."""
    dynamics = LoopedDynamics(Z, A, D, 4, 40, block="rank", block_dim=K * D, **kw).double()
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in dynamics.named_parameters():
            noise = torch.randn(p.shape, generator=stream).double() * scale
            p.add_(0.3 * noise) if "log_" in name else p.copy_(noise)
    return dynamics


def inputs(batch: int, rows: int = 3, columns: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(batch, Z, rows, columns, seed=1), randn(batch, A, seed=2)


def by_hand(dynamics: LoopedDynamics, e: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """One loop, cell by cell and entry by entry."""
    cell = dynamics.cell
    decay, weight = cell.decay(), cell.read.weight  # (D,), (K D, 5 D)
    gain, injected = cell.input_scale(decay), cell.inject(e)
    batch, channels, rows, columns = h.shape
    out = torch.zeros_like(h)
    for b in range(batch):
        for y in range(rows):
            for x in range(columns):
                around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
                near = torch.stack(
                    [
                        h[b, :, i, j] if 0 <= i < rows and 0 <= j < columns else torch.zeros(channels, dtype=DOUBLE)
                        for i, j in around
                    ]
                )
                sources = torch.cat([h[b, :, y, x], *near.sort(0, descending=True).values])
                pieces = (weight @ sources + injected[b, :, y, x]).view(-1, channels).amax(0)
                block = cell.gamma * (1.0 - decay) * pieces
                out[b, :, y, x] = decay * h[b, :, y, x] + gain * e[b, :, y, x] + block
    return out


def test_the_equation():
    dynamics, (z, action) = made(), inputs(2)
    e, h = dynamics.prelude(z, action), randn(2, D, 3, 4, seed=3)
    torch.testing.assert_close(dynamics.cell.prepare(e)(h), by_hand(dynamics, e, h))


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5, 8])
def test_one_node_gives_what_plain_operations_give(pieces):
    shapes = [(D, 2, 3, 4), (D, 2, 3, 4), (pieces * D, 2, 3, 4), (D,), (D,), (pieces * D, 5 * D)]
    parts = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    one, plain = _RankStep.apply(*parts), rank_step(*parts)
    torch.testing.assert_close(one, plain)
    weights = randn(*one.shape, seed=9)
    for a, b in zip(*(torch.autograd.grad(out, parts, weights) for out in (one, plain)), strict=True):
        assert a.any()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("count", range(1, 10))
def test_duels_leave_the_largest_in_front(count):
    for values in torch.stack([torch.randperm(count) for _ in range(20)]).tolist():
        for i, j in _duels(count):
            values[i], values[j] = max(values[i], values[j]), min(values[i], values[j])
        assert values[0] == count - 1


def dense_jacobian(loop, h: torch.Tensor) -> torch.Tensor:
    """dh'/dh at h, one sample: (S, S)."""
    return jacobian(lambda x: loop(x.view_as(h)).flatten(), h.flatten())


def sup_norm(matrix: torch.Tensor) -> float:
    """Of a matrix as a map between vectors measured by their largest entries."""
    return float(matrix.abs().sum(1).max())


@pytest.mark.parametrize("mode", ["certified", "linear"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_bound_is_never_below_a_jacobian(scale, mode):
    dynamics, (z, action) = made(scale, mode=mode), inputs(1)
    loop, bound = dynamics.cell.prepare(dynamics.prelude(z, action)), dynamics.lipschitz_bound()
    assert mode == "linear" or bound < 1.0
    for seed in range(20):
        h = randn(1, D, 3, 4, seed=seed) * 10.0 ** (seed % 5 - 2)
        assert sup_norm(dense_jacobian(loop, h)) <= bound * (1 + 1e-12)
        near = h + randn(*h.shape, seed=seed + 50) * 10.0 ** (seed % 7 - 4)
        step, before = sample_norm(loop(near) - loop(h), math.inf), sample_norm(near - h, math.inf)
        assert (step <= bound * before * (1 + 1e-9)).all()


def test_the_bound_is_reached():
    """Somewhere a row is as long as the bound says: it is no mere upper bound."""
    dynamics, (z, action) = made(30.0), inputs(1)
    bound, loop, worst = dynamics.lipschitz_bound(), dynamics.cell.prepare(dynamics.prelude(z, action)), 0.0
    for seed in range(60):
        h = randn(1, D, 3, 4, seed=seed) * 100.0
        worst = max(worst, sup_norm(dense_jacobian(loop, h)))
    assert 0.95 * bound < worst <= bound * (1 + 1e-12)


def test_the_certificate_holds_after_every_step_of_hostile_training():
    dynamics, (z, action) = made(), inputs(2)
    optimizer = torch.optim.Adam(dynamics.parameters(), 0.5)
    for _ in range(15):
        optimizer.zero_grad()
        (-dynamics(z, action, 5).h.square().sum()).backward()  # wants the state to grow
        optimizer.step()
        assert dynamics.lipschitz_bound() < 1.0
    assert dynamics.measured_contraction(z, action, 20) <= dynamics.lipschitz_bound()


def test_rows_within_the_ball_are_left_alone():
    weight = torch.tensor([[0.3, -0.7], [2.0, -2.0], [0.1, 0.1]])
    torch.testing.assert_close(UnitRowSum()(weight), torch.tensor([[0.3, -0.7], [0.5, -0.5], [0.1, 0.1]]))


def test_distance_and_halting_speak_of_the_largest_entry():
    dynamics, (z, action) = made(halting="certified", halt_tolerance=1e-3), inputs(3)
    dynamics.max_loops = 4000
    fixed = dynamics(z, action, 3000).h
    states = dynamics.trajectory(z, action, 20)
    for before, h in zip(states[:-1], states[1:], strict=True):
        certified = dynamics.distance_to_fixed_point(h, h - before)
        assert (sample_norm(h - fixed, math.inf) <= certified * (1 + 1e-9)).all()
    out = dynamics(z, action)
    assert int(out.loops.max()) < 4000 and (sample_norm(out.h - fixed, math.inf) <= 1e-3).all()


def test_implicit_gradients_equal_unrolled_ones():
    results = []
    for gradient in ("unrolled", "implicit"):
        dynamics, (z, action) = made(gradient=gradient, gamma=0.8), inputs(2)
        if gradient == "implicit":
            dynamics.gradient = ImplicitGradient(1e-12)
        out = dynamics(z, action, 800)
        wanted = [p for p in dynamics.parameters() if p.requires_grad]
        results.append(torch.autograd.grad((out.h * randn(*out.h.shape, seed=7)).sum(), wanted, allow_unused=True))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    assert dual_order(math.inf) == 1.0 and dual_order(2.0) == 2.0


def relay(gamma: float) -> RankLoop:
    """One channel that takes the largest of its neighbours or of what the input holds, and keeps nothing."""
    read = torch.zeros(2, 5, dtype=DOUBLE)
    read[0, 1] = 1.0  # piece 0: the largest neighbour; piece 1: the input alone
    injected = torch.full((2, 1, 1, 30), -10.0, dtype=DOUBLE)
    injected[0] = 0.0
    injected[1, 0, 0, 0] = 1.0 / gamma
    zero, scale = torch.zeros(1, 1, 1, 30, dtype=DOUBLE), torch.full((1,), gamma, dtype=DOUBLE)
    return RankLoop(torch.zeros(1, dtype=DOUBLE), zero, injected, scale=scale, read=read, one_node=False)


def test_a_bit_is_relayed_as_far_as_the_loops_and_fades_by_gamma_alone():
    """What the sup norm is for: n cells away stands gamma ** n, where a Euclidean contraction leaves 2 ** -n."""
    loop, h = relay(0.99), torch.zeros(1, 1, 1, 30, dtype=DOUBLE)
    for n in range(1, 41):
        h = loop(h)
        reached = min(n, 30)
        expected = torch.zeros(30, dtype=DOUBLE)
        expected[:reached] = 0.99 ** torch.arange(reached, dtype=DOUBLE)
        torch.testing.assert_close(h.flatten(), expected)


def relay_from(cells: int, seed: int) -> RankLoop:
    """``relay`` on an 8 x 8 grid from random cells: while it spreads, Euclidean residuals rise, the sup norm's fall."""
    injected = torch.full((2, 1, 8, 8), -10.0, dtype=DOUBLE)
    injected[0] = 0.0
    chosen = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:cells]
    injected[1].view(-1)[chosen] = 2.0 * randn(cells, seed=seed).abs()
    one = relay(0.9)
    return RankLoop(one.decay, torch.zeros(1, 1, 8, 8, dtype=DOUBLE), injected, one.read, one.scale, False)


def test_anderson_judges_progress_in_the_norm_in_which_the_loop_contracts():
    """It ends within the certified distance, after at most one detour for every step that rho = 0.9 allows."""
    for seed in range(8):
        loop, start = relay_from(1 + seed % 4, seed), torch.zeros(1, 1, 8, 8, dtype=DOUBLE)
        fixed = start
        for _ in range(1000):
            fixed = loop(fixed)

        rule, solver = _CertifiedRun(0.9, 1e-6, math.inf), AndersonSolver().begin(math.inf)
        out = loop_adaptive(loop, start, rule, solver, 1, 2 * adjoint_iterations(0.9, 1e-6))
        assert float((out.h - fixed).abs().max()) <= 1e-6


def test_what_only_supports_itself_decays():
    """A state that no input asks for is no fixed point, from wherever the loop starts: the least one is the only."""
    loop, high = relay(0.9), torch.full((1, 1, 1, 30), 5.0, dtype=DOUBLE)
    low = torch.zeros_like(high)
    for _ in range(300):
        high, low = loop(high), loop(low)
    torch.testing.assert_close(high, low)


def test_a_fresh_cell_passes_single_sources_on():
    weight = RankCell(D, K * D).read.weight
    assert (weight.abs().amax(1) > 0.9 * START_WEIGHT).all() and (weight.abs().sum(1) <= 1.0 + 1e-6).all()


def test_widths_are_multiples_of_the_state():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        RankCell(D, 6)
    stack = StackedDynamics(Z, A, D, 5, 8, block="rank", block_dim=K * D)
    assert len(stack.cells) == 5 and all(cell.read.out_features % D == 0 for cell in stack.cells)
