"""Convolutions whose operator norm is at most one on a zero-padded grid of ANY size, at every moment of training.

A zero-padded convolution on S x S cells is a corner of the same convolution on the infinite grid, so its norm is at
most sup_w ||K(w)||_2 over all frequencies w, with the symbol K(w) = sum_k K[k] exp(-i w.k), a matrix (O, I).
The supremum is bounded from a grid of n x n frequencies: along each axis, Re(u* K(w) v) is a real trigonometric
polynomial of degree m (1 for a 3 x 3 kernel), and one that has its largest modulus M somewhere is still at least
M cos(m d) at a distance d (M. Riesz 1914; used for sampled maxima by Ehlich and Zeller 1964), so

    sup_w ||K(w)||_2 <= max_grid ||K(w)||_2 / cos(pi m / n)^2.

Each ||K(w)||_2 is bounded from above by Gram iteration, as Delattre et al. 2023 (2305.16173, section 4) do for
circular convolutions; their correction for an unequal grid, after Pfister and Bresler, is 1 / (1 - 2 m / n): 14 % at
n = 16, where the cosine gives 4 %.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from loopwm.dynamics.spectral import ROUNDING_MARGIN, ROUNDS, check_precision, first_order

SAMPLES = 16  # n: 4.0 % above the largest sample; 32 would be 1.0 % for four times the work


def _symbol(kernel: Tensor) -> Tensor:
    """K(w) on the sampled frequencies, (F, O, I) complex; of w and -w, whose norms agree, mostly one."""
    transform = torch.fft.rfft2(kernel, s=(SAMPLES, SAMPLES))  # (O, I, n, n / 2 + 1)
    return transform.flatten(2).permute(2, 0, 1).contiguous()


def _between_samples(kernel: Tensor) -> float:
    """The factor from the largest sample to the supremum over all frequencies."""
    factor = 1.0
    for size in kernel.shape[-2:]:
        factor /= math.cos(math.pi * ((size - 1) / 2) / SAMPLES)
    return factor


def convolution_norm(kernel: Tensor) -> Tensor:
    """Upper bound () on the norm of convolving with ``kernel`` (O, I, k, k), zero-padded, on a grid of any size.

    By exact singular values of the symbol: at most 4 % above its supremum for 3 x 3 kernels.
    """
    return torch.linalg.matrix_norm(_symbol(kernel), 2).amax() * _between_samples(kernel)


def _frobenius(matrices: Tensor) -> Tensor:
    """Frobenius norms (F,) of complex ``matrices`` (F, n, n), sixty times as fast as torch's own for complex ones."""
    return torch.view_as_real(matrices).flatten(1).square().sum(1).sqrt().clamp_min(1e-30)


def _gram_powers(symbol: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds (F,) on the spectral norms of ``symbol`` (F, m, n), m >= n, and G_6 up to scale (F, n, n).

    As ``spectral._gram_power``, for a batch and without its scaling of huge weights, which the caller does.
    """
    gram = symbol.mH @ symbol  # (F, n, n)
    log_scale = torch.zeros(symbol.shape[0], dtype=gram.real.dtype, device=symbol.device)
    for _ in range(ROUNDS):
        norm = _frobenius(gram)  # (F,)
        gram = gram / norm.view(-1, 1, 1)
        gram = gram @ gram
        gram = gram @ gram
        log_scale = 4.0 * (log_scale + norm.log())
    return ((_frobenius(gram).log() + log_scale) / 2 ** (2 * ROUNDS + 1)).exp() * (1.0 + ROUNDING_MARGIN), gram


class _ProjectConvolution(torch.autograd.Function):
    """kernel / max(1, bound(kernel)), with the bound's gradient through the leading singular pair of the symbol."""

    @staticmethod
    def forward(ctx, kernel: Tensor) -> Tensor:
        largest = kernel.abs().amax().clamp_min(1e-30)  # as for matrices: squares must stay within float32's range
        symbol = _symbol(kernel / largest)  # (F, O, I)
        tall = kernel.shape[0] >= kernel.shape[1]
        bounds, gram = _gram_powers(symbol if tall else symbol.mH)
        worst = bounds.argmax()
        bound = bounds[worst] * largest * _between_samples(kernel)
        ctx.inside = bool(bound <= 1.0)
        if ctx.inside:
            return kernel.clone()
        leading = gram[worst]
        v = leading[:, leading.diagonal().real.argmax()]
        v = v / torch.linalg.vector_norm(v)
        matrix = symbol[worst] if tall else symbol[worst].mH
        u = matrix @ v
        sigma = torch.linalg.vector_norm(u)
        u = u / sigma
        scaled = kernel / bound
        slack = bound / (sigma * largest)  # the bound is slack times the singular value that is differentiated
        ctx.save_for_backward(scaled, bound, slack, u if tall else v, v if tall else u, worst)
        return scaled

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor) -> Tensor:
        if ctx.inside:
            return grad
        scaled, bound, slack, u, v, worst = ctx.saved_tensors
        rows, columns = scaled.shape[-2:]
        columns_kept = SAMPLES // 2 + 1  # of the real transform
        step = 2.0 * math.pi / SAMPLES
        angle_row, angle_column = (worst // columns_kept) * step, (worst % columns_kept) * step
        k = torch.arange(max(rows, columns), device=grad.device)
        phase = angle_row * k[:rows, None] + angle_column * k[None, :columns]  # (k, k) w.k
        # Re(conj(u_o) v_i exp(-i w.k)), the derivative of the singular value by K[o, i, k]
        pair = torch.outer(u.conj(), v)  # (O, I)
        derivative = pair.real[..., None, None] * phase.cos() + pair.imag[..., None, None] * phase.sin()
        return (grad - (grad * scaled).sum() * slack * derivative) / bound


class UnitConvolutionNorm(nn.Module):
    """Parametrisation: keeps a convolution kernel (O, I, k, k), zero-padded, in the unit ball of its operator norm.

    Raises:
        TypeError: see ``check_precision``.
    """

    def forward(self, kernel: Tensor) -> Tensor:
        """kernel (O, I, k, k) -> (O, I, k, k) of operator norm at most one."""
        check_precision(kernel)
        return _ProjectConvolution.apply(kernel)
