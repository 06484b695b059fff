"""Widths as in released models: loops that the compiler unrolls, and kernels for wide heads, that small sizes miss."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from deltaic.ops import cuda, reference
from helpers import TYPES, assert_close, expert_weights, normal, reference_weight, rounded, tensor
from test_mixers import check_attention, delta_case, run_delta


@pytest.fixture
def sums_of_floats(wide_device):
    """Products without tensor cores."""
    if not wide_device.module.emulated:
        pytest.skip("the card decides")
    wide_device.module.use_tensor_cores(False)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_products(sums_of_floats, rng, kind, format, tokens):
    K, N = 2056, 19
    w, x, norm = (
        cuda.pack([normal(rng, N, K)], format),
        rounded(normal(rng, tokens, K), kind),
        normal(rng, K, scale=0.2),
    )
    w.float_output = True
    bias, residual = normal(rng, N), rounded(normal(rng, tokens, N), kind)
    for activation in ("none", "gelu_tanh", "gelu_erf"):
        options = {"norm": norm, "eps": 1e-5, "bias": bias, "activation": activation}
        y = cuda.linear(tensor(x, kind), w, **options, residual=tensor(residual, kind))
        expected = reference.linear(x, reference_weight(w), **options, residual=residual)
        assert_close(y, expected, "f32", factor=2)


@pytest.mark.parametrize(("kind", "tokens"), [("f32", 1), ("bf16", 1), ("bf16", 60)])
@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_experts(wide_device, rng, kind, format, tokens):
    E, H, inner, shared, top_k = 5, 520, 264, 72, 3
    weights = expert_weights(rng, E, H, inner, shared, format)
    x, norm = rounded(normal(rng, tokens, H), kind), normal(rng, H, scale=0.2)
    y = cuda.moe(tensor(x, kind), **weights, top_k=top_k, norm=norm, eps=1e-6)
    expected = {name: reference_weight(w) for name, w in weights.items()}
    assert_close(y, reference.moe(x, **expected, top_k=top_k, norm=norm, eps=1e-6), kind, factor=2)


@pytest.mark.parametrize("Dk", [48, 128])
def test_delta_rule(wide_device, rng, Dk):
    for lengths in ([2], [66]):
        case = delta_case(rng, lengths, "bf16", Hk=1, Hv=2, Dk=Dk, Dv=128)
        y, after = run_delta(case, "bf16")
        expected = copy.deepcopy(case)
        assert_close(y, reference.gated_delta_net(**expected), "bf16", factor=4)
        assert_close(after["states"][0], expected["states"][0], "f32", factor=4)


@pytest.mark.parametrize(("kind", "kv"), [("f32", "bf16"), ("bf16", "bf16"), ("f32", "f32")])
@pytest.mark.parametrize(("D", "half", "Hq", "Hkv"), [(256, 32, 8, 1), (128, 64, 4, 2), (60, 8, 2, 1), (64, 8, 16, 1)])
def test_attention(wide_device, rng, kind, kv, D, half, Hq, Hkv):
    """Several tiles of keys in each split; 60 channels, and 16 query heads to a key head, have kernels of their own."""
    check_attention(rng, [1, 2], [0, 150], kind, kv, D=D, half=half, Hq=Hq, Hkv=Hkv, block=32)
    check_attention(rng, [70], [60], kind, kv, D=D, half=half, Hq=Hq, Hkv=Hkv, block=32)


@pytest.mark.parametrize("d", [128, 160])
def test_vision_attention(wide_device, rng, d):
    qkv, angle = rounded(normal(rng, 70, 3 * d), "bf16"), normal(rng, 70, d // 2)
    cosine, sine, cu = np.cos(angle), np.sin(angle), np.array([0, 70])
    y = cuda.vision_attention(tensor(qkv, "bf16"), cosine, sine, num_heads=1, cu_seqlens=cu)
    assert_close(y, reference.vision_attention(qkv, cosine, sine, num_heads=1, cu_seqlens=cu), "bf16", factor=2)
