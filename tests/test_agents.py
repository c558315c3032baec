"""The planner agent: what it picks, bootstraps from and updates, and that it can be resumed."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from agents import make_agent, planner
from agents.actor_critic import ContinuousPolicy, DiscretePolicy, ValueEnsemble
from agents.mppi import PlanBudget, draw, exhaustive, mppi
from agents.novelty import Novelty
from agents.optim import EMATarget, FlatAdam, flatten_parameters
from agents.planner import LEAST_UNIT, REFRESH, PlannerAgent
from loopwm.config import Config, ConfigError, DynamicsConfig, EncoderConfig, PlannerConfig, TaskConfig
from loopwm.dynamics import DYNAMICS, GRADIENTS, SOLVERS, PatientHalting
from loopwm.training.protocols import Agent
from loopwm.training.replay import Batch, Replay

OBS, A, N = 5, 3, 4
KINDS = pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
SMALL = {
    "policy_dim": 16, "value_dim": 16, "head_dim": 16, "batch_size": 12, "model_batch_size": 6, "horizon": 2,
    "seed_steps": 10, "update_ratio": 0.5, "plan_samples": 40, "plan_horizon": 3, "plan_loops": 2,
    "plan_iterations": 2, "plan_collect": False, "model_every": 1, "policy_every": 1, "discount": 0.5,
    "n_step": 3, "policy_horizon": 0, "policy_std": 0.0, "policy_penalty_kept": 1.0, "policy_step_error": 0.0,
    "policy_switch_steps": 0,
}  # fmt: skip


def config(seed: int = 0, dynamics: dict | None = None, encoder: dict | None = None, **agent) -> Config:
    return Config(
        TaskConfig("dmc", "dmc/cartpole-swingup"),
        EncoderConfig(**{"latent_dim": 6, "hidden_dim": 16} | (encoder or {})),
        DynamicsConfig(**{"hidden_dim": 8, "block_dim": 8, "mean_loops": 3, "max_loops": 6} | (dynamics or {})),
        PlannerConfig(**SMALL | agent),
        seed=seed,
    )


def make(discrete: bool = False, seed: int = 0, **kw) -> PlannerAgent:
    """Zero output weights are given values, so that no test passes because everything is zero."""
    agent = make_agent(config(seed, **kw), OBS, A, discrete)
    stream = torch.Generator().manual_seed(99)
    for member in agent.value.members:
        with torch.no_grad():
            member[-1].weight.copy_(torch.randn(member[-1].weight.shape, generator=stream))
    agent.targets["value"].target.copy_(agent.value_optimizer.flat.detach())
    return agent


def observations(envs: int = N, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(envs, OBS)).astype(np.float32)


def filled_replay(discrete: bool = False, rows: int = 60, seed: int = 0) -> Replay:
    """Episodes of 7 rows; those of the first stream terminate, the others are truncated."""
    rng = np.random.default_rng(seed)
    replay = Replay(1000, 2, OBS, A, seed=seed)
    for row in range(rows):
        action = rng.uniform(-1, 1, (2, A)).astype(np.float32)
        action = np.eye(A, dtype=np.float32)[action.argmax(1)] if discrete else action
        last = np.full(2, row % 7 == 6)
        replay.add(observations(2, row), action, rng.normal(size=2), np.array([row % 7 == 5, False]), last)
    return replay


def weights(agent: PlannerAgent) -> dict[str, torch.Tensor]:
    online = {name: optimizer.flat.detach().clone() for name, optimizer in agent._optimizers().items()}
    return online | {f"target/{name}": ema.target.clone() for name, ema in agent.targets.items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def same(a, b) -> bool:
    """Equal, bit for bit, in nested state dicts."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- MPPI -------------------------------------------------------------------------------------------

BUDGET = PlanBudget(samples=256, iterations=8, horizon=2, policy_samples=16, elites=24)


def run_mppi(score, z: torch.Tensor, discrete: bool = False, budget: PlanBudget = BUDGET, prior=None, seed: int = 0):
    envs = z.shape[0]
    mean = torch.full((budget.horizon, envs, A), 1.0 / A if discrete else 0.0)
    if prior is None:
        prior = mean.unsqueeze(2).expand(-1, -1, budget.policy_samples, -1)
        prior = nn.functional.one_hot(prior.argmax(-1), A).float() if discrete else prior
    return mppi(z, prior, mean, score, budget, torch.Generator().manual_seed(seed), discrete)[:2]


def targets(envs: int = 3, seed: int = 0) -> torch.Tensor:
    """Best sequences (N, H * A), which also serve as the latents, so that each row knows its own optimum."""
    return torch.rand(envs, 2 * A, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


def unpack(z: torch.Tensor) -> torch.Tensor:
    return z.view(-1, 2, A).transpose(0, 1)  # (H, R, A)


def quadratic(z: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    assert actions.shape == (2, z.shape[0], A) and actions.abs().max() <= 1.0
    return -(actions - unpack(z)).square().sum((0, 2))


def test_mppi_finds_a_quadratic_optimum():
    z = targets()
    action, mean = run_mppi(quadratic, z)
    assert action.shape == (3, A) and mean.shape == (2, 3, A)
    torch.testing.assert_close(mean, unpack(z), atol=0.12, rtol=0)
    torch.testing.assert_close(action, mean[0])


def test_mppi_says_how_far_the_first_scores_lie_apart():
    """Of the policy's sequences and the others; the refined ones after them do not count."""
    scores = torch.tensor([0.0, 2.0, 4.0, 6.0]).repeat(64)
    seen = iter([scores, *[torch.zeros(64)] * 7])
    prior = torch.zeros(2, 1, 16, A)
    plan = mppi(
        torch.zeros(1, 6), prior, prior[:, :, 0], lambda z, a: next(seen), BUDGET, torch.Generator(), discrete=False
    )
    torch.testing.assert_close(plan.spread, torch.tensor([5.0**0.5]))


def test_mppi_stays_in_range_when_the_optimum_lies_outside():
    """Most of the way in every seed; some stop short, since a quarter of the draws lets the spread shrink early."""
    found = torch.stack([run_mppi(quadratic, torch.full((2, 2 * A), 3.0), seed=seed)[0] for seed in range(6)])
    assert (found <= 1.0).all() and (found > 0.7).all() and found.mean() > 0.95


def test_mppi_prefers_a_policy_that_knows():
    """The prior holds the exact optimum once; a tiny budget of random samples could not find it."""
    budget = PlanBudget(samples=8, iterations=1, horizon=2, policy_samples=4, elites=2, temperature=0.01)
    z = targets()
    prior = torch.zeros(2, 3, 4, A)
    prior[:, :, 2] = unpack(z)
    torch.testing.assert_close(run_mppi(quadratic, z, budget=budget, prior=prior)[1], unpack(z), atol=1e-3, rtol=0)


def test_mppi_keeps_the_best_and_draws_less_after_the_first_iteration():
    """At a temperature near zero the plan is the best sequence of all iterations, whichever found it."""
    seen = []

    def rough(z, actions):  # refining it leads nowhere
        score = torch.sin(1000.0 * actions.sum((0, 2)))
        seen.append((actions, score))
        return score

    budget = dataclasses.replace(BUDGET, iterations=4, temperature=1e-6)
    _, mean = run_mppi(rough, torch.zeros(1, 6), budget=budget)
    assert [len(score) for _, score in seen] == [256, 64, 64, 64]
    actions, score = torch.cat([a for a, _ in seen], 1), torch.cat([s for _, s in seen])
    torch.testing.assert_close(mean[:, 0], actions[:, score.argmax()], atol=1e-5, rtol=0)


def test_mppi_finds_the_best_discrete_sequence():
    best = torch.tensor([[2, 0], [1, 1], [0, 2], [1, 2]])  # (N, H)
    z = nn.functional.one_hot(best, A).float().reshape(4, -1)

    def matches(z, actions):
        assert set(actions.unique().tolist()) == {0.0, 1.0} and (actions.sum(-1) == 1).all()
        return (actions * unpack(z)).sum((0, 2))

    action, mean = run_mppi(matches, z, discrete=True)
    assert torch.equal(action, nn.functional.one_hot(best[:, 0], A).float())
    assert torch.equal(mean.argmax(-1).t(), best)
    torch.testing.assert_close(mean.sum(-1), torch.ones(2, 4))


def test_all_sequences_of_few_discrete_actions_are_compared():
    """Scores drawn for each sequence of each state: the best one's first action, whatever the policy would do."""
    table = torch.randn(4, A, A, generator=torch.Generator().manual_seed(0))
    z, own = torch.arange(4.0).unsqueeze(1), nn.functional.one_hot(torch.tensor([0, 1, 2, 0]), A).float()

    def look_up(z, actions):
        assert actions.shape == (2, 4 * A * A, A) and (actions.sum(-1) == 1.0).all()
        first, second = actions.argmax(-1)
        return table[z[:, 0].long(), first, second]

    plan = exhaustive(z, own, look_up, 2)
    best = table.flatten(1).argmax(1)
    torch.testing.assert_close(plan.action, nn.functional.one_hot(best // A, A).float())
    torch.testing.assert_close(plan.mean, torch.stack([plan.action, nn.functional.one_hot(best % A, A).float()]))
    torch.testing.assert_close(plan.spread, table.flatten(1).std(1, correction=0))


def test_of_equal_sequences_the_policys_own_is_taken():
    """Also among what is no number; but never instead of a better one."""
    own = nn.functional.one_hot(torch.tensor([2, 1, 0]), A).float()
    worth = torch.tensor([[1.0, 1.0, 1.0], [math.nan, math.nan, math.nan], [0.0, 0.5, math.nan]])
    plan = exhaustive(torch.arange(3.0).unsqueeze(1), own, lambda z, a: worth[z[:, 0].long(), a[0].argmax(-1)], 1)
    assert plan.action.argmax(1).tolist() == [2, 1, 1]


def test_an_agent_of_few_discrete_actions_compares_all_sequences():
    agent = make(discrete=True, plan_samples=A**2, plan_horizon=2, plan_exhaustive=True)
    z = agent.encode(torch.as_tensor(observations()))
    action = agent.plan(z)
    for row, taken in zip(z, action, strict=True):
        index = torch.cartesian_prod(torch.arange(A), torch.arange(A))
        worth = agent.score(row.expand(A**2, -1), torch.eye(A)[index.t()])
        assert index[worth.argmax(), 0] == taken.argmax()
    own = agent.draw_plans(z)
    assert own.shape == (2, N, A**2, A) and len({tuple(x.flatten().tolist()) for x in own[:, 0].unbind(1)}) == A**2


@pytest.mark.parametrize(
    "discrete, settings",
    [(True, {}), (True, {"plan_exhaustive": True, "plan_samples": A**2 - 1}), (False, {"plan_exhaustive": True})],
    ids=["not asked for", "too many", "continuous"],
)
def test_other_plans_are_drawn(monkeypatch, discrete, settings):
    drawn = []
    monkeypatch.setattr("agents.acting.mppi", lambda *a: drawn.append(len(a[0])) or mppi(*a))
    agent = make(discrete, **{"plan_horizon": 2} | settings)
    agent.plan(agent.encode(torch.as_tensor(observations())))
    assert drawn == [N]


def test_mppi_with_a_later_payoff():
    """Only the pair (0, then 1) pays: the first action alone says nothing."""

    def pair(z, actions):
        return actions[0, :, 0] * actions[1, :, 1]

    action, mean = run_mppi(pair, torch.zeros(1, 6), discrete=True)
    assert action.argmax() == 0 and mean[1].argmax() == 1


def test_mppi_survives_scores_that_are_not_numbers():
    z = targets()

    def holed(z, actions):
        return torch.where(actions[0, :, 0] > unpack(z)[0, :, 0] + 0.3, torch.nan, quadratic(z, actions))

    torch.testing.assert_close(run_mppi(holed, z)[1], unpack(z), atol=0.2, rtol=0)


def test_mppi_with_nothing_but_nan_is_finite_and_leaves_other_rows_alone():
    z = targets()

    def first_env_blind(z, actions):
        score = quadratic(z, actions)
        blind = len(score) // 3
        return torch.cat([torch.full((blind,), torch.nan), score[blind:]])

    action, mean = run_mppi(first_env_blind, z)
    assert torch.isfinite(mean).all() and action.abs().max() <= 1.0
    torch.testing.assert_close(mean[:, 1:], unpack(z)[:, 1:], atol=0.12, rtol=0)


def test_mppi_is_reproducible_by_its_generator():
    z = targets()
    assert torch.equal(run_mppi(quadratic, z, seed=3)[1], run_mppi(quadratic, z, seed=3)[1])
    assert not torch.equal(run_mppi(quadratic, z, seed=3)[1], run_mppi(quadratic, z, seed=4)[1])


# ---- optimiser and targets --------------------------------------------------------------------------


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_flat_adam_is_adam_with_clipping(clip):
    ours, theirs = small_net(), small_net()
    flat = FlatAdam([ours[:2], ours[3]], 1e-2, clip)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for step in range(20):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        norms = []
        for net, optimizer in ((ours, flat), (theirs, adam)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            if net is ours:
                norms.append(flat.step())
            else:
                norms.append(nn.utils.clip_grad_norm_(net.parameters(), clip))
                adam.step()
        torch.testing.assert_close(*norms)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_lead_of_flat_adam_takes_a_part_of_each_step(rate):
    whole, part = small_net(), small_net()
    first = sum(p.numel() for p in whole[0].parameters())
    for net, optimizer in (
        (whole, FlatAdam([whole], 1e-2, 1e6)),
        (part, FlatAdam([part], 1e-2, 1e6, lead=first, lead_rate=rate)),
    ):
        net(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
    for i, (a, b, start) in enumerate(
        zip(whole.parameters(), part.parameters(), small_net().parameters(), strict=True)
    ):
        torch.testing.assert_close(b - start, (a - start) * (rate if i < 2 else 1.0), rtol=1e-4, atol=1e-7)
    assert rate == 0.0 or not torch.equal(part[0].weight, small_net()[0].weight)


def test_flat_adam_accumulates_until_zeroed():
    net = small_net()
    optimizer, x = FlatAdam([net], 1e-2, 1e6), torch.ones(1, 4)
    net(x).sum().backward()
    once = optimizer.flat.grad.clone()
    net(x).sum().backward()
    torch.testing.assert_close(optimizer.flat.grad, 2 * once)
    optimizer.zero_grad()
    assert all(not p.grad.any() for p in net.parameters())


def test_flattened_modules_compute_the_same_and_follow_the_vector():
    net = small_net()
    x = torch.randn(3, 4)
    before = net(x)
    flat = flatten_parameters([net])
    assert torch.equal(net(x), before)
    flat.zero_()
    assert not net(x).any()


def test_ema_target():
    online, target = small_net(0), small_net(1)
    ema = EMATarget(FlatAdam([online], 1e-3, 1.0), target, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(online.parameters(), target.parameters(), strict=True))
    assert not any(p.requires_grad for p in target.parameters())
    start = [p.detach().clone() for p in target.parameters()]
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1.0)
    for share in (0.25, 1 - 0.75**2):
        ema.update()
        for a, b in zip(target.parameters(), start, strict=True):
            torch.testing.assert_close(a, b + share)
    assert all(p.requires_grad for p in online.parameters())


# ---- policies and values ------------------------------------------------------------------------------


def test_continuous_policy():
    torch.manual_seed(0)
    policy, stream = ContinuousPolicy(6, A, 16), torch.Generator().manual_seed(0)
    action, raw = policy(torch.randn(2, 7, 6))
    assert action.shape == (2, 7, A) and torch.equal(action, torch.tanh(raw))
    noisy = policy.perturb(torch.full((20_000, A), 0.9), 0.2, 0.3, stream)
    assert float(noisy.min()) == pytest.approx(0.6) and float(noisy.max()) == 1.0


def test_discrete_policy():
    torch.manual_seed(0)
    policy, stream = DiscretePolicy(6, A, 16), torch.Generator().manual_seed(0)
    action, logits = policy(torch.randn(50, 6))
    torch.testing.assert_close(action, nn.functional.one_hot(logits.argmax(-1), A).float())
    action.select(-1, 0).sum().backward()
    assert policy.layers[-1].weight.grad.any(), "straight through: the softmax's gradient"
    kept = torch.eye(A)[torch.zeros(20_000, dtype=torch.long)]
    swapped = policy.perturb(kept, 0.3, 1.0, stream)
    assert (swapped.sum(-1) == 1).all()
    assert float(swapped[:, 0].mean()) == pytest.approx(1 - 0.3 * (A - 1) / A, abs=0.01)


@pytest.mark.parametrize(
    ("loss", "discrete", "bins"),
    [("auto", True, 1), ("auto", False, 63), ("huber", False, 1), ("two_hot", True, 63)],
)
def test_values_of_discrete_actions_are_numbers_unless_told_otherwise(loss, discrete, bins):
    assert make(discrete, value_loss=loss).value.code.bins == bins
    assert loss != "auto" or make(discrete).value.code.bins == bins


@pytest.mark.parametrize(("loss", "bins"), [("huber", 1), ("two_hot", 63)])
def test_value_ensemble_has_independent_members(loss, bins):
    torch.manual_seed(0)
    value, pair = ValueEnsemble(8, 16, members=3, loss=loss), torch.randn(2, 7, 8)
    assert value(pair).shape == (3, 2, 7, bins) and value.values(pair).shape == (3, 2, 7)
    nn.init.normal_(value.members[1][-1].weight)
    values = value.values(pair)
    torch.testing.assert_close(value.first_value(pair), values[0], atol=1e-2, rtol=0)
    # untrained members say zero, but for the rounding of two-hot means over values as far as +-symexp(10)
    torch.testing.assert_close(values[0], values[2], atol=1e-2, rtol=0)
    assert not torch.allclose(values[0], values[1])


def test_a_new_unit_leaves_values_and_the_loss_in_units_of_it_by_hand():
    torch.manual_seed(0)
    value, pair = ValueEnsemble(8, 16, loss="huber"), torch.randn(4, 8)
    for member in value.members:
        nn.init.normal_(member[-1].weight)
        nn.init.normal_(member[-1].bias)
    before = value.values(pair)
    for unit in (0.25, 8.0):
        value.rescale(unit)
        torch.testing.assert_close(value.values(pair), before)
        torch.testing.assert_close(value.first_value(pair), before[0])
        target = before[0] + unit * torch.tensor([0.5, -0.5, 3.0, -3.0])
        loss = value.code.loss(value(pair)[0], target)  # half the square within one unit, straight beyond
        torch.testing.assert_close(loss, torch.tensor([0.125, 0.125, 2.5, 2.5]), rtol=1e-4, atol=1e-4)
    distribution = ValueEnsemble(8, 16, loss="two_hot")
    state = copy.deepcopy(distribution.state_dict())
    distribution.rescale(3.0)
    assert distribution.unit is None and same(distribution.state_dict(), state), "a distribution has no unit"


def test_values_are_in_units_of_the_mean_reward_and_carry_the_change():
    agent, replay = make(value_loss="huber"), filled_replay()
    z, action = torch.randn(20, 6), torch.zeros(20, A)
    before = agent.value_target.values(agent.value_input(z, action))
    agent.targets["value"].tau = agent.value_optimizer.learning_rate = 0.0
    agent.update(replay)
    assert float(agent.value.unit) == pytest.approx(np.abs(replay.reward[:60]).mean()) != 1.0
    for value in (agent.value, agent.value_target):
        torch.testing.assert_close(value.values(agent.value_input(z, action)), before)
    replay.reward *= 7.0
    for _ in range(REFRESH - 1):
        agent.update(replay)
    unit = float(agent.value.unit)
    agent.update(replay)
    assert float(agent.value.unit) == float(agent.value_target.unit) == pytest.approx(7.0 * unit)
    torch.testing.assert_close(agent.value.values(agent.value_input(z, action)), before)
    replay.reward[:] = 0.0
    agent.updates = 0
    agent.update(replay)
    assert float(agent.value.unit) == pytest.approx(LEAST_UNIT), "nothing is divided by zero where no reward was seen"


# ---- acting -------------------------------------------------------------------------------------------


def check_actions(action: np.ndarray, discrete: bool, envs: int = N) -> None:
    if discrete:
        assert action.shape == (envs,) and action.dtype == np.int64 and set(action) <= set(range(A))
    else:
        assert action.shape == (envs, A) and action.dtype == np.float32 and np.abs(action).max() <= 1.0


@KINDS
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"plan_samples": 0},
        {"plan_collect": True},
        {"plan_loops": 0},
        {"imagined_steps": 2},
        {"value_loops": 2},
        {"value_loss": "two_hot"},
        {"value_loss": "huber"},
        {"seed_steps": 0},
        {"plan_horizon": 1},
    ],
    ids=str,
)
def test_actions_have_the_shape_range_and_type_of_the_protocol(case, discrete):
    agent = make(discrete, **case)
    assert isinstance(agent, Agent)
    for step in range(6):
        first = np.array([step == 0, True, False, step == 3])
        for explore in (True, False):
            action = agent.act(observations(seed=step), first=first, explore=explore)
            check_actions(action, discrete)
            stored = agent.encode_action(action)
            assert stored.shape == (N, A) and stored.dtype == np.float32
            assert not discrete or (stored.argmax(1) == action).all()
    check_actions(agent.act(observations(1)), discrete, 1)


def test_observations_that_cannot_be_acted_on_are_named():
    agent, obs = make(plan_samples=0), observations(1)
    assert (agent.act(obs.astype(np.float64)) == agent.act(obs)).all()
    for wrong, said in ((obs[0], "shape"), (obs[:, 1:], "shape"), (np.full_like(obs, np.inf), "not finite")):
        with pytest.raises(ValueError, match=f"act takes finite observations .*{said}"):
            agent.act(wrong)


@KINDS
def test_exploration_varies_and_the_policy_alone_does_not(discrete):
    agent, obs = make(discrete, plan_samples=0, explore_std=0.9), observations(64)
    assert (agent.act(obs) == agent.act(obs)).all()
    explored = [agent.act(obs, explore=True) for _ in range(3)]
    assert (explored[0] != explored[1]).any() and (explored[1] != explored[2]).any()


def test_noise_of_a_plan_may_be_correlated_from_step_to_step():
    """Every step alike in spread; neighbours correlate as asked, and those further apart by its powers."""
    mean, std = torch.zeros(4, 1, 2), torch.full((4, 1, 2), 0.1)
    for rho in (0.0, 0.9):
        noise = draw(mean, std, 20_000, torch.Generator().manual_seed(0), False, rho)[:, 0, :, 0]  # (H, S)
        torch.testing.assert_close(noise.std(1), torch.full((4,), 0.1), rtol=0.03, atol=0.0)
        found = torch.corrcoef(noise)[0]
        torch.testing.assert_close(found, torch.tensor([1.0, rho, rho**2, rho**3]), rtol=0.0, atol=0.03)
    assert make(plan_correlation=0.7).budget.correlation == 0.7


# ---- looking for what is new --------------------------------------------------------------------------


def test_what_was_learnt_is_less_new_than_the_rest():
    stream = torch.Generator().manual_seed(0)
    novelty = Novelty(6, stream)
    random, optimizer = (
        copy.deepcopy(novelty.random.state_dict()),
        torch.optim.Adam(novelty.predictor.parameters(), 1e-3),
    )
    known = torch.randn(64, 6, generator=stream) * 0.3 + 2.0
    elsewhere = torch.randn(64, 6, generator=stream) * 0.3 - 2.0
    before = novelty(known).mean()
    for _ in range(300):
        optimizer.zero_grad()
        novelty(known).mean().backward()
        optimizer.step()
    assert novelty(known).shape == (64,) and novelty(known).mean() < 0.02 * before
    assert novelty(elsewhere).mean() > 20.0 * novelty(known).mean()
    assert same(random, novelty.random.state_dict())


@KINDS
def test_where_all_sequences_are_worth_the_same_an_exploring_plan_takes_the_newest(monkeypatch, discrete):
    """Novelty that grows with the first action's first entry, worth that does not depend on it."""
    agent, z = make(discrete, plan_collect=True, plan_samples=400), torch.randn(N, 6)
    monkeypatch.setattr(agent, "newness", lambda z, actions: actions[0, :, 0])
    monkeypatch.setattr(agent, "score", lambda z, actions: torch.full((len(z),), 7.0))
    assert (agent.plan(z, explore=True)[:, 0] > 0.7).all() and agent.seeking == pytest.approx(0.001)
    assert not (agent.plan(z)[:, 0] > 0.7).all()  # an evaluation does not look for it
    monkeypatch.setattr(agent, "score", lambda z, actions: -actions[0, :, 0])
    assert (agent.plan(z, explore=True)[:, 0] < 0.3).all() and agent.seeking < 0.001


@KINDS
def test_what_is_new_is_sought_by_actions_that_are_held(monkeypatch, discrete):
    agent, z, seen = make(discrete, plan_collect=True, novelty_hold=7), torch.randn(N, 6), []
    newness = agent.newness
    monkeypatch.setattr(agent, "newness", lambda z, actions: seen.append((z, actions)) or newness(z, actions))
    action = agent.seek(z)
    (rows, tried), count = seen[0], SMALL["plan_samples"] // 2
    assert tried.shape == (7, N * count, A) and (tried == tried[0]).all()
    with torch.no_grad():
        found = torch.stack([agent.novelty(step) for step in agent.slow_model.rollout(rows, tried, 2).z[1:]]).sum(0)
    best = found.view(N, count).argmax(1)
    torch.testing.assert_close(action, tried[0].view(N, count, A)[torch.arange(N), best])


def test_small_rewards_do_not_count_as_none(monkeypatch):
    """Scores 0.0005 apart: next to nothing where rewards are of one, and all there is where they are of 0.001."""
    agent, z = make(plan_collect=True, plan_samples=400), torch.randn(N, 6)
    monkeypatch.setattr(agent, "newness", lambda z, actions: actions[0, :, 0])
    monkeypatch.setattr(agent, "score", lambda z, actions: -1e-3 * actions[0, :, 0])
    seeking = []
    for largest in (0.0, 5.0, 1e-3):
        agent.seeking, agent.largest_reward = 0.0, torch.tensor(largest)
        for _ in range(20):
            agent.plan(z, explore=True)
        seeking.append(agent.seeking / 0.02)  # share of steps, about
    assert seeking[0] > 0.7 and seeking[1] > 0.7 and seeking[2] < 0.05


def test_the_largest_reward_is_learnt_from_the_replay_and_kept():
    agent, other = make(plan_collect=True), make(plan_collect=True)
    replay = filled_replay()
    for _ in range(20):
        agent.update(replay)
    largest = agent.largest_reward
    assert 0.5 < largest <= max(abs(r) for r in replay.reward.ravel())
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert other.largest_reward == largest


def test_every_env_looks_for_what_is_new_on_its_own_account(monkeypatch):
    agent, z = make(plan_collect=True, plan_samples=400), torch.tensor([[1.0] * 6, [0.0] * 6])
    monkeypatch.setattr(agent, "newness", lambda z, actions: actions[0, :, 0])
    monkeypatch.setattr(agent, "score", lambda z, actions: -z[:, 0] * actions[0, :, 0])  # worth something in env 0
    first, second = agent.plan(z, explore=True)[:, 0]
    assert first < -0.7 and second > 0.7


@pytest.mark.parametrize("off", [{"novelty_spread": 0.0}, {"plan_collect": False}, {"plan_samples": 0}])
def test_without_plans_to_explore_by_there_is_no_novelty(off):
    agent = make(**{"plan_collect": True} | off)
    assert agent.novelty is None and agent.parameter_counts["novelty"] == 0
    assert "loss/novelty" not in agent.update(filled_replay())


def test_a_run_without_novelty_can_be_planned_with(tmp_path):
    """`evaluate.py RUN --samples 64` of an agent that was trained without plans."""
    trained, planning = make(plan_samples=0, plan_collect=True), make(plan_collect=True)
    planning.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert planning.novelty is not None and planning.seeking == 0.0


def test_exploration_noise_is_correlated_within_an_episode_only():
    agent = make(seed_steps=10**9, explore_correlation=0.9)
    obs, first = observations(4000), np.arange(4000) < 2000
    before = agent.act(obs, explore=True)
    after = agent.act(obs, first=first, explore=True)
    new, old = (np.corrcoef(before[rows, 0], after[rows, 0])[0, 1] for rows in (first, ~first))
    assert abs(new) < 0.1 and old > 0.7


@KINDS
@pytest.mark.parametrize("plan_loops", [0, 2])
def test_evaluation_is_deterministic_and_disturbs_nothing(plan_loops, discrete):
    agent = make(discrete, plan_loops=plan_loops, plan_collect=True, seed_steps=0)
    for step in range(3):
        agent.act(observations(seed=step), explore=True)
    undisturbed = copy.deepcopy(agent)

    def evaluate(one: PlannerAgent) -> list[np.ndarray]:
        view = one.evaluator()
        start = np.full(N, True)
        return [view.act(observations(seed=step), first=start if step == 2 else None) for step in range(5)]

    state = copy.deepcopy(agent.state_dict())
    never_acted = make(discrete, plan_loops=plan_loops, seed_steps=0)  # the same weights, but nothing carried over
    never_acted.acted = agent.acted  # a plan's spread follows what was explored
    once, again, fresh = evaluate(agent), evaluate(agent), evaluate(never_acted)
    assert all((a == b).all() and (a == c).all() for a, b, c in zip(once, again, fresh, strict=True))
    assert same(state, agent.state_dict())
    for step in range(3):
        kept, moved = (one.act(observations(seed=step), explore=True) for one in (undisturbed, agent))
        assert (kept == moved).all()


def test_evaluator_sees_later_training():
    agent, replay = make(plan_samples=0), filled_replay()
    view = agent.evaluator()
    before = view.act(observations())
    agent.update(replay)
    assert (view.act(observations()) == agent.act(observations())).all()
    assert (view.act(observations()) != before).any()


def test_an_evaluation_plans_with_at_most_its_own_samples(monkeypatch):
    drawn = []
    monkeypatch.setattr("agents.acting.mppi", lambda *a: drawn.append(a[4].samples) or mppi(*a))
    for samples, most in ((40, 12), (12, 40)):
        agent = make(plan_samples=samples, eval_samples=most, plan_collect=True, seed_steps=0)
        agent.act(observations(), explore=True)
        agent.evaluator().act(observations())
    assert drawn == [40, 12, 12, 12]
    make(plan_samples=0).evaluator().act(observations())  # the policy acts alone in both
    make(eval_samples=0).evaluator().act(observations())
    assert len(drawn) == 4


@KINDS
def test_a_plan_starts_from_the_policys_own_sequence_and_narrows(monkeypatch, discrete):
    agent, spreads = make(discrete, plan_std=0.8, plan_std_final=0.2, seed_steps=10, explore_decay_steps=100), []

    def spy(z, prior, mean, score, budget, *rest):
        action, first = agent.policy(z)[0], mean[0]
        assert prior.shape[:2] == mean.shape[:2] and prior.shape[3] == A
        torch.testing.assert_close(first, action)
        spreads.append(budget.max_std)
        return mppi(z, prior, mean, score, budget, *rest)

    monkeypatch.setattr("agents.acting.mppi", spy)
    for acted in (0, 10, 60, 110, 1000):
        agent.acted = acted
        agent.act(observations())
    assert spreads == pytest.approx([0.8, 0.8, 0.5, 0.2, 0.2])


def test_score_is_the_imagined_return():
    """r0 + g c0 (r1 + g c1 (r2 + g c2 V)), V the mean of the ensemble at the policy's action."""
    agent = make(discount=0.8)
    for head in (agent.world_model.reward, agent.world_model.continuation):
        nn.init.normal_(head.layers[-1][-1].weight)
    with torch.no_grad():
        z = agent.world_model.encode(torch.as_tensor(observations(7)))
        actions = torch.rand(3, 7, A) * 2 - 1
        given, worth, expected = agent.score(z, actions), torch.ones(7), torch.zeros(7)
        for action in actions:
            step = agent.slow_model.step(z, action, 2)
            expected, worth, z = expected + worth * step.reward, worth * 0.8 * step.continuation, step.z_next
        expected += worth * agent.value.values(agent.value_input(z, agent.policy(z)[0])).mean(0)
    torch.testing.assert_close(given, expected)


def test_policy_sequences_follow_the_policy():
    agent = make()
    with torch.no_grad():
        z = agent.world_model.encode(torch.as_tensor(observations()))
        sequences = agent._policy_sequences(z, agent.budget)
        for t in range(3):
            action = agent.policy(z)[0]
            torch.testing.assert_close(sequences[t, :, 0], action)
            assert (sequences[t, :, 1:] != action.unsqueeze(1)).any(-1).all()
            z = agent.world_model.dynamics(z, action, 2).z_next


@KINDS
@pytest.mark.parametrize("samples", [1, 8, 15])
def test_small_plan_budgets_work(samples, discrete):
    check_actions(make(discrete, plan_samples=samples).act(observations()), discrete)


# ---- value targets ------------------------------------------------------------------------------------


def value_target(agent: PlannerAgent, monkeypatch, values: torch.Tensor, **batch) -> torch.Tensor:
    monkeypatch.setattr(agent.value_target, "values", lambda pair: values)
    columns = {name: torch.tensor(rows, dtype=torch.float32).t() for name, rows in batch.items()}
    return agent._value_target(torch.zeros(values.shape[1], 6), **columns)


def test_value_target_by_hand(monkeypatch):
    """Discount 1/2, n = 3; V is the smaller of the two targets. A row is one sequence."""
    given = value_target(
        make(discount=0.5),
        monkeypatch,
        torch.tensor([[80.0, 80, 80, 80, 80, 8], [88.0, 800, 81, 90, 99, 800]]),
        reward=[[1, 2, 4], [1, 2, 0], [1, 2, 0], [1, 2, 4], [1, 0, 0], [1, 2, 4]],
        terminated=[[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]],
        mask=[[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]],
    )
    whole, truncated, terminated_inside, terminated_last, terminated_first = 3 + 10.0, 2 + 20.0, 2.0, 3.0, 1.0
    expected = [whole, truncated, terminated_inside, terminated_last, terminated_first, 3 + 1.0]
    assert given.tolist() == expected


def test_one_step_value_target(monkeypatch):
    given = value_target(
        make(discount=0.9), monkeypatch, torch.tensor([[10.0, 10.0]] * 2),
        reward=[[1.0], [1.0]], terminated=[[0.0], [1.0]], mask=[[1.0], [1.0]],
    )  # fmt: skip
    torch.testing.assert_close(given, torch.tensor([10.0, 1.0]))


@pytest.mark.parametrize("horizon", [1, 5])
def test_the_value_is_read_where_the_sequence_ends(monkeypatch, horizon):
    """A sequence cut by truncation bootstraps from its last observation, not from the next episode."""
    agent, replay, seen = make(n_step=3, horizon=horizon), filled_replay(), {}
    draw, target = replay.sample, agent._value_target

    def spy_sample(*args, **kw):
        seen["batch"] = draw(*args, **kw)
        return seen["batch"]

    def spy_target(z_end, *rest):
        seen["z_end"], seen["target"] = z_end, rest
        seen["z"] = agent.world_model.encode(torch.as_tensor(seen["batch"].obs))
        return target(z_end, *rest)

    monkeypatch.setattr(replay, "sample", spy_sample)
    monkeypatch.setattr(agent, "_value_target", spy_target)
    monkeypatch.setattr(agent, "_update_model", lambda *_: {})  # so that all encoders still agree
    agent.update(replay)
    steps = seen["batch"].mask[:3].sum(0).astype(int)
    assert set(steps) == {1, 2, 3}
    torch.testing.assert_close(seen["z_end"], seen["z"][steps, torch.arange(len(steps))])
    assert seen["target"][0].shape == (3, 12)


def test_targets_are_at_least_what_the_episode_went_on_to_earn(monkeypatch):
    """By hand: the discounted rewards to the end, and the value there unless it terminated; nothing of what goes on."""
    agent, replay, seen = make(return_floor=0.9), filled_replay(), {}
    monkeypatch.setattr(agent.value_target, "values", lambda pair: pair.sum(-1).expand(2, -1))
    start = np.flatnonzero(replay.priorities.weight > 0)
    with torch.no_grad():
        found = agent._earned(replay, start)
        for b, (row, stream) in enumerate(zip(*np.divmod(start, 2), strict=True)):
            last = row + 6 - row % 7
            if last >= len(replay):
                assert found[b] == -math.inf
                continue
            discount = agent.config.discount ** np.arange(last - row + 1)
            z = agent.encode(torch.as_tensor(replay.obs[last, stream]).unsqueeze(0))
            value = torch.cat([z, agent.policy_target(z)[0]], -1).sum()
            expected = (discount[:-1] * replay.reward[row:last, stream]).sum()
            expected += discount[-1] * float(value) * (stream != 0)  # the first stream's episodes terminate
            assert found[b].item() == pytest.approx(expected - 0.1 * abs(expected), abs=1e-5)
    update = agent._update_value
    monkeypatch.setattr(agent, "_earned", lambda replay, start: torch.full((len(start),), 7.5))
    monkeypatch.setattr(agent, "_value_target", lambda z, *_: torch.linspace(0.0, 15.0, len(z)))
    monkeypatch.setattr(agent, "_update_value", lambda *args: (seen.update(target=args[1]), update(*args))[1])
    metrics = agent.update(replay)
    assert seen["target"].min() == 7.5 and seen["target"].max() == 15.0
    assert metrics["train/floor_share"] == 0.5


def test_imagined_rows_are_the_real_steps_of_imagined_latents(monkeypatch):
    """Row by row by hand: latents from the model, actions and targets of the real step, weight where there is one."""
    agent = make(imagined_steps=2, n_step=2, plan_loops=3, smooth_std=0.0, model_batch_size=6, batch_size=12)
    monkeypatch.setattr(agent.value_target, "values", lambda pair: pair.sum(-1).expand(2, -1))
    replay = filled_replay()
    batch = Batch(*(torch.as_tensor(x) for x in replay.sample(12, 4)))
    obs, action, reward, terminated, mask = batch[:5]
    with torch.no_grad():
        z = agent.encode(obs[0])
        latents, actions, targets, weights = agent._imagined_rows(z, batch)
        assert latents.shape == (6, 6) and targets.shape == weights.shape == (6,)
        for row in range(6):
            t, state = 1 + row % 2, z[row : row + 1]
            for k in range(t):
                state = agent.slow_model.dynamics(state, action[k, row : row + 1], 3).z_next
            torch.testing.assert_close(latents[row], state[0])
            assert (actions[row] == action[t, row]).all()
            there = bool(mask[: t + 1, row].all()) and not terminated[:t, row].any()
            assert weights[row] == float(there)
            if there:
                columns = [x[t : t + 2, row : row + 1] for x in (reward, terminated, mask)]
                expected = agent._value_target(agent.encode(obs[t + 2, row : row + 1]), *columns)
                torch.testing.assert_close(targets[row], expected[0])
    assert set(weights.tolist()) == {0.0, 1.0}


def test_value_and_policy_learn_on_imagined_latents_too(monkeypatch):
    """The policy where it has no horizon of its own."""
    agent, seen = make(imagined_steps=2), {}
    for name in ("_update_value", "_update_policy"):
        kept = getattr(agent, name)
        monkeypatch.setattr(
            agent, name, lambda x, *rest, kept=kept, name=name: seen.update({name: x}) or kept(x, *rest)
        )
    agent.update(filled_replay())
    assert len(seen["_update_value"]) == len(seen["_update_policy"]) == 12 + 6
    assert (seen["_update_value"][:, :6] == seen["_update_policy"]).all()


# ---- what the policy climbs ---------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("horizon", [1, 3])
def test_the_policy_climbs_what_a_plan_of_its_own_actions_scores(discrete, horizon):
    agent = make(discrete, policy_horizon=horizon, policy_std=0.0, plan_horizon=horizon)
    agent.update(filled_replay(discrete))
    z = agent.encode(torch.as_tensor(observations(20)))
    worth, size = agent._policy_worth(z, agent.policy_terms())
    own = dataclasses.replace(agent.budget, policy_samples=1)
    actions = agent._policy_sequences(z, own)[:, :, 0]
    torch.testing.assert_close(worth, agent.score(z, actions))
    assert size.shape == worth.shape and (size > 0.0).all()


def test_without_a_horizon_the_policy_climbs_the_first_value():
    agent = make(policy_horizon=0, policy_std=0.0)
    z = agent.encode(torch.as_tensor(observations(20)))
    action, raw = agent.policy(z)
    worth, size = agent._policy_worth(z, agent.policy_terms())
    assert torch.equal(worth, agent.value.first_value(agent.value_input(z, action)))
    assert torch.equal(size, raw.square().mean(-1))


@pytest.mark.parametrize("horizon", [0, 2])
def test_the_policys_gradient_is_the_slope_of_its_worth(horizon):
    """Central differences along the gradient, in float64: it goes through every imagined step."""
    agent = make(policy_horizon=horizon, policy_std=0.0, policy_penalty=0.0)
    for head in (agent.slow_model.reward, agent.slow_model.continuation):
        torch.nn.init.normal_(head.layers[-1][-1].weight, std=0.3, generator=torch.Generator().manual_seed(1))
    for module in (agent.policy, agent.value, agent.slow_model):
        module.double()
    z = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = list(agent.policy.parameters())
    gradient = torch.autograd.grad(agent._policy_worth(z, agent.policy_terms())[0].mean(), parameters)
    size, reached = torch.cat([g.flatten() for g in gradient]).norm(), []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for p, g in zip(parameters, gradient, strict=True):
                p.add_(g / size, alpha=step)
            reached.append(float(agent._policy_worth(z, agent.policy_terms())[0].mean()))
    assert (reached[0] - reached[1]) / 2e-6 == pytest.approx(float(size), rel=1e-3)


@KINDS
def test_the_policy_learns_by_what_the_model_alone_tells(discrete):
    agent = make(discrete, policy_horizon=2, policy_std=0.0, policy_penalty=0.0)
    agent.update(filled_replay(discrete))
    for member in agent.value.members:  # a value that is the same everywhere
        torch.nn.init.zeros_(member[-1].weight)
    with torch.no_grad():
        agent.slow_model.reward.layers[-1][-1].weight.normal_(0.0, 0.3)
    z = agent.encode(torch.as_tensor(observations(20)))
    before = weights(agent)
    agent._update_policy(z, torch.ones(len(z)))
    assert changed(before, weights(agent)) == {"policy"}
    assert agent.policy_optimizer.flat.grad.abs().max() > 1e-6
    assert all(p.grad is None for p in agent.slow_model.parameters())


def test_every_action_that_the_policy_learns_by_is_noisy(monkeypatch):
    agent, seen = make(policy_horizon=2, policy_std=0.3), []
    read, dynamics = agent.value_input, agent.slow_model.dynamics
    monkeypatch.setattr(agent, "value_input", lambda z, action: seen.append(action.detach()) or read(z, action))
    monkeypatch.setattr(
        dynamics,
        "forward",
        lambda z, a, *rest: seen.append(a.detach()) or type(dynamics).forward(dynamics, z, a, *rest),
    )
    agent._policy_worth(torch.zeros(4000, 6), agent.policy_terms())  # the same latent, whose own action is the same
    assert len(seen) == 3 and seen[0].std(0).min() == pytest.approx(0.3, rel=0.1)
    assert all(action.std(0).min() > 0.2 for action in seen)


def test_a_share_of_the_discrete_actions_that_the_policy_learns_by_is_random():
    agent = make(True, policy_horizon=0, policy_std=0.6)
    seen, read = [], agent.value_input
    agent.value_input = lambda z, action: seen.append(action.detach()) or read(z, action)
    agent._policy_worth(torch.zeros(4000, 6), agent.policy_terms())
    share = float((seen[0].argmax(-1) != seen[0].argmax(-1).mode()[0]).float().mean())
    assert share == pytest.approx(0.6 * (A - 1) / A, abs=0.05)


def test_the_penalty_is_of_all_actions_that_the_policy_learns_by():
    agent, raws = make(policy_horizon=2, policy_std=0.0), []
    forward = agent.policy.forward
    agent.policy.forward = lambda z: raws.append(forward(z)) or raws[-1]
    _, size = agent._policy_worth(torch.randn(12, 6), agent.policy_terms())
    torch.testing.assert_close(size, torch.stack([raw.square().mean(-1) for _, raw in raws]).mean(0))
    assert len(raws) == 3


def test_the_policys_penalty_fades_with_the_exploration():
    """A worthless world, so that the loss is the penalty: from 8 to 2 times the mean square, half way down at 5."""
    agent = make(policy_penalty=8.0, policy_penalty_kept=0.25, explore_decay_steps=100)
    for member in agent.value.members:
        torch.nn.init.zeros_(member[-1].weight)
    z = torch.randn(12, 6)
    for acted, weight in ((0, 8.0), (agent.config.seed_steps + 50, 5.0), (1000, 2.0)):
        agent.acted = acted
        size = float(agent.policy(z)[1].detach().square().mean())
        assert float(agent._update_policy(z, torch.ones(12))["loss/policy"]) == pytest.approx(weight * size, rel=1e-4)


@pytest.mark.parametrize("acted", [30, 31])
def test_the_policy_learns_by_the_value_alone_until_it_switches(acted):
    """Bit for bit as an agent without any of it up to that step, and as one with all of it after."""
    later = {"policy_horizon": 2, "policy_std": 0.2, "policy_penalty_kept": 0.1}
    same = {} if acted <= 30 else later
    ends = []
    for settings in (later | {"policy_switch_steps": 30}, same):
        agent = make(**settings, explore_decay_steps=10)
        agent.acted = acted
        for _ in range(4):
            agent.update(filled_replay())
        ends.append(weights(agent))
    assert not changed(*ends)


@pytest.mark.parametrize("known", [False, True])
def test_the_policys_gradient_goes_through_the_model_where_a_step_is_known(known, monkeypatch):
    """Looked at anew every REFRESH updates, and until then as it was found."""
    monkeypatch.setattr("agents.planner.REFRESH", 3)
    later = {"policy_horizon": 2, "policy_std": 0.2, "policy_penalty_kept": 0.1, "explore_decay_steps": 1}
    ends, looks = [], []
    for settings in (later | {"policy_step_error": 0.5}, later if known else {}):
        agent = make(**settings)
        agent.acted = 100
        monkeypatch.setattr(agent, "_measure_step", lambda *seen: looks.append(seen) or (0.4 if known else 0.6))
        for _ in range(5):
            agent.update(filled_replay())
        ends.append(weights(agent))
    assert not changed(*ends) and len(looks) == 2


def test_the_error_of_a_step_is_the_slow_models_at_the_depth_of_plans():
    agent, replay = make(policy_step_error=0.5, plan_loops=2), filled_replay()
    for _ in range(3):
        agent.update(replay)
    z, action, z_next = agent._look(replay)
    batch = replay.sample(256, 1, rng=np.random.default_rng(agent.updates), uniform=True)
    with torch.no_grad():
        for seen, obs in ((z, batch.obs[0]), (z_next, batch.obs[1])):
            torch.testing.assert_close(seen, agent.slow_model.encode(torch.as_tensor(obs)))
        ahead = agent.slow_model.dynamics(z, torch.as_tensor(batch.action[0]), 2).z_next
    expected = float((ahead - z_next).square().sum() / (z_next - z).square().sum())
    assert agent._measure_step(z, action, z_next) == pytest.approx(expected) and expected > 0.0
    assert agent.diagnostics(replay)["latent/step_error"] == pytest.approx(expected)
    assert agent.step_error != math.inf and agent.step_error != pytest.approx(expected), "of the first update"
    agent._reset()
    assert agent.step_error == math.inf, "what is known of a fresh model is nothing"


def test_a_step_that_is_no_number_is_not_known():
    agent = make(policy_horizon=2, policy_step_error=0.5)
    for error, horizon in ((math.inf, 0), (math.nan, 0), (0.51, 0), (0.5, 2)):
        agent.step_error = error
        assert agent.policy_terms().horizon == horizon


def test_a_policy_without_a_horizon_learns_from_all_rows():
    one, other = make(policy_horizon=0, policy_std=0.0), make(policy_horizon=0, policy_std=0.0)
    z = torch.randn(12, 6)
    one._update_policy(z, torch.ones(12))
    other._update_policy(z[:6], torch.ones(6))
    assert not torch.equal(one.policy_optimizer.flat, other.policy_optimizer.flat)


def test_a_policy_of_a_horizon_learns_from_the_models_share_of_the_batch():
    one, other = make(policy_horizon=1, policy_std=0.0), make(policy_horizon=1, policy_std=0.0)
    z = torch.randn(12, 6)
    one._update_policy(z, torch.ones(12))
    other._update_policy(z[:6], torch.ones(6))
    assert torch.equal(one.policy_optimizer.flat, other.policy_optimizer.flat)


@pytest.mark.parametrize("name", DYNAMICS)
def test_the_value_reads_the_slow_models_loop_state(name):
    """[z; a; LayerNorm(h)] by hand, in any shape; without value_loops [z; a]."""
    agent = make(value_loops=3, dynamics={"name": name})
    z, action = torch.randn(2, 5, 6), torch.rand(2, 5, A)
    with torch.no_grad():
        pair = agent.value_input(z, action)
        h = agent.slow_model.dynamics(z.view(10, 6), action.view(10, A), 3).h.view(2, 5, -1)
    standard = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(pair, torch.cat([z, action, standard], -1))
    assert (make().value_input(z, action) == torch.cat([z, action], -1)).all()


@KINDS
def test_a_value_that_reads_the_loop_state_trains_no_model_and_leads_the_policy_through_it(discrete):
    agent = make(discrete, value_loops=2, imagined_steps=1, policy_penalty=0.0)
    agent.update(filled_replay(discrete))
    for member in agent.value.members:  # deaf to z and a, so that the loop state alone is heard
        with torch.no_grad():
            member[0].weight[:, : 6 + A] = 0.0
    z = agent.encode(torch.as_tensor(observations(20)))
    for update, own in (
        (lambda: agent._update_policy(z, torch.ones(len(z))), {"policy"}),
        (lambda: agent._update_value(agent.value_input(z, agent.policy(z)[0]).detach(), *torch.ones(2, 20)), {"value"}),
    ):
        before = weights(agent)
        update()
        assert changed(before, weights(agent)) == own
    assert agent.policy_optimizer.flat.grad.abs().max() > 1e-3  # nothing but the loop state led it
    assert all(p.grad is None for p in agent.slow_model.parameters())


def test_rows_without_weight_teach_the_value_nothing():
    one, other = make(), make()
    pair, target = torch.randn(8, 6 + A), torch.randn(8)
    weight = (torch.arange(8) < 5).float()
    one._update_value(pair, target, weight)
    other._update_value(pair[:5], target[:5], torch.ones(5))
    torch.testing.assert_close(one.value_optimizer.flat, other.value_optimizer.flat)


def test_rows_without_weight_teach_the_policy_nothing():
    one, other = make(policy_penalty=0.1), make(policy_penalty=0.1)
    z = torch.randn(8, 6)
    one._update_policy(z, (torch.arange(8) < 5).float())
    other._update_policy(z[:5], torch.ones(5))
    torch.testing.assert_close(one.policy_optimizer.flat, other.policy_optimizer.flat)


def test_smoothing_noise_is_clipped(monkeypatch):
    agent, seen = make(smooth_std=100.0, smooth_clip=0.1), []
    monkeypatch.setattr(agent.value_target, "values", lambda pair: seen.append(pair[:, -A:]) or torch.zeros(2, 50))
    z = torch.randn(50, 6)
    agent._value_target(z, *torch.zeros(2, 3, 50), torch.ones(3, 50))
    with torch.no_grad():
        offset = (seen[0] - agent.policy_target(z)[0]).abs()
    assert offset.max() <= 0.1 + 1e-6 and (offset > 0.09).any()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_discrete_target_actions_is_random(share):
    agent = make(discrete=True, smooth_std=100.0, **{"smooth_share": share} if share else {})
    best = agent.policy_target(torch.randn(1, 6).expand(4000, -1))[0].detach()
    moved = (agent.smoothed(best, agent.generator).argmax(-1) != best.argmax(-1)).float().mean()
    assert moved == pytest.approx(share * (A - 1) / A, abs=0.03 if share else 0.0)


# ---- updates ------------------------------------------------------------------------------------------


HORIZON = {"policy_horizon": 2, "policy_std": 0.2, "policy_penalty_kept": 0.1}


@pytest.mark.parametrize("settings", [{}, HORIZON], ids=["value", "horizon"])
@KINDS
def test_update_moves_every_part(discrete, settings):
    agent, replay = make(discrete, **settings), filled_replay(discrete)
    before = weights(agent)
    named = [(module, dict(module.named_parameters())) for module in (agent.world_model, agent.value, agent.policy)]
    metrics = agent.update(replay)
    assert changed(before, weights(agent)) == before.keys()
    assert agent.updates == 1 and agent.value_optimizer.flat.requires_grad
    assert all(np.isfinite(float(value)) for value in metrics.values()), metrics
    agent.update(replay)  # zero initial output weights hold back the gradient of what is before them, once
    for module, parameters in named:
        assert [n for n, p in parameters.items() if not p.grad.any()] == [], type(module)
        assert all(p.requires_grad for p in parameters.values())
    assert not agent.value_target.members[0][0].weight.requires_grad


@pytest.mark.parametrize("model_every", [1, 2])
def test_targets_follow_by_tau(model_every):
    """That of a model that is updated every second time by what two steps of tau would do."""
    agent, replay = make(tau=0.3, model_tau=0.2, model_every=model_every), filled_replay()
    before = weights(agent)
    agent.update(replay)
    after = weights(agent)
    for name, tau, online in (
        ("value", 0.3, after["value"]),
        ("policy", 0.3, after["policy"]),
        ("model", 1.0 - 0.8**model_every, after["model"]),
    ):
        torch.testing.assert_close(after[f"target/{name}"], before[f"target/{name}"].lerp(online, tau))


def test_parts_are_updated_as_often_as_configured():
    agent, replay = make(model_every=2, policy_every=3), filled_replay()
    online, rows = {"model", "value", "policy"}, []
    for _ in range(6):
        before = weights(agent)
        agent.update(replay)
        rows.append(changed(before, weights(agent)) & online)
    value, model, policy = {"value"}, {"model", "value"}, {"policy", "value"}
    assert rows == [online, value, model, policy, model, value]


def test_each_loss_trains_its_own_part():
    agent = make()
    z = torch.randn(20, 6)
    for update, own in (
        (lambda: agent._update_policy(z, torch.ones(len(z))), {"policy"}),
        (lambda: agent._update_value(torch.randn(20, 6 + A), torch.ones(20), torch.ones(20)), {"value"}),
    ):
        before = weights(agent)
        update()
        assert changed(before, weights(agent)) == own
    assert all(p.requires_grad for p in agent.value.parameters())
    obs, ones = torch.randn(3, 6, OBS), torch.ones(2, 6)
    before = weights(agent)
    agent._update_model(obs, torch.zeros(2, 6, A), ones, ones * 0, ones)
    assert changed(before, weights(agent)) == {"model"}


def test_policy_climbs_a_known_value(monkeypatch):
    agent = make(learning_rate=0.01, policy_penalty=0.0)

    def known(pair):
        return -(pair[..., -A:] - 0.5).square().sum(-1) - 1.0

    monkeypatch.setattr(agent.value, "values", lambda pair: known(pair).expand(2, -1))
    monkeypatch.setattr(agent.value, "first_value", known, raising=False)
    z = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(150):
        agent._update_policy(z, torch.ones(20))
    torch.testing.assert_close(agent.policy(z)[0].detach(), torch.full((20, A), 0.5), atol=0.1, rtol=0)


@pytest.mark.parametrize("loss", ["huber", "two_hot"])
def test_value_learns_its_target(loss):
    agent = make(learning_rate=0.01, value_loss=loss)
    z, action = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(20, A)
    target = torch.linspace(-30, 30, 20)
    for _ in range(1500):  # of two-hot, a stray 0.01 % of the outermost bin, 22,025, is worth 2.2: tails fade last
        agent._update_value(agent.value_input(z, action), target, torch.ones_like(target))
    learnt = agent.value.values(agent.value_input(z, action)).detach()
    torch.testing.assert_close(learnt, target.expand(2, -1), atol=3.0, rtol=0.15)


@pytest.mark.parametrize(("horizon", "n_step"), [(4, 2), (1, 3)])
def test_model_is_trained_on_the_sampled_subsequences(monkeypatch, horizon, n_step):
    """horizon and n_step differ: each part gets its own cut of one draw, from its beginning."""
    agent, replay, cuts, drawn = make(horizon=horizon, n_step=n_step), filled_replay(), [], []
    draw = replay.sample
    monkeypatch.setattr(replay, "sample", lambda *a, **kw: drawn.append(draw(*a, **kw)) or drawn[-1])
    monkeypatch.setattr(agent, "_update_model", lambda *xs: cuts.append(xs) or {})
    agent.update(replay)
    h, batch = horizon, drawn[0]
    expected = [batch.obs[: h + 1, :6], *(x[:h, :6] for x in batch[1:5])]
    assert all((a.numpy() == b).all() for a, b in zip(cuts[0], expected, strict=True))


def test_targets_are_made_by_the_slow_copies(monkeypatch):
    """Of the encoder, of the policy and of the values: what was learnt a moment ago is not in them yet."""
    agent, replay, seen = make(tau=0.0, model_tau=0.0, horizon=2, n_step=2), filled_replay(), []
    slow = copy.deepcopy((agent.slow_model, agent.policy_target, agent.value_target))
    for _ in range(3):
        agent.update(replay)  # tau = 0: the copies stay where they were
    z = torch.randn(5, 6)
    agent.generator.manual_seed(3)
    found = agent._value_target(z, *(torch.zeros(2, 5),) * 2, torch.ones(2, 5))
    agent.generator.manual_seed(3)
    action = agent.smoothed(slow[1](z)[0], agent.generator)
    expected = 0.25 * slow[2].values(agent.value_input(z, action)).amin(0)
    torch.testing.assert_close(found, expected)
    assert (slow[1](z)[0] - agent.policy(z)[0]).abs().max() > 1e-4
    losses = planner.world_model_losses

    def spy(model, rollout, z_target, *rest):
        seen.append(z_target)
        return losses(model, rollout, z_target, *rest)

    monkeypatch.setattr(planner, "world_model_losses", spy)
    obs, ones = torch.randn(3, 6, OBS), torch.ones(2, 6)
    agent._update_model(obs, torch.zeros(2, 6, A), ones, ones * 0, ones)
    torch.testing.assert_close(seen[0], slow[0].encode(obs[1:]))
    assert (seen[0] - agent.world_model.encode(obs[1:])).abs().max() > 1e-4


def test_exploration_becomes_less_and_begins_anew_with_an_episode():
    """The noise around a fixed policy: its first spread, half-way, its last; correlated within an episode alone."""
    words = {"seed_steps": 0, "plan_samples": 0, "explore_correlation": 0.9, "explore_decay_steps": 10**9}
    agent = make(explore_std=0.4, explore_std_final=0.1, **words)
    for parameter in agent.policy.parameters():
        torch.nn.init.zeros_(parameter)
    obs, first = observations(4000), np.arange(4000) < 2000
    for share, std in ((0.0, 0.4), (0.5, 0.25), (1.0, 0.1), (5.0, 0.1)):
        agent.acted = int(share * 10**9)
        before = agent.act(obs, first=np.ones(4000, bool), explore=True)
        after = agent.act(obs, first=first, explore=True)
        assert before.std() == pytest.approx(std, rel=0.1 if std > 0.3 else 0.03)  # the widest is cut off at 1
        new, old = (np.corrcoef(before[rows, 0], after[rows, 0])[0, 1] for rows in (first, ~first))
        assert abs(new) < 0.1 and old > 0.7


def test_learn_does_the_updates_that_are_due():
    agent, replay = make(seed_steps=10, update_ratio=0.5), filled_replay()
    done = []
    for agent_steps in (4, 9, 10, 11, 12, 20):
        metrics = agent.learn(replay, agent_steps)
        done.append((agent.updates, metrics is not None))
    assert done == [(0, False), (0, False), (5, True), (5, False), (6, True), (10, True)]


def test_what_learn_reports_is_the_latest_of_every_part():
    """Of several updates at once too, the last of which need not have been one of the policy or of the model."""
    agent = make(seed_steps=0, update_ratio=2.0, policy_every=2, model_every=4)
    for agent_steps in (2, 4, 6):
        metrics = agent.learn(filled_replay(), agent_steps)
        assert {"loss/policy", "loss/value", "loss/consistency"} <= set(metrics)


def test_learn_counts_more_than_one_update_a_step():
    agent = make(seed_steps=0, update_ratio=2.5)
    for agent_steps in (1, 2):
        agent.learn(filled_replay(), agent_steps)
    assert agent.updates == 5


def test_after_a_reset_the_networks_begin_anew_and_catch_up():
    settings = {"seed_steps": 0, "update_ratio": 1, "novelty_spread": 0.0}
    agent, replay = make(reset_every=10, reset_updates=4, **settings), filled_replay()
    fresh = make_agent(config(**settings), OBS, A, False).state_dict()
    agent.learn(replay, 9)
    assert agent.updates == 9 and not same(agent.state_dict()["optimizers"], fresh["optimizers"])
    at_update = []
    update, agent.update = agent.update, lambda _: (at_update.append(copy.deepcopy(agent.state_dict())), update(_))[1]
    agent.learn(replay, 10)
    assert agent.updates == 9 + 1 + 4 and len(at_update) == 5
    assert same(at_update[0]["optimizers"], fresh["optimizers"]) and same(at_update[0]["targets"], fresh["targets"])
    agent.learn(replay, 19)  # no further one until the next multiple
    assert agent.updates == 19 + 4
    agent.learn(replay, 20)
    assert agent.updates == 20 + 2 * 4
    assert same(at_update[14]["optimizers"], fresh["optimizers"])


def test_several_multiples_that_pass_in_one_step_are_one_reset():
    agent = make(reset_every=10, reset_updates=4, seed_steps=0, update_ratio=1)
    agent.learn(filled_replay(), 35)
    assert agent.updates == 35 + 4


def test_a_reset_forgets_nothing_of_what_was_seen():
    agent = make(reset_every=10, reset_updates=0, seed_steps=0, plan_collect=True, novelty_spread=1.0)
    agent.learn(filled_replay(), 9)
    before = copy.deepcopy((agent.novelty.state_dict(), agent.largest_reward))
    agent.update = lambda _: {}
    agent.updates = 10
    agent.learn(filled_replay(), 10)
    assert agent.resets == 1 and same(before, (agent.novelty.state_dict(), agent.largest_reward))


def test_learn_waits_for_the_first_transition():
    agent, replay = make(seed_steps=0), Replay(100, N, OBS, A)
    zeros = np.zeros(N)
    replay.add(observations(), np.zeros((N, A)), zeros, zeros > 0, zeros > 0)
    assert agent.learn(replay, N) is None


# ---- keeping ------------------------------------------------------------------------------------------


def test_an_agent_that_was_saved_on_another_kind_of_device_is_restored():
    """A CUDA generator's state is of 16 bytes, which one on the CPU refuses."""
    first, second = make(plan_collect=True), make(seed=5, plan_collect=True)
    first.act(observations(), explore=True)
    state = copy.deepcopy(first.state_dict()) | {"generator": torch.zeros(16, dtype=torch.uint8)}
    second.load_state_dict(state)
    assert same(first.state_dict()["optimizers"], second.state_dict()["optimizers"])
    assert (first.evaluator().act(observations()) == second.evaluator().act(observations())).all()
    second.act(observations(), explore=True)


@KINDS
@pytest.mark.parametrize(
    "settings", [{"value_loss": "two_hot"}, {"value_loss": "huber"}, HORIZON], ids=["two_hot", "huber", "horizon"]
)
def test_a_restored_agent_goes_on_bit_for_bit(settings, discrete):
    first, second = (make(discrete, seed=seed, plan_collect=True, **settings) for seed in (0, 5))
    for step in range(5):
        first.act(observations(seed=step), explore=True)
        first.update(filled_replay(discrete, seed=step))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert same(first.state_dict(), second.state_dict())
    for step in range(3):
        a, b = (one.update(filled_replay(discrete, seed=50 + step)) for one in (first, second))
        assert same(a, b)
        actions = [one.act(observations(seed=90 + step), explore=True) for one in (first, second)]
        assert (actions[0] == actions[1]).all()
    assert same(first.state_dict(), second.state_dict())


def test_state_of_another_agent_is_refused():
    agent = make()
    for other in (make(encoder={"hidden_dim": 8}), make(value_dim=8)):
        with pytest.raises((KeyError, RuntimeError)):
            agent.load_state_dict(other.state_dict())
    with pytest.raises(KeyError):
        agent.load_state_dict({})


@KINDS
def test_the_activation_reaches_every_network(discrete):
    networks = ("world_model", "slow_model", "value", "value_target", "policy", "policy_target")
    for name, kind, other in (("relu", nn.ReLU, nn.SiLU), ("silu", nn.SiLU, nn.ReLU)):
        agent = make(discrete, activation=name)
        for network in networks:
            kinds = [type(module) for module in getattr(agent, network).modules()]
            assert kind in kinds and other not in kinds, network
    before = weights(agent)
    agent.update(filled_replay(discrete))
    assert {"model", "value", "policy"} <= changed(before, weights(agent))


@KINDS
def test_two_agents_of_one_seed_are_equal_and_of_two_are_not(discrete):
    runs = []
    for seed in (1, 1, 2):
        agent = make(discrete, seed=seed)
        actions = [agent.act(observations(seed=step), explore=True) for step in range(5)]
        agent.update(filled_replay(discrete))
        runs.append((actions, weights(agent)))
    assert changed(runs[0][1], runs[1][1]) == set()
    assert all((a == b).all() for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert changed(runs[0][1], runs[2][1]) == runs[0][1].keys()


@pytest.mark.parametrize("name", ["looped", "single_pass", "stacked", "wide", "deep_thin"])
def test_every_dynamics_trains_acts_and_is_looked_at(name):
    agent, replay = make(dynamics={"name": name}), filled_replay()
    agent.update(replay)
    check_actions(agent.act(observations()), False)
    before, draws = copy.deepcopy(agent.state_dict()), replay.rng.bit_generator.state
    found = agent.diagnostics(replay)
    assert same(before, agent.state_dict()) and replay.rng.bit_generator.state == draws
    assert all(isinstance(value, float) for value in found.values())
    assert found["loop/mean"] >= 1.0
    counts = dict(agent.parameter_counts)
    modules = (agent.world_model, agent.policy, agent.value)
    assert counts.pop("total") == sum(counts.values()) == sum(p.numel() for m in modules for p in m.parameters())


@pytest.mark.parametrize(("plan_loops", "mean"), [(5, 5.0), (0, None)])
def test_the_loops_that_are_logged_are_those_of_a_plan(plan_loops, mean):
    found = make(plan_loops=plan_loops).diagnostics(filled_replay())
    assert found["loop/mean"] == (mean or found["loop/adaptive_mean"]) and found["loop/adaptive_max"] <= 6


@pytest.mark.parametrize("patience", [1, 2])
def test_halting_by_the_prediction_reads_reward_and_value_while_acting(patience):
    """Rewards that still change keep the loop going, and so do values where rewards say nothing."""
    loop = {"halting": "prediction", "halt_tolerance": 1e-3, "max_loops": 60, "patience": patience}
    agent, counts = make(dynamics=loop, plan_loops=0, discount=0.9), []
    for module in (agent.slow_model, agent.policy, agent.value):
        module.double()
    z = agent.encode(torch.as_tensor(observations(5)).double())
    action = torch.rand(5, agent.action_dim).double() * 2 - 1
    dynamics, stream = agent.slow_model.dynamics, torch.Generator().manual_seed(1)
    for valued in (False, True):  # what alone says something: the reward, or the value
        with torch.no_grad():
            for last in (member[-1] for member in agent.value.members):
                last.weight.normal_(0.0, 1.0 if valued else 1e-9, generator=stream)
            agent.slow_model.reward.layers[-1][-1].weight.normal_(0.0, 1e-9 if valued else 0.3, generator=stream)
            states = dynamics.trajectory(z, action, 60)  # (61, 5, D)
            worth = torch.stack([agent.worth_of_step(z, h) for h in states])  # (61, 5, 2)
            loops = dynamics(z, action).loops
            reward, continuation = agent.slow_model.predict(states)
            value = agent.state_value(dynamics.coda(z.expand(61, -1, -1), states))
        torch.testing.assert_close(worth, torch.stack([reward, 0.9 * continuation * value], -1), rtol=1e-9, atol=1e-9)
        still = (worth.diff(dim=0).abs().amax(-1) < 1e-3).int()  # (60, 5)
        if patience == 2:
            still[1:] *= still[:-1].clone()
            still[0] = 0
        assert loops.tolist() == (still.argmax(0) + 1).tolist()
        assert patience < int(loops.min()) and int(loops.max()) < 60
        counts.append(loops)
    assert not torch.equal(*counts)


@pytest.mark.parametrize(
    "settings",
    [
        {"halting": "prediction", "patience": 2},
        {"halting": "certified", "solver": "anderson"},
        {"gradient": "implicit", "halt_tolerance": 1e-3},
        {"depth_sampler": "lognormal_poisson"},
        {"mode": "soft"},
        {"block_layers": 2, "order": "aabb", "coda_layers": 2, "max_loops": 4},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_the_loop_reach_it_and_train(settings):
    agent = make(dynamics=settings, plan_loops=0)
    dynamics = agent.world_model.dynamics
    assert ("patience" in settings) == isinstance(dynamics.halting, PatientHalting)
    assert isinstance(dynamics.solver, SOLVERS[settings.get("solver", "plain")])
    assert isinstance(dynamics.gradient, GRADIENTS[settings.get("gradient", "unrolled")])
    assert dynamics.depth_sampler == settings.get("depth_sampler", "poisson")
    before = weights(agent)
    agent.update(filled_replay())
    assert "model" in changed(before, weights(agent))
    check_actions(agent.act(observations()), False)


def test_the_encoder_learns_at_a_rate_of_its_own():
    still = []
    for rate in (0.0, 1.0):
        agent = make(encoder_rate=rate)
        before = {name: p.clone() for name, p in agent.world_model.named_parameters()}
        agent.update(filled_replay())
        still.append({name for name, p in agent.world_model.named_parameters() if torch.equal(p, before[name])})
    encoder = {name for name in before if name.startswith("encoder.")}
    assert encoder and still[0] == still[1] | encoder and not encoder & still[1]


@KINDS
def test_latents_learn_to_tell_the_observation_where_that_has_a_weight(discrete, tmp_path):
    ends = []
    for weight in (0.0, 1e-9, 1.0):
        agent = make(discrete, observation_weight=weight, early_weight=0.5)
        metrics = agent.update(filled_replay(discrete))
        told = {name for name in metrics if "observation" in name}
        assert told == ({"loss/observation", "loss/early_observation"} if weight else set())
        assert (agent.world_model.decoder is None) == (weight == 0.0)
        ends.append(copy.deepcopy(agent.world_model.encoder.state_dict()))
    assert all(not torch.equal(ends[1][name], ends[2][name]) for name in ends[1]), "the encoder learns by it"
    counts = dict(agent.parameter_counts)
    assert counts.pop("total") == sum(counts.values())
    assert counts["heads"] - make(discrete).parameter_counts["heads"] == 6 * OBS + OBS
    assert {"latent/variance", "latent/rank"} <= agent.diagnostics(filled_replay(discrete)).keys()
    again = make(discrete, observation_weight=1.0, early_weight=0.5, seed=1)
    again.load_state_dict(agent.state_dict())
    assert same(agent.state_dict(), again.state_dict())


@pytest.mark.parametrize("mode", ["certified", "soft"])
def test_an_earlier_loop_is_trained_where_it_has_a_weight(mode):
    ends = []
    for weight in (0.0, 1.0):
        agent = make(early_weight=weight, dynamics={"mode": mode})
        metrics = agent.update(filled_replay())
        assert ("loss/jacobian" in metrics) == (mode == "soft")
        assert ("loss/early_consistency" in metrics) == (weight > 0)
        ends.append(weights(agent))
    assert "model" in changed(*ends)


@pytest.mark.parametrize(
    "case",
    [
        {"dynamics": {"min_loops": 3, "mean_loops": 2}},
        {"dynamics": {"halt_tolerance": 0.0}},
        {"encoder": {"latent_dim": 1}},
    ],
    ids=str,
)
def test_impossible_configs_are_refused_by_the_config(case):
    with pytest.raises(ConfigError):
        make(**case)


@pytest.mark.parametrize("loss", ["huber", "two_hot"])
def test_transitions_are_prioritised_by_how_far_their_values_were_off(loss):
    agent, replay, seen = make(priority=0.5, value_loss=loss), filled_replay(), {}
    for member in agent.value.members:
        member[-1].weight.data.mul_(0.05)  # so that some errors are small, others not
    before = replay.priorities.weight.copy()
    update_value, sample = agent._update_value, replay.sample

    def watched(pair, target, weight):
        with torch.no_grad():
            seen["error"] = (agent.value.values(pair) - target).abs().amax(0)
        return update_value(pair, target, weight)

    agent._update_value = watched
    replay.sample = lambda *args: seen.setdefault("batch", sample(*args))
    agent.update(replay)
    start, after = seen["batch"].start, replay.priorities.weight
    if loss == "huber":  # alike within a unit, by their size beyond
        error = (seen["error"] / agent.value.unit).clamp_min(1.0)
        assert 0 < (error == 1.0).sum() < len(error)
    else:
        error = seen["error"] + 1e-3
    last = dict(zip(start.tolist(), error.sqrt().tolist(), strict=True))  # of equal rows the last
    np.testing.assert_allclose([after[row] for row in last], list(last.values()), rtol=1e-4)
    rest = np.setdiff1d(np.arange(len(before)), start)
    np.testing.assert_array_equal(after[rest], before[rest])
    assert replay.new_priority == pytest.approx(float(after.max()))


def test_without_priorities_all_transitions_stay_alike():
    agent, replay = make(priority=0.0), filled_replay()
    agent.update(replay)
    assert set(replay.priorities.weight.tolist()) == {0.0, 1.0}


def test_values_that_diverged_do_not_spoil_the_replay():
    agent, replay = make(priority=0.4), filled_replay()
    agent._prioritise(replay, replay.sample(3, 1).start, torch.tensor([float("nan"), float("inf"), 1.0]))
    assert np.isfinite(replay.priorities.weight).all()
    replay.sample(5, 1)


def test_padding_of_a_batch_trains_nothing():
    """What stands in masked steps must not matter to any part of the update."""
    batch = filled_replay().sample(12, 3)
    spoilt = Batch(*(x.copy() for x in batch))
    masked = batch.mask == 0
    assert masked.any()
    spoilt.action[masked] = 0.77
    ends = []
    for one in (batch, spoilt):
        agent = make(n_step=3, horizon=3, priority=0.0)
        agent.update(SimpleNamespace(sample=lambda *_, one=one: one))
        ends.append(weights(agent))
    assert changed(*ends) == set()
