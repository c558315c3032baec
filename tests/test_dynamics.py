"""The loop's promises: it contracts, its depth is what was asked for, and its fast path is plain autograd."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.utils.flop_counter import FlopCounterMode

from loopwm.dynamics import (
    DYNAMICS,
    Architecture,
    CertifiedHalting,
    DeepThinDynamics,
    DepthSchedule,
    Dynamics,
    FixedHalting,
    HaltingRule,
    LoopedDynamics,
    SinglePassDynamics,
    StackedDynamics,
    WideDynamics,
)
from loopwm.dynamics.base import sample_norm
from loopwm.dynamics.cell import ACTIVATIONS, INJECTIONS, LoopCell, PreparedLoop
from loopwm.dynamics.depth import sample_depths
from loopwm.dynamics.lipsdp import SLOPES
from loopwm.dynamics.spectral import UnitSpectralNorm, spectral_norm_bound
from loopwm.dynamics.unroll import unroll

Z, A, D = 7, 3, 8
DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sigma(weight: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


def scramble(module: nn.Module, scale: float = 1.0, seed: int = 0) -> nn.Module:
    """Random values everywhere, so that no zero initial weight hides a term."""
    stream = generator(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=stream).to(p.dtype) * scale
            p.add_(0.3 * noise) if "log_" in name else p.copy_(noise)
    return module


def looped(seed: int = 0, scale: float = 1.0, **kw) -> LoopedDynamics:
    torch.manual_seed(seed)
    return scramble(LoopedDynamics(Z, A, D, **kw), scale, seed).double()


def inputs(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    stream = generator(seed)
    z = torch.randn(batch, Z, generator=stream, dtype=DOUBLE)
    return z, torch.randn(batch, A, generator=stream, dtype=DOUBLE)


# ---- sizes and shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["looped", "stacked"])
@pytest.mark.parametrize("name", ["latent_dim", "action_dim", "hidden_dim", "block_dim"])
@pytest.mark.parametrize("size", [0, -4])
def test_sizes_below_one_are_refused(kind, name, size):
    sizes = {"latent_dim": Z, "action_dim": A, "hidden_dim": D} | {name: size}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {size}"):
        DYNAMICS[kind](**sizes)


@pytest.mark.parametrize("kind", ["looped", "stacked"])
@pytest.mark.parametrize(
    ("z", "action"), [((3, Z), (2, A)), ((3, Z + 1), (3, A)), ((3, Z), (3, A + 1)), ((3, Z - 1), (3, A + 1))], ids=str
)
def test_latents_and_actions_of_other_shapes_are_named(kind, z, action):
    dynamics = DYNAMICS[kind](Z, A, D)
    with pytest.raises(ValueError, match=re.escape(f"z (B, {Z}) and action (B, {A}), got {z} and {action}")):
        dynamics(torch.zeros(z), torch.zeros(action), 2)


# ---- spectral norm -------------------------------------------------------------------------------


def orthogonal(rows: int, columns: int) -> torch.Tensor:
    return nn.init.orthogonal_(torch.empty(rows, columns), generator=generator())


def rank_one(rows: int, columns: int) -> torch.Tensor:
    return torch.outer(torch.randn(rows, generator=generator(1)), torch.randn(columns, generator=generator(2)))


def two_flat(rows: int, columns: int) -> torch.Tensor:
    """Two equal leading singular values, the others far below."""
    weight = orthogonal(rows, columns) * 1e-3
    weight[0], weight[1] = weight[0] * 5e3, weight[1] * 5e3
    return weight


MATRICES = {
    "random": lambda m, n: torch.randn(m, n, generator=generator()),
    "rank-1": rank_one,
    "flat": orthogonal,
    "two flat": two_flat,
    "diagonal": lambda m, n: torch.eye(m, n) * torch.linspace(0.1, 3.0, n),
    "one entry": lambda m, n: torch.zeros(m, n).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(9.0)),
    "zero": torch.zeros,
}


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1.0001, 1e3, 1e7])
@pytest.mark.parametrize("shape", [(16, 16), (5, 40), (40, 5), (128, 64)], ids=str)
@pytest.mark.parametrize("kind", MATRICES)
def test_spectral_norm_at_most_one(kind, shape, scale):
    weight = MATRICES[kind](*shape) * scale
    exact = sigma(weight)
    assert float(spectral_norm_bound(weight)) >= exact
    projected = UnitSpectralNorm()(weight)
    assert torch.isfinite(projected).all()
    assert sigma(projected) <= 1.0
    if exact > 1.1:
        assert sigma(projected) > 0.97, "the ball is used up: the bound is tight"
        torch.testing.assert_close(projected / projected.norm(), weight / weight.norm())


def test_bound_never_below_exact_and_never_far_above():
    """The excess is at most r ** (1 / 2**8): 1 % for rank 9."""
    for seed in range(50):
        weight = torch.randn(12, 9, generator=generator(seed))
        assert sigma(weight) <= float(spectral_norm_bound(weight)) <= sigma(weight) * 1.01


def test_enormous_weights_stay_usable():
    weight = (torch.randn(16, 8, generator=generator()) * 1e12).requires_grad_()
    out = UnitSpectralNorm()(weight)
    out.sum().backward()
    assert torch.isfinite(weight.grad).all()
    assert 0.9 < sigma(out) <= 1.0


def test_wide_spectra_stay_bounded_in_float32():
    weight = torch.randn(256, 256, generator=generator()) @ torch.diag(torch.logspace(-6, 3, 256))
    assert float(spectral_norm_bound(weight)) >= sigma(weight)
    assert sigma(UnitSpectralNorm()(weight)) <= 1.0


def test_inside_the_ball_is_the_identity_with_its_gradient():
    weight = (torch.randn(6, 4, generator=generator(), dtype=DOUBLE) * 0.1).requires_grad_()
    out = UnitSpectralNorm()(weight)
    assert torch.equal(out, weight)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    assert torch.equal(weight.grad, direction)


def separated(rows: int, columns: int, leading: float = 3.0) -> torch.Tensor:
    """Singular values leading, leading / 3, leading / 9, ..."""
    q = nn.init.orthogonal_(torch.empty(rows, columns, dtype=DOUBLE), generator=generator(3))
    rank = min(rows, columns)
    p = nn.init.orthogonal_(torch.empty(rank, rank, dtype=DOUBLE), generator=generator(4))
    values = torch.diag(leading * 3.0 ** -torch.arange(rank, dtype=DOUBLE))
    return q @ p @ values @ p.t() if rows >= columns else p @ values @ p.t() @ q


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)], ids=str)
def test_gradient_outside_the_ball(shape):
    """The bound exceeds sigma by its rounding margin alone (1e-4) when sigma is well separated."""
    weight = separated(*shape).requires_grad_()
    assert torch.autograd.gradcheck(UnitSpectralNorm(), (weight,), eps=1e-6, atol=1e-3, rtol=1e-3)
    UnitSpectralNorm()(weight).backward(torch.randn(*shape, generator=generator(), dtype=DOUBLE))
    assert abs((weight.grad * weight).sum()) < 1e-3 * weight.grad.norm() * weight.norm(), "growing changes nothing"


# ---- the certificate -----------------------------------------------------------------------------


def loop_for(dynamics: LoopedDynamics, e: torch.Tensor) -> PreparedLoop:
    return dynamics.cell.prepare(e)


def jacobian_norm(loop: PreparedLoop, h: torch.Tensor) -> float:
    """Exact spectral norm of dh'/dh at h (D,), for a loop prepared with one row."""
    return sigma(jacobian(lambda x: loop(x.unsqueeze(0)).squeeze(0), h))


def smooth_jacobian(loop: PreparedLoop, activation: str, h: torch.Tensor) -> torch.Tensor:
    """dh'/dh (D, D), differentiable also where ReLU's own second derivative is zero."""
    pre = (h @ loop.read + loop.injected).squeeze(0)
    if activation == "relu":
        slope = torch.sigmoid(4.0 * pre)
    else:
        slope = torch.func.vmap(torch.func.grad(ACTIVATIONS[activation][0]))(pre)
    path = torch.diag(loop.decay) if loop.decay.ndim == 1 else loop.decay.t()
    return path + (loop.read * slope @ loop.write).t()


def adversarial(dynamics: LoopedDynamics, activation: str, seed: int, steps: int = 25) -> float:
    """The largest Jacobian norm that gradient ascent over h and e comes by."""
    h = torch.randn(1, D, generator=generator(seed), dtype=DOUBLE).requires_grad_()
    e = torch.randn(1, D, generator=generator(seed + 100), dtype=DOUBLE).requires_grad_()
    ascent, worst = torch.optim.Adam([h, e], lr=0.3, maximize=True), 0.0
    for _ in range(steps):
        ascent.zero_grad()
        loop = loop_for(dynamics, e)
        worst = max(worst, jacobian_norm(dynamics.cell.prepare(e.detach()), h.detach()[0]))
        torch.linalg.matrix_norm(smooth_jacobian(loop, activation, h), 2).backward()
        ascent.step()
    return worst


WEIGHTS = {
    "fresh": lambda kw: LoopedDynamics(Z, A, D, **kw).double(),
    "random": lambda kw: looped(**kw),
    "large": lambda kw: looped(scale=100.0, **kw),
    "slow": lambda kw: with_logs(looped(scale=3.0, **kw), -50.0, 0.0),
    "fast": lambda kw: with_logs(looped(scale=3.0, **kw), 50.0, 50.0),
    "mixed": lambda kw: with_logs(looped(scale=3.0, **kw), None, 0.0),
}


def with_logs(dynamics: LoopedDynamics, log_rate: float | None, log_dt: float) -> LoopedDynamics:
    values = torch.linspace(-20, 20, D, dtype=DOUBLE) if log_rate is None else torch.full((D,), log_rate)
    with torch.no_grad():
        dynamics.cell.log_rate.copy_(values)
        dynamics.cell.log_dt.fill_(log_dt)
    return dynamics


@pytest.mark.parametrize(
    "mode, skip, activation",
    [
        *(("certified", False, name) for name in ACTIVATIONS),
        *(("lipsdp", skip, name) for skip in (False, True) for name in SLOPES),
    ],
)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_one_loop_contracts_at_least_as_the_bound_says(weights, mode, skip, activation):
    dynamics = WEIGHTS[weights]({"mode": mode, "skip": skip, "activation": activation})
    bound = dynamics.lipschitz_bound()
    assert 0.0 < bound < 1.0
    with torch.no_grad():
        for seed in range(5):
            h, e = torch.randn(2, 1, D, generator=generator(seed), dtype=DOUBLE) * 10 ** (seed - 2)
            assert jacobian_norm(loop_for(dynamics, e), h[0]) <= bound + 1e-12
    assert adversarial(dynamics, activation, seed=1) <= bound + 1e-12


def test_bound_is_nearly_reached():
    """W1 and W2 aligned, every unit open: the bound cannot be loosened unnoticed."""
    dynamics = LoopedDynamics(Z, A, D, block_dim=D).double()
    with torch.no_grad():
        for linear in (dynamics.cell.read, dynamics.cell.write):
            linear.parametrizations.weight.original.copy_(torch.diag(torch.tensor([50.0] + [1.0] * (D - 1))))
        dynamics.cell.inject.bias.fill_(100.0)
    e, h = torch.randn(2, 1, D, generator=generator(), dtype=DOUBLE)
    bound = dynamics.lipschitz_bound()
    assert bound * 0.999 < jacobian_norm(loop_for(dynamics, e), h[0]) <= bound
    assert bound == pytest.approx(0.2**0.5 + dynamics.cell.gamma * (1 - 0.2**0.5), rel=1e-3)


def test_the_slope_of_silu_is_counted():
    """Every unit at SiLU's steepest point, W1 and W2 aligned: the true factor is the bound, which 1 would not cover."""
    dynamics = LoopedDynamics(Z, A, D, block_dim=D, activation="silu").double()
    with torch.no_grad():
        for linear in (dynamics.cell.read, dynamics.cell.write):
            linear.parametrizations.weight.original.copy_(torch.eye(D))
        dynamics.cell.inject.weight.zero_()
        dynamics.cell.inject.bias.fill_(2.3994)
    e, h = torch.zeros(1, D, dtype=DOUBLE), torch.zeros(1, D, dtype=DOUBLE)
    decay = float(dynamics.cell.decay().max())
    bound = dynamics.lipschitz_bound()
    assert bound * 0.999 < jacobian_norm(loop_for(dynamics, e), h[0]) <= bound
    slope = ACTIVATIONS["silu"][1]
    assert slope * float(dynamics.cell.block_scale(dynamics.cell.decay())) == pytest.approx(0.95 * (1 - decay))
    steepest = torch.autograd.functional.jacobian(torch.nn.functional.silu, torch.linspace(2.3, 2.5, 9, dtype=DOUBLE))
    assert slope - 1e-4 < float(steepest.max()) <= slope


@pytest.mark.parametrize("log_dt", [0.0, -3.0])
@pytest.mark.parametrize("block", ["mlp", "rank"])
def test_the_certified_distance_holds_in_float32(block, log_dt):
    """Against the fixed point in float64 of the loop with the same rounded weights, as finely as rounding allows."""
    torch.manual_seed(0)
    size, loops = (() if block == "mlp" else (4, 4)), 20_000
    dynamics = LoopedDynamics(Z, A, D, 4, loops, block=block, block_dim=2 * D, gamma=0.8)
    with torch.no_grad():
        for name, p in dynamics.named_parameters():
            p.add_(log_dt) if "log_dt" in name else p.copy_(torch.randn(p.shape)) if "log" not in name else None
        z, action = torch.randn(16, Z, *size), torch.randn(16, A)
        exact, fold = copy.deepcopy(dynamics.cell).double(), dynamics.cell.fold()
        exact._folded = tuple(part.double() if torch.is_tensor(part) else part for part in fold)
        loop, fixed = exact.prepare(dynamics.prelude(z, action).double()), dynamics.start(z).double()
        for _ in range(2500):
            fixed = loop(fixed)
        finest = float(dynamics.distance_to_fixed_point(fixed.float(), torch.zeros(fixed.shape)).max())
        assert finest > 0
        for distance in (1.2 * finest, 10 * finest):
            dynamics.halting = CertifiedHalting(distance)
            out = dynamics(z, action)
            true = sample_norm(out.h.double() - fixed, dynamics.cell.norm_order)
            assert int(out.loops.max()) < loops and (true <= distance).all()
        dynamics.max_loops, dynamics.halting = 400, CertifiedHalting(0.5 * finest)
        assert int(dynamics(z, action).loops.max()) == 400, "finer than rounding: nothing is certain"


@pytest.mark.parametrize("name,loss", [("grow", lambda h: -h.square().mean()), ("sum", lambda h: h.sum())])
def test_certificate_holds_after_every_step_of_training(name, loss):
    torch.manual_seed(0)
    dynamics = LoopedDynamics(Z, A, D)
    adam = torch.optim.Adam(dynamics.parameters(), lr=0.5)
    z, action = (x.float() for x in inputs(16))
    for _ in range(60):
        adam.zero_grad()
        loss(dynamics(z, action, 4).h).backward()
        adam.step()
        assert dynamics.lipschitz_bound() < 1.0
    assert sigma(dynamics.cell.read.parametrizations.weight.original) > 2.0, "training pushed against the bound"
    assert sigma(dynamics.cell.write.weight) > 0.9
    assert dynamics.measured_contraction(z, action, 20) <= dynamics.lipschitz_bound() * (1 + 1e-3)
    trained = copy.deepcopy(dynamics).double()  # and a search for the worst state and input finds none that breaks it
    found = max(adversarial(trained, "relu", seed) for seed in range(3))
    assert 0.5 * trained.lipschitz_bound() < found <= trained.lipschitz_bound()


@pytest.mark.parametrize(
    "kw",
    [*({"activation": name} for name in ACTIVATIONS), {"mode": "lipsdp"}, {"mode": "lipsdp", "skip": True}],
    ids=lambda kw: "-".join(map(str, kw.values())),
)
def test_all_starts_reach_one_fixed_point_within_the_certified_distance(kw):
    dynamics = looped(scale=2.0, **kw)
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
            certified = dynamics.distance_to_fixed_point(states[t], states[t] - states[t - 1])
            assert certified.shape == (6,)
            assert (certified >= true - 1e-9).all()


def test_measured_contraction_is_below_the_bound_and_not_zero():
    dynamics = looped(scale=2.0)
    measured = dynamics.measured_contraction(*inputs(32))
    assert 0.0 < measured <= dynamics.lipschitz_bound()


def test_linear_mode_certifies_nothing():
    dynamics = looped(scale=3.0, mode="linear")
    h = torch.ones(2, D, dtype=DOUBLE)
    assert dynamics.lipschitz_bound() >= 1.0
    assert torch.isinf(dynamics.distance_to_fixed_point(h, h)).all()


@pytest.mark.parametrize(
    "change",
    [{"mode": "stiff"}, {"injection": "heun"}, {"activation": "gelu"}, {"gamma": 1.0}, {"gamma": 0.0}],
    ids=str,
)
def test_unknown_choices_are_refused(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        LoopCell(D, D, **change)


# ---- injection -----------------------------------------------------------------------------------


def test_injection_formulas_by_hand():
    """A = -2, dt = 0.5, B = 3: Abar = exp(-1); zero-order hold (1 - e^-1) / 2 * 3, Euler 0.5 * 3."""
    by_hand = {"zoh": (1 - math.exp(-1.0)) / 2.0 * 3.0, "euler": 1.5, "additive": 1.0}
    assert set(by_hand) == set(INJECTIONS)
    for injection, gain in by_hand.items():
        cell = LoopCell(2, 3, injection=injection).double()
        with torch.no_grad():
            cell.log_rate.fill_(math.log(2.0))
            cell.log_dt.fill_(math.log(0.5))
            cell.input_gain.fill_(3.0)
            e, h = torch.tensor([[1.0, -2.0]], dtype=DOUBLE), torch.tensor([[5.0, 7.0]], dtype=DOUBLE)
            torch.testing.assert_close(cell.prepare(e)(h), math.exp(-1.0) * h + gain * e)


def test_one_loop_by_hand():
    """h' = Abar h + Bbar e + g W2 relu(W1 h + U e + b), with W1 and W2 inside their balls."""
    cell = LoopCell(2, 2, gamma=0.5).double()
    with torch.no_grad():
        cell.read.parametrizations.weight.original.copy_(torch.tensor([[0.5, 0.0], [0.0, -0.5]]))
        cell.write.parametrizations.weight.original.copy_(torch.tensor([[0.0, 0.2], [0.4, 0.0]]))
        cell.inject.weight.copy_(torch.eye(2))
        cell.inject.bias.copy_(torch.tensor([1.0, -1.0]))
        h_next = cell.prepare(torch.tensor([[1.0, 2.0]], dtype=DOUBLE))(torch.tensor([[2.0, -4.0]], dtype=DOUBLE))
    decay = 0.2**0.5
    g, inner = 0.5 * (1 - decay), (0.5 * 2 + 1 + 1, -0.5 * -4 + 2 - 1)
    expected = [
        2 * decay + (1 - decay) * 1 + g * 0.2 * inner[1],
        -4 * decay + (1 - decay) * 2 + g * 0.4 * inner[0],
    ]
    torch.testing.assert_close(h_next, torch.tensor([expected], dtype=DOUBLE))


def test_start_is_a_contraction_at_parcaes_decay():
    cell = LoopedDynamics(Z, A, D).cell
    torch.testing.assert_close(cell.decay(), torch.full((D,), 0.2**0.5))
    torch.testing.assert_close(cell.input_scale(cell.decay()), 1 - cell.decay())
    assert not cell.write.weight.any()


# ---- depth ---------------------------------------------------------------------------------------


def by_hand(dynamics: LoopedDynamics, z: torch.Tensor, action: torch.Tensor, depth: int) -> list[torch.Tensor]:
    """h[0] .. h[depth]."""
    loop, states = loop_for(dynamics, dynamics.prelude(z, action)), [dynamics.start(z)]
    for _ in range(depth):
        states.append(loop(states[-1]))
    return states


@pytest.mark.parametrize("depth", [1, 3, 8, 40])
def test_integer_depth_is_exact_also_beyond_max_loops(depth):
    dynamics = looped(max_loops=8)
    z, action = inputs(5)
    out, states = dynamics(z, action, depth), by_hand(dynamics, z, action, depth)
    torch.testing.assert_close(out.h, states[-1])
    torch.testing.assert_close(out.z_next, dynamics.coda(z, states[-1]))
    assert out.loops.tolist() == [depth] * 5 and out.loops.dtype == torch.int64
    step = (states[-1] - states[-2]).norm(dim=-1) / states[-2].norm(dim=-1)
    torch.testing.assert_close(out.residual, step.detach())
    assert not out.residual.requires_grad


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("depths", [[3, 1, 11, 4, 1, 3], [5, 4, 4, 1, 1, 1], [2] * 6, [1, 2, 3, 4, 5, 6]], ids=str)
def test_depth_per_sample_equals_one_call_per_sample(depths, activation):
    dynamics = looped(activation=activation)
    z, action = inputs(6)
    tensor = torch.tensor(depths)
    alone = [dynamics(z[i : i + 1], action[i : i + 1], d) for i, d in enumerate(depths)]
    for depth in (tensor, tensor.int(), DepthSchedule(tensor)):
        out = dynamics(z, action, depth)
        for field in ("z_next", "h", "residual"):
            torch.testing.assert_close(getattr(out, field), torch.cat([getattr(one, field) for one in alone]))
        assert out.loops.tolist() == depths and out.loops.dtype == torch.int64


def test_schedule_counts_the_samples_still_looping():
    schedule = DepthSchedule(torch.tensor([2, 4, 1]))
    assert schedule.active == [3, 2, 1, 1] and len(schedule) == 3
    assert DepthSchedule(torch.tensor([4, 2, 1])).order is None, "sorted depths need no permutation"


@pytest.mark.parametrize("depth", [0, -1, *map(torch.tensor, ([1, 0, 2], [1, -3, 2], [1.0, 2.0, 3.0], [[1, 2, 3]]))])
def test_impossible_depths_are_refused(depth):
    with pytest.raises(ValueError, match="depth must be"):
        looped()(*inputs(3), depth)


@pytest.mark.parametrize("depth", [torch.tensor([1, 2]), DepthSchedule(torch.tensor([4, 2, 1, 1]))])
def test_depth_of_another_batch_is_refused(depth):
    with pytest.raises(ValueError, match="batch of 3"):
        looped()(*inputs(3), depth)


@pytest.mark.parametrize("loops", [(0, 1, 2), (3, 2, 4), (1, 5, 4)])
def test_impossible_loop_ranges_are_refused(loops):
    low, mean, high = loops
    with pytest.raises(ValueError, match="min_loops"):
        LoopedDynamics(Z, A, D, mean, high, min_loops=low)


@pytest.mark.parametrize("tolerance", [1e-9, 0.02, 0.2, 1e9])
def test_adaptive_depth_of_a_batch_equals_each_sample_alone(tolerance):
    dynamics = looped(scale=0.5, max_loops=12, min_loops=2, halt_tolerance=tolerance)
    z, action = inputs(9)
    z = z * torch.logspace(-1, 2, 9, dtype=DOUBLE).unsqueeze(1)
    out = dynamics(z, action)
    for i in range(9):
        alone = dynamics(z[i : i + 1], action[i : i + 1])
        assert int(out.loops[i]) == int(alone.loops) and 2 <= int(alone.loops) <= 12
        exact = dynamics(z[i : i + 1], action[i : i + 1], int(alone.loops))
        for field in ("z_next", "h", "residual"):
            torch.testing.assert_close(getattr(out, field)[i : i + 1], getattr(alone, field))
            torch.testing.assert_close(getattr(alone, field), getattr(exact, field))
        assert float(alone.residual) < tolerance or int(alone.loops) == 12
    if tolerance == 0.02:
        assert out.loops.unique().numel() > 1, "the case must mix depths"


def test_adaptive_depth_passes_gradients():
    """Detached halting must not detach the state: finished rows keep their graph."""
    dynamics = looped(scale=0.5, max_loops=12, halt_tolerance=0.05)
    z, action = inputs(6)
    out = dynamics(z, action)
    expected = torch.autograd.grad(dynamics(z, action, out.loops).z_next.square().sum(), list(dynamics.parameters()))
    given = torch.autograd.grad(out.z_next.square().sum(), list(dynamics.parameters()))
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)


def linear_cell(**kw) -> LoopedDynamics:
    """A cell without block: h[t] = h* + Abar^t (h0 - h*), and with no input h[t] = Abar^t h0."""
    dynamics = LoopedDynamics(D, A, D, **kw).double()
    with torch.no_grad():
        dynamics.cell.input_gain.zero_()
    return dynamics


@pytest.mark.parametrize("decay", [0.3, 0.7, 0.9])
def test_halting_at_the_closed_form_loop_count(decay):
    """h[t] = Abar^t h0, and the certified distance is exact: Abar^t |h0|."""
    dynamics = linear_cell(max_loops=200)
    with torch.no_grad():
        dynamics.cell.log_dt.fill_(math.log(-math.log(decay)))
    assert dynamics.lipschitz_bound() == pytest.approx(decay)
    dynamics.halting = CertifiedHalting(1e-3)
    h0 = torch.nn.functional.normalize(torch.randn(4, D, generator=generator(), dtype=DOUBLE), dim=-1)
    size = torch.tensor([1e-4, 0.01, 1.0, 100.0], dtype=DOUBLE)
    out = dynamics(h0 * size.unsqueeze(1), torch.zeros(4, A, dtype=DOUBLE))
    expected = [max(1, math.ceil(math.log(1e-3 / s) / math.log(decay))) for s in size.tolist()]
    assert out.loops.tolist() == expected
    torch.testing.assert_close(out.h, h0 * (size * decay**out.loops).unsqueeze(1))


def test_residual_halting_at_the_closed_form_loop_count():
    """With h* = c and h0 = c + d: |step| / |h[t-1]| = Abar^(t-1) (1 - Abar) |d| / |c + Abar^(t-1) d|."""
    dynamics = LoopedDynamics(D, A, D, max_loops=100, halt_tolerance=1e-3).double()
    with torch.no_grad():
        dynamics.cell.inject.weight.zero_()
    z, action = torch.randn(3, D, generator=generator(), dtype=DOUBLE), torch.randn(3, A, dtype=DOUBLE)
    z = z * torch.tensor([[0.1], [1.0], [100.0]], dtype=DOUBLE)
    c, decay = (
        dynamics.prelude(z, action),
        0.2**0.5,
    )  # zero-order hold at A = -1, B = 1 holds e itself as fixed point
    expected = []
    for start, fixed in zip(z, c, strict=True):
        ratios = (
            decay ** (t - 1)
            * (1 - decay)
            * (start - fixed).norm()
            / (fixed + decay ** (t - 1) * (start - fixed)).norm()
            for t in range(1, 100)
        )
        expected.append(next(t for t, ratio in enumerate(ratios, 1) if ratio < 1e-3))
    out = dynamics(z, action)
    assert out.loops.tolist() == expected and len(set(expected)) > 1


def test_never_halting_runs_to_the_cap():
    assert looped(max_loops=5, halting=FixedHalting(99))(*inputs(3)).loops.tolist() == [5] * 3


def test_finished_rows_leave_the_batch(monkeypatch):
    rows = []

    def spy(self, h, original=PreparedLoop.__call__):
        rows.append(h.shape[0])
        return original(self, h)

    monkeypatch.setattr(PreparedLoop, "__call__", spy)
    dynamics = looped(scale=0.5, max_loops=12, halt_tolerance=0.02)
    z, action = inputs(9)
    out = dynamics(z * torch.logspace(-1, 2, 9, dtype=DOUBLE).unsqueeze(1), action)
    assert rows == DepthSchedule(out.loops).active
    assert sum(rows) == int(out.loops.sum()) < 9 * max(out.loops.tolist())


def test_mixed_depths_cost_their_mean():
    """In the fused node, by the rows that entered a loop."""
    dynamics, depths = looped(), torch.tensor([9, 1, 1, 1, 1, 1, 1, 1])
    loop = loop_for(dynamics, torch.ones(8, D, dtype=DOUBLE))
    final, states = unroll(torch.ones(8, D, dtype=DOUBLE), loop, DepthSchedule(depths).active)
    assert final.shape == (8, D) and states().shape == (16, D)


def test_the_fused_loop_is_counted_as_many_flops_as_the_plain_one():
    """The benchmarks compare training FLOPs by torch's counter, which knows some operations and not others."""
    dynamics = looped(mean_loops=6, max_loops=6)

    def flops(depth) -> int:
        with FlopCounterMode(display=False) as counter:
            dynamics(*inputs(8), depth).z_next.sum().backward()
        return counter.get_total_flops()

    once, fused = flops(1), flops(torch.full((8,), 6))
    assert fused == flops(6) > 2 * once


def test_empty_batch():
    out = looped()(*inputs(0))
    assert out.z_next.shape == (0, Z) and out.loops.shape == (0,)


# ---- samplers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler,mean", [("poisson", 4), ("uniform", 4), ("fixed", 4), ("uniform", 2)])
def test_sampled_depths(sampler, mean):
    depths = sample_depths(sampler, 20_000, mean, 1, 12, generator())
    assert depths.dtype == torch.int64 and 1 <= int(depths.min()) <= int(depths.max()) <= 12
    assert (depths[1:] <= depths[:-1]).all()
    assert float(depths.double().mean()) == pytest.approx(mean, abs=0.06)
    assert torch.equal(depths, sample_depths(sampler, 20_000, mean, 1, 12, generator()))
    if sampler != "fixed":
        assert not torch.equal(depths, sample_depths(sampler, 20_000, mean, 1, 12, generator(1)))


def test_sampled_depths_respect_tight_ranges():
    for sampler in ("poisson", "uniform", "fixed"):
        assert set(sample_depths(sampler, 200, 3, 3, 3).tolist()) == {3}
    assert set(sample_depths("poisson", 5000, 4, 3, 5, generator()).tolist()) == {3, 4, 5}
    with pytest.raises(ValueError, match="unknown depth sampler"):
        sample_depths("zipf", 3, 3, 1, 4)


@pytest.mark.parametrize("name", DYNAMICS)
def test_a_sampled_depth_can_be_used_and_repeated(name):
    dynamics = DYNAMICS[name](Z, A, D).double()
    depth, again = (dynamics.sample_depth(6, generator(2)) for _ in range(2))
    z, action = inputs(6)
    assert torch.equal(dynamics(z, action, depth).loops, dynamics(z, action, again).loops)


# ---- one autograd node ---------------------------------------------------------------------------


def outcome(dynamics: LoopedDynamics, depth, plain: bool = False) -> dict[str, torch.Tensor]:
    """Value and gradients of a loss that weighs every entry of z_next and h differently."""
    dynamics = copy.deepcopy(dynamics)
    z, action = inputs(6)
    z.requires_grad_(), action.requires_grad_()
    if plain:
        states = [by_hand(dynamics, z[i : i + 1], action[i : i + 1], int(d))[-1] for i, d in enumerate(depth)]
        h = torch.cat(states)
        z_next = dynamics.coda(z, h)
    else:
        out = dynamics(z, action, depth)
        z_next, h = out.z_next, out.h
    weight = torch.randn(6, Z + D, generator=generator(9), dtype=DOUBLE)
    loss = (torch.cat([z_next, h], 1).tanh() * weight).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in dynamics.named_parameters()}
    assert all(g is not None and g.any() for g in gradients.values()), "every parameter must take part"
    return {"loss": loss.detach(), "z": z.grad, "action": action.grad, **gradients}


@pytest.mark.parametrize("mode", ["certified", "linear"])
@pytest.mark.parametrize("injection", ["zoh", "euler"])
@pytest.mark.parametrize("depths", [[6, 5, 3, 3, 1, 1], [1, 6, 3, 1, 5, 3], [4] * 6], ids=str)
def test_unroll_equals_plain_autograd(depths, injection, mode):
    dynamics = looped(scale=0.7, mode=mode, injection=injection)
    fast, plain = outcome(dynamics, torch.tensor(depths)), outcome(dynamics, depths, plain=True)
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], msg=lambda text, name=name: f"{name}: {text}")


def test_unroll_leaves_its_inputs_alone():
    dynamics = LoopedDynamics(D, A, D).double()
    z, action = torch.randn(4, D, dtype=DOUBLE), torch.randn(4, A, dtype=DOUBLE)
    before = z.clone()
    dynamics(z, action, torch.tensor([4, 3, 2, 1]))
    assert torch.equal(z, before), "h0 is z itself when the widths agree"


def test_frozen_gives_the_same_results_and_gradients():
    for make in DYNAMICS.values():
        results = []
        for is_frozen in (False, True):
            dynamics = scramble(make(Z, A, D, mode="certified")).double()
            z, action = inputs(6)
            depth = dynamics.sample_depth(6, generator(1))
            with dynamics.frozen() if is_frozen else torch.enable_grad():
                first = dynamics(z, action, depth)
                last = dynamics(first.z_next, action, depth)
                last.z_next.square().sum().backward()
            results.append([last.z_next.detach(), *(p.grad for p in dynamics.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_frozen_ends_with_its_block_even_after_an_error():
    dynamics = looped()
    z, action = inputs(2)
    before = dynamics(z, action, 3).h.detach()
    with pytest.raises(RuntimeError, match="boom"), dynamics.frozen():
        raise RuntimeError("boom")
    with torch.no_grad():
        dynamics.cell.log_dt.add_(1.0)
    assert not torch.allclose(dynamics(z, action, 3).h, before)


# ---- controls ------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("mode", ["certified", "linear"])
@pytest.mark.parametrize("name", DYNAMICS)
def test_every_dynamics_has_the_same_interface(name, mode):
    dynamics = DYNAMICS[name](
        Z, A, D, 3, 6, min_loops=2, block_dim=5, prelude_layers=2, mode=mode, gamma=0.9, injection="euler",
        depth_sampler="uniform", halt_tolerance=0.1, latent_norm=nn.LayerNorm(Z),
    ).double()  # fmt: skip
    assert isinstance(dynamics, Dynamics)
    z, action = inputs(5)
    for depth in (None, 4, torch.tensor([1, 2, 3, 4, 5]), dynamics.sample_depth(5, generator())):
        out = dynamics(z, action, depth)
        assert out.z_next.shape == (5, Z) and out.h.shape == (5, dynamics.state_dim)
        assert dynamics.state_dim < D if name == "deep_thin" else dynamics.state_dim == D
        assert out.loops.shape == out.residual.shape == (5,)
        assert out.loops.dtype == torch.int64 and int(out.loops.min()) >= 1
    assert isinstance(dynamics.lipschitz_bound(), float)
    assert isinstance(dynamics.measured_contraction(z, action), float)
    with dynamics.frozen():
        assert dynamics(z, action).z_next.shape == (5, Z)


@pytest.mark.parametrize("width", [8, 64])
def test_single_pass_has_the_loops_parameters_and_equals_one_loop(width):
    loop, single = (make(Z, A, width, mode="certified").double() for make in (LoopedDynamics, SinglePassDynamics))
    assert count(single) == count(loop)
    single.prelude, single.coda, single.start, single.cells[0] = (
        loop.prelude,
        loop.coda,
        loop.start,
        loop.cell,
    )
    scramble(loop)
    z, action = inputs(4)
    torch.testing.assert_close(single(z, action, 7).z_next, loop(z, action, 1).z_next)
    assert single(z, action, 7).loops.tolist() == [1] * 4


def test_stacked_has_one_block_per_loop():
    """Each a little narrower than the loop's, because each injects anew: 2 T + 1 shares of 3 T."""
    stacked = StackedDynamics(Z, A, D, 3)
    widths = [cell.read.weight.shape[0] for cell in stacked.cells]
    assert sum(widths) == round(2 * D * 7 / 3) and max(widths) - min(widths) <= 1
    assert stacked(*(x.float() for x in inputs(2))).loops.tolist() == [3, 3]
    assert len({id(p) for p in stacked.parameters()}) == len(list(stacked.parameters()))


LATENTS = {"mlp": (4, 64), "conv": (2, 64, 6, 6), "transformer": (2, 16, 64)}


@pytest.mark.parametrize("make", [StackedDynamics, WideDynamics])
@pytest.mark.parametrize("loops", [2, 4, 8])
@pytest.mark.parametrize("block_layers", [1, 2])
@pytest.mark.parametrize("block", LATENTS)
def test_controls_spend_about_the_loops_flops(make, loops, block_layers, block):
    """Their width allows for the injections, which cost mean_loops times what the loop pays once."""

    def flops(make: type[nn.Module]) -> int:
        dynamics = make(64, 6, 64, loops, loops, mode="linear", block=block, block_layers=block_layers)
        with FlopCounterMode(display=False) as counter:
            dynamics(torch.randn(LATENTS[block]), torch.randn(LATENTS[block][0], 6), loops)
        return counter.get_total_flops()

    ratio = flops(make) / flops(LoopedDynamics)
    assert 0.97 <= ratio <= 1.03, f"{ratio:.3f}"


@pytest.mark.parametrize("loops,width,block_layers", [(2, 64, 1), (4, 64, 2), (16, 96, 1), (4, 24, 1)])
@pytest.mark.parametrize("block", LATENTS)
def test_deep_thin_has_the_loops_parameters_in_more_and_thinner_cells(block, loops, width, block_layers):
    kw = {"mode": "linear", "block": block, "block_layers": block_layers, "latent_norm": nn.LayerNorm(64)}
    thin, loop = (make(64, 6, width, loops, loops, **kw) for make in (DeepThinDynamics, LoopedDynamics))
    assert len(thin.cells) == loops * block_layers and thin.state_dim < width
    inner = sum(cell.inject.weight.shape[0] for cell in thin.cells) / len(thin.cells)
    assert 0.8 <= inner / (2 * thin.state_dim) <= 1.25, "thinner alike in h and inside"
    assert 0.98 <= count(thin) / count(loop) <= 1.0, f"{count(thin) / count(loop):.3f}"


def test_deep_thin_draws_the_same_numbers_whatever_it_counts():
    """The sizes are found on modules that are never filled."""
    torch.manual_seed(0)
    thin, after = DeepThinDynamics(Z, A, D), torch.rand(())
    torch.manual_seed(0)
    parts, widths = DeepThinDynamics.plan(Architecture(Z, A, D), 4)
    modules = [parts.make_prelude(), parts.make_start(), *map(parts.make_cell, widths), parts.make_coda()]
    assert torch.equal(torch.rand(()), after)
    assert [tuple(p.shape) for m in modules for p in m.parameters()] == [tuple(p.shape) for p in thin.parameters()]


def test_deep_thin_with_too_many_cells_is_refused():
    with pytest.raises(ValueError, match="1000 cells are too many"):
        DeepThinDynamics(4, 2, 2, 1000, 1000)


@pytest.mark.parametrize("name", DYNAMICS)
def test_every_control_takes_every_word_of_the_loop_and_no_other(name):
    words = {"halting": "residual", "patience": 2, "solver": "anderson", "gradient": "unrolled", "order": "aabb"}
    dynamics = DYNAMICS[name](Z, A, D, 3, 6, block_layers=2, coda_layers=2, **words).double()
    z, action = inputs(3)
    out = dynamics(z, action, 2, h0=torch.ones(3, dynamics.state_dim, dtype=DOUBLE))
    assert out.z_next.shape == (3, Z) and not torch.equal(out.h, dynamics(z, action, 2).h)
    with pytest.raises(ValueError, match="h0 must have the state's shape"):
        dynamics(z, action, h0=torch.ones(3, dynamics.state_dim + 1, dtype=DOUBLE))
    with pytest.raises(TypeError, match="unknown argument 'blok': did you mean block"):
        DYNAMICS[name](Z, A, D, blok="mlp")
    for change in ({"block": "mpl"}, {"order": "abba"}, {"block_layers": 0}, {"coda_layers": 0}, {"prelude_layers": 0}):
        with pytest.raises(ValueError, match=str(next(iter(change.values())))):
            DYNAMICS[name](Z, A, D, **change)


@pytest.mark.parametrize("word", ["min_loops", "mean_loops", "max_loops"])
@pytest.mark.parametrize("loops", [0, 4.0, True])
def test_loops_are_counted_in_whole_numbers(word, loops):
    with pytest.raises(ValueError, match=f"{word} must be an integer of at least 1"):
        LoopedDynamics(Z, A, D, **{word: loops})


# ---- what a person can get wrong, in words ----------------------------------------------------------


def test_a_depth_is_any_whole_number():
    dynamics, (z, action) = looped(), inputs(2)
    assert torch.equal(dynamics(z, action, np.int64(3)).h, dynamics(z, action, 3).h)
    for wrong in (True, 2.0, "3", np.array(2.7), np.array(True), np.array([3, 4])):
        with pytest.raises(ValueError, match="depth must be an int"):
            dynamics(z, action, wrong)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        dynamics(z, action, np.int64(0))


def test_shapes_that_do_not_fit_are_named():
    dynamics, (z, action) = looped(), inputs(2)
    for wrong in ((z[0], action[0]), (z[None], action[None])):
        with pytest.raises(ValueError, match=re.escape(f"z (B, {Z}) and action (B, {A}), got")):
            dynamics(*wrong, 4)
    with pytest.raises(ValueError, match="tensor, got 3"):
        dynamics(z, action, 4).at(3)


@pytest.mark.parametrize("answer", [True, 1.0, torch.ones(2, 1, dtype=torch.bool), torch.ones(2), torch.tensor(True)])
def test_a_rule_that_answers_wrongly_is_told_so(answer):
    class Rule(HaltingRule):
        def forward(self, h, previous):
            return answer

    with pytest.raises(TypeError, match=r"a halting rule answers with a \(2,\) tensor of bool, got"):
        looped(halting=Rule())(*inputs(2))


@pytest.mark.parametrize("mode", ["certified", "lipsdp"])
def test_the_transforms_of_torch_work_on_frozen_weights(mode):
    dynamics, (z, action) = looped(mode=mode), inputs(4)
    with dynamics.frozen():
        found = torch.func.vmap(torch.func.jacrev(lambda z, a: dynamics(z[None], a[None], 3).z_next[0]))(z, action)
    for i in range(4):
        wanted = jacobian(lambda x, i=i: dynamics(x[None], action[i : i + 1], 3).z_next[0], z[i])
        torch.testing.assert_close(found[i], wanted)
