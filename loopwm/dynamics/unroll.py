"""All loops of one prediction as a single autograd node.

A loop of four small operations costs autograd more than arithmetic: a node an operation, and a weight-gradient matrix
product and an addition for each use of a shared weight. Here the whole unroll is one node, and the gradient of a
shared weight is ONE matrix product over the rows of all loops. Same mathematics as ``PreparedLoop`` applied in turn;
a test compares the two in float64. It pays where depths are mixed; at one fixed depth it was no faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loopwm.dynamics.cell import PreparedLoop
from loopwm.dynamics.spectral import first_order

relu_backward = torch.ops.aten.threshold_backward.grad_input


class _Unroll(torch.autograd.Function):
    """h[t+1] = decay * h[t] + constant + relu(h[t] read + injected) write, loop t on the first active[t] rows."""

    @staticmethod
    def forward(ctx, h, constant, injected, decay, read, write, active):
        total = sum(active)
        states = h.new_empty(total, h.shape[1])  # input state of every (loop, row)
        inner = h.new_empty(total, injected.shape[1])  # the block's activation there
        final, start = h.clone(), 0
        for rows in active:
            end = start + rows
            state, hidden, out = states[start:end], inner[start:end], final[:rows]
            state.copy_(out)
            torch.addmm(injected[:rows], state, read, out=hidden).relu_()
            # in place on the final buffer: rows that finish keep the value of their last loop
            torch.addcmul(constant[:rows], state, decay, out=out)
            torch.addmm(out, hidden, write, out=out)  # not addmm_, which torch's FLOP counter does not see
            start = end
        ctx.save_for_backward(states, inner, decay, read, write)
        ctx.active = active
        ctx.set_materialize_grads(False)  # mostly nobody reads the states: no zeros for them then
        return final, states

    @staticmethod
    @first_order
    def backward(ctx, grad, grad_states):
        states, inner, decay, read, write = ctx.saved_tensors
        active = ctx.active
        rows_all = active[0]
        grad = states.new_zeros(rows_all, states.shape[1]) if grad is None else grad.clone()
        outer = torch.empty_like(states)  # gradient at the output of every (loop, row)
        before = torch.empty_like(inner)  # gradient before the activation
        grad_constant = torch.zeros_like(grad)
        grad_injected = grad.new_zeros(rows_all, inner.shape[1])
        read_t, write_t = read.t(), write.t()
        end = states.shape[0]
        for rows in reversed(active):
            start = end - rows
            g, g_out, g_pre = grad[:rows], outer[start:end], before[start:end]
            g_out.copy_(g)
            torch.mm(g_out, write_t, out=g_pre)
            relu_backward(g_pre, inner[start:end], 0, grad_input=g_pre)
            grad_constant[:rows] += g_out
            grad_injected[:rows] += g_pre
            torch.addmm(g.mul_(decay), g_pre, read_t, out=g)
            if grad_states is not None:
                g += grad_states[start:end]
            end = start
        grad_decay = (outer * states).sum(0)
        return grad, grad_constant, grad_injected, grad_decay, states.t() @ before, inner.t() @ outer, None


def unroll(h: Tensor, loop: PreparedLoop, active: list[int]) -> tuple[Tensor, Callable[[], Tensor]]:
    """Apply ``loop`` (one that is ``fused``) to h (B, D), loop t on the first active[t] rows.

    Returns:
        (final states (B, D), a function that gives the states (sum(active), D) that entered each loop, loop by loop).
    """
    final, states = _Unroll.apply(h, loop.constant, loop.injected, loop.decay, loop.read, loop.write, active)
    return final, lambda: states


def unroll_plain(h: Tensor, loop: PreparedLoop, active: list[int]) -> tuple[Tensor, Callable[[], Tensor]]:
    """What ``unroll`` does, by autograd alone: for every other loop, and to test it against."""
    states, finished = [], []
    for rows in active:
        if rows < h.shape[0]:
            finished.append(h[rows:])
            h, loop = h[:rows], loop.first(rows)
        states.append(h)
        h = loop(h)
    return torch.cat([h, *reversed(finished)]), lambda: torch.cat(states)
