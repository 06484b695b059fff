"""Experts, the vision tower's operators and sampling, in the emulator, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from cases import PLAIN_CHOICE, chosen, seen_of
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


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0}, {}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.3}, {"min_p": 0.2}, {"temperature": 0.3},
        {"top_k": 20, "top_p": 0.8, "temperature": 0.7}, {"top_k": 500, "top_p": 0.95, "min_p": 0.01},
        {"presence_penalty": 1.5, "frequency_penalty": 0.3, "repetition_penalty": 1.3, "top_k": 20},
    ],
)  # fmt: skip
def test_sample(device, rng, options):
    V, text = 700, {"output": [3, 9, 9, 9, 9, 600, 600], "prompt": [3, 77, 695]}
    for logits in (normal(rng, V, scale=3), np.round(normal(rng, V, scale=2))):  # the latter with ties
        logits[690:] = 100
        for uniform in (0.0, 0.2, 0.55, 0.93, 0.9999):
            wanted = chosen(reference, logits, uniform, limit=690, **text, **options)
            assert chosen(cuda, logits, uniform, limit=690, **text, **options) == wanted, (options, uniform)


@pytest.mark.parametrize("V", [300, 9000])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"), [(0.0, 0, 1.0, 0.0), (0.8, 20, 0.9, 0.02), (1.0, 0, 0.95, 0.0)]
)
@pytest.mark.parametrize("penalised", [False, True])
def test_sample_rows(device, rng, V, temperature, top_k, top_p, min_p, penalised):
    """Several rows at once, of two texts, some without logits; ties (across stretches of a vocabulary, too), and ids
    that are never chosen; tokens of the host and of the device."""
    logits, limit, T = np.round(normal(rng, 5, V, scale=2) * 2) / 2, V - 5, 5
    logits[:, limit:] = 100
    unused = np.array([int(logits[0, :limit].argmax()), 1, limit - 1, V - 1])
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "limit": limit}
    options = PLAIN_CHOICE | options | {"unused": unused}
    seen = []
    if penalised:
        likely = np.argsort(-logits[:, :limit].mean(0))[:12]
        seen = [seen_of(V, rng.choice(likely, 9), rng.integers(0, V, 40)) for _ in range(2)]
        options |= {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.25}
        options |= {"cu_seqlens": np.array([0, 3, 7]), "fed": rng.choice(likely, 7)}
    draws, wanted = rng.integers(0, 2**53, T), np.zeros(T, np.int64)
    reference.sample_rows(logits.copy(), **options | {"draws": draws, "seen": seen}, tokens=wanted)
    found, on_device = np.zeros(T, np.int64), tensor(np.zeros(T, np.int64))
    options["seen"] = [tensor(text) for text in seen]
    cuda.sample_rows(tensor(logits), **options, draws=draws, tokens=found)
    if penalised:
        options |= {name: tensor(options[name]) for name in ("cu_seqlens", "fed")}
    cuda.sample_rows(tensor(logits), **options, draws=tensor(draws), tokens=on_device)
    assert found.tolist() == array(on_device).tolist() == wanted.tolist()


@pytest.mark.parametrize(("V", "B", "S"), [(64, 1, 1), (700, 3, 16), (5000, 2, 4), (9, 0, 1), (9, 2, 0)])
def test_count_tokens(device, rng, V, B, S):
    """Some twice, and -1 for none."""
    ids = rng.integers(0, max(1, V // 50), (B, S)) * min(V - 1, 50)
    ids[rng.random((B, S)) < 0.3] = -1
    seen = [seen_of(V, rng.integers(0, V, 5), rng.integers(0, V, 5)) for _ in range(B)]
    found = [tensor(text) for text in seen]
    cuda.count_tokens(ids, found)
    reference.count_tokens(ids, seen)
    for text, wanted in zip(found, seen, strict=True):
        np.testing.assert_array_equal(array(text), wanted)


@pytest.mark.parametrize("V", [64, 9000])
def test_sample_rows_marks_broken_logits(device, rng, V):
    logits, tokens = normal(rng, 4, V), tensor(np.zeros(4, np.int64))
    logits[0, V - 2], logits[1, 3], logits[3] = np.nan, np.inf, -np.inf
    for choice in ({"temperature": 0.0}, {"top_k": 5}, {}):
        options = PLAIN_CHOICE | choice | {"limit": V - 1, "draws": np.zeros(4, np.int64)}
        cuda.sample_rows(tensor(logits), **options, tokens=tokens)
        assert (array(tokens) < 0).tolist() == [True, True, False, True]
        on_host = np.zeros(4, np.int64)
        cuda.sample_rows(tensor(logits), **options, tokens=on_host)
        assert on_host.tolist() == array(tokens).tolist()


def test_texts_that_do_not_fit_are_refused(device, rng):
    logits, text = tensor(normal(rng, 2, 100)), tensor(seen_of(100, np.array([3]), np.array([4])))
    options = PLAIN_CHOICE | {"limit": 100, "draws": np.zeros(2, np.int64), "tokens": np.zeros(2, np.int64)}
    given = {"seen": [text], "cu_seqlens": np.array([0, 2]), "fed": np.array([3, 5])}
    cuda.sample_rows(logits, **options | given)
    for change, message in (
        ({"cu_seqlens": np.array([0, 1, 2])}, "cu_seqlens has 3 numbers and fed 2 ids, expected 2, and at least 2"),
        ({"fed": np.array([3])}, "cu_seqlens has 2 numbers and fed 1 ids"),
        ({"seen": [text.float()]}, r"seen is float32\[65,2\], expected int64\[65,_\]"),
        ({"seen": [text[:, :1].contiguous()]}, "seen has room for 64 ids, limit is 100"),
    ):
        with pytest.raises(cuda.ArgumentError, match=message):
            cuda.sample_rows(logits, **options | given | change)


def test_log_softmax_top(device, rng):
    logits = normal(rng, 50)
    found = cuda.log_softmax_top(tensor(logits), limit=45, k=4, token=11)
    expected = reference.log_softmax_top(logits, limit=45, k=4, token=11)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-6)
