"""Model predictive path integral control in latent space, with the policy as its prior (after TD-MPC2, 2310.16828)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

REFINEMENT = 4  # a later iteration scores so many times fewer sequences than the first, beside the best so far


@dataclass(frozen=True)
class PlanBudget:
    """How much an action may cost. ``samples`` 0: the policy alone acts."""

    samples: int  # action sequences scored in the first iteration, and 1 / ``REFINEMENT`` of them in each later one
    iterations: int  # of the sampling distribution
    horizon: int  # imagined agent steps
    policy_samples: int  # of the samples, how many follow the policy
    elites: int  # best sequences that the distribution is refitted to
    max_std: float = 0.6  # first spread and the most of any, action units (discrete: share of uniform draws)
    temperature: float = 0.5  # weight exp((score - best) / temperature), scores standardised over the elites
    min_std: float = 0.05  # floor of the sampling spread, action units
    correlation: float = 0.0  # of a drawn sequence's noise from step to step, in [0, 1] (discrete: none)


class Plan(NamedTuple):
    """What a search found for N states."""

    action: Tensor  # (N, A), one-hot where discrete
    mean: Tensor  # (H, N, A) of the last distribution; of an exhaustive search its best sequence
    spread: Tensor  # (N,) standard deviation of the first scores


Score = Callable[[Tensor, Tensor], Tensor]  # z (R, Z), actions (H, R, A) -> return (R,)


@torch.no_grad()
def mppi(
    z: Tensor, prior: Tensor, mean: Tensor, score: Score, budget: PlanBudget, generator: torch.Generator, discrete: bool
) -> Plan:
    """Refine a distribution over action sequences for N states at once.

    The elites of an iteration are kept for the next, and later ones draw less (both after iCEM, 2008.06389, which keeps
    a share of them and draws less each time).

    Args:
        z: (N, Z) latents. prior: (H, N, P, A) sequences of the policy. mean: (H, N, A) first guess.
        score: imagined return of sequences. discrete: actions are one-hot, ``mean`` probabilities.
    """
    horizon, envs, from_policy, action_dim = prior.shape
    std = torch.full_like(mean, budget.max_std)
    fresh = draw(mean, std, budget.samples - from_policy, generator, discrete, budget.correlation)  # (H, N, S - P, A)
    actions = torch.cat([prior, fresh], 2)  # (H, N, S, A)
    value = score_all(score, z, actions)  # (N, S)
    first_spread = value.std(1, correction=0)
    for iteration in range(budget.iterations):
        elite_value, elite = value.nan_to_num(nan=-1e9, posinf=-1e9, neginf=-1e9).topk(budget.elites, dim=1)  # (N, E)
        index = elite.view(1, envs, -1, 1).expand(horizon, -1, -1, action_dim)
        chosen = actions.gather(2, index)  # (H, N, E, A)
        spread = elite_value.std(1, keepdim=True, correction=0).clamp_min(1e-6)
        weight = torch.softmax((elite_value - elite_value[:, :1]) / (spread * budget.temperature), 1)
        weight = weight.view(1, envs, -1, 1)
        mean = (weight * chosen).sum(2)  # (H, N, A)
        std = (weight * (chosen - mean.unsqueeze(2)).square()).sum(2).sqrt().clamp(budget.min_std, budget.max_std)
        if iteration + 1 < budget.iterations:  # the best so far stay, at no cost: a sequence is worth what it was
            fresh = draw(mean, std, max(1, budget.samples // REFINEMENT), generator, discrete, budget.correlation)
            actions = torch.cat([chosen, fresh], 2)
            value = torch.cat([elite_value, score_all(score, z, fresh)], 1)
    if discrete:
        best = mean[0].argmax(-1)
        return Plan(torch.nn.functional.one_hot(best, action_dim).to(mean.dtype), mean, first_spread)
    return Plan(mean[0].clamp(-1.0, 1.0), mean, first_spread)


@torch.no_grad()
def exhaustive(z: Tensor, own: Tensor, score: Score, horizon: int) -> Plan:
    """Exhaustive search: the best of ALL sequences of discrete actions for N states, A ** H of them.

    Args:
        z: (N, Z) latents. own: (N, A) the policy's actions, one-hot, which break ties: nothing is known to be better.
        score: imagined return of sequences.
    """
    envs, count = own.shape
    actions = all_sequences(count, horizon, own)  # (H, A ** H, A), by the first action in turn
    value = score_all(score, z, actions.unsqueeze(1).expand(-1, envs, -1, -1))  # (N, A ** H)
    value = value.nan_to_num(nan=-1e9, posinf=-1e9, neginf=-1e9)
    worth, after = value.view(envs, count, -1).max(-1)  # (N, A) each: of the best sequence that begins so, and which
    best = worth == worth.amax(1, keepdim=True)
    own_is_best = (best & (own > 0.5)).any(1)
    first = torch.where(own_is_best, own.argmax(1), worth.argmax(1))  # (N,)
    after = after.gather(1, first.unsqueeze(1)).squeeze(1)  # (N,)
    sequence = actions.view(horizon, count, -1, count)[:, first, after]  # (H, N, A)
    return Plan(sequence[0], sequence, value.std(1, correction=0))


def all_sequences(count: int, horizon: int, like: Tensor) -> Tensor:
    """Every sequence of one-hot actions (H, A ** H, A), in order, of the dtype and on the device of ``like``."""
    index = torch.cartesian_prod(*[torch.arange(count, device=like.device)] * horizon).view(-1, horizon)
    return torch.eye(count, dtype=like.dtype, device=like.device)[index.t()]


def score_all(score: Score, z: Tensor, actions: Tensor) -> Tensor:
    """z (N, Z), actions (H, N, S, A) -> returns (N, S)."""
    horizon, envs, samples, action_dim = actions.shape
    if not samples:
        return z.new_empty(envs, 0)
    rows = z.repeat_interleave(samples, 0)  # (N * S, Z)
    return score(rows, actions.reshape(horizon, -1, action_dim)).view(envs, samples)


def draw(
    mean: Tensor, std: Tensor, count: int, generator: torch.Generator, discrete: bool, correlation: float = 0.0
) -> Tensor:
    """``count`` action sequences (H, N, count, A) around mean (H, N, A), with spread std (H, N, A).

    With a correlation from step to step (AR(1)) they search fewer directions, those that steps push together: noise
    that differs at every step largely cancels (coloured noise in a plan: iCEM, 2008.06389, section 3.1).
    """
    shape = (*mean.shape[:2], count, mean.shape[2])
    if not count:  # which torch.multinomial refuses
        return mean.new_empty(shape)
    if not discrete:
        noise = torch.randn(shape, generator=generator, device=mean.device)
        if correlation:
            fresh = (1.0 - correlation**2) ** 0.5
            for step in range(1, len(noise)):
                noise[step].mul_(fresh).add_(noise[step - 1], alpha=correlation)
        return (mean.unsqueeze(2) + std.unsqueeze(2) * noise).clamp_(-1.0, 1.0)
    # For one-hot actions the spread is the share of uniform draws: it keeps every action in play.
    share = std.mean(-1, keepdim=True)  # (H, N, 1)
    probability = (1.0 - share) * mean + share / mean.shape[2]
    probability = probability.nan_to_num(1.0)  # of an agent that has diverged, which the losses say
    drawn = torch.multinomial(probability.reshape(-1, mean.shape[2]), count, True, generator=generator)
    return torch.nn.functional.one_hot(drawn.view(shape[:3]), mean.shape[2]).to(mean.dtype)
