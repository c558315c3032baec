"""The world model: its code for scalars, its steps and rollouts, and what its losses do and do not see."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loopwm.build import make_world_model
from loopwm.config import load_config
from loopwm.dynamics import DYNAMICS, Cell, DynamicsOutput, LatentNorm
from loopwm.dynamics.flat import to_grid
from loopwm.model import ENCODERS, MLPEncoder, Rollout, WorldModel
from loopwm.model.decoders import LinearDecoder
from loopwm.model.encoders import GridEncoder, latent_spread, mlp, step_error, symlog
from loopwm.model.heads import ContinuationHead, RewardHead, TwoHot, symexp
from loopwm.model.losses import masked_mean, weighted_sum, world_model_losses

B, OBS, Z, A, D, H = 5, 4, 6, 2, 8, 3
NAMES = ("consistency", "reward", "continuation")


def make(name: str = "looped", seed: int = 0) -> WorldModel:
    """Random values in the heads, which start from zero."""
    torch.manual_seed(seed)
    encoder = MLPEncoder(OBS, Z, 16)
    dynamics = DYNAMICS[name](Z, A, D, 3, 6, latent_norm=encoder.norm)
    model = WorldModel(encoder, dynamics, 16).double()
    for p in model.reward.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """obs (B, OBS), actions (H, B, A)."""
    stream = torch.Generator().manual_seed(seed)
    obs = torch.randn(B, OBS, generator=stream, dtype=torch.float64)
    return obs, torch.rand(H, B, A, generator=stream, dtype=torch.float64) * 2 - 1


def test_a_world_model_of_tokens_is_refused():
    for name in ("looped", "stacked"):
        tokens = DYNAMICS[name](Z, A, D, 3, 6, block="transformer", mode="linear")
        with pytest.raises(ValueError, match="read off vectors and grids, not off tokens"):
            WorldModel(MLPEncoder(OBS, Z, 16), tokens, 16)


# ---- scalars as distributions --------------------------------------------------------------------


def two_hot(code: TwoHot, target: torch.Tensor) -> torch.Tensor:
    """The code of target, read off the loss: at equal logits its gradient is softmax - code."""
    logits = torch.zeros(*target.shape, code.bins, dtype=torch.float64, requires_grad=True)
    code.loss(logits, target).sum().backward()
    return 1.0 / code.bins - logits.grad


TARGETS = [0.0, 0.3, -0.001, 1.0, -2.5, 77.7, -400.0, math.expm1(3.0), math.expm1(-6.0) * -1, math.expm1(6.0)]


@pytest.mark.parametrize("bins", [2, 13, 63])
def test_two_hot_round_trip(bins):
    code, target = TwoHot(bins, -6.0, 6.0).double(), torch.tensor(TARGETS, dtype=torch.float64)
    hot = two_hot(code, target)
    torch.testing.assert_close(hot.sum(-1), torch.ones_like(target))
    assert hot.min() > -1e-12
    for row in hot > 1e-12:
        at = row.nonzero().squeeze(1).tolist()
        assert len(at) == 1 or (len(at) == 2 and at[1] == at[0] + 1), "at most two neighbouring bins"
    torch.testing.assert_close(code.decode(hot.clamp_min(1e-300).log()), target, rtol=1e-6, atol=1e-6)


def test_two_hot_loss_is_least_at_its_target():
    code, target = TwoHot(13, -6.0, 6.0).double(), torch.tensor(TARGETS, dtype=torch.float64)
    best = two_hot(code, target).clamp_min(1e-12).log().requires_grad_()
    loss = code.loss(best, target)
    loss.sum().backward()
    assert best.grad.abs().max() < 1e-9
    for seed in range(5):
        noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert (code.loss(best.detach() + noise, target) > loss.detach() - 1e-9).all()


def test_two_hot_holds_targets_beyond_its_range_at_the_edge():
    code = TwoHot(9, -2.0, 2.0).double()
    hot = two_hot(code, torch.tensor([1e9, -1e9], dtype=torch.float64))
    torch.testing.assert_close(hot, torch.eye(9, dtype=torch.float64)[[8, 0]])


def test_two_hot_decodes_equal_logits_to_zero():
    code = TwoHot(63, -6.0, 6.0)
    assert abs(float(code.decode(torch.zeros(63)))) < 1e-5


def test_two_hot_mean_is_of_the_scalar_itself():
    """A mean in symlog space reads 9.05 here: risk-averse, it kept a walker standing still (benchmarks/returns)."""
    code = TwoHot(63, -6.0, 6.0).double()
    spread = two_hot(code, torch.tensor([0.0, 100.0], dtype=torch.float64)).mean(0)
    torch.testing.assert_close(float(code.decode(spread.clamp_min(1e-300).log())), 50.0, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("case", [(1, -1.0, 1.0), (5, 1.0, 1.0), (5, 2.0, 1.0)])
def test_two_hot_refuses_empty_ranges(case):
    with pytest.raises(ValueError, match="bins"):
        TwoHot(*case)


def test_symlog_and_symexp_are_inverse():
    x = torch.tensor([0.0, 1e-6, -3.0, 1e5, -1e5], dtype=torch.float64)
    torch.testing.assert_close(symexp(symlog(x)), x)
    torch.testing.assert_close(symlog(torch.tensor(math.e - 1)), torch.tensor(1.0))


# ---- encode, step, rollout -----------------------------------------------------------------------


def test_latents_have_mean_zero_and_variance_one():
    z = LatentNorm(8)(torch.randn(3, 4, 8, dtype=torch.float64) * 50 + 7)
    torch.testing.assert_close(z.mean(-1), torch.zeros(3, 4, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.var(-1, correction=0), torch.ones(3, 4, dtype=torch.float64), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="at least 2"):
        LatentNorm(1)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_encoder_takes_any_leading_shape(layers):
    encoder = ENCODERS["mlp"](OBS, Z, 16, layers)
    obs = torch.randn(H, B, OBS) * 1e4
    z = encoder(obs)
    assert z.shape == (H, B, Z) and torch.isfinite(z).all()
    torch.testing.assert_close(z[1, 2], encoder(obs[1, 2]))
    assert sum(isinstance(m, nn.Linear) for m in encoder.modules()) == layers


def test_mlp_without_hidden_layers_is_linear():
    assert [type(m) for m in mlp(3, 99, 0, 2)] == [nn.Linear]


def test_heads_start_neutral():
    h = torch.randn(B, D)
    assert not RewardHead(D, 16)(h).any()
    assert torch.sigmoid(ContinuationHead(D, 16)(h)).min() > 0.9


@pytest.mark.parametrize("name", DYNAMICS)
@pytest.mark.parametrize("depth", [None, 4, torch.tensor([1, 5, 2, 2, 3])], ids=["adaptive", "4", "per sample"])
def test_rollout_is_repeated_step(name, depth):
    model, (obs, actions) = make(name), inputs()
    z = model.encode(obs)
    rollout = model.rollout(z, actions, depth)
    assert rollout.z.shape == (H + 1, B, Z) and rollout.h.shape == (H, B, model.dynamics.state_dim)
    assert rollout.loops.shape == (H, B) and rollout.loops.dtype == torch.int64 and len(rollout.outputs) == H
    reward, continuation = model.predict(rollout.h)
    assert torch.equal(rollout.z[0], z)
    for t in range(H):
        step = model.step(z, actions[t], depth)
        assert step.reward.shape == step.continuation.shape == (B,)
        torch.testing.assert_close(rollout.z[t + 1], step.z_next)
        torch.testing.assert_close(rollout.h[t], step.out.h)
        torch.testing.assert_close((reward[t], continuation[t]), (step.reward, step.continuation))
        assert torch.equal(rollout.loops[t], step.out.loops)
        assert (step.continuation >= 0).all() and (step.continuation <= 1).all()
        z = step.z_next


@pytest.mark.parametrize("name", DYNAMICS)
def test_rollout_stays_on_the_scale_of_the_encoder(name):
    model, (obs, actions) = make(name), inputs()
    z = model.rollout(model.encode(obs), actions.repeat(10, 1, 1) * 100, 2).z
    torch.testing.assert_close(z.square().mean(-1), torch.ones(z.shape[:2], dtype=torch.float64), atol=1e-3, rtol=0)


def test_frozen_rollout_trains_like_any_other():
    gradients = []
    for is_frozen in (False, True):
        model, (obs, actions) = make(), inputs()
        with model.frozen() if is_frozen else torch.enable_grad():
            rollout = model.rollout(model.encode(obs), actions, torch.tensor([4, 3, 2, 1, 1]))
            rollout.z.square().sum().add(rollout.h.sum()).backward()
        gradients.append([p.grad for p in [*model.encoder.parameters(), *model.dynamics.parameters()]])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# ---- losses --------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A head that reads its output off the first entries of h."""

    def __init__(self, code: TwoHot | None = None):
        super().__init__()
        self.code = code

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h[..., 0] if self.code is None else h[..., 1 : 1 + self.code.bins]


def hand_case() -> dict:
    """H = 2, B = 2, Z = 2; the second step of the second sequence is masked."""
    h = torch.tensor([[[0.0, 0, 0, 0], [2.0, 1, 0, 0]], [[-1.0, 0, 0, 3], [9.0, 9, 9, 9]]], requires_grad=True)
    z = torch.tensor([[[5.0, 5.0]] * 2, [[1.0, 2.0], [0.0, 0.0]], [[3.0, 3.0], [7.0, 7.0]]], requires_grad=True)
    return {
        "model": SimpleNamespace(reward=Fixed(TwoHot(3, -1.0, 1.0)), continuation=Fixed()),
        "rollout": Rollout(z, h, []),
        "z_target": torch.tensor([[[1.0, 4.0], [1.0, 0.0]], [[0.0, 3.0], [0.0, 0.0]]], requires_grad=True),
        "reward": torch.tensor([[0.0, math.e - 1], [-50.0, 123.0]]),
        "terminated": torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
        "mask": torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
    }


def test_losses_by_hand():
    """Bins at symlog -1, 0, 1: targets fall on bins 1, 2 and (clamped) 0."""
    losses = world_model_losses(**hand_case())
    assert tuple(losses) == NAMES and all(loss.shape == () for loss in losses.values())
    rewards = [math.log(3), math.log(math.e + 2), math.log(2 + math.e**3)]
    expected = {
        "consistency": ((0 + 4) / 2 + (1 + 0) / 2 + (9 + 0) / 2) / 3,
        "reward": sum(rewards) / 3,
        "continuation": (math.log(2) + math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-1.0))) / 3,
    }
    for name in NAMES:
        assert float(losses[name].detach()) == pytest.approx(expected[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_masked_steps_contribute_nothing(name):
    case = hand_case()
    loss = world_model_losses(**case)[name]
    loss.backward()
    z, h = case["rollout"].z.grad, case["rollout"].h.grad
    used, unused = (z, h) if name == "consistency" else (h, z)
    assert unused is None or not unused.any()
    assert not used[-1, 1].any(), "no gradient into a masked step"
    assert used[-1, 0].any() and used[-2, 1].any(), "but into every other"
    with torch.no_grad():
        case["rollout"].z[-1, 1], case["rollout"].h[-1, 1], case["z_target"][-1, 1] = -4.0, -4.0, 11.0
    case["reward"][-1, 1], case["terminated"][-1, 1] = -7.0, 0.0
    assert torch.equal(world_model_losses(**case)[name], loss)


def test_a_linear_readout_is_judged_by_the_share_of_each_entrys_variance():
    """Entries of variance 1 and 4; a constant two above the mean of the first: (1 + 4) / 1.01 and 4 / 4.01."""
    decoder, symlogs = LinearDecoder(2, 2), torch.tensor([[[-1.0, -2.0]], [[1.0, 2.0]]])  # (2, 1, O)
    obs, mask = symexp(symlogs), torch.ones(2, 1)
    with torch.no_grad():
        decoder.layer.weight.zero_()
        decoder.layer.bias.copy_(torch.tensor([2.0, 0.0]))
    assert float(decoder.unexplained(symlogs, obs, mask).detach()) == pytest.approx((5 / 1.01 + 4 / 4.01) / 2)
    assert torch.allclose(decoder(symlogs), symexp(torch.tensor([2.0, 0.0])).expand(2, 1, 2))
    with torch.no_grad():
        decoder.layer.weight.copy_(torch.eye(2))
        decoder.layer.bias.zero_()
    assert float(decoder.unexplained(symlogs, obs, mask).detach()) == pytest.approx(0.0, abs=1e-9)
    dull = torch.cat([obs, torch.full_like(obs[..., :1], 1000.0)], -1)  # with a constant, which is not to be learnt
    wider = LinearDecoder(2, 3)
    with torch.no_grad():
        wider.layer.weight[:2], wider.layer.bias[:2] = torch.eye(2), 1.0
    assert float(wider.unexplained(symlogs, dull, mask).detach()) == pytest.approx((1 / 1.01 + 1 / 4.01) / 2)
    padded = [torch.cat([x, torch.full_like(x[:1], 9.0)]) for x in (symlogs + 0.5, obs)]
    found = decoder.unexplained(*padded, torch.tensor([[1.0], [1.0], [0.0]]))
    assert torch.equal(found, decoder.unexplained(symlogs + 0.5, obs, mask)), "invalid rows count for nothing"
    assert float(decoder.unexplained(symlogs, obs, 0 * mask).detach()) == 0.0


def test_the_readout_trains_latents_and_what_predicts_them():
    model, (first, actions) = make(), inputs()
    stream = torch.Generator().manual_seed(1)
    later = [torch.randn(first.shape, generator=stream, dtype=first.dtype) for _ in actions]
    obs = torch.stack([first, *later])  # (H + 1, B, O)
    model.decoder = LinearDecoder(model.encode(obs[0]).shape[-1], obs.shape[-1]).double()
    rollout = model.rollout(model.encode(obs[0]), actions)
    ones = torch.ones(actions.shape[:2])
    before = world_model_losses(model, rollout, model.encode(obs[1:]), ones, 0 * ones, ones)
    losses = world_model_losses(model, rollout, model.encode(obs[1:]), ones, 0 * ones, ones, obs=obs)
    assert tuple(losses) == (*NAMES, "observation") and all(torch.equal(before[n], losses[n]) for n in NAMES)
    losses["observation"].backward()
    for part in (model.encoder, model.dynamics, model.decoder):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    ended = ones.clone()
    ended[-1, 0] = 0.0
    changed = obs.clone()
    changed[-1, 0] = 50.0
    assert torch.equal(
        *(
            world_model_losses(model, rollout, model.encode(obs[1:]), ones, 0 * ones, ended, obs=seen)["observation"]
            for seen in (obs, changed)
        )
    ), "what follows an episode's end is not to be read"


def test_how_far_latents_are_apart():
    assert latent_spread(torch.eye(3)[:1].expand(5, 3)) == {"variance": 0.0, "rank": 0.0}
    assert not any(math.isfinite(value) for value in latent_spread(torch.full((5, 3), float("nan"))).values())
    line = torch.linspace(-1.0, 1.0, 5)[:, None] * torch.tensor([1.0, 2.0, 0.0])
    assert latent_spread(line) == {"variance": pytest.approx(0.625 * 5 / 3), "rank": pytest.approx(1.0)}
    sphere = LatentNorm(8)(torch.randn(40, 500, 8, generator=torch.Generator().manual_seed(0)))
    found = latent_spread(sphere)
    assert found["variance"] == pytest.approx(1.0, rel=1e-3), "the most that the norm allows"
    assert found["rank"] == pytest.approx(7.0, rel=1e-2), "of 8, since their mean is zero"


def test_no_gradient_through_targets():
    case = hand_case()
    sum(world_model_losses(**case).values()).backward()
    assert case["z_target"].grad is None


def test_all_masked_is_zero_and_finite():
    case = hand_case()
    case["mask"] = torch.zeros(2, 2)
    total = sum(world_model_losses(**case).values())
    total.backward()
    assert float(total.detach()) == 0.0 and not case["rollout"].z.grad.any()
    assert float(masked_mean(torch.tensor([2.0, 4.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]))) == 3.0


def test_losses_train_every_part_of_the_model():
    model, (obs, actions) = make(), inputs()
    nn.init.normal_(model.dynamics.cell.write.parametrizations.weight.original)  # its zeros hide read and inject
    rollout = model.rollout(model.encode(obs), actions, 3)
    target, ones = torch.randn(H, B, Z, dtype=torch.float64), torch.ones(H, B, dtype=torch.float64)
    losses = world_model_losses(model, rollout, target, ones * 0.3, ones * 0.0, ones)
    weighted_sum(losses, dict.fromkeys(NAMES, 1.0)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_weighted_sum():
    losses = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert float(weighted_sum(losses, {"b": 10.0, "a": 0.5})) == 31.0
    for weights in ({"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "c": 1.0}):
        with pytest.raises(KeyError, match="differ"):
            weighted_sum(losses, weights)


def test_output_measures_only_when_asked():
    """Training never reads loops and residual, so it must never pay for them."""
    asked = []
    out = DynamicsOutput(
        torch.zeros(1), torch.zeros(1), lambda: asked.append("loops"), lambda: asked.append("residual")
    )
    assert asked == []
    _ = out.loops, out.residual
    assert asked == ["loops", "residual"]


def test_the_error_of_a_step_is_a_share_of_the_step():
    z, z_next = torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    assert step_error(z_next, z, z_next) == 0.0 and step_error(z, z, z_next) == 1.0
    assert step_error(z_next + torch.tensor([1.0, 0.0]), z, z_next) == pytest.approx(3 / 5)
    assert math.isnan(step_error(z_next, z, z))


def test_bad_sizes_and_names_are_refused():
    with pytest.raises(ValueError, match="unknown activation 'tanh'; choose from relu, silu"):
        WorldModel(MLPEncoder(OBS, Z, 16), DYNAMICS["looped"](Z, A, D), 16, activation="tanh")
    with pytest.raises(ValueError, match="at least one linear layer, got 0"):
        MLPEncoder(OBS, Z, 16, layers=0)
    with pytest.raises(ValueError, match="at least one action"):
        make().rollout(torch.zeros(B, Z).double(), torch.zeros(0, B, A).double())


# ---- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, features", [(0, 1), (3, 1), (3, 2)])
def test_a_grid_is_encoded_cell_by_cell(side, features):
    encoder = GridEncoder(9 * features, Z, 16, side=side)
    obs = torch.randn(4, 9 * features, generator=torch.Generator().manual_seed(0))
    z = encoder(obs).view(4, Z, 9)
    assert encoder.width == 9 * Z and encoder(obs.view(2, 2, -1)).shape == (2, 2, 9 * Z)
    torch.testing.assert_close(z.mean(1), torch.zeros(4, 9), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.var(1, correction=0), torch.ones(4, 9), rtol=1e-3, atol=0)
    swapped = obs.view(4, 9, features).flip(1).flatten(1)  # the last cell first: so are its channels
    torch.testing.assert_close(encoder(swapped).view(4, Z, 9), z.flip(2))
    for cell in range(9):  # in rows, as an action that chooses one is laid out
        alone = encoder.norm(encoder.layers(symlog(obs.view(4, 9, features)[:, cell]))[:, :, None, None])
        torch.testing.assert_close(z[:, :, cell], alone[:, :, 0, 0])
    assert torch.equal(to_grid(encoder(obs), 3)[:, :, 0, 1], z[:, :, 1])


def test_observations_that_are_no_such_grid():
    with pytest.raises(ValueError, match="observations of 10 numbers are not a square"):
        GridEncoder(10, Z, 16)
    with pytest.raises(ValueError, match="observations of 10 numbers are not 3 by 3 cells"):
        GridEncoder(10, Z, 16, side=3)


def test_heads_of_a_grid_read_all_of_its_cells_alike():
    torch.manual_seed(0)
    encoder = GridEncoder(9, Z, 16)
    dynamics = DYNAMICS["looped"](Z, 9, D, 3, 6, block="conv", side=3, latent_norm=encoder.norm)
    model = WorldModel(encoder, dynamics, 16, grid=True)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    rollout = model.rollout(model.encode(torch.randn(B, 9)), torch.randn(H, B, 9), 3)
    reward, continuation = model.predict(rollout.h)
    assert rollout.z.shape == (H + 1, B, 9 * Z) and rollout.h.shape == (H, B, D, 3, 3) and reward.shape == (H, B)
    for mine, its in zip((reward, continuation), model.predict(rollout.h.flip(-1, -2)), strict=True):
        torch.testing.assert_close(mine, its)
    everywhere = rollout.h.mean((-2, -1), keepdim=True).expand(-1, -1, -1, 3, 3)
    for mine, its in zip((reward, continuation), model.predict(everywhere), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("block, mode", [("conv", "linear"), ("rank", "certified")])
@pytest.mark.parametrize("name", ["looped", "stacked"])
def test_a_world_model_of_grids_from_a_config(name, block, mode):
    """Sizes that all differ, so that no axis passes for another; the coda's norm is the encoder's."""
    words = ["task=gym/loopwm/Sandpile-v0", "encoder=grid", "encoder.latent_dim=5", "encoder.hidden_dim=7"]
    words += [f"dynamics={name}", f"dynamics.block={block}", f"dynamics.mode={mode}", "dynamics.hidden_dim=6"]
    model = make_world_model(load_config([*words, "dynamics.block_dim=12"]), 9, 9)
    for p in model.dynamics.parameters():
        nn.init.normal_(p, std=0.5)
    z = model.encode(torch.randn(B, 9))
    step = model.step(z, torch.eye(9)[:B], 3)
    assert step.z_next.shape == z.shape == (B, 45) and step.out.h.shape == (B, 6, 3, 3)
    for latent in (z, step.z_next):
        torch.testing.assert_close(latent.view(B, 5, 9).mean(1), torch.zeros(B, 9), rtol=0, atol=1e-5)
        torch.testing.assert_close(latent.view(B, 5, 9).var(1, correction=0), torch.ones(B, 9), rtol=1e-2, atol=0)
    moved = (model.step(z, torch.eye(9)[1:2].expand(B, -1), 1).out.h - model.step(z, torch.zeros(B, 9), 1).out.h) != 0
    near = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0]] if block == "conv" else [[1, 1, 1], [0, 1, 0], [0, 0, 0]])
    if name == "looped":  # the action is on the second cell of the first row: one loop carries it to its neighbours
        assert not moved.any(1)[:, near == 0].any() and moved.any(1)[:, 0, 1].all()


@pytest.mark.parametrize(("words", "activation"), [([], torch.relu), (["dynamics.activation=tanh"], torch.tanh)])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_the_blocks_activation_is_a_setting(dynamics, words, activation):
    cfg = load_config(["task=dmc/cup-catch", f"dynamics={dynamics}", *words])
    cells = [module for module in make_world_model(cfg, 8, 2).dynamics.modules() if isinstance(module, Cell)]
    assert cells and all(cell.activation is activation for cell in cells)
