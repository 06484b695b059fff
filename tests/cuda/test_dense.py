"""Norms, products, embeddings and the tails of products, in the emulator, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deltaic.ops import cpu, cuda, reference
from helpers import TYPES, array, assert_close, dequantised, normal, reference_weight, rounded, tensor

FORMATS = ("f32", "bf16", "int8", "int4")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 257), (1, 1000)])
def test_norms(device, rng, kind, shape):
    x = rounded(normal(rng, *shape), kind)
    w, b = normal(rng, shape[1]), normal(rng, shape[1])
    assert_close(cuda.rms_norm(tensor(x, kind), w, 1e-6), reference.rms_norm(x, w, 1e-6), kind)
    assert_close(cuda.layer_norm(tensor(x, kind), w, b, 1e-6), reference.layer_norm(x, w, b, 1e-6), kind)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(17, 40), (5, 300)])
def test_packing_keeps_the_numbers(device, rng, format, shape):
    matrix = normal(rng, *shape)
    found = dequantised(cuda.pack([matrix], format))
    if format == "f32":
        np.testing.assert_array_equal(found, matrix)
    elif format == "bf16":
        np.testing.assert_array_equal(found, rounded(matrix, "bf16"))
    else:  # the same numbers as on the CPU
        ids = np.arange(shape[0])
        np.testing.assert_allclose(found, cpu.embed(ids, cpu.pack([matrix], format)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 19])
def test_linear(device, rng, kind, format, tokens):
    K = 136
    w = cuda.pack([normal(rng, 9, K), normal(rng, 18, K)], [format, "bf16"])
    x, norm, bias = rounded(normal(rng, tokens, K), kind), normal(rng, K, scale=0.2), normal(rng, 27)
    residual = rounded(normal(rng, tokens, 27), kind)
    expected = reference_weight(w)
    y = cuda.linear(tensor(x, kind), w)
    assert_close(y, reference.linear(x, expected), kind)
    y = cuda.linear(
        tensor(x, kind), w, norm=norm, eps=1e-5, bias=bias, activation="gelu_tanh", residual=tensor(residual, kind)
    )
    assert_close(
        y,
        reference.linear(x, expected, norm=norm, eps=1e-5, bias=bias, activation="gelu_tanh", residual=residual),
        kind,
    )
    y = cuda.linear(tensor(x, kind), w, bias=bias, activation="gelu_erf")
    assert_close(y, reference.linear(x, expected, bias=bias, activation="gelu_erf"), kind)


@pytest.mark.parametrize("tokens", [2, 18])
def test_a_head_gives_floats_with_every_epilogue(device, rng, tokens):
    w, x, bias = cuda.pack([normal(rng, 9, 40)], "bf16"), rounded(normal(rng, tokens, 40), "bf16"), normal(rng, 9)
    w.float_output = True
    y = cuda.linear(tensor(x, "bf16"), w, bias=bias)
    assert y.dtype == torch.float32
    assert_close(y, reference.linear(x, reference_weight(w), bias=bias), "bf16")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_swiglu(device, rng, kind, format, tokens):
    w = cuda.pack_glu(normal(rng, 13, 72), normal(rng, 13, 72), format)
    x, norm = rounded(normal(rng, tokens, 72), kind), normal(rng, 72, scale=0.2)
    assert_close(
        cuda.swiglu(tensor(x, kind), w, norm=norm), reference.swiglu(x, reference_weight(w), norm=norm), kind, factor=2
    )


def test_a_row_gets_the_same_bits_in_any_batch(device, rng):
    w = cuda.pack([normal(rng, 10, 264)], "int4")
    x, norm = tensor(normal(rng, cuda.FEW, 264), "bf16"), normal(rng, 264)
    whole = array(cuda.linear(x, w, norm=norm))
    for n in (1, 2, 3, 7):
        np.testing.assert_array_equal(array(cuda.linear(x[:n].contiguous(), w, norm=norm)), whole[:n])


@pytest.mark.parametrize("format", FORMATS)
def test_embed(device, rng, format):
    table = cuda.pack([normal(rng, 21, 37)], format)
    ids = np.array([20, 0, 7, 7])
    found = array(cuda.embed(ids, table))
    expected = dequantised(table)[ids]
    np.testing.assert_array_equal(found, expected if format == "f32" else rounded(expected, "bf16"))


def test_rope_table(device):
    positions = np.array([[0, 0, 0], [5, 7, 9], [262143, 1, 2]])
    frequencies = np.array([1.0, 0.1, 0.003], np.float32)
    axes = np.array([0, 1, 2])
    cos, sin = cuda.rope_table(tensor(positions), frequencies, axes, 1.5)
    angle = (positions[:, axes].astype(np.float32) * frequencies).astype(np.float64)
    np.testing.assert_allclose(array(cos), 1.5 * np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(array(sin), 1.5 * np.sin(angle), atol=1e-6)


def test_wrong_arguments_are_named(device, rng):
    w = cuda.pack([normal(rng, 8, 16)], "bf16")
    good = tensor(normal(rng, 2, 16), "bf16")
    cases = [
        (
            lambda: cuda.linear(tensor(normal(rng, 2, 15), "bf16"), w),
            r"linear: x is bfloat16\[2,15\], expected .*\[_,16\]",
        ),
        (lambda: cuda.linear(good.double(), w), "linear: x is float64"),
        (lambda: cuda.linear(tensor(normal(rng, 16, 2), "bf16").T, w), "not contiguous"),
        (lambda: cuda.linear(normal(rng, 2, 16), w), "x is a ndarray, expected a torch tensor"),
        (lambda: cuda.linear(good, w, activation="relu"), "unknown activation 'relu'"),
        (lambda: cuda.linear(good, w, residual=tensor(normal(rng, 2, 8))), "residual is float32"),
        (lambda: cuda.swiglu(good, w), "pack_glu"),
        (lambda: cuda.pack([normal(rng, 2, 2)], "fp8"), "unknown weight format 'fp8'"),
        (lambda: cuda.embed(np.array([8]), w), "token ids span 8..8"),
    ]
    for call, message in cases:
        with pytest.raises(cuda.ArgumentError, match=message):
            call()
    assert torch.isfinite(cuda.linear(good, w)).all()
