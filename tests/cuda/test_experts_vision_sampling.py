"""Experts, the vision tower's operators and sampling, in the emulator, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from deltaic.ops import cuda, reference
from helpers import TYPES, array, assert_close, expert_weights, normal, reference_weight, rounded, tensor


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("format", ["bf16", "int4"])
@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_moe(device, rng, kind, format, tokens):
    E, H, inner, shared, top_k = 5, 40, 12, 20, 2
    weights = expert_weights(rng, E, H, inner, shared, format)
    x, norm = rounded(normal(rng, tokens, H), kind), normal(rng, H, scale=0.2)
    residual = rounded(normal(rng, tokens, H), kind)
    y = cuda.moe(tensor(x, kind), **weights, top_k=top_k, norm=norm, eps=1e-6, residual=tensor(residual, kind))
    expected = {name: reference_weight(w) for name, w in weights.items()}
    wanted = reference.moe(x, **expected, top_k=top_k, norm=norm, eps=1e-6, residual=residual)
    assert_close(y, wanted, kind, factor=2)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("inner", "shared"), [(16, 264), (136, 24)])
def test_experts_of_a_token_do_not_depend_on_its_batch(device, rng, format, inner, shared):
    """Widths that tensor cores take, of one run of columns or more, and not the same for the shared expert."""
    E, H, top_k, tokens = 5, 40, 3, 4
    weights = expert_weights(rng, E, H, inner, shared, format)
    x, norm = rounded(normal(rng, tokens, H), "bf16"), normal(rng, H, scale=0.2)
    options = {**weights, "top_k": top_k, "norm": norm, "eps": 1e-6}
    y = array(cuda.moe(tensor(x, "bf16"), **options))
    expected = {name: reference_weight(w) for name, w in weights.items()}
    assert_close(y, reference.moe(x, **{**options, **expected}), "bf16", factor=2)
    for t in range(tokens):
        np.testing.assert_array_equal(array(cuda.moe(tensor(x[t : t + 1], "bf16"), **options)), y[t : t + 1])


@pytest.mark.parametrize(("E", "top_k"), [(5, 1), (33, 4), (256, 8)])
def test_route_takes_lower_experts_on_ties(device, rng, E, top_k):
    tokens = 6
    logits = rng.integers(0, 4, size=(tokens, E + 1)).astype(np.float32)  # many ties
    experts, coefficients = (
        tensor(np.zeros((tokens, top_k), np.int64)),
        tensor(np.zeros((tokens, top_k + 1), np.float32)),
    )
    on_device = tensor(logits)
    device.module.moe_route(
        on_device.data_ptr(), E, top_k, experts.data_ptr(), coefficients.data_ptr(), tokens, device.stream()
    )
    top = np.argsort(-logits[:, :E], axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(array(experts), top)
    chosen = reference.softmax(np.take_along_axis(logits[:, :E], top, 1))
    np.testing.assert_allclose(array(coefficients)[:, :top_k], chosen, rtol=1e-5)
    np.testing.assert_allclose(array(coefficients)[:, top_k], reference.sigmoid(logits[:, E]), rtol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("grid", [(2, 4), (4, 2), (6, 6)])
def test_patch_embed(device, rng, kind, grid):
    p, V, side = 4, 24, 3
    image = rng.integers(0, 256, size=(grid[0] * p, grid[1] * p, 3), dtype=np.uint8)
    weight = cuda.pack([normal(rng, V, 3 * p * p)], "f32")
    weight.activation_dtype = "bfloat16" if kind == "bf16" else "float32"
    bias, pos = normal(rng, V), normal(rng, side * side, V)
    options = {"patch_size": p, "merge_size": 2, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}
    y = cuda.patch_embed(image, weight, bias, pos, **options)
    assert_close(y, reference.patch_embed(image, reference_weight(weight), bias, pos, **options), kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("heads", "d"), [(2, 8), (1, 72), (3, 6)])
@pytest.mark.parametrize("lengths", [[5], [17, 1, 70]])
def test_vision_attention(device, rng, kind, heads, d, lengths):
    P = sum(lengths)
    qkv, angle = rounded(normal(rng, P, 3 * heads * d), kind), normal(rng, P, d // 2)
    cu = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    y = cuda.vision_attention(tensor(qkv, kind), np.cos(angle), np.sin(angle), num_heads=heads, cu_seqlens=cu)
    expected = reference.vision_attention(qkv, np.cos(angle), np.sin(angle), num_heads=heads, cu_seqlens=cu)
    assert_close(y, expected, kind, factor=2)


PLAIN = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0, "output_ids": np.zeros(0, np.int64), "output_counts": np.zeros(0, np.int64),
    "prompt_ids": np.zeros(0, np.int64),
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0}, {}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.3}, {"min_p": 0.2}, {"temperature": 0.3},
        {"top_k": 20, "top_p": 0.8, "temperature": 0.7}, {"top_k": 500, "top_p": 0.95, "min_p": 0.01},
        {"presence_penalty": 1.5, "frequency_penalty": 0.3, "repetition_penalty": 1.3, "top_k": 20},
    ],
)  # fmt: skip
def test_sample(device, rng, options):
    V, limit = 700, 690
    options = dict(PLAIN, **options, limit=limit)
    options.update(
        output_ids=np.array([3, 9, 600]), output_counts=np.array([1, 4, 2]), prompt_ids=np.array([3, 77, 695])
    )
    for logits in (normal(rng, V, scale=3), np.round(normal(rng, V, scale=2))):  # the latter with ties
        logits[limit:] = 100
        for uniform in (0.0, 0.2, 0.55, 0.93, 0.9999):
            wanted = reference.sample(logits, **options, uniform=uniform)
            assert cuda.sample(tensor(logits), **options, uniform=uniform) == wanted, (options, uniform)


def test_sample_shortlist(device, rng):
    """A vocabulary of several stretches, ties across them included."""
    V = 9000
    logits = np.round(normal(rng, V, scale=2) * 2) / 2
    for top_k, temperature in ((20, 1.0), (1, 1.0), (20, 0.0)):
        for uniform in (0.1, 0.8):
            options = dict(PLAIN, top_k=top_k, temperature=temperature, limit=V - 5, uniform=uniform)
            assert cuda.sample(tensor(logits), **options) == reference.sample(logits, **options)


@pytest.mark.parametrize("V", [300, 9000])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"), [(0.0, 0, 1.0, 0.0), (0.8, 20, 0.9, 0.02), (1.0, 0, 0.95, 0.0)]
)
def test_sample_rows(device, rng, V, temperature, top_k, top_p, min_p):
    """Several rows at once, ties and ids that are never chosen among them; tokens of the host and of the device."""
    logits, limit = np.round(normal(rng, 3, V, scale=2) * 2) / 2, V - 5
    logits[:, limit:] = 100
    unused = np.array([int(logits[0, :limit].argmax()), 1, limit - 1, V - 1])
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "limit": limit}
    draws, wanted = rng.integers(0, 2**53, 3), np.zeros(3, np.int64)
    reference.sample_rows(logits.copy(), **options, unused=unused, draws=draws, tokens=wanted)
    found, on_device = np.zeros(3, np.int64), tensor(np.zeros(3, np.int64))
    cuda.sample_rows(tensor(logits), **options, unused=unused, draws=draws, tokens=found)
    cuda.sample_rows(tensor(logits), **options, unused=unused, draws=tensor(draws), tokens=on_device)
    assert found.tolist() == array(on_device).tolist() == wanted.tolist()
    for t in range(3):  # each row for itself, as `sample` does it
        row = logits[t].copy()
        row[unused] = -np.inf
        assert cuda.sample(tensor(row), **dict(PLAIN, **options), uniform=float(draws[t]) / 2**53) == wanted[t]


@pytest.mark.parametrize("V", [64, 9000])
def test_sample_rows_marks_broken_logits(device, rng, V):
    logits, tokens = normal(rng, 4, V), tensor(np.zeros(4, np.int64))
    logits[0, V - 2], logits[1, 3], logits[3] = np.nan, np.inf, -np.inf
    for options in (
        {"temperature": 0.0, "top_k": 0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 0},
    ):
        options |= {"top_p": 1.0, "min_p": 0.0, "limit": V - 1, "unused": np.arange(0), "draws": np.zeros(4, np.int64)}
        cuda.sample_rows(tensor(logits), **options, tokens=tokens)
        assert (array(tokens) < 0).tolist() == [True, True, False, True]
        on_host = np.zeros(4, np.int64)
        cuda.sample_rows(tensor(logits), **options, tokens=on_host)
        assert on_host.tolist() == array(tokens).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_sample_refuses_broken_logits(device, rng, bad):
    for V in (64, 9000):
        logits = normal(rng, V)
        logits[V - 7] = bad
        for top_k in (0, 5):
            with pytest.raises(cuda.ArgumentError, match="NaN"):
                cuda.sample(tensor(logits), **dict(PLAIN, top_k=top_k), limit=V - 1, uniform=0.5)
    with pytest.raises(cuda.ArgumentError, match="NaN"):
        cuda.sample(tensor(np.full(8, -np.inf, np.float32)), **PLAIN, limit=8, uniform=0.5)


def test_log_softmax_top(device, rng):
    logits = normal(rng, 50)
    found = cuda.log_softmax_top(tensor(logits), limit=45, k=4, token=11)
    expected = reference.log_softmax_top(logits, limit=45, k=4, token=11)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-6)
