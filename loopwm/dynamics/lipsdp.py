"""One inequality for the whole loop: how far a block's weights must shrink, together, for the loop to contract.

A norm for each of W1 and W2 and the largest Abar, added up, counts three worst cases that never meet: it takes the
linear path for pulling where the block pushes, and every unit for open. What one loop h' = Abar h + W2 s(W1 h + c)
does to a difference of two states is bounded by one matrix inequality instead. With slopes of s in [0, 1], one positive
multiplier for each unit (diagonal L), C = (L / 2)^(1/2) W1, B = (2 L)^(-1/2) W2^T and F the linear path, Abar or a
matrix, the loop contracts by rho if

    [C, -B]^T [C, -B]  <=  [[rho^2, F^T], [F, 1]]

(LipSDP-Neuron for one layer, with a linear path beside it: Fazlyab et al. 2019, 1906.04893; the Schur complement of
their matrix. Without the linear path, and with an equality, it is the sandwich layer of Wang and Manchester 2023,
2301.11526; residual layers made by it: Araujo et al. 2023, 2303.03169.) Where the norm of F is below rho this says that

    [(C + B F) (rho^2 - F^T F)^(-1/2), B]

has a spectral norm of at most one: one norm of one matrix, for which there is a bound from above (``spectral``).
Dividing W1 and W2 by it makes any weights contract. The multipliers are learnt. A matrix F (``skip``) is worth having:
by another basis of h it stands for another norm to contract in.

How much room that is: a block that pulls back, W2 = -W1^T, may have W2 W1 = -(1 + Abar), where norms stop at 1 - Abar.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopwm.dynamics.spectral import differentiable_norm_bound

SLOPES = ("relu", "tanh")  # activations whose slopes lie in [0, 1], as the inequality needs
MARGIN = 1e-3  # the norm stays below one by so much: room for rounding, which the slowest decays make 100 times larger
MULTIPLIER_INIT = -1.0  # of log L, all alike; of 0, -1 and -2 the best, by little, on TimeWarp (one seed)
MULTIPLIER_LIMIT = 40.0  # of log L, either way: what float32 squares without harm
PATH_SHARE = 0.98  # of rho, the most that a matrix F may take: rho^2 - F^T F has a condition of at most 25 then
EIGENVALUE_ERROR = 1e-10  # relative, in float64: the inverse below has a condition of at most 1 / MARGIN


def halves(read: Tensor, write: Tensor, log_multipliers: Tensor) -> tuple[Tensor, Tensor]:
    """C and B, (W, D) each, of W1 = read (W, D), W2 = write (D, W) and log L (W,)."""
    half = 0.5 * log_multipliers.clamp(-MULTIPLIER_LIMIT, MULTIPLIER_LIMIT).unsqueeze(1)
    return read * torch.exp(half) / 2**0.5, write.t() * torch.exp(-half) / 2**0.5


def promised_factor(decay: Tensor, gamma: float) -> Tensor:
    """rho (), float64: max Abar + gamma (1 - max Abar), what mode ``certified`` promises too; decay (D,)."""
    slowest = decay.double().max()  # differences of numbers next to one
    return slowest + gamma * (1.0 - slowest)


def path_scale(path: Tensor, rho: Tensor) -> Tensor:
    """() factor of at most one that leaves F = path (D, D) a norm of at most ``PATH_SHARE`` rho."""
    most = (PATH_SHARE * rho).to(path.dtype)
    return most / torch.maximum(differentiable_norm_bound(path), most)


def joint_scale(read: Tensor, write: Tensor, path: Tensor, log_multipliers: Tensor, rho: Tensor) -> Tensor:
    """() factor of at most one on W1 (W, D) and on W2 (D, W), by which one loop contracts by rho ().

    ``path`` is Abar (D,), each entry below rho, or F (D, D) of a norm below rho; not a number where they are not.

    Raises:
        TypeError: in 16 bits.
    """
    c, b = halves(read, write, log_multipliers)
    slow = path.double()
    if path.ndim == 1:
        rest = (c + b * path) * ((rho - slow) * (rho + slow)).rsqrt().to(c.dtype)
    else:
        room = rho**2 * torch.eye(len(path), dtype=slow.dtype, device=path.device) - slow.t() @ slow
        lower, broken = torch.linalg.cholesky_ex(room)  # one that raises would end a run that has diverged
        lower = torch.where(broken == 0, lower, torch.nan)
        rest = torch.linalg.solve_triangular(lower, (c + b @ path).t().double(), upper=False).t().to(c.dtype)
    return (1.0 - MARGIN) / differentiable_norm_bound(torch.cat([rest, b], 1)).clamp_min(1.0 - MARGIN)


def joint_factor(read: Tensor, write: Tensor, path: Tensor, log_multipliers: Tensor) -> float | None:
    """The smallest rho for which the inequality holds, in float64; None where these multipliers give none.

    Of W1 = read (W, D), W2 = write (D, W), a path (D,) or (D, D), and log L (W,).
    """
    read, write, path = read.double(), write.double(), path.double()
    c, b = halves(read, write, log_multipliers.double())
    lower, broken = torch.linalg.cholesky_ex(torch.eye(len(path), dtype=b.dtype, device=b.device) - b.t() @ b)
    if broken:
        return None
    # The other Schur complement: rho^2 >= C^T C + (F + B^T C)^T (1 - B^T B)^-1 (F + B^T C)
    mixed = (torch.diag(path) if path.ndim == 1 else path) + b.t() @ c
    solved = torch.linalg.solve_triangular(lower, mixed, upper=False)
    largest = torch.linalg.eigvalsh(c.t() @ c + solved.t() @ solved)[-1]
    return float(largest.clamp_min(0.0).sqrt()) * (1.0 + EIGENVALUE_ERROR)
