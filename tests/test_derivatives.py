"""Second derivatives, mixed precision and empty batches: right, or refused in words."""

import pytest
import torch
from test_dynamics import A, D, Z, generator, scramble
from torch.func import functional_call

from loopwm.dynamics import BLOCKS, DYNAMICS, LoopedDynamics
from loopwm.dynamics.cell import MODES
from loopwm.model.losses import masked_mean

SHAPES = {"mlp": (Z,), "conv": (Z, 4, 4), "rank": (Z, 4, 4), "transformer": (3, Z)}
KINDS = [(block, mode) for block in SHAPES for mode in MODES if mode not in BLOCKS[block].lacks]


def build(block: str, mode: str, dtype=torch.float64, **words) -> LoopedDynamics:
    torch.manual_seed(0)
    dynamics = LoopedDynamics(Z, A, D, block=block, block_dim=16, mode=mode, **words)
    return scramble(dynamics, 0.3).to(dtype)


def data(block: str, batch: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn(batch, *SHAPES[block], generator=generator(1), dtype=torch.float64)
    return z.to(dtype), torch.randn(batch, A, generator=generator(2), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("mixed", [False, True], ids=["int", "mixed"])
@pytest.mark.parametrize("block, mode", KINDS)
def test_second_derivatives_by_weights_are_right_or_refused(block, mode, mixed):
    """A gradient penalty: d/dw of (d loss/dw . v), against central differences of the gradient."""
    dynamics = build(block, mode, **({} if block == "rank" else {"activation": "tanh"}))
    depth = torch.tensor([1, 3, 2]) if mixed else 3
    z, action = data(block, 3)
    parameters = [p for p in dynamics.parameters() if p.requires_grad]
    stream = generator(3)
    direction = [torch.randn(p.shape, generator=stream, dtype=p.dtype) for p in parameters]

    def slope(create: bool) -> torch.Tensor:
        out = dynamics(z, action, depth)
        grads = torch.autograd.grad(out.z_next.square().sum(), parameters, create_graph=create, allow_unused=True)
        return sum((g * v).sum() for g, v in zip(grads, direction, strict=True) if g is not None)

    try:
        found = torch.autograd.grad(slope(True), parameters, allow_unused=True)
    except RuntimeError as error:
        assert "second derivative" in str(error)
        return
    along = sum((g * v).sum() for g, v in zip(found, direction, strict=True) if g is not None)
    step, ends = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p.add_(sign * step * v)
        ends.append(slope(False).detach())
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p.sub_(sign * step * v)
    torch.testing.assert_close(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-6)


def test_some_second_derivatives_are_had():
    """Or the test above would hold of a library that refuses them all."""
    dynamics = build("mlp", "soft", activation="tanh")
    z, action = data("mlp", 3)
    weight = dynamics.cell.inject.weight
    (first,) = torch.autograd.grad(dynamics(z, action, 3).z_next.square().sum(), weight, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), weight)[0].abs().max() > 0


def test_a_dropped_term_is_refused():
    """The gradient by h0 goes through the depths' one node; a penalty on it would have had no effect."""
    dynamics, h0 = build("mlp", "linear"), torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    loss = dynamics(*data("mlp", 3), torch.tensor([1, 3, 2]), h0).h.sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, h0, create_graph=True)


@pytest.mark.parametrize("block", ["mlp", "conv", "rank"])
def test_implicit_gradients_refuse_a_second_and_leave_the_states_own(block):
    dynamics = build(block, "certified", gradient="implicit", max_loops=300, halt_tolerance=1e-9)
    h = dynamics(*data(block, 3)).h
    (own,) = torch.autograd.grad(h.sum(), h, retain_graph=True)
    assert (own == 1).all()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(h.sum(), dynamics.cell.inject.weight, create_graph=True)


def test_implicit_gradients_are_of_the_weights_that_were_called():
    own = build("mlp", "certified", gradient="implicit", max_loops=3000, halt_tolerance=1e-12)
    called = build("mlp", "certified", gradient="implicit", max_loops=3000, halt_tolerance=1e-12)
    with torch.no_grad():
        own.cell.log_dt.fill_(5.0)  # forgets at once: a backward pass by its bound would stop after a few terms
        called.cell.log_dt.fill_(-3.0)
    z, action = data("mlp", 3)
    words = {name: p.detach().clone().requires_grad_() for name, p in called.named_parameters()}
    functional_call(own, words, (z, action)).h.square().sum().backward()
    called(z, action).h.square().sum().backward()
    assert 1.0 - own.lipschitz_bound() > 20 * (1.0 - called.lipschitz_bound())
    for name, p in called.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(words[name].grad, p.grad, rtol=1e-4, atol=1e-8)


def test_implicit_gradients_of_no_number_are_none():
    dynamics = build("mlp", "certified", gradient="implicit", max_loops=20)
    with torch.no_grad():
        dynamics.cell.log_dt.fill_(torch.nan)
    dynamics(*data("mlp", 3)).h.sum().backward()
    assert dynamics.cell.inject.weight.grad.isnan().any()


@pytest.mark.parametrize("depth", [3, torch.tensor([1, 3, 2]), None], ids=["int", "mixed", "adaptive"])
@pytest.mark.parametrize("block, mode", KINDS)
def test_autocast_trains_and_keeps_the_bound(block, mode, depth):
    dynamics = build(block, mode, torch.float32)
    z, action = data(block, 3, torch.float32)
    bound = dynamics.cell.lipschitz_bound()
    with torch.autocast("cpu", torch.bfloat16):
        assert dynamics.cell.lipschitz_bound() == bound
        out = dynamics(z, action, depth)
        with dynamics.frozen():
            assert torch.equal(dynamics(z, action, depth).h, out.h)
    (out.z_next.float().square().sum() + out.h.float().square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in dynamics.parameters() if p.grad is not None)
    exact = dynamics(z, action, depth).h
    if depth is not None:
        assert (out.h.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", DYNAMICS)
@pytest.mark.parametrize("block", SHAPES)
def test_a_batch_of_none(name, block):
    dynamics = DYNAMICS[name](Z, A, D, block=block, block_dim=16, mode="linear")
    z, action = data(block, 0, torch.float32)
    for depth in (3, None):
        out = dynamics(z, action, depth)
        assert out.z_next.shape == z.shape and out.loops.shape == (0,)
        out.z_next.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_anderson_in_16_bits(dtype):
    dynamics = build("mlp", "linear", dtype, solver="anderson", max_loops=8)
    assert dynamics(*data("mlp", 3, dtype), None).h.isfinite().all()


def test_a_mask_of_another_shape_is_refused():
    assert masked_mean(torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 0.0]])) == 1.0
    with pytest.raises(ValueError, match=r"mask of \(2, 1\) for losses of \(2, 3\)"):
        masked_mean(torch.ones(2, 3), torch.ones(2, 1))


@pytest.mark.parametrize("name", ["stacked", "wide", "deep_thin", "single_pass"])
@pytest.mark.parametrize("loops", [0, -2, 2.5, True])
def test_controls_of_no_depth_are_refused(name, loops):
    with pytest.raises(ValueError, match="mean_loops must be an integer of at least 1"):
        DYNAMICS[name](Z, A, D, mean_loops=loops)
