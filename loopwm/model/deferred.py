"""Deferred decoding (2606.18208, section 3.5): many latent steps, one decoded observation at their end."""

from __future__ import annotations

import torch
from torch import Tensor

from loopwm.model.losses import masked_mean
from loopwm.model.world_model import Rollout, WorldModel


def deferred_decoding_loss(
    model: WorldModel,
    rollout: Rollout,
    z_target: Tensor,
    last_obs: Tensor,
    mask: Tensor,
    step_budget: float | Tensor | None = None,
) -> dict[str, Tensor]:
    """Named losses of K action-conditioned latent steps with ONE observation decoded, at step K.

    The published loss (equations 19 to 22) is ``decoding + alpha * latent + beta * path``, with reward and continuation
    predicted at step K alone; ``world_model_losses`` has them at every step here, since returns need them. Latents
    are predicted in the encoder's own space, so there is no projection head before they are compared. ``drift`` is not
    of that paper: it is what is left of a latent's error when errors that cancel along the way are let pass.

    Args:
        rollout: K >= 1 steps from the first encoded observation under the recorded actions; K is its length.
        z_target: (K, B, Z) encodings of the observations that followed; no gradient passes through them.
        last_obs: (B, O), the observation after step K.
        mask: (K, B), 1 while the sequence lies in its episode; a sequence that leaves it is not decoded.
        step_budget: C_max, the mean length of a latent step from which on the path costs something.

    Returns:
        Scalars (). ``decoding``: the decoder's loss at step K. ``latent``: squared latent error, mean over Z, at the
        steps 1 .. K - 1 between; zero for K = 1. ``drift``: squared mean over the steps 1 .. K of the signed latent
        error, mean over Z: errors that point the same way from step to step add up, errors that cancel cost nothing.
        With a ``step_budget`` also ``path``: what the lengths of the steps, ||z_k - z_(k-1)||, sum up to beyond K times
        the budget. Latents of a fixed norm, as here by default, cannot take steps longer than twice that.

    Raises:
        ValueError: a model without a decoder, or targets and mask of another length than the rollout.
    """
    if model.decoder is None:
        raise ValueError("deferred decoding needs a world model with a decoder")
    steps = rollout.h.shape[0]
    if z_target.shape[0] != steps or mask.shape[0] != steps:
        raise ValueError(f"a rollout of {steps} steps, z_target of {z_target.shape[0]} and mask of {mask.shape[0]}")
    error = rollout.z[1:] - z_target.detach()  # (K, B, Z)
    decoding = model.decoder.loss(rollout.z[-1], last_obs)  # (B,)
    latent = error[:-1].square().mean(-1)  # (K - 1, B)
    valid = mask.sum(0)  # (B,) steps in the episode
    drift = (error * mask.unsqueeze(-1)).sum(0) / valid.clamp_min(1.0).unsqueeze(-1)  # (B, Z)
    losses = {
        "decoding": masked_mean(decoding, mask[-1]),
        "latent": masked_mean(latent, mask[:-1]),
        "drift": masked_mean(drift.square().mean(-1), valid.clamp_max(1.0)),
    }
    if step_budget is not None:
        lengths = torch.linalg.vector_norm(rollout.z[1:] - rollout.z[:-1], dim=-1)  # (K, B)
        beyond = ((lengths - step_budget) * mask).sum(0).clamp_min(0.0)  # (B,)
        losses["path"] = masked_mean(beyond, valid.clamp_max(1.0))
    return losses


def decoding_horizon(progress: float, longest: int, share: float = 0.5) -> int:
    """Curriculum of K: from 1 to ``longest`` in equal spans over the first ``share`` of training, then ``longest``.

    Args:
        progress: share of training done, in [0, 1].

    Raises:
        ValueError: progress outside [0, 1], longest < 1, or share outside (0, 1].
    """
    if not 0.0 <= progress <= 1.0 or longest < 1 or not 0.0 < share <= 1.0:
        raise ValueError(
            f"need progress in [0, 1], longest >= 1 and share in (0, 1], got {progress}, {longest}, {share}"
        )
    return min(longest, 1 + int(longest * progress / share))
