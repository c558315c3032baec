"""A penalty on the loop's Jacobian, for weights that no certificate holds."""

from __future__ import annotations

import torch
from torch import Tensor

from loopwm.dynamics.base import sample_norm
from loopwm.dynamics.cell import Loop


def jacobian_penalty(loop: Loop, h: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """||v J||^2 / S per sample, (B,), for J = dh'/dh at h (B, ...), S entries each, and one random v ~ N(0, I).

    Its mean over v is ||J||_F^2 / S, the mean squared singular value: Hutchinson's estimate, which Bai et al. 2021
    (2106.14342) take at a fixed point. STARS (2605.26733) lowers the spectral radius by the same norm, at the state
    after a random number of loops, as here. It makes contraction likely where training went, and certifies nothing.

    h is taken as given: the gradient shapes the map at the states it visits, not where they lie.
    """
    with torch.enable_grad():
        at = h.detach().requires_grad_()
        after = loop(at)
        v = torch.randn(h.shape, generator=generator, dtype=h.dtype).to(h.device)
        (product,) = torch.autograd.grad(after, at, v, create_graph=True)
    return sample_norm(product).square() / h.shape[1:].numel()
