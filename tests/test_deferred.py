"""What the world model does beside one-step losses: decoding at the end, early exits, warm starts."""

import copy
import math

import pytest
import torch
from torch import nn

from loopwm.dynamics import DYNAMICS, CertifiedHalting, DynamicsOutput, LoopedDynamics, PatientHalting
from loopwm.model import (
    DECODERS,
    MLPDecoder,
    MLPEncoder,
    Rollout,
    WorldModel,
    decoders,
    decoding_horizon,
    deferred_decoding_loss,
)
from loopwm.model.encoders import symlog
from loopwm.model.losses import world_model_losses

B, OBS, Z, A, D, H = 5, 4, 6, 2, 8, 3
DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def make(decoder: bool = True, **kw) -> WorldModel:
    """Random values in the output weights, which start from zero."""
    torch.manual_seed(0)
    encoder = MLPEncoder(OBS, Z, 16)
    dynamics = LoopedDynamics(Z, A, D, 3, 6, latent_norm=encoder.norm, **kw)
    model = WorldModel(encoder, dynamics, 16, MLPDecoder(Z, OBS, 16) if decoder else None).double()
    nn.init.normal_(dynamics.cell.write.parametrizations.weight.original)
    for p in model.reward.parameters():
        nn.init.normal_(p, std=0.5)
    return model


# ---- the decoder ---------------------------------------------------------------------------------


def test_a_model_without_decoder_is_the_model_there_was():
    plain, decoding = make(decoder=False), make()
    assert [key for key in decoding.state_dict() if not key.startswith("decoder.")] == list(plain.state_dict())
    with pytest.raises(ValueError, match="no decoder"):
        plain.decode(randn(B, Z))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_decoder_takes_any_leading_shape_and_its_loss_is_in_symlog(name, layers):
    decoder = DECODERS[name](Z, OBS, 16, layers).double()
    z, obs = randn(H, B, Z), randn(H, B, OBS, seed=1) * 100
    assert decoder(z).shape == (H, B, OBS)
    torch.testing.assert_close(decoder(z)[1, 2], decoder(z[1, 2]))
    torch.testing.assert_close(decoder.loss(z, obs), (symlog(decoder(z)) - symlog(obs)).square().mean(-1))
    assert float(decoder.loss(z, decoder(z)).abs().max().detach()) < 1e-20
    assert sum(isinstance(m, nn.Linear) for m in decoder.modules()) == layers


def test_a_linear_decoder_serves_deferred_decoding_too():
    model, (obs, action) = make(), (randn(B, OBS), randn(H, B, A))
    model.decoder = decoders.LinearDecoder(Z, OBS).double()
    rollout = model.rollout(model.encode(obs), action, 3)
    losses = deferred_decoding_loss(model, rollout, rollout.z[1:], obs, torch.ones(H, B, dtype=DOUBLE))
    expected = (model.decoder.layer(rollout.z[-1]) - symlog(obs)).square().mean()
    torch.testing.assert_close(losses["decoding"], expected)
    torch.testing.assert_close(symlog(model.decode(rollout.z[-1])), model.decoder.layer(rollout.z[-1]))


def test_decoder_learns_to_invert_the_encoder():
    torch.manual_seed(0)
    encoder, decoder = MLPEncoder(OBS, 16, 32).double(), MLPDecoder(16, OBS, 64).double()
    obs = randn(64, OBS) * 3
    z, optimizer = encoder(obs).detach(), torch.optim.Adam(decoder.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss = decoder.loss(z, obs).mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05 < 0.3 < float(symlog(obs).var())


# ---- deferred decoding ---------------------------------------------------------------------------


class LinearDynamics(nn.Module):
    """z' = 2 z + (a, -a)."""

    state_dim = 2

    def forward(self, z, action, depth=None):
        z_next = 2 * z + torch.cat([action, -action], -1)
        return DynamicsOutput(z_next, z_next, lambda: None, lambda: None)


class LinearDecoder(nn.Module):
    """obs = z, read directly: the loss is the squared error itself."""

    def forward(self, z):
        return z

    def loss(self, z, obs):
        return (z - obs).square().mean(-1)


def linear_case(steps: int) -> dict:
    """From z = (1, 0) and (0, 1) with actions 1, 0, -1: (3, -1) (6, -2) (11, -3), and (1, 1) (2, 2) (3, 5)."""
    model = WorldModel(nn.Identity(), LinearDynamics(), 4, LinearDecoder())
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    actions = torch.tensor([[[1.0], [1.0]], [[0.0], [0.0]], [[-1.0], [-1.0]]])[:steps]
    target = torch.tensor([[[2.0, -1.0], [1.0, 1.0]], [[7.0, -2.0], [2.0, 0.0]], [[11.0, 0.0], [3.0, 1.0]]])[:steps]
    return {
        "model": model,
        "rollout": model.rollout(z, actions),
        "z_target": target.requires_grad_(),
        "last_obs": torch.tensor([[10.0, -3.0], [3.0, 3.0]]),
        "mask": torch.ones(steps, 2),
    }


def test_deferred_decoding_by_hand():
    """Errors of the first sequence: (1, 0) (-1, 0) (0, -3); of the second: (0, 0) (0, 2) (0, 4)."""
    case = linear_case(3)
    torch.testing.assert_close(case["rollout"].z[-1], torch.tensor([[11.0, -3.0], [3.0, 5.0]]))
    losses = deferred_decoding_loss(**case)
    expected = {
        "decoding": (0.5 * 1 + 0.5 * 4) / 2,
        "latent": (0.5 * 1 + 0 + 0.5 * 1 + 0.5 * 4) / 4,
        "drift": (0.5 * 1 + 0.5 * 4) / 2,  # mean errors (0, -1) and (0, 2)
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value), name
    sum(losses.values()).backward()
    assert case["z_target"].grad is None, "targets get no gradient"


def test_deferred_decoding_of_masked_steps_by_hand():
    """The second sequence ends after one step: it is not decoded, and its later errors do not count."""
    case = linear_case(3)
    case["mask"] = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    losses = deferred_decoding_loss(**case)
    expected = {"decoding": 0.5, "latent": (0.5 * 1 + 0 + 0.5 * 1) / 3, "drift": (0.5 * 1 + 0) / 2}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value), name
    case["mask"] = torch.zeros(3, 2)
    assert sum(deferred_decoding_loss(**case).values()).item() == 0.0


def test_a_path_costs_what_it_is_longer_than_its_budget():
    """Steps of the first sequence: (2, -1) (3, -1) (5, -1); of the second: (1, 0) (1, 1) (1, 3)."""
    case = linear_case(3)
    lengths = math.sqrt(5) + math.sqrt(10) + math.sqrt(26), 1 + math.sqrt(2) + math.sqrt(10)
    assert lengths[1] < 9 < lengths[0]
    found = deferred_decoding_loss(**case, step_budget=3.0)["path"]
    assert found.item() == pytest.approx((lengths[0] - 9) / 2)
    found.backward()
    assert case["rollout"].z.requires_grad and case["z_target"].grad is None
    assert deferred_decoding_loss(**case, step_budget=torch.tensor(4.0))["path"].item() == 0.0
    case["mask"] = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    found = deferred_decoding_loss(**case, step_budget=0.75)["path"]
    assert found.item() == pytest.approx((lengths[0] - 3 * 0.75 + 0.25) / 2)
    case["mask"] = torch.zeros(3, 2)
    assert deferred_decoding_loss(**case, step_budget=0.75)["path"].item() == 0.0


def test_one_step_decodes_at_once():
    case = linear_case(1)
    case["last_obs"] = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    losses = deferred_decoding_loss(**case)
    assert losses["decoding"].item() == pytest.approx(0.5 * 4 / 2)
    assert losses["latent"].item() == 0.0
    assert losses["drift"].item() == pytest.approx(0.5 * 1 / 2)


def test_one_observation_is_decoded(monkeypatch):
    """That is what makes it cheap: K latent steps, one decoding, of the last latent."""
    model, decoded = make(), []
    rollout = model.rollout(model.encode(randn(B, OBS)), randn(H, B, A), 3)
    original = model.decoder.loss
    monkeypatch.setattr(model.decoder, "loss", lambda z, obs: decoded.append(z) or original(z, obs))
    losses = deferred_decoding_loss(model, rollout, randn(H, B, Z), randn(B, OBS), torch.ones(H, B, dtype=DOUBLE))
    assert len(decoded) == 1 and torch.equal(decoded[0], rollout.z[-1])
    losses["decoding"].backward()
    trained = [*model.encoder.parameters(), *model.dynamics.parameters(), *model.decoder.parameters()]
    assert all(p.grad is not None and p.grad.any() for p in trained), "through every step, back to the encoder"


def test_deferred_decoding_refuses_what_does_not_fit():
    case = linear_case(3)
    for change in ({"z_target": torch.zeros(2, 2, 2)}, {"mask": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match="rollout of 3 steps"):
            deferred_decoding_loss(**case | change)
    case["model"].decoder = None
    with pytest.raises(ValueError, match="decoder"):
        deferred_decoding_loss(**case)


def test_curriculum_of_the_decoding_horizon():
    assert [decoding_horizon(p, 4) for p in (0.0, 0.124, 0.126, 0.26, 0.38, 0.5, 1.0)] == [1, 1, 2, 3, 4, 4, 4]
    assert [decoding_horizon(p, 3, share=1.0) for p in (0.0, 0.3, 0.4, 0.7, 1.0)] == [1, 1, 2, 3, 3]
    assert {decoding_horizon(p / 50, 1) for p in range(51)} == {1}
    for case in ((-0.1, 3), (1.1, 3), (math.nan, 3), (0.5, 0), (0.5, 3, 0.0), (0.5, 3, 1.1)):
        with pytest.raises(ValueError, match="progress"):
            decoding_horizon(*case)


# ---- early exits, warm starts, halting by the prediction -----------------------------------------


@pytest.mark.parametrize("depth", [4, torch.tensor([1, 5, 2, 2, 6])], ids=["4", "per sample"])
def test_an_early_rollout_is_one_of_shorter_steps(depth):
    model, z, actions = make(), randn(B, Z), randn(H, B, A)
    rollout = model.rollout(z, actions, depth)
    early = rollout.early(torch.Generator().manual_seed(0))
    assert isinstance(early, Rollout) and early.z.shape == (H + 1, B, Z) and early.h.shape == (H, B, D)
    assert (early.loops <= rollout.loops).all() and (early.loops < rollout.loops).any()
    for t in range(H):
        step = model.step(rollout.z[t], actions[t], early.loops[t])
        torch.testing.assert_close(early.z[t + 1], step.z_next)
        torch.testing.assert_close(early.h[t], step.out.h)
    ones = torch.ones(H, B, dtype=DOUBLE)
    losses = world_model_losses(model, early, randn(H, B, Z, seed=2), ones, 0 * ones, ones)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.dynamics.parameters())
    with pytest.raises(ValueError, match="asked-for depth"):
        model.rollout(z, actions).early()


def test_a_warm_rollout_starts_each_step_from_the_last_state():
    model, z, actions = make(), randn(B, Z), randn(H, B, A)
    rollout, h = model.rollout(z, actions, 3, warm_start=True), None
    for t in range(H):
        out = model.dynamics(rollout.z[t], actions[t], 3, h0=h)
        torch.testing.assert_close(rollout.h[t], out.h)
        torch.testing.assert_close(rollout.z[t + 1], out.z_next)
        h = out.h
    assert not torch.allclose(rollout.h[1], model.rollout(z, actions, 3).h[1])


def test_a_warm_rollout_saves_loops_where_little_changes():
    """A latent that hardly moves: the coda's weights are small."""
    model = make(halting=CertifiedHalting(1e-6), gamma=0.8)
    model.dynamics.max_loops = 300
    with torch.no_grad():
        model.dynamics.coda.out.weight.mul_(1e-4), model.dynamics.coda.out.bias.zero_()
    z, actions = model.encode(randn(B, OBS)), randn(1, B, A).expand(6, B, A)
    cold, warm = (model.rollout(z, actions, warm_start=w) for w in (False, True))
    torch.testing.assert_close(cold.z, warm.z, rtol=0, atol=1e-7)
    assert torch.equal(cold.loops[0], warm.loops[0]) and int(cold.loops.max()) < 300
    assert warm.loops[1:].sum() < 0.75 * cold.loops[1:].sum()


@pytest.mark.parametrize("patience", [1, 2])
def test_halting_by_the_prediction_reads_the_models_own_heads(patience):
    """And a copy of the model, such as a slow target, reads the copy's."""
    model = make(halting="prediction", halt_tolerance=1e-3, patience=patience)
    model.dynamics.max_loops = 60
    z, action = randn(B, Z), randn(B, A)
    out = model.dynamics(z, action)
    states = model.dynamics.trajectory(z, action, 60)
    change = (torch.stack(model.predict(states), -1).diff(dim=0).abs().amax(-1) < 1e-3).int()  # (60, B)
    if patience == 2:
        change[1:] = change[1:] * change[:-1]
        change[0] = 0
        assert isinstance(model.dynamics.halting, PatientHalting)
    assert out.loops.tolist() == (change.argmax(0) + 1).tolist() and 1 < int(out.loops.min()) < 60
    twin = copy.deepcopy(model)
    for p in twin.reward.parameters():
        nn.init.zeros_(p)
    for p in twin.continuation.parameters():
        nn.init.zeros_(p)
    assert twin.dynamics(z, action).loops.tolist() == [patience] * B, "a constant prediction changes never"
    assert torch.equal(model.dynamics(z, action).loops, out.loops)


def test_every_control_serves_a_model_with_a_decoder():
    for make_dynamics in DYNAMICS.values():
        model = WorldModel(MLPEncoder(OBS, Z, 16), make_dynamics(Z, A, D), 16, MLPDecoder(Z, OBS, 16))
        rollout = model.rollout(torch.randn(B, Z), torch.randn(H, B, A), 2)
        losses = deferred_decoding_loss(model, rollout, torch.randn(H, B, Z), torch.randn(B, OBS), torch.ones(H, B))
        assert all(torch.isfinite(loss) for loss in losses.values())
