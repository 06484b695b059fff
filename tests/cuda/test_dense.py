"""Norms, products, embeddings and the tails of products, in the emulator, against the definition."""

from __future__ import annotations

import emulator
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


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("T", "D"), [(1, 8), (3, 300)])
def test_rms_norm_pair(device, rng, kind, T, D):
    a, b = (rounded(normal(rng, T, D), kind) for _ in range(2))
    weights = [normal(rng, D) for _ in range(2)]
    y = cuda.rms_norm_pair(tensor(a, kind), weights[0], tensor(b, kind), weights[1], 1e-6)
    assert_close(y, reference.rms_norm_pair(a, weights[0], b, weights[1], 1e-6), kind)
    for half, x, weight in ((y[:, :D], a, weights[0]), (y[:, D:], b, weights[1])):
        np.testing.assert_array_equal(array(half), array(cuda.rms_norm(tensor(x, kind), weight, 1e-6)))


@pytest.mark.parametrize("format", FORMATS)
def test_embed(device, rng, format):
    table = cuda.pack([normal(rng, 21, 37)], format)
    ids = np.array([20, 0, 7, 7])
    found = array(cuda.embed(ids, table))
    expected = dequantised(table)[ids]
    np.testing.assert_array_equal(found, expected if format == "f32" else rounded(expected, "bf16"))


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


@pytest.fixture
def tensor_cores(device):
    """Switches them off and on again, on the emulator; on a card they are as they are."""
    if not device.module.emulated:
        pytest.skip("the card decides")
    device.module.use_tensor_cores(True)
    yield device.module.use_tensor_cores
    device.module.use_tensor_cores(True)


# The last two have more runs of columns than shared memory takes at once: for 8 tokens, and for one.
@pytest.mark.parametrize("K", [8, 136, 1024, 2184, 17000])
@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_products_on_tensor_cores(tensor_cores, rng, format, K):
    """As exact as sums of floats, with a norm too, and for every number of tokens the same bits."""
    N = 40 if K < 10000 else 3
    w = cuda.pack([normal(rng, N, K), normal(rng, 1, K)], format)
    w.float_output = True
    x, norm, bias = normal(rng, cuda.FEW, K), normal(rng, K, scale=0.2), normal(rng, N + 1)
    residual = tensor(normal(rng, cuda.FEW, N + 1), "bf16")
    x = tensor(x, "bf16")
    plain, normed = array(cuda.linear(x, w)), array(cuda.linear(x, w, norm=norm, bias=bias, residual=residual))
    assert_close(plain, reference.linear(array(x), reference_weight(w)), "f32")
    for n in (1, 2, 5, 8, 9):
        some = cuda.linear(x[:n].contiguous(), w, norm=norm, bias=bias, residual=residual[:n].contiguous())
        np.testing.assert_array_equal(array(some), normed[:n])
    tensor_cores(False)
    assert_close(plain, array(cuda.linear(x, w)), "f32")
    assert_close(normed, array(cuda.linear(x, w, norm=norm, bias=bias, residual=residual)), "f32")


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("inner", [1, 8, 19])
def test_gated_products_on_tensor_cores(tensor_cores, rng, format, inner):
    w = cuda.pack_glu(normal(rng, inner, 264), normal(rng, inner, 264), format)
    x, norm = tensor(normal(rng, 9, 264), "bf16"), normal(rng, 264, scale=0.2)
    y = cuda.swiglu(x, w, norm=norm)
    assert_close(y, reference.swiglu(array(x), reference_weight(w), norm=norm), "bf16", factor=2)
    np.testing.assert_array_equal(array(cuda.swiglu(x[:1].contiguous(), w, norm=norm)), array(y)[:1])
    tensor_cores(False)
    assert_close(y, array(cuda.swiglu(x, w, norm=norm)), "bf16", factor=2)


@pytest.mark.parametrize("rows", [8200, 16400, 32800])
def test_large_matrices_share_no_tile(emulated, rng, rows):
    """The more rows, the fewer warps on each: 4, 2 and 1 of eight. One order of threads will do."""
    emulated.set_order("reverse", 1)
    cuda.use_device(emulator.EmulatedDevice(emulated))
    try:
        w, x = cuda.pack([normal(rng, rows, 264)], "int8"), tensor(normal(rng, 2, 264), "bf16")
        assert_close(cuda.linear(x, w), reference.linear(array(x), reference_weight(w)), "bf16")
    finally:
        cuda.use_device(None)
