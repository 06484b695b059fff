"""The delta rule and the causal convolution for training, in C++ with gradients; built by the system's compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("delta_rule.cpp")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC", "-std=c++20")


@functools.cache
def library() -> ctypes.CDLL:
    """Compiles delta_rule.cpp into the temporary folder, unless that was done before, and loads it."""
    name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"miniature_{name}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([os.environ.get("CXX", "g++"), *FLAGS, str(SOURCE), "-o", str(partial)], check=True)
        os.replace(partial, target)
    return ctypes.CDLL(str(target))


def _call(function: str, *values: Tensor | float) -> None:
    """Calls a C function with tensors as pointers, integers as int64 and floats as double; the thread count last."""
    types = {int: ctypes.c_int64, float: ctypes.c_double}
    arguments = [ctypes.c_void_p(v.data_ptr()) if isinstance(v, Tensor) else types[type(v)](v) for v in values]
    library()[function](*arguments, ctypes.c_int(torch.get_num_threads()))


class DeltaRule(torch.autograd.Function):
    """q, k, v [B, T, H, 32], g and beta [B, T, H], all float32 and contiguous; returns o [B, T, H, 32]."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *inputs: Tensor) -> Tensor:
        """The recurrence from an empty state."""
        inputs = tuple(x.contiguous() for x in inputs)
        if inputs[0].shape[-1] != 32 or inputs[2].shape[-1] != 32:
            raise ValueError("head dimensions other than 32 are not built")
        ctx.save_for_backward(*inputs)
        out = torch.empty_like(inputs[2])
        _call("delta_rule_forward", *inputs, out, *inputs[2].shape[:3])
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients in the order of the inputs."""
        inputs = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in inputs)
        _call("delta_rule_backward", *inputs, grad.contiguous(), *grads, *inputs[2].shape[:3])
        return grads


class Convolution(torch.autograd.Function):
    """x [B, T, C], weight [C, 4]; causal depthwise convolution, then SiLU."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        """Zeros stand before the first token."""
        x, weight = x.contiguous(), weight.contiguous()
        total, y = torch.empty_like(x), torch.empty_like(x)
        _call("conv_forward", x, weight, total, y, *x.shape)
        ctx.save_for_backward(x, weight, total)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and weight."""
        x, weight, total = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), x.new_empty(x.shape[0], *weight.shape)
        _call("conv_backward", x, weight, total.clone(), grad.contiguous(), dx, dweight, *x.shape)
        return dx, dweight.sum(0)


class RmsNorm(torch.autograd.Function):
    """x [..., D], weight [D] (as multiplied), eps; float32."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight."""
        x = x.contiguous()
        scale, y = x.new_empty(x.shape[:-1]), torch.empty_like(x)
        _call("rms_norm_forward", x, weight, scale, y, scale.numel(), x.shape[-1], float(eps))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and weight."""
        x, weight, scale = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        _call("rms_norm_backward", x, weight, scale, grad.contiguous(), dx, dweight, scale.numel(), x.shape[-1])
        return dx, dweight, None


def rms_norm(self: torch.nn.Module, x: Tensor) -> Tensor:
    """Stands in for the forward pass of the zero-centred norm."""
    return RmsNorm.apply(x, 1.0 + self.weight, self.eps)


def gated_rms_norm(self: torch.nn.Module, x: Tensor, gate: Tensor) -> Tensor:
    """Stands in for the forward pass of the delta rule's norm."""
    return RmsNorm.apply(x, self.weight, self.variance_epsilon) * torch.nn.functional.silu(gate)


def delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: object) -> tuple[Tensor, None]:
    """Stands in for `torch_chunk_gated_delta_rule` from an empty state, normalisation of q and k included."""
    width = key.shape[-1]  # x / sqrt(sum(x^2) + eps) is the RMS norm with eps / width, divided by sqrt(width)
    query = RmsNorm.apply(query, query.new_full((width,), 1 / width), 1e-6 / width)
    key = RmsNorm.apply(key, key.new_full((width,), width**-0.5), 1e-6 / width)
    return DeltaRule.apply(query, key, value, g, beta), None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object) -> Tensor:
    """Stands in for `causal_conv1d_fn`. x [B, C, T] is a transposed view of a [B, T, C] tensor."""
    return Convolution.apply(x.transpose(1, 2), weight).transpose(1, 2)
