"""The certificate at its edges: rounded weights, weights that are no numbers, 16 bits, changes that hide, no rows."""

import math

import pytest
import torch
from test_dynamics import A, D, Z, generator, inputs, looped, scramble, sigma

from loopwm.dynamics import HALTING, SOLVERS, DepthSchedule, FixedHalting, LoopedDynamics, PatientHalting
from loopwm.dynamics.cell import PreparedLoop
from loopwm.dynamics.penalty import jacobian_penalty

CERTIFIED = ("mlp", "conv", "rank")


def of_block(block: str, **kw) -> tuple[LoopedDynamics, torch.Tensor, torch.Tensor]:
    """A certified loop of a block in float32, and inputs of three samples."""
    torch.manual_seed(0)
    size = () if block == "mlp" else (4, 4)
    dynamics = scramble(LoopedDynamics(Z, A, D, block=block, block_dim=2 * D, **kw), 0.5)
    return dynamics, torch.randn(3, Z, *size, generator=generator()), torch.randn(3, A, generator=generator(1))


def factor_as_computed(dynamics: LoopedDynamics) -> float:
    """The true factor, in float64, of the loop with its float32 weights, where every unit of the block is open."""
    decay, _, read, write = (part.double() for part in dynamics.cell.fold())
    return sigma(torch.diag(decay) + (read @ write).t())


def test_the_bound_covers_the_weights_as_they_are_rounded():
    """W1 and W2 aligned with the slowest direction, so that nothing but rounding lies between factor and bound."""
    gaps = []
    for seed in range(200):
        dynamics = LoopedDynamics(Z, A, D, block_dim=D)
        with torch.no_grad():
            size = 1.0 + torch.rand(D, generator=generator(seed))
            size[0] = 3.0
            dynamics.cell.log_dt.add_(torch.rand((), generator=generator(seed + 1000)))
            for linear in (dynamics.cell.read, dynamics.cell.write):
                linear.parametrizations.weight.original.copy_(torch.diag(size))
            gaps.append(dynamics.lipschitz_bound() - factor_as_computed(dynamics))
    assert min(gaps) >= 0.0, "a bound below the truth"
    assert max(gaps) < 1e-6, "the case must be one where only rounding is between them"


@pytest.mark.parametrize("block", CERTIFIED)
def test_gamma_next_to_one_leaves_the_bound_below_one(block):
    dynamics, *_ = of_block(block, gamma=1.0 - 1e-9)
    with torch.no_grad():
        for name, weight in dynamics.cell.named_parameters():
            if "original" in name:
                weight.mul_(100.0)
    assert 0.99 < dynamics.lipschitz_bound() < 1.0


@pytest.mark.parametrize(
    "where, bad",
    [
        ("log_dt", math.nan),
        ("input_gain", math.nan),
        ("read.parametrizations.weight.original", math.nan),
        ("read.parametrizations.weight.original", math.inf),
    ],
)
@pytest.mark.parametrize("block", CERTIFIED)
def test_weights_that_are_no_numbers_certify_nothing(block, where, bad):
    """An infinite bound, and a rule that goes by it runs to the cap: no traceback out of a diverged run."""
    dynamics, z, action = of_block(block, halting="certified", max_loops=5)
    assert dynamics.lipschitz_bound() < 1.0
    with torch.no_grad():
        dynamics.cell.get_parameter(where).view(-1)[0] = bad
    assert dynamics.lipschitz_bound() == math.inf
    assert dynamics(z, action).loops.tolist() == [5, 5, 5]
    assert dynamics.distance_to_fixed_point(dynamics.start(z), dynamics.start(z)).tolist() == [math.inf] * 3


@pytest.mark.parametrize("halting", [name for name in HALTING if name not in ("prediction", "random", "fixed")])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_latent_that_is_no_number_runs_to_the_cap_alone(halting, solver):
    dynamics = looped(halting=halting, solver=solver, max_loops=30, halt_tolerance=2.0 if halting == "gate" else 0.5)
    if halting == "gate":  # an untrained one foretells a drop of 1
        dynamics.halting.gate.layers[-1].requires_grad_(False).weight.zero_()
        dynamics.halting.gate.layers[-1].bias.zero_()
    z, action = inputs(4)
    whole = dynamics(z, action)
    z[2] = math.nan
    out = dynamics(z, action)
    assert int(out.loops[2]) == 30
    for row in (0, 1, 3):
        assert int(out.loops[row]) == int(whole.loops[row]) < 30
        torch.testing.assert_close(out.h[row], whole.h[row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", CERTIFIED)
def test_sixteen_bits_are_refused_in_one_line(block, dtype):
    dynamics, z, action = of_block(block)
    dynamics.to(dtype)
    for use in (lambda: dynamics(z.to(dtype), action.to(dtype), 2), dynamics.lipschitz_bound):
        with pytest.raises(TypeError, match="a certified mode needs weights in float32 or float64"):
            use()


def test_the_kept_bound_sees_a_loaded_state_and_another_gamma():
    dynamics, other = looped(seed=0), looped(seed=1)
    assert dynamics.lipschitz_bound() != other.lipschitz_bound()
    dynamics.load_state_dict(other.state_dict())
    assert dynamics.lipschitz_bound() == other.lipschitz_bound()
    dynamics.cell.gamma = 0.1
    assert dynamics.lipschitz_bound() == dynamics.cell.lipschitz_bound() < other.lipschitz_bound()


def test_mixed_depths_from_given_states_equal_each_sample_alone():
    dynamics, (z, action) = looped(), inputs(5)
    h0 = torch.randn(5, D, generator=generator(3), dtype=z.dtype)
    depth = torch.tensor([3, 1, 4, 1, 2])
    out = dynamics(z, action, depth, h0)
    assert out.loops.tolist() == depth.tolist()
    for row in range(5):
        alone = dynamics(z[row : row + 1], action[row : row + 1], int(depth[row]), h0[row : row + 1])
        torch.testing.assert_close(out.h[row], alone.h[0])
        torch.testing.assert_close(out.z_next[row], alone.z_next[0])


@pytest.mark.parametrize("mode", ["linear", "soft"])
def test_the_penalty_of_no_rows_is_empty(mode):
    dynamics, (z, action) = looped(mode=mode), inputs(3)
    loop: PreparedLoop = dynamics.cell.prepare(dynamics.prelude(z, action)[:0])
    assert jacobian_penalty(loop, dynamics.start(z)[:0]).shape == (0,)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: FixedHalting(0.5), "loops must be an integer of at least 1, got 0.5"),
        (lambda: FixedHalting(True), "loops must be an integer of at least 1, got True"),
        (lambda: PatientHalting(FixedHalting(1), 1.9), "patience must be an integer of at least 1, got 1.9"),
        (lambda: DepthSchedule(torch.tensor([], dtype=torch.int64)), "one integer for each sample, got none"),
    ],
)
def test_what_counts_nothing_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
