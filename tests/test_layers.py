"""Several layers in the block, token latents, and the soft mode with its penalty."""

import math
import re

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

from loopwm.dynamics import BLOCKS, DYNAMICS, MODES, ORDERS, DepthSchedule, LoopedDynamics
from loopwm.dynamics.cell import LoopCell
from loopwm.dynamics.penalty import jacobian_penalty
from loopwm.model import MLPEncoder, WorldModel
from loopwm.model.losses import weighted_sum, world_model_losses

Z, A, D = 5, 2, 8
DOUBLE = torch.float64
LATENTS = {"mlp": (Z,), "conv": (Z, 3, 3), "rank": (Z, 3, 3), "transformer": (6, Z)}
STATES = {"mlp": (D,), "conv": (D, 3, 3), "rank": (D, 3, 3), "transformer": (6, D)}
MODE = {"mlp": "certified", "conv": "certified", "rank": "certified", "transformer": "linear"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def made(block: str = "mlp", scale: float = 0.5, seed: int = 0, name: str = "looped", **kw) -> LoopedDynamics:
    """Random values everywhere, so that no zero initial weight hides a term."""
    dynamics, stream = DYNAMICS[name](Z, A, D, block=block, **({"mode": MODE[block]} | kw)), generator(seed)
    with torch.no_grad():
        for parameter, p in dynamics.named_parameters():
            noise = torch.randn(p.shape, generator=stream) * scale
            p.add_(0.3 * noise) if "log_" in parameter else p.copy_(noise)
    return dynamics.double()


def inputs(block: str, batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(batch, *LATENTS[block], seed=seed), randn(batch, A, seed=seed + 50)


def sigma(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def jacobian_of(loop, h: torch.Tensor) -> torch.Tensor:
    """dh'/dh at h, one row: (S, S)."""
    return jacobian(lambda x: loop(x.view_as(h)).flatten(), h.flatten())


# ---- layers and their order ----------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_orders_by_hand(block):
    """ABAB is layer by layer, again and again; AABB each layer as often as asked before the next."""
    z, action = inputs(block, 3)
    for order in ORDERS:
        dynamics = made(block, block_layers=2, order=order)
        e, h = dynamics.prelude(z, action), dynamics.start(z)
        a, b = (layer.prepare(e) for layer in dynamics.cell.layers)
        for loop in {"abab": (a, b, a, b, a, b), "aabb": (a, a, a, b, b, b)}[order]:
            h = loop(h)
        out = dynamics(z, action, 3)
        torch.testing.assert_close(out.h, h)
        torch.testing.assert_close(dynamics.trajectory(z, action, 3)[-1], h)
        assert out.loops.tolist() == [3] * 3
        out.z_next.sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in dynamics.cell.layers[0].parameters())


@pytest.mark.parametrize("block", BLOCKS)
def test_at_one_loop_the_order_means_nothing(block):
    z, action = inputs(block, 2)
    outs = [made(block, block_layers=3, order=order)(z, action, 1).h for order in ORDERS]
    assert torch.equal(*outs)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", BLOCKS)
def test_mixed_and_adaptive_depths_equal_each_sample_alone(block, order):
    dynamics = made(block, block_layers=2, order=order, max_loops=9, halt_tolerance=0.05)
    z, action = inputs(block, 5)
    depths = torch.tensor([2, 7, 1, 3, 2])
    out, early = dynamics(z, action, depths), dynamics(z, action, depths).at(torch.tensor([1, 4, 1, 3, 1]))
    adaptive = dynamics(z, action)
    for i, (last, first) in enumerate(zip(depths.tolist(), (1, 4, 1, 3, 1), strict=True)):
        one = (z[i : i + 1], action[i : i + 1])
        torch.testing.assert_close(out.h[i : i + 1], dynamics(*one, last).h)
        torch.testing.assert_close(adaptive.h[i : i + 1], dynamics(*one).h)
        assert int(adaptive.loops[i]) == int(dynamics(*one).loops)
        if order == "abab":  # an earlier loop of AABB is one of the last layer, after all of those before it
            torch.testing.assert_close(early.h[i : i + 1], dynamics(*one, first).h)


def test_loops_of_aabb_are_the_mean_over_its_layers_rounded_up():
    dynamics = made(block_layers=2, order="aabb", max_loops=9, halt_tolerance=0.05)
    z, action = inputs("mlp", 5)
    e, h, counts = dynamics.prelude(z, action), dynamics.start(z), []
    for layer in dynamics.cell.layers:
        result = dynamics.run_loops(layer.prepare(e), h, None, z)
        h = result.h
        counts.append(result.loops())
    assert (counts[0] != counts[1]).any(), "the case must mix them"
    assert torch.equal(dynamics(z, action).loops, torch.ceil(torch.stack(counts).double().mean(0)).long())


def test_frozen_layers_give_the_same_gradients():
    z, action = inputs("mlp", 4)
    for order in ORDERS:
        dynamics, gradients = made(block_layers=2, order=order), []
        for context in (torch.enable_grad(), dynamics.frozen()):
            with context:
                loss = dynamics(z, action, 3).z_next.square().sum()
                gradients.append(torch.autograd.grad(loss, list(dynamics.parameters())))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_implicit_gradients_through_layers():
    kw = {"block_layers": 2, "max_loops": 300, "halt_tolerance": 1e-12}
    implicit, unrolled = made(gradient="implicit", **kw), made(**kw)
    implicit.gradient.tolerance = 1e-11
    z, action = inputs("mlp", 2)
    implicit(z, action).h.tanh().sum().backward()
    unrolled(z, action, 300).h.tanh().sum().backward()
    for p, q in zip(implicit.cell.parameters(), unrolled.cell.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="last layer of order 'aabb' alone"):
        made(gradient="implicit", order="aabb", **kw)


def test_a_deep_aabb_is_its_last_layer():
    """Why it is for few loops: the fixed point of the last layer knows nothing of the layers before."""
    dynamics, (z, action) = made(block_layers=2, order="aabb"), inputs("mlp", 2)
    alone = dynamics.cell.layers[1].prepare(dynamics.prelude(z, action))
    h = torch.zeros(2, D, dtype=DOUBLE)
    for _ in range(500):
        h = alone(h)
    torch.testing.assert_close(dynamics(z, action, 500).h, h)
    assert not torch.allclose(dynamics(z, action, 2).h, h, rtol=1e-2)


# ---- the certificate -----------------------------------------------------------------------------


def worst_by_ascent(dynamics: LoopedDynamics, h: torch.Tensor, e: torch.Tensor, steps: int = 12) -> float:
    """The largest Jacobian norm of a loop that ascent on |J u| over h, e and u comes by."""
    h, e, u = (x.clone().requires_grad_() for x in (h, e, randn(*h.shape, seed=7)))
    ascent, worst = torch.optim.Adam([h, e, u], lr=0.2, maximize=True), 0.0
    for _ in range(steps):
        for loop in dynamics.cell.stages(e):
            product = torch.autograd.functional.jvp(loop, h, u / u.norm(), create_graph=True)[1]
            ascent.zero_grad()
            product.norm().backward()
            fixed = dynamics.cell.stages(e.detach())
            worst = max(worst, *(sigma(jacobian_of(stage, h.detach())) for stage in fixed))
        ascent.step()
    return worst


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(
    "block, mode", [(block, mode) for block in ("mlp", "conv") for mode in MODES if mode not in BLOCKS[block].lacks]
)
def test_the_bound_is_never_below_a_jacobian(block, mode, layers, order):
    activation = "tanh" if MODES[mode].jointly else "silu"
    for scale in (0.3, 3.0):
        dynamics = made(block, scale, mode=mode, block_layers=layers, order=order, activation=activation)
        bound = dynamics.lipschitz_bound()
        assert bound < 1.0 or not MODES[mode].certified
        for seed in range(2):
            h, e = randn(2, 1, *STATES[block], seed=seed)
            for loop in dynamics.cell.stages(e):
                assert sigma(jacobian_of(loop, h)) <= bound * (1 + 1e-12)
    assert worst_by_ascent(dynamics, h, e) <= bound * (1 + 1e-12)


def test_the_bound_of_aabb_is_its_worst_layers():
    """The slow layer's, wherever it stands: its own loop is one of those that the bound speaks of."""
    for slow in (0, 1):
        dynamics = made(block_layers=2, order="aabb")
        with torch.no_grad():
            dynamics.cell.layers[slow].log_dt.fill_(math.log(0.01))
        rho = [layer.lipschitz_bound() for layer in dynamics.cell.layers]
        assert dynamics.lipschitz_bound() == rho[slow] > rho[1 - slow]


@pytest.mark.parametrize("block", ["mlp", "conv"])
def test_layers_stay_certified_through_training(block):
    torch.manual_seed(0)
    dynamics = LoopedDynamics(Z, A, D, block=block, block_layers=2)
    adam = torch.optim.Adam(dynamics.parameters(), lr=0.3)
    z, action = (x.float() for x in inputs(block, 8))
    for _ in range(25):
        adam.zero_grad()
        (-dynamics(z, action, 3).h.square().mean()).backward()
        adam.step()
        assert dynamics.lipschitz_bound() < 1.0
    rho = [layer.lipschitz_bound() for layer in dynamics.cell.layers]
    assert dynamics.lipschitz_bound() == rho[0] * rho[1] < min(rho)
    assert 0.0 < dynamics.measured_contraction(z, action, 20) <= dynamics.lipschitz_bound() * (1 + 1e-3)
    with torch.no_grad():
        states = dynamics.trajectory(z, action, 200)
    true = (states[:40] - states[-1]).flatten(2).norm(dim=-1)
    for t in range(1, 40):
        certified = dynamics.distance_to_fixed_point(states[t], states[t] - states[t - 1])
        assert (certified >= true[t] * (1 - 1e-3) - 1e-3).all()


# ---- tokens --------------------------------------------------------------------------------------


def test_the_transformer_equation():
    dynamics = made("transformer", block_dim=8)
    cell, (z, action) = dynamics.cell, inputs("transformer", 2)
    e = dynamics.prelude.layers(torch.cat([z, action[:, None].expand(-1, 6, -1)], -1))
    h = dynamics.start(z)
    x = nn.functional.layer_norm(h + e, (D,), cell.norm_attention.weight, cell.norm_attention.bias)
    q, k, v = cell.attend(x).split(8, -1)
    heads = []
    for head in range(4):
        part = slice(2 * head, 2 * head + 2)
        heads.append(((q[..., part] @ k[..., part].mT) / math.sqrt(2)).softmax(-1) @ v[..., part])
    mixed = torch.cat(heads, -1) @ cell.join.weight.T
    y = nn.functional.layer_norm(h + mixed, (D,), cell.norm_mlp.weight, cell.norm_mlp.bias)
    inner = torch.relu(y @ cell.read.weight.T + cell.inject(e))
    decay = cell.decay()
    expected = decay * h + cell.input_scale(decay) * e + mixed + inner @ cell.write.weight.T
    out = dynamics(z, action, 1)
    torch.testing.assert_close(out.h, expected)
    assert out.z_next.shape == z.shape and out.h.shape == (2, 6, D)
    each = action[:, None].expand(-1, 6, -1)
    torch.testing.assert_close(dynamics(z, each, 3).h, dynamics(z, action, 3).h)


def test_a_permutation_of_tokens_permutes_the_prediction():
    dynamics, order = made("transformer"), torch.randperm(6, generator=generator())
    z, action = inputs("transformer", 2)
    torch.testing.assert_close(dynamics(z[:, order], action, 4).z_next, dynamics(z, action, 4).z_next[:, order])


@pytest.mark.parametrize("name", DYNAMICS)
def test_tokens_have_no_certificate(name):
    with pytest.raises(ValueError, match="no mode 'certified'.*choose from linear, soft"):
        DYNAMICS[name](Z, A, D, block="transformer")
    with pytest.raises(ValueError, match="a block_dim that 4 divides, got 6"):
        made("transformer", block_dim=6)
    for mode in ("linear", "soft"):
        assert made("transformer", name=name, mode=mode).lipschitz_bound() == math.inf
    dynamics, h = made("transformer"), torch.ones(1, 6, D, dtype=DOUBLE)
    assert torch.isinf(dynamics.distance_to_fixed_point(h, h)).all()


@pytest.mark.parametrize(
    ("z", "action"), [((2, Z), (2, A)), ((2, 6, Z), (2, 5, A)), ((2, 6, Z), (3, A)), ((2, 6, Z + 1), (2, A))]
)
def test_tokens_of_other_shapes_are_named(z, action):
    wanted = re.escape(f"take z (B, G, {Z}) and action (B, G, {A}) or (B, {A}), got {z} and {action}")
    with pytest.raises(ValueError, match=wanted):
        made("transformer")(torch.zeros(z, dtype=DOUBLE), torch.zeros(action, dtype=DOUBLE), 2)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", DYNAMICS)
def test_every_dynamics_takes_every_block(name, block):
    dynamics = made(block, name=name, mean_loops=3, max_loops=5)
    z, action = inputs(block, 4)
    for depth in (None, 2, dynamics.sample_depth(4, generator())):
        out = dynamics(z, action, depth)
        assert out.z_next.shape == z.shape and out.residual.shape == (4,)
    h0 = dynamics(z, action, 2).h
    assert dynamics(z, action, 2, h0=h0).h.shape == h0.shape
    dynamics(z, action, 2).z_next.sum().backward()


# ---- the soft mode -------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_the_penalty_is_the_mean_squared_singular_value(block):
    """E ||v J||^2 / S over v is ||J||_F^2 / S; and one draw is what the dense Jacobian gives for that very v."""
    dynamics = made(block, mode="soft")
    z, action = inputs(block, 1)
    out = dynamics(z, action, 3)
    dense = jacobian_of(dynamics.cell.prepare(dynamics.prelude(z, action)), out.h.detach())
    size = dense.shape[0]
    v = torch.randn(out.h.shape, generator=generator(3), dtype=DOUBLE).flatten()
    torch.testing.assert_close(out.jacobian_penalty(generator(3)), ((v @ dense).square().sum() / size).view(1))
    rows = out.h.detach().expand(4000, *STATES[block])
    loop = dynamics.cell.prepare(dynamics.prelude(z, action).detach().expand(4000, *STATES[block]))
    mean = float(jacobian_penalty(loop, rows, generator()).mean().detach())
    assert mean == pytest.approx(float(dense.square().sum() / size), rel=0.03)


@pytest.mark.parametrize("order", ORDERS)
def test_descending_the_penalty_makes_the_loop_contract(order):
    """What the penalty is for; the bound stays true while it moves."""
    dynamics = made(scale=0.4, mode="soft", block_layers=2, order=order)
    z, action = inputs("mlp", 32)
    adam = torch.optim.Adam(dynamics.cell.parameters(), lr=0.02)

    def worst() -> float:
        e, h = dynamics.prelude(z, action)[:1], dynamics(z, action, 4).h.detach()[:1]
        return max(sigma(jacobian_of(loop, h)) for loop in dynamics.cell.stages(e.detach()))

    before = worst()
    for step in range(150):
        adam.zero_grad()
        dynamics(z, action, 4).jacobian_penalty(generator(step)).mean().backward()
        adam.step()
        assert worst() <= dynamics.lipschitz_bound() * (1 + 1e-12)
    assert before > 1.2 and worst() < 0.6


def test_the_penalty_does_not_move_the_states_it_looks_at():
    dynamics = made(mode="soft")
    dynamics(*inputs("mlp", 3), 3).jacobian_penalty(generator()).sum().backward()
    assert dynamics.start.weight.grad is None and dynamics.cell.read.weight.grad.any()


@pytest.mark.parametrize("mode", ["certified", "linear"])
def test_other_modes_have_no_penalty(mode):
    out = made(mode=mode)(*inputs("mlp", 2), 3)
    assert not out.penalised
    with pytest.raises(ValueError, match="mode 'soft' alone"):
        out.jacobian_penalty()
    soft = made(mode="soft")(*inputs("mlp", 2), 3)
    assert soft.penalised and torch.equal(soft.h, made(mode="linear")(*inputs("mlp", 2), 3).h)


def test_the_penalty_takes_mixed_depths_in_the_callers_order():
    dynamics = made(mode="soft")
    z, action = inputs("mlp", 3)
    v = torch.randn(3, D, generator=generator(), dtype=DOUBLE)
    penalty = dynamics(z, action, DepthSchedule(torch.tensor([1, 4, 2]))).jacobian_penalty(generator())
    for i, depth in enumerate((1, 4, 2)):
        h = dynamics(z[i : i + 1], action[i : i + 1], depth).h.detach()
        dense = jacobian_of(dynamics.cell.prepare(dynamics.prelude(z[i : i + 1], action[i : i + 1])), h)
        torch.testing.assert_close(penalty[i], (v[i] @ dense).square().sum() / D)


def test_the_world_models_losses_name_it_in_soft_mode_alone():
    ones = torch.ones(2, 3)
    for mode in MODES:
        torch.manual_seed(0)
        model = WorldModel(MLPEncoder(4, Z, 8), LoopedDynamics(Z, A, D, mode=mode), 8)
        before = torch.get_rng_state()
        rollout = model.rollout(*steps(), 3)
        mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
        losses = world_model_losses(model, rollout, torch.zeros(2, 3, Z), ones, 0 * ones, mask, generator(4))
        assert ("jacobian" in losses) == (mode == "soft")
        assert torch.equal(torch.get_rng_state(), before), "its vectors come from the generator it is given"
        weighted_sum(losses, dict.fromkeys(losses, 1.0)).backward()
    stream = generator(4)
    each = torch.stack([out.jacobian_penalty(stream) for out in model.rollout(*steps(), 3).outputs])
    assert float(losses["jacobian"].detach()) == pytest.approx(float((each * mask).sum().detach() / 5))


def steps() -> tuple[torch.Tensor, torch.Tensor]:
    """A latent and two actions."""
    return torch.randn(3, Z, generator=generator()), torch.randn(2, 3, A, generator=generator())


def test_a_cell_alone_says_which_modes_there_are():
    with pytest.raises(ValueError, match="unknown mode 'stiff'; choose from certified, lipsdp, linear, soft"):
        LoopCell(D, D, mode="stiff")
