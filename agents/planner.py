"""The planner agent: a policy prior and a value ensemble on looped latents, and MPPI through the world model to act.

After TD-MPC2 (2310.16828) and MR.Q (2501.16142): the world model is trained by multi-step latent consistency, reward
and continuation; the value off it, on real latents (with ``imagined_steps`` on imagined ones too), by n-step double
Q-learning (TD3 style); the policy by the gradient of its return through some steps of the model and the value after
them (``policy_horizon``), or by the value's alone where the model knows too little of a step. Here is how it learns;
how it acts stands in agents/acting.py.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.acting import ActingAgent
from agents.actor_critic import ContinuousPolicy, DiscretePolicy, ValueEnsemble
from agents.novelty import Novelty
from agents.optim import EMATarget, FlatAdam
from loopwm.config import PlannerConfig
from loopwm.model.encoders import latent_spread, step_error
from loopwm.model.losses import masked_mean, weighted_sum, world_model_losses
from loopwm.model.world_model import WorldModel
from loopwm.training.replay import Batch, Earned

PRIORITY_FLOOR = 1e-3  # so that a transition which is known today may be drawn again; of values without a unit
REFRESH = 250  # updates between looks at the replay: the largest priority, the mean size of a reward, the step's error
LEAST_UNIT = 1e-3  # of the values, where hardly any reward has been seen


class PolicyTerms(NamedTuple):
    """What the policy learns by, see ``PlannerConfig``."""

    horizon: int  # imagined agent steps that its gradient goes through
    std: float  # noise on its actions, action units
    penalty: float  # weight of its squared pre-activations


class PlannerAgent(ActingAgent):
    """See the module. Implements ``loopwm.training.protocols.Agent``.

    Args:
        world_model: on ``device``; ``ActingAgent`` acts by a slow copy of it, and says what the others are.
        seed: of exploration, depths and planning.
    """

    def __init__(
        self,
        world_model: WorldModel,
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
        acting = (copy.deepcopy(world_model), policy, value, obs_dim, action_dim, config)
        super().__init__(*acting, seed=seed, device=device, novelty=novelty)
        self.world_model = world_model
        self.parameter_counts = {
            "encoder": _count(world_model.encoder),
            "dynamics": _count(world_model.dynamics),
            "heads": sum(_count(head) for head in world_model.heads()),
            "policy": _count(policy),
            "value": _count(value),
            "novelty": 0 if novelty is None else _count(novelty.predictor),
        }
        self.parameter_counts["total"] = sum(self.parameter_counts.values())
        c = config
        first = _count(world_model.encoder)  # of the model's parameters they come first
        self.model_optimizer = FlatAdam(
            [world_model], c.learning_rate, c.clip_norm, lead=first, lead_rate=c.encoder_rate
        )
        self.value_optimizer = FlatAdam([value], c.learning_rate, c.clip_norm)
        self.policy_optimizer = FlatAdam([policy], c.learning_rate, c.clip_norm)
        self.value_target, self.policy_target = copy.deepcopy(value), copy.deepcopy(policy)
        self.targets = {
            "value": EMATarget(self.value_optimizer, self.value_target, c.tau),
            "policy": EMATarget(self.policy_optimizer, self.policy_target, c.tau),
            # The model moves once in ``model_every`` updates, and so does its slow copy: the same pace by the frame.
            "model": EMATarget(self.model_optimizer, self.slow_model, 1.0 - (1.0 - c.model_tau) ** c.model_every),
        }
        if novelty is not None:
            self.novelty_optimizer = FlatAdam([novelty.predictor], c.learning_rate, c.clip_norm)
        self.depth_generator = torch.Generator().manual_seed(seed + 1)
        self.updates = 0
        self.step_error = math.inf  # of the model, when it was last looked at
        self.resets, self.caught_up = 0, 0  # multiples of reset_every that were passed, updates made for them
        self._beginning = {name: copy.deepcopy(o.state_dict()) for name, o in self._optimizers().items()}

    # ---- learning -----------------------------------------------------------------------------------------------

    def learn(self, replay: Any, agent_steps: int) -> dict[str, float] | None:
        """Do the updates that are due: ``update_ratio`` for each agent step, and ``reset_updates`` for each reset."""
        c = self.config
        if agent_steps < c.seed_steps or len(replay) < 2:
            return None
        if c.reset_every and agent_steps // c.reset_every > self.resets:
            self.resets = agent_steps // c.reset_every
            self._reset()
        due = int(agent_steps * c.update_ratio) + self.caught_up
        metrics: dict[str, Tensor] = {}  # parts learn at their own pace: the latest of each
        while self.updates < due:
            metrics |= self.update(replay)
        return metrics or None

    def _reset(self) -> None:
        """Give every network the weights that it began with; what they know is to be learnt anew from the replay.

        Against what early data have done to them for good (Nikishin et al. 2022, 2205.07802, section 4). The novelty
        networks stay, which seldom act: they get used to the new latents as to any.
        """
        for name, optimizer in self._optimizers().items():
            optimizer.load_state_dict(self._beginning[name])
        for ema in self.targets.values():
            ema.target.copy_(ema.online)
        self.step_error = math.inf
        self.caught_up += self.config.reset_updates

    def update(self, replay: Any) -> dict[str, Tensor]:
        """One update on one batch: a gradient step of the value, and of the world model and the policy where due.

        The model's is due every ``model_every`` updates, the policy's every ``policy_every``. The novelty networks
        learn, priorities are written, and all slow copies move as well.
        """
        c = self.config
        length = max(c.horizon, c.n_step + c.imagined_steps)
        drawn = replay.sample(c.batch_size, length)
        batch = Batch(*(torch.as_tensor(x, device=self.device) for x in drawn[:5]), drawn.start)
        metrics: dict[str, Tensor] = {}
        if self.updates % REFRESH == 0 and self.value.unit is not None:
            unit = max(replay.mean_reward_size(), LEAST_UNIT)
            self.value.rescale(unit)
            self.value_target.rescale(unit)
        if self.updates % c.model_every == 0:
            b, h = c.model_batch_size, c.horizon
            metrics |= self._update_model(batch.obs[: h + 1, :b], *(x[:h, :b] for x in batch[1:5]))
            self.targets["model"].update()
        if c.policy_step_error and self.updates % REFRESH == 0:
            self.step_error = self._measure_step(*self._look(replay))
        # Whether the rest asks the slow model, whose weights stay from here; folding them is a twentieth of an update.
        looks = c.value_loops or c.imagined_steps or (self.policy_terms().horizon and self._policy_is_due())
        with self.slow_model.frozen() if looks else nullcontext():
            metrics |= self._update_value_and_policy(replay, batch)
        self.updates += 1
        return metrics

    def _policy_is_due(self) -> bool:
        return self.updates % self.config.policy_every == 0

    def _update_value_and_policy(self, replay: Any, batch: Batch) -> dict[str, Tensor]:
        """One gradient step each on ``batch``, of tensors; the ``replay`` it came from gets its priorities."""
        c, n = self.config, self.config.n_step
        metrics: dict[str, Tensor] = {}
        with torch.no_grad():
            z = self.encode(batch.obs[0])  # (B, Z)
            z_end = self.encode(batch.obs[n])  # (B, Z); the last row of shorter sequences, by padding
            target = self._value_target(z_end, batch.reward[:n], batch.terminated[:n], batch.mask[:n])  # (B,)
            if c.return_floor:
                floor = self._earned(replay, batch.start)  # (B,)
                metrics["train/floor_share"] = (floor > target).float().mean()
                target = torch.maximum(target, floor)
            rows = [z, batch.action[0], target, torch.ones_like(target)]
            if c.imagined_steps:
                imagined = self._imagined_rows(z, batch)
                rows = [torch.cat(both) for both in zip(rows, imagined, strict=True)]
            z, taken, target, weight = rows
            inputs = self.value_input(z, taken)
        found, out = self._update_value(inputs, target, weight)
        metrics |= found
        real = slice(len(batch.start))  # they come first
        if self.novelty is not None:
            self.largest_reward = torch.maximum(self.largest_reward, batch.reward.abs().amax())
            metrics |= self._update_novelty(z[real])
        if c.priority:
            error = (self.value.code.decode(out[:, real]) - target[real]).abs().amax(0)  # (B,), the larger of two
            self._prioritise(replay, batch.start, error)
        if self._policy_is_due():
            metrics |= self._update_policy(z, weight)
        self.targets["value"].update()
        self.targets["policy"].update()
        return metrics

    def _imagined_rows(self, z: Tensor, batch: Batch) -> list[Tensor]:
        """[z_t (M, Z), action_t (M, A), target_t (M,), weight (M,)] of the first M = ``model_batch_size`` sequences.

        z_t is imagined from z (B, Z) along the actions that were taken, row by row at t = 1 .. ``imagined_steps`` in
        turn; action and target are those of the real step t, and its weight is one if the episode had it. A plan ends
        in imagined latents, whose value it reads (TD-MPC2, 2310.16828, trains value and policy on a real latent and
        those imagined from it). The policy learns on these rows only without ``policy_horizon``, which goes through
        imagined latents of its own.
        """
        c, n = self.config, self.config.n_step
        obs, action, reward, terminated, mask = batch[:5]
        row = torch.arange(c.model_batch_size, device=self.device)
        t = 1 + row % c.imagined_steps  # (M,)
        rollout = self.slow_model.rollout(z[row], action[: c.imagined_steps, row], self._plan_depth())
        window = t + torch.arange(n, device=self.device).unsqueeze(1)  # (n, M)
        later = (reward[window, row], terminated[window, row], mask[window, row])
        target = self._value_target(self.encode(obs[t + n, row]), *later)
        goes_on = (mask * (1.0 - terminated)).cumprod(0)  # (L, B), whether the episode goes on after each step
        return [rollout.z[t, row], action[t, row], target, goes_on[t - 1, row] * mask[t, row]]

    def _prioritise(self, replay: Any, start: np.ndarray, error: Tensor) -> None:
        """Transitions ``start`` (B,) whose values were off by ``error`` (B,) are drawn by it from now on.

        Proportional prioritisation (Schaul et al. 2016, 1511.05952, section 3.3) without importance weights; errors in
        the Huber loss's straight part are drawn by their size, all others alike (LAP, 2007.06049).
        """
        unit = self.value.unit
        # What has diverged to no number must not become the replay's: the metrics show it.
        error = error.nan_to_num(0.0, 0.0, 0.0)
        error = error + PRIORITY_FLOOR if unit is None else (error / unit).clamp_min(1.0)
        replay.prioritise(start, error.pow(self.config.priority).cpu().numpy())
        if self.updates % REFRESH == 0:
            replay.refresh_priority()

    def _update_model(
        self, obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """obs (H + 1, B, O), action (H, B, A), the rest (H, B)."""
        c, model = self.config, self.world_model
        with torch.no_grad():
            z_target = self.encode(obs[1:])  # (H, B, Z)
        depth = model.dynamics.sample_depth(obs.shape[1], self.depth_generator)
        with model.frozen():
            rollout = model.rollout(model.encode(obs[0]), action, depth)
            data = (z_target, reward, terminated, mask, self.depth_generator, obs if c.observation_weight else None)
            losses = world_model_losses(model, rollout, *data)
            weights = {
                "consistency": c.consistency_weight,
                "reward": c.reward_weight,
                "continuation": c.continuation_weight,
            }
            for name, weight in (("jacobian", c.jacobian_weight), ("observation", c.observation_weight)):
                if name in losses:  # the one in mode soft, the other with a weight
                    weights[name] = weight
            if c.early_weight:
                early = rollout.early(self.depth_generator)
                early_losses = world_model_losses(model, early, *data)
                losses |= {f"early_{name}": loss for name, loss in early_losses.items()}
                weights |= {f"early_{name}": c.early_weight * weights[name] for name in early_losses}
            total = weighted_sum(losses, weights)
            self.model_optimizer.zero_grad()
            total.backward()
        norm = self.model_optimizer.step()
        metrics = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        return metrics | {"loss/model": total.detach(), "loss/model_gradient": norm}

    def _value_target(self, z_end: Tensor, reward: Tensor, terminated: Tensor, mask: Tensor) -> Tensor:
        """n-step target (B,): sum of discounted rewards, and the value where the sequence ends unless it terminated."""
        c = self.config
        powers = c.discount ** torch.arange(reward.shape[0] + 1, device=self.device)  # (n + 1,)
        returns = (powers[:-1, None] * reward).sum(0)  # (B,); masked rewards are zero
        bootstrap = powers[mask.sum(0).long()] * (1.0 - terminated.amax(0))  # truncation does not stop it
        action = self.smoothed(self.policy_target(z_end)[0], self.generator)
        value = self.value_target.values(self.value_input(z_end, action)).amin(0)
        return returns + bootstrap * value

    def _earned(self, replay: Any, start: np.ndarray) -> Tensor:
        """What the episodes of the transitions ``start`` (B,) went on to earn, with the value at their end: (B,).

        Minus infinity while an episode goes on. What was earned once can be earned again where the world is
        deterministic, so no value should lie below it (optimality tightening, 1611.01606; self-imitation
        learning, 1806.05635): what succeeded by chance is known at once, which targets of a few steps hand down slowly.
        It is lowered by 1 - ``return_floor`` of its size, for the luck of noisy actions is in it too.
        """
        replay.keep_earned(self.config.discount)
        earned = Earned(*(torch.as_tensor(x, device=self.device) for x in replay.earned(start)))
        z = self.encode(earned.obs)
        value = self.value_target.values(self.value_input(z, self.policy_target(z)[0])).amin(0)
        after = self.config.discount ** earned.steps.float() * (1.0 - earned.terminated)
        found = earned.reward + after * value
        return torch.where(earned.known, found - (1.0 - self.config.return_floor) * found.abs(), -math.inf)

    def _update_value(self, inputs: Tensor, target: Tensor, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """inputs (B, ...), target and weight (B,) -> (metrics, the values (E, B, bins) before the step, encoded)."""
        out = self.value(inputs)  # (E, B, bins)
        losses = self.value.code.loss(out, target.expand(out.shape[0], -1)).sum(0)  # (B,)
        loss = (losses * weight).sum() / weight.sum()
        self.value_optimizer.zero_grad()
        loss.backward()
        norm = self.value_optimizer.step()
        return {
            "loss/value": loss.detach(),
            "loss/value_gradient": norm,
            "train/value_target": target.mean(),
        }, out.detach()

    def _update_policy(self, z: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Climb what the policy is worth from z (B, Z), weight (B,); a penalty keeps it off saturation.

        With a horizon from the first ``model_batch_size`` of the rows alone, since it is dearer by the row.
        """
        c, terms = self.config, self.policy_terms()
        if terms.horizon:
            z, weight = z[: c.model_batch_size], weight[: c.model_batch_size]
        self.value.requires_grad_(False)
        worth, size = self._policy_worth(z, terms)
        scale = masked_mean(worth.detach().abs(), weight).clamp_min(1e-3)
        loss = masked_mean(terms.penalty * size - worth / scale, weight)
        self.policy_optimizer.zero_grad()
        loss.backward()
        self.value.requires_grad_(True)
        norm = self.policy_optimizer.step()
        return {"loss/policy": loss.detach(), "loss/policy_gradient": norm}

    def policy_terms(self) -> PolicyTerms:
        """What the policy learns by now.

        The penalty may fade with the exploration (``policy_penalty_kept``): a policy that saturates early explores
        less. Before ``policy_switch_steps``, and where the model errs by more than ``policy_step_error``, it is whole,
        and the gradient the first value's: the one through a model that knows little is a loss (docs/ablations.md).
        """
        c = self.config
        early = c.policy_switch_steps and self.acted <= c.policy_switch_steps
        if early or (c.policy_step_error and not self.step_error <= c.policy_step_error):  # nor if it is no number
            return PolicyTerms(0, 0.0, c.policy_penalty)
        penalty = c.policy_penalty * self._annealed(1.0, c.policy_penalty_kept)
        return PolicyTerms(c.policy_horizon, c.policy_std, penalty)

    def _policy_worth(self, z: Tensor, terms: PolicyTerms) -> tuple[Tensor, Tensor]:
        """What the policy is worth from z (B, Z), and the mean square of its pre-activations: (B,) each.

        The return of ``terms.horizon`` imagined steps and the mean value of the next, whose gradient goes through the
        slow model: a value-expanded stochastic value gradient (SVG(H), 1510.09142 and 2008.12775). The actions of all
        steps are noisy, so that it is that of a smoothed value, and count in the mean square. Without a horizon it is
        the first value, as in TD3 (1802.09477). ``python -m benchmarks.policy_gradients`` compares such gradients.
        """
        sizes = []

        def act(z: Tensor) -> Tensor:
            action, raw = self.policy(z)
            sizes.append(raw.square().mean(-1))
            return self.policy.perturb(action, terms.std, 1.0, self.generator) if terms.std else action

        reward, discount, inputs = self.imagine(z, act(z), act, terms.horizon)
        value = self.value.values(inputs).mean(0) if terms.horizon else self.value.first_value(inputs)
        return reward + discount * value, torch.stack(sizes).mean(0)

    def _update_novelty(self, z: Tensor) -> dict[str, Any]:
        """What z (B, Z) holds is less new from now on."""
        loss = self.novelty(z).mean()
        self.novelty_optimizer.zero_grad()
        loss.backward()
        self.novelty_optimizer.step()
        return {"loss/novelty": loss.detach(), "explore/seeking": self.seeking}

    # ---- looking and keeping ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _look(self, replay: Any) -> tuple[Tensor, Tensor, Tensor]:
        """z (256, Z), action (256, A), z_next (256, Z) of transitions drawn alike, from no training stream."""
        batch = replay.sample(256, 1, rng=np.random.default_rng(self.updates), uniform=True)
        z, z_next = self.encode(torch.as_tensor(batch.obs, device=self.device))
        return z, torch.as_tensor(batch.action[0], device=self.device), z_next

    @torch.no_grad()
    def _measure_step(self, z: Tensor, action: Tensor, z_next: Tensor) -> float:
        """``step_error`` of the slow model at the depth by which plans, and the policy's gradient, go through it."""
        return step_error(self.slow_model.dynamics(z, action, self._plan_depth()).z_next, z, z_next)

    @torch.no_grad()
    def diagnostics(self, replay: Any) -> dict[str, float]:
        """See ``Agent.diagnostics``: what the loop does on real transitions, and how far latents are apart."""
        z, action, z_next = self._look(replay)
        dynamics = self.slow_model.dynamics
        # Plans have a depth of their own; with plan_loops=0 each of their predictions chooses, as ``adaptive`` shows.
        adaptive, trained = dynamics(z, action), dynamics(z, action, dynamics.mean_loops)
        planned = dynamics(z, action, self.config.plan_loops) if self.config.plan_loops else adaptive
        found = {
            "latent/step_error": step_error(planned.z_next, z, z_next),
            "loop/mean": float(planned.loops.double().mean()),  # in a plan's predictions
            "loop/adaptive_mean": float(adaptive.loops.double().mean()),
            "loop/adaptive_max": float(adaptive.loops.max()),
            "loop/adaptive_residual": float(adaptive.residual.mean()),
            "loop/residual_at_mean_loops": float(trained.residual.mean()),
            "loop/contraction_bound": dynamics.lipschitz_bound(),
            "loop/contraction_measured": dynamics.measured_contraction(z, action),
        }
        found |= {f"latent/{name}": value for name, value in latent_spread(z).items()}
        return {name: value for name, value in found.items() if np.isfinite(value)}  # the controls certify nothing

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from: weights, optimisers, targets, random streams, carried state."""
        return {
            "optimizers": {name: o.state_dict() for name, o in self._optimizers().items()},
            "targets": {name: ema.target for name, ema in self.targets.items()},
            "generator": self.generator.get_state(),
            "depth_generator": self.depth_generator.get_state(),
            "updates": self.updates,
            "resets": (self.resets, self.caught_up),
            "value_unit": None if self.value.unit is None else self.value.unit.clone(),
            "acted": self.acted,
            "step_error": self.step_error,
            "novelty": None if self.novelty is None else self._novelty_state(),
            "noise": self._noise.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, whichever device it was saved on.

        Raises:
            KeyError, RuntimeError: ``state`` is of another agent.
        """
        for name, optimizer in self._optimizers().items():
            optimizer.load_state_dict(state["optimizers"][name])
        for name, ema in self.targets.items():
            ema.target.copy_(state["targets"][name])
        for value in (self.value, self.value_target):
            if value.unit is not None:
                value.unit.copy_(state["value_unit"])
        stream = state["generator"].cpu()
        if stream.shape == self.generator.get_state().shape:
            self.generator.set_state(stream)
        else:  # of another kind of device, which cannot take it up: a stream of this agent's own, by where it stands
            self.generator.manual_seed(self.generator.initial_seed() + state["updates"])
        self.depth_generator.set_state(state["depth_generator"].cpu())
        self.updates, self.acted = state["updates"], state["acted"]
        self.resets, self.caught_up = state.get("resets", (0, 0))  # of a run from before there were any
        self.step_error = state.get("step_error", math.inf)  # likewise
        if self.novelty is not None and state.get("novelty"):  # None: planned for the first time from here on
            self.novelty_optimizer.load_state_dict(state["novelty"]["optimizer"])
            self.novelty.random.load_state_dict(state["novelty"]["random"])
            self.seeking = state["novelty"]["seeking"]
            self.largest_reward = state["novelty"]["largest_reward"].to(self.device)
        self._noise.state = None if state["noise"] is None else state["noise"].to(self.device)

    def _optimizers(self) -> dict[str, FlatAdam]:
        return {"model": self.model_optimizer, "value": self.value_optimizer, "policy": self.policy_optimizer}

    def _novelty_state(self) -> dict[str, Any]:
        random = {name: tensor.clone() for name, tensor in self.novelty.random.state_dict().items()}
        seen = {"seeking": self.seeking, "largest_reward": self.largest_reward}
        return seen | {"optimizer": self.novelty_optimizer.state_dict(), "random": random}


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
