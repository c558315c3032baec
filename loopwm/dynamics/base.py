"""What every dynamics model returns and answers to, looped or not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from loopwm.dynamics.depth import earlier_loops

Depth = "int | Tensor | DepthSchedule | None"


class LatentNorm(nn.Module):
    """Layer normalisation without parameters: each latent has mean 0 and variance 1 over its Z entries.

    Raises:
        ValueError: latent_dim < 2, where the norm would erase everything.
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        if latent_dim < 2:
            raise ValueError(f"latent_dim must be at least 2, got {latent_dim}")
        self.shape = (latent_dim,)

    def forward(self, z: Tensor) -> Tensor:
        """z (..., Z) -> (..., Z)."""
        return nn.functional.layer_norm(z, self.shape)


class DynamicsOutput:
    """One prediction for a batch.

    Attributes:
        z_next: (B, Z) predicted next latent.
        h: (B, ...) loop state after the last loop, (B, D) for a vector; reward and continuation heads read it.
        loops: (B,) int64, how often the block was applied to each sample.
        residual: (B,) relative size of each sample's last step, ||h[T] - h[T-1]|| / ||h[T-1]||. Computed whenever it
            is read, without gradient: training never pays for it.
    """

    __slots__ = ("z_next", "h", "_loops", "_residual", "_at", "_penalty")

    def __init__(
        self,
        z_next: Tensor,
        h: Tensor,
        loops: Callable[[], Tensor],
        residual: Callable[[], Tensor],
        at: Callable[[Tensor], DynamicsOutput] | None = None,
        penalty: Callable[[torch.Generator | None], Tensor] | None = None,
    ):
        self.z_next, self.h = z_next, h
        self._loops, self._residual, self._at, self._penalty = loops, residual, at, penalty

    @property
    def loops(self) -> Tensor:
        """(B,) int64, how often the block was applied to each sample."""
        return self._loops()

    @property
    def residual(self) -> Tensor:
        """(B,) relative size of each sample's last step; see the class."""
        return self._residual()

    def at(self, loops: Tensor) -> DynamicsOutput:
        """The prediction that the same pass would have given after ``loops`` (B,) loops, with its gradients.

        No block is applied again: it costs a gather of states and one coda. It is there for an asked-for depth with
        unrolled gradients, while gradients are on.

        Raises:
            ValueError: where the earlier states were not kept, or unless 1 <= loops <= the loops of each sample.
        """
        if not isinstance(loops, Tensor):
            raise ValueError(f"loops must be a (B,) integer tensor, got {loops!r}")
        if self._at is None:
            raise ValueError("earlier loops are kept only for an asked-for depth with unrolled gradients switched on")
        if loops.shape != self.loops.shape or bool(((loops < 1) | (loops > self.loops)).any()):
            raise ValueError("loops must hold one number for each sample, from 1 to its own number of loops")
        return self._at(loops)

    @property
    def penalised(self) -> bool:
        """Whether there is a penalty on the Jacobian: in mode ``soft``."""
        return self._penalty is not None

    def jacobian_penalty(self, generator: torch.Generator | None = None) -> Tensor:
        """(B,) mean squared singular value of dh'/dh at the last state, by one product with a random vector.

        See ``loopwm.dynamics.penalty``. Costs one loop, its backward pass, and the backward pass of that.

        Raises:
            ValueError: in another mode than ``soft``.
        """
        if self._penalty is None:
            raise ValueError("there is a penalty on the Jacobian in mode 'soft' alone")
        return self._penalty(generator)

    def early(self, generator: torch.Generator | None = None) -> DynamicsOutput:
        """The prediction at one random earlier loop of each sample, for a loss that makes early exits usable.

        The loop is uniform on {1 .. loops - 1}; a sample of one loop, which has no earlier one, gives its own
        prediction. Raises what ``at`` does.
        """
        return self.at(earlier_loops(self.loops, generator))


def sample_norm(x: Tensor, order: float = 2.0) -> Tensor:
    """Norm of an order (2: Euclidean, inf: largest entry) over all but the batch dimension: (B, ...) -> (B,)."""
    return torch.linalg.vector_norm(x if x.ndim == 2 else x.flatten(1), order, dim=-1)


ROUNDING = 8.0  # of one loop, in units of eps ||h||: at most 4 was measured, over blocks, widths, decays and scales


def rounding_error(h: Tensor, order: float = 2.0) -> Tensor:
    """(B,) how far one loop that is computed in the dtype of h (B, ...) may end from the exact one, in the same norm.

    An allowance with room to spare where no term of a loop is much larger than h, not a proven bound; see ``ROUNDING``.
    """
    return ROUNDING * torch.finfo(h.dtype).eps * sample_norm(h, order)


def banach_distance(rho: float, h: Tensor, step: Tensor, order: float = 2.0) -> Tensor:
    """Bound (B,) on ||h - h*|| after a step (B, ...) to h (B, ...) of a map that contracts by rho; inf unless rho < 1.

    Banach's a-posteriori bound, with what rounding may do to one loop: (rho ||step|| + r) / (1 - rho).
    """
    size = sample_norm(step, order)
    if rho >= 1.0:
        return torch.full_like(size, torch.inf)
    return (rho * size + rounding_error(h, order)) / (1.0 - rho)


def relative_step(h: Tensor, previous: Tensor) -> Tensor:
    """||h - previous|| / ||previous|| per sample: (B, ...), (B, ...) -> (B,)."""
    with torch.no_grad():
        h, previous = h.detach(), previous.detach()
        return sample_norm(h - previous) / sample_norm(previous).clamp_min(1e-8)


@runtime_checkable
class Dynamics(Protocol):
    """Latent dynamics: ``out = dynamics(z, action, depth, h0)`` with z (B, Z), action (B, A), or as the block says."""

    state_dim: int
    mean_loops: int
    max_loops: int

    def __call__(self, z: Tensor, action: Tensor, depth: Depth = None, h0: Tensor | None = None) -> DynamicsOutput: ...

    def sample_depth(self, batch: int, generator: torch.Generator | None = None) -> Depth:
        """A training depth for each of ``batch`` sequences."""
        ...

    def frozen(self) -> AbstractContextManager[None]:
        """A context in which the parameters do not change, so that what depends on them alone is computed once."""
        ...

    def lipschitz_bound(self) -> float:
        """Upper bound on the contraction factor of one loop; inf where nothing is looped."""
        ...

    def measured_contraction(self, z: Tensor, action: Tensor, loops: int | None = None) -> float:
        """Largest ratio of successive steps seen on a batch; nan where nothing is looped."""
        ...


class Prelude(nn.Module):
    """e = LayerNorm(P [z; a]), once per prediction, with ``layers - 1`` hidden layers before it."""

    layout = "z (B, {z}) and action (B, {a})"  # what it takes, for the message
    axes, channel = 2, 1  # how many axes z has, and which of them is Z long

    def __init__(self, latent_dim: int, action_dim: int, hidden_dim: int, layers: int = 1):
        super().__init__()
        self.latent_dim, self.action_dim = latent_dim, action_dim
        widths = [latent_dim + action_dim] + [hidden_dim] * layers
        modules: list[nn.Module] = []
        for i, (width_in, width_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            modules += [nn.ReLU()] if i else []
            modules += [nn.Linear(width_in, width_out), nn.LayerNorm(width_out)]
        self.layers = nn.Sequential(*modules)

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        """z (B, Z), action (B, A) -> e (B, D). Raises ValueError: other widths, or not as many of both."""
        self.check(z, action)
        return self.embed(z, action)

    def check(self, z: Tensor, action: Tensor) -> None:
        """Raises ValueError unless z is laid out as ``layout`` says, and action likewise or (B, A)."""
        if z.ndim == self.axes and z.shape[self.channel] == self.latent_dim:
            at_each_place = (*z.shape[: self.channel], self.action_dim, *z.shape[self.channel + 1 :])
            if action.shape in (at_each_place, (len(z), self.action_dim)):
                return
        wanted = self.layout.format(z=self.latent_dim, a=self.action_dim)
        raise ValueError(f"the dynamics take {wanted}, got {tuple(z.shape)} and {tuple(action.shape)}")

    def embed(self, z: Tensor, action: Tensor) -> Tensor:
        """z (..., Z), action (..., A) -> e (..., D), unchecked."""
        return self.layers(torch.cat([z, action], -1))


def make_start(latent_dim: int, hidden_dim: int, linear: type[nn.Linear] = nn.Linear) -> nn.Module:
    """z -> h0: z itself where the widths agree, else a matrix."""
    return linear(latent_dim, hidden_dim, bias=False) if latent_dim != hidden_dim else nn.Identity()


def first_state(start: nn.Module, z: Tensor, h0: Tensor | None) -> Tensor:
    """The state (B, ...) that a prediction starts from: ``h0`` where there is one, else what ``start`` makes of z.

    Raises:
        ValueError: h0 of another shape than the state.
    """
    h = start(z)
    if h0 is None:
        return h
    if h0.shape != h.shape:
        raise ValueError(f"h0 must have the state's shape {tuple(h.shape)}, got {tuple(h0.shape)}")
    return h0


class Coda(nn.Module):
    """z' = latent_norm(z + C h): the residual is in z, the norm is the encoder's own; ``layers - 1`` before C."""

    def __init__(self, hidden_dim: int, latent_dim: int, latent_norm: nn.Module | None = None, layers: int = 1):
        super().__init__()
        modules: list[nn.Module] = []
        for _ in range(layers - 1):
            modules += [nn.Linear(hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.ReLU()]
        self.hidden = nn.Sequential(*modules) if modules else None
        self.out = nn.Linear(hidden_dim, latent_dim)
        self.latent_norm = latent_norm if latent_norm is not None else nn.Identity()

    def step(self, h: Tensor) -> Tensor:
        """C h: (..., D) -> (..., Z)."""
        return self.out(h if self.hidden is None else self.hidden(h))

    def forward(self, z: Tensor, h: Tensor) -> Tensor:
        """z (B, Z), h (B, D) -> z' (B, Z)."""
        return self.latent_norm(z + self.step(h))
