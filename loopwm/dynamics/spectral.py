"""Weights whose spectral norm is at most one, guaranteed, at every moment of training.

Power iteration approaches a spectral norm from below, so a weight divided by its estimate may still stretch.
Gram iteration (Delattre et al. 2023, arXiv 2305.16173, theorem 2) approaches it from ABOVE: with G_0 = W^T W and
G_{k+1} = G_k^2, the Frobenius norm bounds the spectral one, so ``||W||_2 <= ||G_k||_F ** (1 / 2**(k+1))``, and the
excess shrinks doubly fast in k. It needs no persistent vectors: the bound is a function of the weight alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

ROUNDS = 3  # of two squarings each: the excess is at most r ** (1 / 2**8), 1.6 % for rank 64 with a flat spectrum
ROUNDING_MARGIN = 1e-4  # float32 rounding of six squarings, measured below 1e-5 relative


def autocasts(device: torch.device) -> bool:
    """Whether operations on ``device`` are being cast to 16 bits."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of an autograd function that has no second derivative, and says so.

    Under ``create_graph`` torch would take what the pass computes for a constant, and drop terms in silence; its own
    ``once_differentiable`` raises only where the incoming gradient has a graph.

    Raises:
        RuntimeError: in ``backward`` or ``grad`` with ``create_graph=True``, where the gradient goes through it.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            name = backward.__qualname__.split(".")[0]
            raise RuntimeError(f"no second derivative goes through {name}")
        return backward(ctx, *grads)

    return checked


def check_precision(weight: Tensor) -> None:
    """Raises TypeError in 16 bits, where no bound on a norm survives rounding."""
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a certified mode needs weights in float32 or float64, got {weight.dtype}")


def _gram_power(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (bound (), G_6 up to scale (r, r)), r the shorter side of weight (m, n)."""
    short = weight if weight.shape[0] >= weight.shape[1] else weight.t()
    largest = weight.abs().amax().clamp_min(1e-30)  # squares of huge or tiny weights leave float32's range
    short = short / largest
    gram = short.t() @ short  # (r, r)
    log_scale = torch.zeros((), dtype=weight.dtype, device=weight.device)
    for _ in range(ROUNDS):
        # Once for two squarings: the largest eigenvalue is then at least r ** -0.5, and its fourth power r ** -2.
        norm = torch.linalg.vector_norm(gram).clamp_min(1e-30)
        gram = gram / norm
        gram = gram @ gram
        gram = gram @ gram
        log_scale = 4.0 * (log_scale + norm.log())
    last = torch.linalg.vector_norm(gram).clamp_min(1e-30)
    bound = ((last.log() + log_scale) / 2 ** (2 * ROUNDS + 1)).exp() * (1.0 + ROUNDING_MARGIN)
    return bound * largest, gram


def spectral_norm_bound(weight: Tensor) -> Tensor:
    """Upper bound () on the spectral norm of ``weight`` (m, n); never below it, in float32 and float64.

    Raises:
        TypeError: in 16 bits, where the squarings round by more than the margin.
    """
    check_precision(weight)
    return _gram_power(weight.detach())[0]


def _leading_pair(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Leading singular vectors u (m,), v (n,) of weight (m, n), up to one sign; of zeros, zeros."""
    # A column of G_k ~ v v^T is the leading right singular vector of the short form, up to its sign.
    v = gram[:, gram.diagonal().argmax()]
    v = v / torch.linalg.vector_norm(v).clamp_min(1e-30)
    tall = weight.shape[0] >= weight.shape[1]
    u = (weight if tall else weight.t()) @ v
    u = u / torch.linalg.vector_norm(u).clamp_min(1e-30)
    return (u, v) if tall else (v, u)


class _NormBound(torch.autograd.Function):
    """``spectral_norm_bound`` with the gradient of the leading singular value, u v^T."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        bound, gram = _gram_power(weight)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*_leading_pair(weight, gram))
        return bound

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * torch.outer(*ctx.saved_tensors)


def differentiable_norm_bound(weight: Tensor) -> Tensor:
    """``spectral_norm_bound`` of ``weight`` (m, n) with a gradient; raises what that does."""
    check_precision(weight)
    return _NormBound.apply(weight)


class _ProjectToBall(torch.autograd.Function):
    """weight / max(1, bound(weight)), with the bound's gradient through its leading singular pair."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        bound, gram = _gram_power(weight)
        if bound <= 1.0:
            ctx.inside = True
            return weight.clone()
        ctx.inside = False
        scaled = weight / bound
        ctx.save_for_backward(scaled, bound, *_leading_pair(weight, gram))
        return scaled

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor) -> Tensor:
        if ctx.inside:
            return grad
        scaled, bound, u, v = ctx.saved_tensors
        # d(W/s) = dW/s - (W/s) ds/s with ds = u^T dW v (the derivative of the leading singular value).
        return (grad - (grad * scaled).sum() * torch.outer(u, v)) / bound


class UnitSpectralNorm(nn.Module):
    """Parametrisation for ``torch.nn.utils.parametrize``: keeps a matrix in the unit ball of the spectral norm.

    Weights inside the ball pass unchanged; the others are divided by a true upper bound of their norm. Wrap an
    update in ``LoopCell.frozen()`` so that it is computed once per update, not once per prediction.

    Raises:
        TypeError: see ``check_precision``.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """weight (m, n) -> (m, n) of spectral norm at most one."""
        check_precision(weight)
        return _ProjectToBall.apply(weight)
