"""How the planner agent acts: MPPI through the slow world model, around its policy, with its values at the end."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from agents.actor_critic import ContinuousPolicy, DiscretePolicy, ValueEnsemble
from agents.exploration import CorrelatedNoise
from agents.mppi import PlanBudget, all_sequences, draw, exhaustive, mppi, score_all
from agents.novelty import Novelty
from loopwm.config import PlannerConfig
from loopwm.dynamics import LoopedDynamics
from loopwm.model.world_model import WorldModel


class ActingAgent:
    """The half of ``PlannerAgent`` that chooses actions; its networks are trained by the other half.

    Args:
        slow_model, policy, value: on ``device``. obs_dim: O. action_dim: A.
        config: every coefficient. seed: of exploration and planning.
        novelty: of latents, which exploring plans look for where all seems alike; None: they do not.
    """

    def __init__(
        self,
        slow_model: WorldModel,
        policy: ContinuousPolicy | DiscretePolicy,
        value: ValueEnsemble,
        obs_dim: int,
        action_dim: int,
        config: PlannerConfig,
        *,
        seed: int,
        device: torch.device,
        novelty: Novelty | None = None,
    ):
        self.slow_model, self.policy, self.value, self.novelty = slow_model, policy, value, novelty
        self.obs_dim = obs_dim
        self.action_dim, self.discrete, self.config, self.device = action_dim, policy.discrete, config, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.acted = 0  # agent steps chosen while exploring
        self.largest_reward = torch.zeros((), device=device)  # in size, that was learnt from
        self.seeking = 0.0  # share of the last thousand exploring steps, about, that were after what is new
        self._noise = CorrelatedNoise(config.explore_correlation)
        slow_model.halt_on(self.worth_of_step)  # the model's own heads know no value

    def encode(self, obs: Tensor) -> Tensor:
        """obs (..., O) -> z (..., Z) by the slow copy of the world model.

        Its latents are what the world model learns to predict, and what value, policy and planner see: they move
        slowly under the value's feet (MR.Q, 2501.16142, holds its encoder fixed between target updates).
        """
        return self.slow_model.encode(obs)

    def value_input(self, z: Tensor, action: Tensor) -> Tensor:
        """What the value reads of z (B, ..., Z) and action (B, ..., A): (B, ..., Z + A), or (B, ..., Z + A + D).

        With ``value_loops`` that includes the loop state which the slow model makes of the two, from which it predicts
        reward and next latent: features of a state and an action that the model has learnt (z_sa of MR.Q, 2501.16142,
        and of TD7, 2306.02451, whose values read z and a beside it), and the policy's gradient goes through them.
        """
        if not self.config.value_loops:
            return torch.cat([z, action], -1)
        h = self.slow_model.dynamics(z.flatten(0, -2), action.flatten(0, -2), self.config.value_loops).h
        h = torch.nn.functional.layer_norm(h, h.shape[-1:])  # of one scale, whatever the loop makes of it
        return torch.cat([z, action, h.view(*z.shape[:-1], h.shape[-1])], -1)

    def state_value(self, z: Tensor) -> Tensor:
        """z (B, ..., Z) -> value (B, ...) of what the policy does there, the mean of the ensemble."""
        return self.value.values(self.value_input(z, self.policy(z)[0])).mean(0)

    def worth_of_step(self, z: Tensor, h: Tensor) -> Tensor:
        """Reward and discounted value (B, 2) of the step from z (B, Z) whose loop stands at h (B, D).

        What ``dynamics.halting=prediction`` looks at while acting: plans rank their sequences by the sum of such.
        """
        reward, continuation = self.slow_model.predict(h)
        value = self.state_value(self.slow_model.dynamics.coda(z, h))
        return torch.stack([reward, self.config.discount * continuation * value], -1)

    @property
    def looped(self) -> bool:
        """Whether its model's depth can be chosen."""
        return isinstance(self.slow_model.dynamics, LoopedDynamics)

    @property
    def budget(self) -> PlanBudget:
        """What a plan may cost now; its spread shrinks as the agent explores, to ``plan_std_final``."""
        c = self.config
        policy_samples = max(1, c.plan_samples // 4)
        elites = max(1, c.plan_samples // 5)
        std = self._annealed(c.plan_std, c.plan_std_final)
        return PlanBudget(
            c.plan_samples,
            c.plan_iterations,
            c.plan_horizon,
            policy_samples,
            elites,
            max_std=std,
            correlation=c.plan_correlation,
        )

    @torch.no_grad()
    def act(self, obs: np.ndarray, *, first: np.ndarray | None = None, explore: bool = False) -> np.ndarray:
        """See ``Agent.act``. The first ``seed_steps`` exploring actions are random.

        Raises:
            ValueError: obs of another shape than (N, O), or not finite.
        """
        if obs.ndim != 2 or obs.shape[1] != self.obs_dim or not np.isfinite(obs).all():
            wrong = "numbers that are not finite" if obs.shape[1:] == (self.obs_dim,) else f"shape {obs.shape}"
            raise ValueError(f"act takes finite observations (N, {self.obs_dim}), got {wrong}")
        envs = obs.shape[0]
        if explore:
            self.acted += envs
            if self.acted <= self.config.seed_steps:
                return self._to_env(self._explore(torch.zeros(envs, self.action_dim, device=self.device), first, 1.0))
        dtype = next(self.policy.parameters()).dtype
        z = self.encode(torch.as_tensor(obs, dtype=dtype, device=self.device))  # (N, Z)
        if self.config.plan_samples > 0 and (self.config.plan_collect or not explore):
            action = self.plan(z, explore)
        else:
            action = self.policy(z)[0]  # (N, A)
        return self._to_env(self._explore(action, first, self._noise_std()) if explore else action)

    def plan(self, z: Tensor, explore: bool = False) -> Tensor:
        """MPPI, or an exhaustive search, from z (N, Z) -> action (N, A), around what the policy would do.

        It starts from the policy's own sequence, not from the previous plan: with a trained policy that search came
        out worse than the policy it began with (docs/ablations.md). Young policies need a wide one, hence ``plan_std``.
        With ``plan_exhaustive`` it takes the best of all sequences, where there are no more than it may score.

        Where no sequence is worth more than another there is nothing to gain by it. An exploring plan seeks what is
        new there instead, with probability exp(-spread of the scores / ``novelty_spread``): in units of the largest
        reward where that is below one, lest an environment of small rewards be explored for ever.
        """
        budget = self.budget
        with self.slow_model.frozen():
            if self._compares_all(budget):
                plan = exhaustive(z, self.policy(z)[0], self.score, budget.horizon)
            else:
                prior = self._policy_sequences(z, budget)
                plan = mppi(z, prior, prior[:, :, 0], self.score, budget, self.generator, self.discrete)
            if self.novelty is None or not explore:
                return plan.action
            unit = torch.where(self.largest_reward > 0.0, self.largest_reward.clamp_max(1.0), 1.0)
            flat = torch.exp(-plan.spread / (self.config.novelty_spread * unit))  # (N,)
            seeks = torch.rand(flat.shape, generator=self.generator, device=self.device) < flat
            self.seeking += 0.001 * (float(seeks.float().mean()) - self.seeking)
            return torch.where(seeks.unsqueeze(1), self.seek(z), plan.action) if seeks.any() else plan.action

    def seek(self, z: Tensor) -> Tensor:
        """Of random actions the one (N, A) that leads from z (N, Z) to the newest latents if it is held for some steps.

        Held, since steps of a plan are short: three of them that differ hardly leave the place.
        """
        held, count = self.config.novelty_hold, max(1, self.config.plan_samples // 2)
        like = torch.full(
            (1, len(z), self.action_dim), 1.0 / self.action_dim if self.discrete else 0.0, device=self.device
        )
        tried = draw(like, torch.ones_like(like), count, self.generator, self.discrete)  # (1, N, S, A)
        newness = score_all(self.newness, z, tried.expand(held, -1, -1, -1))  # (N, S)
        return tried[0, torch.arange(len(z), device=self.device), newness.argmax(1)]

    def _compares_all(self, budget: PlanBudget) -> bool:
        """Whether a plan scores every sequence there is, as ``plan_exhaustive`` asks where they are no more."""
        few = self.discrete and self.action_dim**budget.horizon <= budget.samples
        return few and self.config.plan_exhaustive

    def draw_plans(self, z: Tensor) -> Tensor:
        """The sequences (H, N, S, A) that a plan from z (N, Z) begins with: what it chooses among."""
        budget = self.budget
        if self._compares_all(budget):
            return all_sequences(self.action_dim, budget.horizon, z).unsqueeze(1).expand(-1, len(z), -1, -1)
        mean = self._policy_sequences(z, budget)[:, :, 0]  # (H, N, A)
        std = torch.full_like(mean, budget.max_std)
        return draw(mean, std, budget.samples, self.generator, self.discrete, budget.correlation)

    def _policy_sequences(self, z: Tensor, budget: PlanBudget) -> Tensor:
        """Imagined policy action sequences (H, N, P, A): the first is the policy's own, the others are perturbed."""
        rows = z.repeat_interleave(budget.policy_samples, 0)  # (N * P, Z)
        own = torch.arange(rows.shape[0], device=self.device) % budget.policy_samples == 0
        actions = []
        for step in range(budget.horizon):
            action = self.policy(rows)[0]
            noisy = self.policy.perturb(action, self.config.plan_policy_std, 1.0, self.generator)
            actions.append(torch.where(own.unsqueeze(1), action, noisy))
            if step + 1 < budget.horizon:
                rows = self.slow_model.dynamics(rows, actions[-1], self._plan_depth()).z_next
        return torch.stack(actions).view(budget.horizon, z.shape[0], budget.policy_samples, -1)

    def score(self, z: Tensor, actions: Tensor) -> Tensor:
        """Imagined return (R,) of actions (H, R, A) from z (R, Z), with the value at the end."""
        rollout = self.slow_model.rollout(z, actions, self._plan_depth())
        reward, continuation = self.slow_model.predict(rollout.h)  # (H, R)
        discount = self.config.discount * continuation
        value = self.state_value(rollout.z[-1])  # (R,)
        for t in reversed(range(actions.shape[0])):
            value = reward[t] + discount[t] * value
        return value

    def imagine(
        self, z: Tensor, action: Tensor, act: Callable[[Tensor], Tensor], horizon: int
    ) -> tuple[Tensor | float, Tensor | float, Tensor]:
        """Imagine ``horizon`` steps from z (B, Z), of action (B, A) and then of act(z) (B, A), with their gradient.

        Returns their discounted reward (B,), what a value after them counts (B,), and the ``value_input`` for it.
        """
        reward_sum, discount = 0.0, 1.0
        for _ in range(horizon):
            out = self.slow_model.dynamics(z, action, self._plan_depth())
            reward, continuation = self.slow_model.predict(out.h)
            reward_sum, discount = reward_sum + discount * reward, discount * self.config.discount * continuation
            z = out.z_next
            action = act(z)
        return reward_sum, discount, self.value_input(z, action)

    def newness(self, z: Tensor, actions: Tensor) -> Tensor:
        """Sum (R,) of the novelties of the latents that actions (H, R, A) lead through from z (R, Z)."""
        return self.novelty(self.slow_model.rollout(z, actions, self._plan_depth()).z[1:]).sum(0)

    def _plan_depth(self) -> int | None:
        return self.config.plan_loops or None

    def _noise_std(self) -> float:
        return self._annealed(self.config.explore_std, self.config.explore_std_final)

    def _annealed(self, start: float, end: float) -> float:
        """From start to end in a straight line, over ``explore_decay_steps`` exploring steps after the seed phase."""
        c = self.config
        share = min(1.0, max(0.0, (self.acted - c.seed_steps) / max(1, c.explore_decay_steps)))
        return start + share * (end - start)

    def _explore(self, action: Tensor, first: np.ndarray | None, std: float) -> Tensor:
        """Add noise that is correlated over time; for discrete actions, epsilon-greedy with epsilon = std."""
        if self.discrete:
            return self.policy.perturb(action, std, 1.0, self.generator)
        return (action + std * self._noise(action, first, self.generator)).clamp(-1.0, 1.0)

    def smoothed(self, action: Tensor, generator: torch.Generator) -> Tensor:
        """Action (..., A) as the value's target takes it: near it, or, of discrete ones, a random one at times."""
        c = self.config
        return self.policy.perturb(action, c.smooth_share if self.discrete else c.smooth_std, c.smooth_clip, generator)

    def _to_env(self, action: Tensor) -> np.ndarray:
        action = action.argmax(-1) if self.discrete else action
        return action.cpu().numpy()

    def encode_action(self, action: np.ndarray) -> np.ndarray:
        """See ``Agent.encode_action``."""
        return np.eye(self.action_dim, dtype=np.float32)[action] if self.discrete else action

    def evaluator(self) -> ActingAgent:
        """See ``Agent.evaluator``: deterministic, the same plan noise for every evaluation, at most ``eval_samples``.

        More plans make better data, but a trained agent's return no better (docs/ablations.md), and evaluations slow.
        """
        view, c = copy.copy(self), self.config
        view.config = dataclasses.replace(c, plan_samples=min(c.plan_samples, c.eval_samples))
        view.generator = torch.Generator(self.device).manual_seed(0)
        view._noise = CorrelatedNoise(c.explore_correlation)
        return view
