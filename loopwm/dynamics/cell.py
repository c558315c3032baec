"""One loop of h' = Abar * h + Bbar e + Rbar(h, e): the linear path of every block, and the block of vector latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from loopwm.dynamics.base import Coda, Prelude, make_start
from loopwm.dynamics.lipsdp import MULTIPLIER_INIT, SLOPES, joint_factor, joint_scale, path_scale, promised_factor
from loopwm.dynamics.spectral import UnitSpectralNorm, autocasts


class Loop(Protocol):
    """A cell, or a block of several, with its weights and its input fixed: ``h = loop(h)`` for h (n, ...)."""

    @property
    def fused(self) -> bool:
        """Whether all loops may run as one autograd node (see ``unroll``)."""
        ...

    waiting: float
    """Share of a batch's rows that may have finished before they are taken out of it (see ``loop_adaptive``)."""

    def __call__(self, h: Tensor) -> Tensor: ...

    def first(self, rows: int) -> Loop:
        """The same loop on the first ``rows`` samples."""
        ...

    def select(self, index: Tensor) -> Loop:
        """The same loop on the samples ``index`` (n,)."""
        ...


class Mode(NamedTuple):
    """What keeps the block stable."""

    certified: bool = False  # one loop contracts by construction
    jointly: bool = False  # by one inequality for block and linear path (``lipsdp``), not by a norm for each weight
    penalised: bool = False  # training is offered a penalty on its Jacobian


MODES: dict[str, Mode] = {
    "certified": Mode(certified=True),
    "lipsdp": Mode(certified=True, jointly=True),
    "linear": Mode(),
    "soft": Mode(penalised=True),
}
CERTIFIED = tuple(name for name, mode in MODES.items() if mode.certified)
INJECTIONS = ("zoh", "euler", "additive")
# Lipschitz constants of the activations; SiLU's exceeds one (max of its derivative, at x = 2.3994).
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (torch.relu, 1.0),
    "tanh": (torch.tanh, 1.0),
    "silu": (nn.functional.silu, 1.09984),
}
FoldedWeights = tuple[Tensor, "Tensor | float", Tensor, Tensor]  # Abar or F^T, Bbar, W1, g W2
SINGULAR_VALUE_ERROR = 1e-12  # relative, in float64: a few hundred roundings
DECAY_INIT = math.sqrt(1.0 / 5.0)  # of Parcae's code (2604.12946): the linear path forgets h0 at this rate per loop


class Cell(nn.Module):
    """What the cells of every block have in common: the linear path, the mode, and the bound made of both.

    A cell's block is Rbar(h, e) = g R(h, e). In mode ``certified`` the Lipschitz constant of R is at most that of its
    activation and g = gamma (1 - max Abar) / Lip(s), so one loop contracts by
    rho <= max Abar + gamma (1 - max Abar) < 1. Mode ``lipsdp`` promises the same factor by one inequality for the
    whole loop (see ``lipsdp``), which leaves the block more room: g = 1, and W1 and W2 shrink together where they must.
    In mode ``linear`` (the constraint of 2606.18208, equations 6-7) only the linear path is bounded: g = 1 and the
    weights are free. Mode ``soft`` is the same cell, and predictions offer a penalty on the Jacobian
    (``DynamicsOutput.jacobian_penalty``) for the loss to weigh.

    Args:
        hidden_dim: D, width of h. block_dim: inner width of the block. mode: a name in ``MODES``, see above.
        gamma: in (0, 1), share of the head-room that the block may use. activation: s, a name in ``ACTIVATIONS``.
        injection: ``zoh`` Bbar = (1 - Abar) / -A * B, ``euler`` dt * B, ``additive`` 1.
        skip: whether the block has a linear layer W0 h beside its own (block ``mlp``).

    Raises:
        ValueError: unknown mode, injection or activation, a mode or a skip that the block does not have, mode
        ``lipsdp`` with an activation that is not in ``SLOPES``, or gamma outside (0, 1).
    """

    prelude: ClassVar[Callable] = Prelude
    start: ClassVar[Callable] = make_start
    coda: ClassVar[Callable] = Coda
    name: ClassVar[str]  # in ``BLOCKS``
    flops: ClassVar[tuple[int, int]]  # of a loop and of the injection, paid once per prediction, in like units
    norm_order: ClassVar[float] = 2.0  # of the norm of h in which ``lipschitz_bound`` speaks
    places: ClassVar[tuple[int, ...]] = ()  # dimensions of h (B, ...) over which a state is laid out
    lacks: ClassVar[dict[str, str]] = {"lipsdp": "which is for block 'mlp'"}  # modes that it does not have, and why
    may_skip: ClassVar[bool] = False

    @staticmethod
    def width_multiple(hidden_dim: int) -> int:
        """What block_dim must be a multiple of."""
        return 1

    def __init__(
        self,
        hidden_dim: int,
        block_dim: int,
        mode: str = "certified",
        gamma: float = 0.95,
        injection: str = "zoh",
        activation: str = "relu",
        skip: bool = False,
    ):
        super().__init__()
        for value, known, what in ((mode, MODES, "mode"), (injection, INJECTIONS, "injection")):
            if value not in known:
                raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(known)}")
        if mode in self.lacks:
            names = ", ".join(name for name in MODES if name not in self.lacks)
            raise ValueError(f"block {self.name!r} has no mode {mode!r}, {self.lacks[mode]}; choose from {names}")
        if skip and not self.may_skip:
            raise ValueError(f"block {self.name!r} has no skip, which is for block 'mlp'")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
        if not 0.0 < gamma < 1.0:
            raise ValueError(f"gamma must lie in (0, 1), got {gamma}")
        if MODES[mode].jointly and activation not in SLOPES:
            raise ValueError(f"mode {mode!r} needs an activation of slopes in [0, 1]: {', '.join(SLOPES)}")
        self.mode, self.gamma, self.injection, self.has_skip = mode, gamma, injection, skip
        self.activation, self.activation_lipschitz = ACTIVATIONS[activation]
        self.log_rate = nn.Parameter(torch.zeros(hidden_dim))  # a, with A = -exp(a)
        self.log_dt = nn.Parameter(torch.full((hidden_dim,), math.log(-math.log(DECAY_INIT))))
        self.input_gain = nn.Parameter(torch.ones(hidden_dim))  # B, diagonal
        self._folded: tuple | None = None

    def decay(self) -> Tensor:
        """Abar = exp(dt * A) in (0, 1), (D,)."""
        # The floor keeps Abar below one in float32: exp(-x) rounds to 1 for x under 6e-8.
        return torch.exp(-torch.exp(self.log_rate + self.log_dt).clamp_min(1e-4))

    def _inverse_rate(self) -> Tensor:
        """1 / -A, (D,), kept finite where A vanishes."""
        return torch.exp(-self.log_rate.clamp_min(-10.0))

    def block_scale(self, decay: Tensor) -> Tensor | float:
        """g, the factor on the block that leaves the certificate its room; not used in mode ``lipsdp``."""
        if not MODES[self.mode].certified:
            return 1.0
        return self.gamma * (1.0 - decay.max()) / self.activation_lipschitz

    def input_scale(self, decay: Tensor) -> Tensor | float:
        """Bbar, (D,)."""
        if self.injection == "zoh":
            return (1.0 - decay) * self._inverse_rate() * self.input_gain
        if self.injection == "euler":
            return torch.exp(self.log_dt) * self.input_gain
        return 1.0

    def fold(self) -> tuple:
        """Everything that depends on the parameters alone."""
        raise NotImplementedError

    def prepare(self, e: Tensor) -> Loop:
        """Do everything that does not depend on h, once per prediction: e (B, ...)."""
        raise NotImplementedError

    def stages(self, e: Tensor) -> list[Loop]:
        """The loops to run one after the other: of a single layer, one."""
        return [self.prepare(e)]

    def norms(self, folded: tuple) -> list[Tensor]:
        """Operator norms (), float64, of the folded weights: their product times Lip(s) bounds Rbar's constant."""
        raise NotImplementedError

    def folded(self) -> tuple:
        """``fold()``, or what it was where the cell was frozen."""
        return self._folded or self._fold_exactly()

    def _fold_exactly(self) -> tuple:
        """``fold()`` in the precision of the weights: under autocast its norms would be 16 bits wide, and too small."""
        if not autocasts(self.log_dt.device):
            return self.fold()
        with torch.autocast(self.log_dt.device.type, enabled=False):
            return self.fold()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the parameters must not change: they are normalised and folded once, not once per prediction.

        What is folded (the decay and the block's own matrices) stays as it was at the beginning, all else is read as it
        is, and bounds and distances are of the weights as they are: after a step in here they belong to no one model.
        What is folded is part of a gradient's graph: one ``backward()`` frees it, ``copy.deepcopy`` refuses it, and
        entered under ``no_grad`` it has none.
        """
        before, self._folded = self._folded, self._fold_exactly()
        try:
            yield
        finally:
            self._folded = before

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        """Upper bound on |dh'/dh|, by exact singular values in float64.

        Of the weights that a loop multiplies by, as they are rounded to their dtype. In a certified mode it is below
        one at every moment of training, as long as 1 - gamma is far above that dtype's rounding; in the others it is
        as true, and may be any number. Infinite once a weight is no finite number.
        """
        folded = self._fold_exactly()
        finite = all(bool(part.isfinite().all()) for part in folded if isinstance(part, Tensor))
        return self.factor(folded) if finite else math.inf

    def factor(self, folded: tuple) -> float:
        """``lipschitz_bound`` of finite folded weights."""
        block = math.prod((float(norm) for norm in self.norms(folded)), start=self.activation_lipschitz)
        return (float(folded[0].double().max()) + block) * (1.0 + SINGULAR_VALUE_ERROR)


class LoopCell(Cell):
    """One loop on a state h (B, D) with injected input e (B, D): R(h, e) = W2 s(W1 h + U e + b), + W0 h with ``skip``.

    In mode ``certified`` the spectral norms of W1 and W2 are at most one, and there is no skip: a third norm would
    leave the two no room. Mode ``lipsdp`` learns ``block_dim`` multipliers. With a skip the linear path is the matrix
    F = Abar + W0; mode ``lipsdp`` scales all of it down to a norm of at most ``PATH_SHARE`` of the promised factor, so
    decays slower than that are not to be had, in the others it is free. Bbar is of Abar alone. The rest: see ``Cell``.

    Raises:
        ValueError: a skip in mode ``certified``.
    """

    name = "mlp"
    may_skip = True
    lacks: ClassVar[dict[str, str]] = {}
    flops = (2, 1)  # W1 and W2; U

    def __init__(self, hidden_dim: int, block_dim: int, *args, **kwargs):
        super().__init__(hidden_dim, block_dim, *args, **kwargs)
        self.read = nn.Linear(hidden_dim, block_dim, bias=False)  # W1
        self.inject = nn.Linear(hidden_dim, block_dim)  # U, b: free, they do not touch dh'/dh
        self.write = nn.Linear(block_dim, hidden_dim, bias=False)  # W2
        nn.init.zeros_(self.write.weight)
        self.skip = nn.Linear(hidden_dim, hidden_dim, bias=False) if self.has_skip else None  # W0
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)
        if MODES[self.mode].jointly:
            self.log_multipliers = nn.Parameter(torch.full((block_dim,), MULTIPLIER_INIT))
        elif MODES[self.mode].certified:
            if self.has_skip:
                others = ", ".join(name for name in MODES if name != self.mode)
                raise ValueError(f"mode {self.mode!r} has no skip; choose from {others}")
            parametrize.register_parametrization(self.read, "weight", UnitSpectralNorm())
            parametrize.register_parametrization(self.write, "weight", UnitSpectralNorm(), unsafe=True)

    def fold(self) -> FoldedWeights:
        decay, read, write = self.decay(), self.read.weight, self.write.weight
        path = decay if self.skip is None else torch.diag(decay) + self.skip.weight
        if MODES[self.mode].jointly:
            rho = promised_factor(decay, self.gamma)
            path = path if self.skip is None else path * path_scale(path, rho)
            scale = joint_scale(read, write, path, self.log_multipliers, rho)
            read, write = read * scale, write * scale
        else:
            write = write * self.block_scale(decay)
        return path if self.skip is None else path.t(), self.input_scale(decay), read.t(), write.t()

    def prepare(self, e: Tensor) -> PreparedLoop:
        decay, input_scale, read, write = self.folded()
        constant, injected = e * input_scale, self.inject(e)  # (B, D), (B, W)
        kind = PreparedLoop if self.skip is None else SkipLoop
        return kind(decay, constant, injected, read, write, self.activation)

    def norms(self, folded: FoldedWeights) -> list[Tensor]:
        return [torch.linalg.matrix_norm(matrix.double(), 2) for matrix in folded[2:]]

    def factor(self, folded: FoldedWeights) -> float:
        """Of the inequality that the weights were made to fulfil, where there is one; else of their norms."""
        path, _, read, write = folded
        if MODES[self.mode].jointly:
            path = path if self.skip is None else path.t()
            found = joint_factor(read.t(), write.t(), path, self.log_multipliers)
            if found is not None:
                return found
        if self.skip is not None:
            path = torch.linalg.matrix_norm(path.double(), 2)
        return super().factor((path, *folded[1:]))


class PreparedLoop:
    """A cell with its weights and its input fixed: ``h = loop(h)`` is one application of the shared block."""

    __slots__ = ("decay", "constant", "injected", "read", "write", "activation")
    waiting = 0.0

    @property
    def fused(self) -> bool:
        """See ``Loop``: the one node's backward pass is written for ReLU."""
        return self.activation is torch.relu

    def __init__(self, decay, constant, injected, read, write, activation):
        self.decay, self.constant, self.injected = decay, constant, injected
        self.read, self.write, self.activation = read, write, activation

    def __call__(self, h: Tensor) -> Tensor:
        inner = self.activation(torch.addmm(self.injected, h, self.read))  # (B, W)
        return torch.addmm(torch.addcmul(self.constant, h, self.decay), inner, self.write)  # (B, D)

    def first(self, rows: int) -> PreparedLoop:
        """The same loop on the first ``rows`` samples."""
        return type(self)(
            self.decay, self.constant[:rows], self.injected[:rows], self.read, self.write, self.activation
        )

    def select(self, index: Tensor) -> PreparedLoop:
        """The same loop on the samples ``index`` (n,)."""
        constant, injected = self.constant.index_select(0, index), self.injected.index_select(0, index)
        return type(self)(self.decay, constant, injected, self.read, self.write, self.activation)


class SkipLoop(PreparedLoop):
    """The same with a matrix F^T (D, D) in the place of ``decay``."""

    __slots__ = ()
    fused = False

    def __call__(self, h: Tensor) -> Tensor:
        inner = self.activation(torch.addmm(self.injected, h, self.read))  # (B, W)
        return torch.addmm(torch.addmm(self.constant, h, self.decay), inner, self.write)  # (B, D)
