"""Inputs for both op sets, and comparisons."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from deltaic.ops import cuda, reference

TYPES = ("f32", "bf16")
# Largest error in units of the largest output: float sums of a few hundred products, and bfloat16's half step (2^-9) on
# inputs, outputs and tensor-core operands.
TOLERANCE = {"f32": 2e-5, "bf16": 1.5e-2}


def normal(rng, *shape, scale=1.0):
    return (rng.normal(size=shape) * scale).astype(np.float32)


def rounded(x, kind):
    """The values that survive in an activation of this kind."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32) if kind == "bf16" else x


def tensor(x, kind="f32"):
    """A numpy array on the device, in guarded memory; kind "bf16" rounds floats."""
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[kind] if x.dtype == np.float32 else torch.from_numpy(x).dtype
    return cuda.device().empty(x.shape, dtype).copy_(torch.from_numpy(np.ascontiguousarray(x)))


def array(x):
    return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()


def assert_close(found, expected, kind, factor=1.0):
    found = array(found) if isinstance(found, torch.Tensor) else found
    assert found.shape == expected.shape
    bound = TOLERANCE[kind] * factor * max(1e-3, float(np.abs(expected).max(initial=0)))
    error = np.abs(found.astype(np.float64) - expected)
    assert np.isfinite(found).all(), "the output holds numbers that are not finite: something was not written"
    if error.size and error.max() > bound:
        worst = np.unravel_index(np.argmax(error), error.shape)
        raise AssertionError(f"{error.max():.3g} > {bound:.3g} at {worst}: {found[worst]} instead of {expected[worst]}")


def dequantised(weight, part=0):
    """The numbers that a packed part holds, from the kernel that cuBLAS products use."""
    p = weight.parts[part]
    rows = p.rows * weight.count
    y = cuda.device().empty([rows, p.columns], torch.float32)
    cuda.device().module.dequantise(weight.handle, part, 0, rows, y.data_ptr(), 0, cuda.device().stream())
    return array(y).copy()


def reference_weight(weight):
    """A reference weight with the numbers of a packed one."""
    joined = np.concatenate(
        [dequantised(weight, i).reshape(weight.count, -1, p.columns) for i, p in enumerate(weight.parts)], 1
    )
    matrix = joined if weight.count > 1 else joined[0]
    return reference.Weight(matrix, "f32", matrix.nbytes, is_glu=weight.glu)


def expert_weights(rng, E, H, inner, shared, format):
    """The matrices of a layer of E experts, by their names as arguments of `moe`."""
    return {
        "router": cuda.pack([normal(rng, E, H)], "bf16"),
        "gate_up": cuda.pack_glu(normal(rng, E, inner, H), normal(rng, E, inner, H), format),
        "down": cuda.pack([normal(rng, E, H, inner)], format),
        "shared_gate_up": cuda.pack_glu(normal(rng, shared, H), normal(rng, shared, H), format),
        "shared_down": cuda.pack([normal(rng, H, shared)], format),
        "shared_gate": cuda.pack([normal(rng, 1, H)], "bf16"),
    }
