"""Grid latents: the convolutional block is local, contracts on every grid, and loops like the others."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from loopwm.dynamics import DYNAMICS, HALTING, LoopedDynamics
from loopwm.dynamics.spectral_conv import UnitConvolutionNorm, convolution_norm

Z, A, D = 5, 2, 6
DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def grid(seed: int = 0, scale: float = 1.0, name: str = "looped", **kw) -> nn.Module:
    """Random values everywhere, so that no zero initial weight hides a term."""
    dynamics, stream = DYNAMICS[name](Z, A, D, **({"block": "conv"} | kw)), generator(seed)
    with torch.no_grad():
        for parameter, p in dynamics.named_parameters():
            noise = torch.randn(p.shape, generator=stream) * scale
            p.add_(0.3 * noise) if "log_" in parameter else p.copy_(noise)
    return dynamics.double()


def inputs(batch: int, size: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(batch, Z, size, size, seed=seed), randn(batch, A, size, size, seed=seed + 50)


def sigma(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


def dense(kernel: torch.Tensor, size: int) -> torch.Tensor:
    """The matrix of a zero-padded convolution on a size x size grid."""
    kernel, inner = kernel.detach().double(), kernel.shape[1]
    basis = torch.eye(inner * size * size, dtype=DOUBLE).view(-1, inner, size, size)
    return conv2d(basis, kernel, padding=1).flatten(1)


@pytest.mark.parametrize("block", ["conv", "rank"])
@pytest.mark.parametrize(
    ("z", "action"),
    [
        ((2, Z), (2, A)),
        ((2, Z, 4, 4), (3, A)),
        ((2, Z, 4, 4), (2, A, 4, 5)),
        ((2, Z, 4, 4, 1), (2, A)),
        ((2, 9, 4, 4), (2, A)),
    ],
)
def test_grids_of_other_shapes_are_named(block, z, action):
    wanted = re.escape(f"take z (B, {Z}, S, S) and action (B, {A}, S, S) or (B, {A}), got {z} and {action}")
    with pytest.raises(ValueError, match=wanted):
        grid(block=block, block_dim=4 * D)(torch.zeros(z, dtype=DOUBLE), torch.zeros(action, dtype=DOUBLE), 2)


# ---- the norm of a convolution -------------------------------------------------------------------


def lowpass(o: int, i: int) -> torch.Tensor:
    return torch.randn(o, i, 1, 1, generator=generator(3)).expand(o, i, 3, 3).contiguous()


def between_samples(o: int, i: int) -> torch.Tensor:
    """A wave whose supremum lies half-way between two sampled frequencies along both axes, phases as complex pairs."""
    angle = math.pi / 16 * torch.arange(3)
    wave = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])])  # (2, 2, 3)
    both = torch.einsum("abx,bcy->acxy", wave, wave)  # a rotation by (x + y) pi / 16
    kernel = torch.zeros(o, i, 3, 3)
    kernel[:2, :2] = both
    return kernel


KERNELS = {
    "random": lambda o, i: torch.randn(o, i, 3, 3, generator=generator()),
    "low-pass": lowpass,
    "high-pass": lambda o, i: lowpass(o, i) * torch.tensor([1.0, -1.0, 1.0]) * torch.tensor([[1.0], [-1.0], [1.0]]),
    "between samples": between_samples,
    "shift": lambda o, i: nn.functional.pad(torch.eye(o, i)[..., None, None], (0, 2, 2, 0)),
    "one entry": lambda o, i: torch.zeros(o, i, 3, 3).index_put([torch.tensor(0)] * 4, torch.tensor(1.0)),
    "zero": lambda o, i: torch.zeros(o, i, 3, 3),
}


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(4, 4), (7, 3), (3, 7)], ids=str)
@pytest.mark.parametrize("kind", KERNELS)
def test_convolution_norm_bounds_the_dense_matrix_on_every_grid(kind, shape, scale):
    kernel = KERNELS[kind](*shape) * scale
    bound, projected = float(convolution_norm(kernel.double())), UnitConvolutionNorm()(kernel)
    assert torch.isfinite(projected).all()
    for size in (1, 2, 3, 5, 8, 12):
        exact = sigma(dense(kernel, size))
        assert exact <= bound * (1 + 1e-6)
        assert sigma(dense(projected, size)) <= 1.0
    if bound <= 0.97:
        assert torch.equal(projected, kernel), "inside the ball nothing changes"
    if exact > 1.1:
        torch.testing.assert_close(projected / projected.norm(), kernel / kernel.norm())
        assert float(convolution_norm(projected.double())) > 0.97, "the ball is used up"


def supremum(kernel: torch.Tensor) -> float:
    """sup_w ||K(w)||_2, sampled so densely that 4e-4 is missing at most."""
    symbol = torch.fft.fft2(kernel.double(), s=(160, 160)).permute(2, 3, 0, 1)
    return float(torch.linalg.matrix_norm(symbol, 2).amax())


def test_the_correction_between_samples_is_needed_and_enough():
    kernel = between_samples(2, 2)
    sampled = torch.linalg.matrix_norm(torch.fft.fft2(kernel.double(), s=(16, 16)).permute(2, 3, 0, 1), 2).amax()
    true = supremum(kernel)
    assert float(sampled) < 0.98 * true < true <= float(convolution_norm(kernel.double())) <= 1.04 * true


def test_slack_of_the_certificate():
    """Against the supremum 4 %; against a grid of 12 x 12, whose border costs every kernel some of its norm, 10 %."""
    for seed in range(2):
        kernel = torch.randn(6, 4, 3, 3, generator=generator(seed))
        used = supremum(UnitConvolutionNorm()(kernel))
        assert 0.945 < used <= 1.0
        assert sigma(dense(UnitConvolutionNorm()(kernel), 12)) > 0.9


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 1)], ids=str)
def test_gradient_of_the_projection(shape):
    kernel = randn(*shape, 3, 3).mul_(2.0).requires_grad_()
    direction = randn(*shape, 3, 3, seed=1)
    assert torch.autograd.gradcheck(lambda k: (UnitConvolutionNorm()(k) * direction).sum(), (kernel,), atol=1e-3)
    (UnitConvolutionNorm()(kernel) * direction).sum().backward()
    assert abs((kernel.grad * kernel).sum()) < 1e-6 * kernel.grad.norm() * kernel.norm(), "growing changes nothing"
    small = (kernel.detach() * 0.01).requires_grad_()
    (UnitConvolutionNorm()(small) * direction).sum().backward()
    assert torch.equal(small.grad, direction)


# ---- the certificate of a loop -------------------------------------------------------------------


def jacobian_norm(dynamics: LoopedDynamics, e: torch.Tensor, h: torch.Tensor) -> float:
    """Exact spectral norm of dh'/dh at h, for one row."""
    loop = dynamics.cell.prepare(e)
    matrix = torch.autograd.functional.jacobian(lambda x: loop(x.view_as(h)).flatten(), h.flatten())
    return sigma(matrix)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_one_loop_contracts_at_least_as_the_bound_says(size, activation):
    for scale in (0.3, 3.0, 100.0):
        dynamics = grid(scale=scale, activation=activation)
        bound = dynamics.lipschitz_bound()
        assert 0.0 < bound < 1.0
        for seed in range(3):
            h, e = randn(2, 1, D, size, size, seed=seed)
            assert jacobian_norm(dynamics, e, h) <= bound + 1e-12


def test_certificate_holds_after_every_step_of_training():
    torch.manual_seed(0)
    dynamics = LoopedDynamics(Z, A, D, block="conv")
    adam = torch.optim.Adam(dynamics.parameters(), lr=0.3)
    z, action = (x.float() for x in inputs(8))
    for _ in range(30):
        adam.zero_grad()
        (-dynamics(z, action, 4).h.square().mean()).backward()
        adam.step()
        assert dynamics.lipschitz_bound() < 1.0
    original = dynamics.cell.read.parametrizations.weight.original
    assert float(convolution_norm(original.detach())) > 1.5, "training pushed against the bound"
    assert 0.0 < dynamics.measured_contraction(z, action, 20) <= dynamics.lipschitz_bound() * (1 + 1e-3)


def test_bound_is_nearly_reached():
    """W1 and W2 aligned and every unit open on a large grid of equal cells: the bound cannot be loosened unnoticed."""
    dynamics = LoopedDynamics(1, 1, 1, block="conv", block_dim=1).double()
    with torch.no_grad():
        dynamics.cell.read.parametrizations.weight.original.fill_(9.0)
        dynamics.cell.write.parametrizations.weight.original.fill_(9.0)
        dynamics.cell.inject.bias.fill_(100.0)
    h, e = randn(2, 1, 1, 20, 20)
    bound = dynamics.lipschitz_bound()
    assert bound * 0.96 < jacobian_norm(dynamics, e, h) <= bound
    assert bound == pytest.approx(0.2**0.5 + dynamics.cell.gamma * (1 - 0.2**0.5), rel=1e-3)


# ---- loops ---------------------------------------------------------------------------------------


def by_hand(dynamics: LoopedDynamics, z: torch.Tensor, action: torch.Tensor, loops: int) -> torch.Tensor:
    """h after ``loops`` loops, written out cell by cell."""
    cell, prelude = dynamics.cell, dynamics.prelude
    e = prelude.layers(torch.cat([z, action], 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    h = torch.einsum("dz,bzij->bdij", dynamics.start.weight, z)
    decay = cell.decay()
    gain = cell.block_scale(decay)
    constant = e * cell.input_scale(decay).view(-1, 1, 1)
    injected = torch.einsum("wd,bdij->bwij", cell.inject.weight, e) + cell.inject.bias.view(-1, 1, 1)
    for _ in range(loops):
        inner = torch.relu(conv2d(h, cell.read.weight, padding=1) + injected)
        h = decay.view(-1, 1, 1) * h + constant + gain * torch.einsum("dw,bwij->bdij", cell.write.weight, inner)
    return h


@pytest.mark.parametrize("mode", ["certified", "linear"])
@pytest.mark.parametrize("size", [1, 4])
def test_the_equation(size, mode):
    dynamics = grid(scale=0.5, mode=mode, prelude_layers=2, coda_layers=2)
    z, action = inputs(3, size)
    out, h = dynamics(z, action, 5), by_hand(dynamics, z, action, 5)
    torch.testing.assert_close(out.h, h)
    torch.testing.assert_close(out.z_next, z + dynamics.coda.step(h))
    assert out.z_next.shape == z.shape and out.h.shape == (3, D, size, size) and out.loops.tolist() == [5] * 3


def test_one_action_for_the_whole_grid_is_its_map():
    dynamics = grid()
    z, action = inputs(3)[0], randn(3, A, seed=9)
    everywhere = action[:, :, None, None].expand(-1, -1, 4, 4)
    assert torch.equal(dynamics(z, action, 3).z_next, dynamics(z, everywhere, 3).z_next)


def test_a_cell_reaches_as_far_as_the_loops():
    dynamics = grid()
    z, action = inputs(1, size=9)
    touched = z.clone()
    touched[0, :, 0, 0] += 1.0
    for loops in (1, 2, 4):
        change = (dynamics(z, action, loops).h - dynamics(touched, action, loops).h).abs().amax(1)[0]  # (9, 9)
        reached = change > 0
        assert reached[: loops + 1, : loops + 1].all() and int(reached.sum()) == (loops + 1) ** 2


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_depth_per_sample_and_adaptive_depth_equal_each_sample_alone(activation):
    dynamics = grid(scale=0.5, activation=activation, max_loops=12, halt_tolerance=0.02)
    z, action = inputs(6)
    z = z * torch.logspace(-1, 2, 6, dtype=DOUBLE).view(-1, 1, 1, 1)
    for depth in (torch.tensor([3, 1, 11, 4, 1, 3]), None):
        out = dynamics(z, action, depth)
        for i in range(6):
            alone = dynamics(z[i : i + 1], action[i : i + 1], int(out.loops[i]))
            for field in ("z_next", "h", "residual"):
                torch.testing.assert_close(getattr(out, field)[i : i + 1], getattr(alone, field))
        assert out.loops.unique().numel() > 1, "the case must mix depths"


def test_early_exit_and_gradients_at_mixed_depths():
    dynamics, depths = grid(scale=0.5), torch.tensor([4, 2, 5])
    z, action = inputs(3)
    early = dynamics(z, action, depths).at(torch.tensor([2, 2, 3]))
    gradients = []
    for h in (early.h, torch.cat([dynamics(z[i : i + 1], action[i : i + 1], d).h for i, d in enumerate((2, 2, 3))])):
        gradients.append(torch.autograd.grad(h.square().sum(), list(dynamics.cell.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("halting", [name for name in HALTING if name != "prediction"])
def test_every_rule_and_solver_takes_grids(halting):
    for solver in ("plain", "anderson"):
        dynamics = grid(scale=0.5, halting=halting, solver=solver)
        out = dynamics(*inputs(4))
        assert out.h.shape == (4, D, 4, 4) and 1 <= int(out.loops.min()) <= int(out.loops.max()) <= 8
        if solver == "plain":  # whatever stopped it, it is the state after so many loops
            torch.testing.assert_close(out.h, dynamics(*inputs(4), out.loops).h)


def test_implicit_gradients_equal_deeply_unrolled_ones():
    kw = {"scale": 0.5, "max_loops": 400, "halt_tolerance": 1e-12}
    implicit, unrolled = grid(gradient="implicit", **kw), grid(**kw)
    implicit.gradient.tolerance = 1e-10
    z, action = inputs(2)
    gradients = []
    for dynamics, depth in ((implicit, None), (unrolled, 400)):
        loss = dynamics(z, action, depth).h.tanh().sum()
        gradients.append(torch.autograd.grad(loss, list(dynamics.cell.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# ---- grids told as vectors -----------------------------------------------------------------------


@pytest.mark.parametrize("block, width", [("conv", 2 * D), ("rank", 4 * D)])
@pytest.mark.parametrize("name", ["looped", "stacked", "single_pass", "wide", "deep_thin"])
@pytest.mark.parametrize("laid_out", [True, False], ids=["an entry a cell", "for every cell"])
def test_a_grid_told_as_vectors_is_the_same_grid(name, block, width, laid_out):
    side, told = 3, 1 if laid_out else A
    words = {"block": block, "block_dim": width, "mode": "linear" if block == "conv" else "certified"}
    model = grid(name=name, **words | {"latent_norm": nn.Sigmoid()})
    model.prelude = type(model.prelude)(Z, told, model.state_dim).double()
    flat = DYNAMICS[name](Z, side**2 if laid_out else A, D, side=side, latent_norm=nn.Sigmoid(), **words).double()
    if name == "deep_thin":  # what it may be as thin as depends on the prelude
        flat = DYNAMICS[name](Z, A, D, side=side, latent_norm=nn.Sigmoid(), **words).double()
        flat.prelude.prelude = type(model.prelude)(Z, told, model.state_dim).double()
    parts = [(flat.prelude.prelude, model.prelude), (flat.start.start, model.start), (flat.coda.coda, model.coda)]
    parts += [(flat.cell, model.cell)] if name == "looped" else [(flat.cells, model.cells)]
    for mine, its in parts:
        mine.load_state_dict(its.state_dict())
    z, action = randn(2, Z, side, side), randn(2, told, *([side] * 2 if laid_out else []), seed=1)
    expected, got = model(z, action, 3), flat(z.flatten(1), action.flatten(1), 3)
    torch.testing.assert_close(got.z_next, expected.z_next.flatten(1), rtol=0, atol=0)
    torch.testing.assert_close(got.h, expected.h, rtol=0, atol=0)
    assert flat.lipschitz_bound() == model.lipschitz_bound()


def test_a_block_for_vectors_takes_no_side():
    with pytest.raises(ValueError, match="block 'mlp' is not for grids"):
        LoopedDynamics(Z, A, D, side=4)
