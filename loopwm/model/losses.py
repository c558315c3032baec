"""The world model's named losses. Each is a mean over the valid steps of a batch of sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from loopwm.model.world_model import Rollout, WorldModel


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (...) where mask (...) is one. Raises ValueError where one would be broadcast to the other."""
    if x.shape != mask.shape:
        raise ValueError(f"a mask of {tuple(mask.shape)} for losses of {tuple(x.shape)}")
    return (x * mask).sum() / mask.sum().clamp_min(1.0)


def world_model_losses(
    model: WorldModel,
    rollout: Rollout,
    z_target: Tensor,
    reward: Tensor,
    terminated: Tensor,
    mask: Tensor,
    generator: torch.Generator | None = None,
    obs: Tensor | None = None,
) -> dict[str, Tensor]:
    """Consistency, reward and continuation at every step of a rollout; in mode ``soft`` the Jacobian's penalty too.

    Args:
        rollout: H steps from the first encoded observation under the recorded actions.
        z_target: (H, B, Z) encodings of the observations that followed; no gradient passes through them.
        reward, terminated, mask: (H, B); mask is 1 while the sequence lies in its episode.
        generator: of the penalty's random vectors.
        obs: (H + 1, B, O), which the model's ``LinearDecoder`` is to read off the rollout's latents; None: it is not.

    Returns:
        ``consistency`` squared latent error, mean over Z; ``reward`` two-hot cross-entropy; ``continuation`` binary
        cross-entropy; ``jacobian``, in mode ``soft`` alone, see ``DynamicsOutput.jacobian_penalty``; ``observation``,
        with ``obs`` alone, see ``LinearDecoder.unexplained``. Scalars ().
    """
    consistency = (rollout.z[1:] - z_target.detach()).square().mean(-1)  # (H, B)
    reward_loss = model.reward.code.loss(model.reward(rollout.h), reward)  # (H, B)
    continuation = torch.nn.functional.binary_cross_entropy_with_logits(
        model.continuation(rollout.h), 1.0 - terminated, reduction="none"
    )  # (H, B)
    losses = {
        "consistency": masked_mean(consistency, mask),
        "reward": masked_mean(reward_loss, mask),
        "continuation": masked_mean(continuation, mask),
    }
    penalties = [out.jacobian_penalty(generator) for out in rollout.outputs if out.penalised]
    if penalties:
        losses["jacobian"] = masked_mean(torch.stack(penalties), mask)  # (H, B)
    if obs is not None:
        began = torch.ones_like(mask[:1])  # the first observation is always there
        losses["observation"] = model.decoder.unexplained(rollout.z, obs, torch.cat([began, mask]))
    return losses


def weighted_sum(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """One scalar from named losses.

    Raises:
        KeyError: the two do not have the same names: a loss without a weight is a loss forgotten.
    """
    if losses.keys() != weights.keys():
        raise KeyError(f"losses {sorted(losses)} and weights {sorted(weights)} differ")
    return sum(weights[name] * loss for name, loss in losses.items())
