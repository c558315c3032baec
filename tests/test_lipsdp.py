"""Mode lipsdp: one inequality for the whole loop, against every pattern of open units and against its own LMI."""

import itertools
import math

import pytest
import torch
from test_dynamics import (
    DOUBLE,
    A,
    D,
    Z,
    adversarial,
    generator,
    inputs,
    jacobian_norm,
    looped,
    sigma,
)

from loopwm.dynamics import DYNAMICS, LoopedDynamics
from loopwm.dynamics.cell import LoopCell
from loopwm.dynamics.lipsdp import PATH_SHARE, joint_factor, joint_scale, path_scale, promised_factor

SMALL, UNITS = 3, 6


def parts(seed: int, scale: float = 1.0, matrix: bool = False, decay: float | None = None) -> list[torch.Tensor]:
    """W1 (W, D), W2 (D, W), a linear path, log multipliers (W,) and the rho that is asked for, in float64.

    The path is Abar (D,), or a matrix F (D, D) that is not symmetric, as large as it may be.
    """
    stream = generator(seed)
    read, write = (torch.randn(UNITS, SMALL, generator=stream, dtype=DOUBLE) * scale for _ in range(2))
    path = torch.rand(SMALL, generator=stream, dtype=DOUBLE) if decay is None else torch.full((SMALL,), decay).double()
    rho = promised_factor(path, 0.9)
    if matrix:
        path = 5.0 * torch.randn(SMALL, SMALL, generator=stream, dtype=DOUBLE)
        path = path * path_scale(path, rho)
    return [read, write.t(), path, torch.randn(UNITS, generator=stream, dtype=DOUBLE), rho]


def dense(path: torch.Tensor) -> torch.Tensor:
    return torch.diag(path) if path.ndim == 1 else path


def true_factor(read: torch.Tensor, write: torch.Tensor, path: torch.Tensor) -> float:
    """The largest ||F + W2 P W1|| over P in [0, 1]^W: a norm is convex in P, so it is largest at a corner."""
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(read))), dtype=DOUBLE)
    maps = dense(path) + torch.einsum("dw,pw,we->pde", write, corners, read)
    return float(torch.linalg.matrix_norm(maps, 2).max())


@pytest.mark.parametrize("matrix", [False, True], ids=["decay", "skip"])
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scale", [0.05, 0.3, 3.0, 1e3])
def test_no_pattern_of_units_is_beyond_the_factor(seed, scale, matrix):
    read, write, path, multipliers, rho = parts(seed, scale, matrix)
    shrink = joint_scale(read, write, path, multipliers, rho)
    assert 0.0 < float(shrink) <= 1.0
    read, write = read * shrink, write * shrink
    bound = joint_factor(read, write, path, multipliers)
    assert true_factor(read, write, path) <= bound <= float(rho)


@pytest.mark.parametrize("size", [0.1, 1.0, 1e3])
def test_a_matrix_for_a_path_stays_within_its_share(size):
    path, rho = size * torch.randn(5, 5, generator=generator(), dtype=DOUBLE), torch.tensor(0.9, dtype=DOUBLE)
    within = float(torch.linalg.matrix_norm(path, 2)) <= PATH_SHARE * 0.9
    assert float(torch.linalg.matrix_norm(path * path_scale(path, rho), 2)) <= PATH_SHARE * 0.9
    assert (float(path_scale(path, rho)) == 1.0) == within


def test_a_matrix_that_is_diagonal_is_the_decay():
    """Square roots of numbers and the Cholesky factor say the same."""
    read, write, decay, multipliers, _ = parts(1, 1.0)
    rho = torch.tensor(0.999, dtype=DOUBLE)
    one, other = (joint_scale(read, write, path, multipliers, rho) for path in (decay, torch.diag(decay)))
    assert float(one) == pytest.approx(float(other), rel=1e-12)
    one, other = (joint_factor(read * 0.05, write * 0.05, path, multipliers) for path in (decay, torch.diag(decay)))
    assert one == pytest.approx(other, rel=1e-12)


def test_weights_that_contract_are_left_alone():
    assert float(joint_scale(*parts(0, 0.05, decay=0.3))) == 1.0


@pytest.mark.parametrize("matrix", [False, True], ids=["decay", "skip"])
@pytest.mark.parametrize("seed", range(5))
def test_the_factor_is_the_smallest_for_which_the_published_matrix_is_not_negative(seed, matrix):
    """The LMI of LipSDP itself, in (h, units, h'): [[rho^2, -W1^T L, F^T], [., 2 L, W2^T], [., ., 1]]."""
    read, write, path, multipliers, asked = parts(seed, 0.3, matrix)
    shrink = joint_scale(read, write, path, multipliers, asked)
    read, write, weights = read * shrink, write * shrink, torch.diag(multipliers.exp())
    rho = joint_factor(read, write, path, multipliers)

    def smallest_eigenvalue(factor: float) -> float:
        one = torch.eye(SMALL, dtype=DOUBLE)
        rows = [
            torch.cat([factor**2 * one, -read.t() @ weights, dense(path).t()], 1),
            torch.cat([-weights @ read, 2.0 * weights, write.t()], 1),
            torch.cat([dense(path), write, one], 1),
        ]
        return float(torch.linalg.eigvalsh(torch.cat(rows))[0])

    assert smallest_eigenvalue(rho) >= -1e-9 > smallest_eigenvalue(rho * (1.0 - 1e-3))


@pytest.mark.parametrize("matrix", [False, True], ids=["decay", "skip"])
def test_the_bound_is_reached(matrix):
    """Ascent on weights and multipliers comes near the promised factor: nothing is given away but the margin."""
    read, write, path, multipliers, rho = parts(0, 0.3, matrix)
    free = [x.clone().requires_grad_() for x in (read, write, multipliers)]
    ascent = torch.optim.Adam(free, lr=0.02, maximize=True)
    for _ in range(400):
        ascent.zero_grad()
        shrink = joint_scale(free[0], free[1], path, free[2], rho)
        torch.linalg.matrix_norm(dense(path) + free[1] @ free[0] * shrink**2, 2).backward()
        ascent.step()
    read, write, multipliers = (x.detach() for x in free)
    shrink = joint_scale(read, write, path, multipliers, rho)
    assert true_factor(read * shrink, write * shrink, path) > 0.99 * float(rho)


def test_a_block_that_pulls_back_has_more_room_than_norms_leave_it():
    """W2 = -W1^T with orthonormal rows: up to 1 + Abar is a contraction, norms stop at gamma (1 - Abar)."""
    decay, gamma = torch.full((SMALL,), 0.6, dtype=DOUBLE), 0.95
    read = 10.0 * torch.linalg.qr(torch.randn(SMALL, SMALL, generator=generator(), dtype=DOUBLE))[0]
    rho = promised_factor(decay, gamma)
    shrink = joint_scale(read, -read.t(), decay, torch.zeros(SMALL, dtype=DOUBLE), rho)
    pull = sigma(read * shrink) ** 2
    assert pull == pytest.approx(float(rho) + 0.6, rel=2e-2)  # a flat spectrum: the norm is bounded loosely
    assert pull > 4.0 * gamma * 0.4
    assert true_factor(read * shrink, -read.t() * shrink, decay) <= float(rho)


def test_where_the_multipliers_prove_nothing_the_norms_do():
    """W2 alone too large for its multipliers: no rho fulfils the inequality."""
    assert joint_factor(*parts(0, 3.0)[:-1]) is None


@pytest.mark.parametrize("skip", [False, True], ids=["decay", "skip"])
def test_everything_that_is_folded_has_the_right_gradient(skip):
    """Through rho, the path's scale, the inequality and the multipliers; where both scales are at work."""
    cell = LoopCell(3, 6, mode="lipsdp", skip=skip).double()
    with torch.no_grad():
        for p in cell.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(4), dtype=DOUBLE))
        cell.log_dt.copy_(torch.tensor([-3.0, 0.0, 0.5]))  # one slowest entry
        cell.log_rate.zero_()
    names = ["log_dt", "log_rate", "read.weight", "write.weight", "log_multipliers", *["skip.weight"] * skip]
    values = [cell.get_parameter(name).detach().clone().requires_grad_() for name in names]

    cell.forward = cell.fold  # what functional_call calls

    def folded(*given):
        path, _, read, write = torch.func.functional_call(cell, dict(zip(names, given, strict=True)), ())
        return path, read, write

    assert sigma(folded(*values)[1]) < 0.9 * sigma(cell.read.weight), "the scale is at work"
    # The bound is up to a hundredth above the norm, and has the norm's gradient.
    assert torch.autograd.gradcheck(folded, values, eps=1e-6, atol=1e-3, rtol=3e-2)


@pytest.mark.parametrize("skip", [False, True], ids=["decay", "skip"])
def test_weights_of_nothing_have_gradients(skip):
    """Norms of zero, of W1 and W2 and of F, must not make zero times infinity."""
    dynamics = LoopedDynamics(Z, A, D, mode="lipsdp", skip=skip)
    with torch.no_grad():
        for weight in (dynamics.cell.read.weight, dynamics.cell.write.weight):
            weight.zero_()
        if skip:
            dynamics.cell.skip.weight.copy_(-torch.diag(dynamics.cell.decay()))
    dynamics(*(x.float() for x in inputs(3)), 3).h.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in dynamics.cell.parameters())


@pytest.mark.parametrize("size", [-1e4, -90.0, 90.0, 1e4])
def test_multipliers_of_any_size_certify(size):
    dynamics = LoopedDynamics(Z, A, D, mode="lipsdp")
    with torch.no_grad():
        dynamics.cell.write.weight.normal_()
        dynamics.cell.log_multipliers.fill_(size)
    dynamics(*(x.float() for x in inputs(3)), 3).h.square().sum().backward()
    assert dynamics.lipschitz_bound() < 1.0
    assert all(p.grad.isfinite().all() for p in dynamics.cell.parameters())


@pytest.mark.parametrize("skip", [False, True], ids=["decay", "skip"])
@pytest.mark.parametrize("log_dt", [0.0, -8.0], ids=["fast", "slow"])
def test_the_promise_is_kept_in_float32(log_dt, skip):
    """Decays next to one leave little of rho^2 - Abar^2: where rounding is magnified most."""
    for seed in range(20):
        torch.manual_seed(seed)
        dynamics = LoopedDynamics(Z, A, D, mode="lipsdp", skip=skip)
        with torch.no_grad():
            if skip:
                dynamics.cell.skip.weight.normal_()
            dynamics.cell.log_dt.add_(log_dt + 0.01 * torch.randn(D))
            for weight in (dynamics.cell.read.weight, dynamics.cell.write.weight, dynamics.cell.log_multipliers):
                weight.copy_(3.0 * torch.randn(weight.shape))
            promised = float(promised_factor(dynamics.cell.decay(), 0.95))
        assert dynamics.lipschitz_bound() <= promised < 1.0


@pytest.mark.parametrize("skip", [False, True], ids=["decay", "skip"])
def test_training_that_wants_to_grow_stays_below_the_bound(skip):
    torch.manual_seed(0)
    dynamics = LoopedDynamics(Z, A, D, mode="lipsdp", skip=skip)
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


def test_it_may_halt_by_its_certificate():
    z, action = inputs(4)
    out = looped(mode="lipsdp", halting="certified", halt_tolerance=1e-6, max_loops=900)(z, action)
    assert 1 < int(out.loops.max()) < 900
    rest = looped(mode="lipsdp")(z, action, 2000)
    assert (torch.linalg.vector_norm(out.h - rest.h, dim=-1) <= 1e-6).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["log_multipliers", "log_dt", "read.weight", "write.weight", "skip.weight"])
def test_weights_that_are_no_numbers_certify_nothing(where, bad):
    """An infinite bound and latents that are no numbers, and no traceback, out of a run that has diverged."""
    dynamics = looped(mode="lipsdp", skip=True, halting="certified", max_loops=5)
    with torch.no_grad():
        dynamics.cell.get_parameter(where).view(-1)[0] = bad
    if (where, bad) == ("log_multipliers", math.inf) or (where, bad) == ("log_dt", math.inf):  # limited
        assert dynamics.lipschitz_bound() < 1.0
    else:
        assert dynamics.lipschitz_bound() == math.inf
        assert dynamics(*inputs(3)).loops.tolist() == [5, 5, 5]


@pytest.mark.parametrize("mode", ["lipsdp", "linear", "soft"])
def test_one_loop_with_a_skip_by_hand(mode):
    """h' = (Abar + W0) h + Bbar e + W2 s(W1 h + U e + b), where nothing has to shrink."""
    cell = LoopCell(2, 3, mode=mode, skip=True).double()
    with torch.no_grad():
        for weight in (cell.skip.weight, cell.read.weight, cell.write.weight):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator(), dtype=DOUBLE))
        h, e = torch.randn(2, 4, 2, generator=generator(1), dtype=DOUBLE)
        inner = torch.relu(h @ cell.read.weight.t() + cell.inject(e))
        expected = h * cell.decay() + h @ cell.skip.weight.t() + e * cell.input_scale(cell.decay())
        torch.testing.assert_close(cell.prepare(e)(h), expected + inner @ cell.write.weight.t())
        assert cell.lipschitz_bound() >= max(jacobian_norm(cell.prepare(x[None]), y) for x, y in zip(e, h, strict=True))


def test_mixed_depths_and_controls_have_the_skip():
    z, action = inputs(5)
    depth = torch.tensor([3, 1, 4, 1, 2])
    dynamics = looped(mode="lipsdp", skip=True)
    out = dynamics(z, action, depth)
    for row in range(5):
        alone = dynamics(z[row : row + 1], action[row : row + 1], int(depth[row]))
        torch.testing.assert_close(out.h[row], alone.h[0])
    out.h.sum().backward()
    assert dynamics.cell.skip.weight.grad.any()
    loop, stack, wide = (
        DYNAMICS[name](Z, A, D, 4, 8, block_dim=6 * D, mode="linear", skip=True)
        for name in ("looped", "stacked", "wide")
    )
    assert len(stack.cells) == 4 and all(cell.skip is not None for cell in stack.cells)

    def flops(cells, loops=1, injections=1):  # of the block, in multiplications
        weights = lambda cell, names: sum(getattr(cell, name).weight.numel() for name in names)  # noqa: E731
        return sum(loops * weights(c, ("read", "write", "skip")) + injections * weights(c, ("inject",)) for c in cells)

    assert flops(stack.cells) == pytest.approx(flops([loop.cell], 4), rel=0.01)
    assert flops(wide.cells) == pytest.approx(flops([loop.cell], 4), rel=0.01)


def test_a_skip_where_there_is_no_room_for_it_is_refused():
    with pytest.raises(ValueError, match="mode 'certified' has no skip; choose from lipsdp, linear, soft"):
        LoopCell(D, D, skip=True)
    with pytest.raises(ValueError, match="block 'conv' has no skip"):
        LoopedDynamics(Z, A, D, block="conv", mode="linear", skip=True)


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
