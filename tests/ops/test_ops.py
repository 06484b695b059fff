"""Every operator of every op set against the reference in float64, for every case of `cases.py`.

Tolerances follow from the inputs. For a product: c * eps * sum |a||b|. For composite operators: c times what the
reference's result moves when every input moves by one rounding (`conditioned`), which no float32 kernel can avoid. The
reference itself runs through the same test in float32, which keeps the tolerances honest.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cases import CASES, KV_LAYER, POISON, Case, arguments_for
from deltaic import _core
from deltaic.ops import reference

EPS = 2.0**-24
CONDITION = 32  # operators add hundreds of terms, each rounded; the factor covers their square root with room
BF16_ULP = 2.0**-7  # distance of two neighbouring bfloat16 numbers, at most, relative to their size
UPDATED = ("conv_states", "states", "tables", "tokens")


def generator(case: Case) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(str(case).encode()))


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh arrays hold NaN (or ones in all bits) instead of whatever lay there: an element left unwritten shows."""
    for module, name in ((np, "empty"), (np, "empty_like"), (_core, "empty")):
        plain = getattr(module, name)

        def fill(*args: Any, plain: Callable[..., np.ndarray] = plain, **kwargs: Any) -> np.ndarray:
            array = plain(*args, **kwargs)
            array.fill(np.nan if array.dtype.kind == "f" else np.array(-1).astype(array.dtype))
            return array

        monkeypatch.setattr(module, name, fill)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_matches_reference(ops, case, poisoned):
    inputs = case.make(generator(case))
    arguments = arguments_for(ops, inputs)
    found = getattr(ops, case.op)(**arguments)
    CHECKS.get(case.op, check_conditioned)(case, inputs, arguments, found)
    assert_inputs_untouched(inputs, arguments)
    again = arguments_for(ops, inputs)
    np.testing.assert_equal(getattr(ops, case.op)(**again), found)  # the same input gives the same bits
    np.testing.assert_equal(state_arrays(again), state_arrays(arguments))


def state_arrays(arguments: dict[str, Any]) -> list[np.ndarray]:
    arrays = [*arguments.get("conv_states", []), *arguments.get("states", [])]
    return arrays + [block for table in arguments.get("tables", []) for block in table.blocks]


def assert_inputs_untouched(inputs: dict[str, Any], arguments: dict[str, Any]) -> None:
    for name, value in inputs.items():
        if isinstance(value, np.ndarray) and name not in UPDATED:
            np.testing.assert_array_equal(arguments[name], value, err_msg=f"the operator wrote to its input {name}")


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: Any, what: str = "output") -> None:
    """Element-wise |found - expected| <= tolerance; the message shows the worst element."""
    assert found.shape == expected.shape, what
    assert found.dtype == np.float32, what
    assert found.flags.c_contiguous, what
    excess = np.abs(found - expected) - tolerance
    if excess.size and not (excess <= 0).all():
        worst = np.unravel_index(np.nanargmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        allowed = np.broadcast_to(tolerance, excess.shape)[worst]
        index = tuple(int(i) for i in worst)
        pytest.fail(f"{what}{index}: {found[worst]!r}, expected {expected[worst]!r} +- {allowed:.3g}")


# products: c * eps * sum |a||b|


def check_linear(case, inputs, arguments, found):
    a = arguments_for(reference, inputs, np.float64)
    h = a["x"] if a["norm"] is None else reference.rms_norm(a["x"], a["norm"], a["eps"])
    size = np.abs(h) @ np.abs(a["w"].matrix).T + (0 if a["bias"] is None else np.abs(a["bias"]))
    expected = reference.linear(**a)
    # 1.2 bounds the slope of both GELUs
    assert_close(found, expected, EPS * (1.2 * product_factor(h) * size + 8 * np.abs(expected)))


def check_swiglu(case, inputs, arguments, found):
    a = arguments_for(reference, inputs, np.float64)
    h = a["x"] if a["norm"] is None else reference.rms_norm(a["x"], a["norm"], a["eps"])
    gate, up = np.split(h @ a["w"].matrix.T, 2, axis=1)
    gate_size, up_size = np.split(np.abs(h) @ np.abs(a["w"].matrix).T, 2, axis=1)
    expected = reference.swiglu(**a)
    moved = 1.1 * gate_size * np.abs(up) + np.abs(reference.silu(gate)) * up_size  # 1.1 bounds the slope of silu
    assert_close(found, expected, EPS * (product_factor(h) * moved + 8 * np.abs(expected)))


def product_factor(h: np.ndarray) -> float:
    return 8 + 2 * h.shape[1] ** 0.5


def check_rms_norm(case, inputs, arguments, found):
    expected = reference.rms_norm(**arguments_for(reference, inputs, np.float64))
    assert_close(found, expected, 16 * EPS * np.abs(expected))


def check_rms_norm_pair(case, inputs, arguments, found):
    expected = reference.rms_norm_pair(**arguments_for(reference, inputs, np.float64))
    assert_close(found, expected, 16 * EPS * np.abs(expected))


def check_layer_norm(case, inputs, arguments, found):
    a = arguments_for(reference, inputs, np.float64)
    scale = np.abs(a["x"]).max(axis=1, keepdims=True) / np.sqrt(a["x"].var(axis=1, keepdims=True) + a["eps"])
    assert_close(found, reference.layer_norm(**a), 16 * EPS * (scale * np.abs(a["weight"]) + np.abs(a["bias"])))


def check_embed(case, inputs, arguments, found):
    assert_close(found, reference.embed(**arguments_for(reference, inputs)), 0)


# composite operators: how far does one rounding of each input move the result?


def conditioned(
    function: Callable[[dict[str, Any]], list[np.ndarray]], inputs: dict[str, Any], rng: np.random.Generator
) -> tuple[list[np.ndarray], list[float]]:
    """Outputs of `function` in float64, and for each CONDITION times its largest move under inputs * (1 +- eps)."""
    expected = function(arguments_for(reference, inputs, np.float64))
    moves = [EPS * np.abs(y).max(initial=0) for y in expected]
    for _ in range(3):
        shaken = {name: _shake(value, rng) for name, value in arguments_for(reference, inputs, np.float64).items()}
        moves = [
            max(move, np.abs(y - e).max(initial=0))
            for move, y, e in zip(moves, function(shaken), expected, strict=True)
        ]
    return expected, [CONDITION * move for move in moves]


def _shake(value: Any, rng: np.random.Generator) -> Any:
    if isinstance(value, list):
        return [_shake(v, rng) for v in value]
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return value * (1 + EPS * rng.choice([-1.0, 1.0], value.shape))
    return value


def check_conditioned(case, inputs, arguments, found):
    def outputs(a: dict[str, Any]) -> list[np.ndarray]:
        return [getattr(reference, case.op)(**a), *a.get("states", [])]

    expected, tolerances = conditioned(outputs, inputs, generator(case))
    results = [found, *arguments.get("states", [])]
    for i, (y, e, tolerance) in enumerate(zip(results, expected, tolerances, strict=True)):
        assert_close(y, e, tolerance, f"state {i - 1}" if i else "output")


def check_gated_delta_net(case, inputs, arguments, found):
    check_conditioned(case, inputs, arguments, found)
    a = arguments_for(reference, inputs)
    reference.gated_delta_net(**a)
    for y, e in zip(arguments["conv_states"], a["conv_states"], strict=True):
        np.testing.assert_array_equal(y, e)  # rows of the input, moved but not computed


def check_moe(case, inputs, arguments, found):
    a = arguments_for(reference, inputs, np.float64)
    logits = reference.rms_norm(a["x"], a["norm"], a["eps"]) @ a["router"].matrix.T
    if a["top_k"] < logits.shape[1] and logits.size:
        descending = -np.sort(-logits, axis=1)
        gap = descending[:, a["top_k"] - 1] - descending[:, a["top_k"]]
        assert ((gap > 1e-4) | (gap < 1e-12)).all(), "draw other inputs: a rounding would choose another expert"
    check_conditioned(case, inputs, arguments, found)


def check_patch_embed(case, inputs, arguments, found):
    a = arguments_for(reference, inputs, np.float64)
    mean, std = np.asarray(a["mean"]), np.asarray(a["std"])
    pixel = (np.maximum(mean, 1 - mean) / std).max()
    size = np.abs(a["weight"].matrix).sum(axis=1) * pixel + np.abs(a["bias"])
    side = a["pos_embed"].shape[0] ** 0.5  # interpolation weights inherit the rounding of coordinates up to side - 1
    tolerance = EPS * (product_factor(a["weight"].matrix) * size + 16 * side * np.abs(a["pos_embed"]).max())
    assert_close(found, reference.patch_embed(**a), tolerance)


# attention: first what was stored, then what was read from it


def check_gated_attention(case, inputs, arguments, found):
    check_caches(inputs, arguments["tables"])
    # A key on the border between two bfloat16 numbers may be stored as either: go on from what was stored.
    tables = arguments["tables"]
    (expected,), (tolerance,) = conditioned(lambda a: [attend(a, tables)], inputs | {"tables": []}, generator(case))
    ulp = query_ulp(tables)
    if ulp:
        tolerance = tolerance + rounded_queries(inputs | {"tables": []}, tables, expected, generator(case), ulp)
    assert_close(found, expected, tolerance)


def query_ulp(tables: list[Any]) -> float:
    """How the op set rounds queries and probabilities where they meet these caches; 0: not at all."""
    compiled = [t.blocks[0].dtype for t in tables if type(t).__module__ == "deltaic._core" and len(t)]
    if _core.rounds_to_bf16 and any(dtype != np.float32 for dtype in compiled):
        return BF16_ULP
    # Bytes count in steps of the largest number of a row, to which most are a few times smaller.
    return 4 * 2.0 ** (1 - _core.int8_kv_bits) if _core.int8_kv_bits < 24 and np.uint8 in compiled else 0.0


def rounded_queries(
    inputs: dict[str, Any], tables: list[Any], expected: np.ndarray, rng: np.random.Generator, ulp: float
) -> Any:
    """What that may change: 4 times the largest move under queries * (1 +- half an ulp), and half an ulp of each
    probability, whatever its sign."""
    D, heads, move = inputs["q_norm"].shape[0], inputs["num_heads"], 0.0
    for _ in range(8):
        a = arguments_for(reference, inputs, np.float64)
        queries = a["proj"][:, : 2 * heads * D].reshape(-1, heads, 2, D)[:, :, 0]
        queries *= 1 + ulp / 4 * rng.choice([-1.0, 1.0], queries.shape)
        move = max(move, np.abs(attend(a, tables) - expected).max(initial=0))
    sizes = attend(arguments_for(reference, inputs, np.float64), tables, np.abs)
    both = 2 if any(t.blocks[0].dtype == np.uint8 for t in tables if len(t)) else 1  # then keys and values round too
    return both * (4 * move + ulp / 2 * np.abs(sizes))


def check_caches(inputs: dict[str, Any], tables: list[Any]) -> None:
    expected = arguments_for(reference, inputs, np.float64)
    reference.gated_attention(**expected)
    lengths = np.diff(inputs["cu_seqlens"])
    for before, table, right, start, n in zip(
        inputs["tables"], tables, expected["tables"], inputs["starts"], lengths, strict=True
    ):
        old, new, want = (np.concatenate(t.blocks, axis=3) if t.blocks else None for t in (before, table, right))
        if new is None:
            continue
        rows = slice(start, start + n)
        keys, values = new[KV_LAYER, 0, :, rows], new[KV_LAYER, 1, :, rows]
        np.testing.assert_array_equal(values, want[KV_LAYER, 1, :, rows])
        k, e = (reference.kv_decode(x, np.float64) for x in (keys, want[KV_LAYER, 0, :, rows]))
        if new.dtype == np.float32:
            np.testing.assert_allclose(k, e, rtol=0, atol=32 * EPS * np.abs(e).max(initial=0))
        else:
            step = {"rtol": BF16_ULP, "atol": 1e-6}
            if new.dtype == np.uint8:
                step = {"rtol": 1e-3, "atol": 1.01 / 127 * np.abs(e).max(initial=0)}
            np.testing.assert_allclose(k, e, **step)
            k, e = (x.astype(np.float32) for x in (k, e))
            assert (k != e).sum() <= 1 + k.size / 200  # all but a few on a border are equal
        new[KV_LAYER, :, :, rows] = old[KV_LAYER, :, :, rows]
        np.testing.assert_array_equal(new, old)  # nothing else was written (NaN equals NaN here)


def attend(a: dict[str, Any], tables: list[Any], of: Callable[[np.ndarray], np.ndarray] = np.asarray) -> np.ndarray:
    """`reference.gated_attention` with the keys, and what `of` makes of the values, that `tables` already hold."""
    T, D, Hq = a["proj"].shape[0], a["q_norm"].shape[0], a["num_heads"]
    q, gate = np.split(a["proj"][:, : Hq * 2 * D].reshape(T, Hq, 2 * D), 2, axis=2)
    q = reference.rotate(reference.rms_norm(q, a["q_norm"], a["eps"]), a["cos"], a["sin"])
    o = np.zeros_like(q)
    for i, (start, table) in enumerate(zip(a["starts"], tables, strict=True)):
        first, last = a["cu_seqlens"][i : i + 2]
        if last > first:
            keys, values = reference.kv_read(table, KV_LAYER, int(start + last - first), np.float64)
            o[first:last] = reference.causal_attention(q[first:last], keys, of(values))
    return (o * reference.sigmoid(gate)).reshape(T, Hq * D)


# sampling


def check_count_tokens(case, inputs, arguments, found):
    expected = arguments_for(reference, inputs)
    reference.count_tokens(**expected)
    np.testing.assert_array_equal(arguments["seen"], expected["seen"])


def check_sample_rows(case, inputs, arguments, found):
    allowed = []
    for step in (
        -1e-5,
        0,
        1e-5,
    ):  # where a sum of probabilities passes the draw within rounding, its neighbour is right
        given = arguments_for(reference, inputs, np.float64)
        given["draws"] = np.clip(given["draws"] + int(step * 2**53), 0, 2**53 - 1)
        reference.sample_rows(**given)
        allowed.append(given["tokens"])
    assert (arguments["tokens"] == allowed).any(0).all()
    assert (arguments["tokens"] >= 0).all()
    overwritten = arguments["logits"] != inputs["logits"]
    assert (arguments["logits"][overwritten] == -np.inf).all()
    inputs["logits"] = arguments["logits"]


def check_log_softmax_top(case, inputs, arguments, found):
    logprob, ids, logprobs = found
    e_logprob, e_ids, e_logprobs = reference.log_softmax_top(**arguments_for(reference, inputs, np.float64))
    size = float(np.abs(inputs["logits"]).max())
    assert type(logprob) is float
    assert logprob == pytest.approx(e_logprob, abs=16 * EPS * size)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, e_ids)
    assert_close(logprobs, e_logprobs, 16 * EPS * size)


CHECKS = {
    "linear": check_linear,
    "swiglu": check_swiglu,
    "rms_norm": check_rms_norm,
    "rms_norm_pair": check_rms_norm_pair,
    "layer_norm": check_layer_norm,
    "embed": check_embed,
    "gated_delta_net": check_gated_delta_net,
    "gated_attention": check_gated_attention,
    "moe": check_moe,
    "patch_embed": check_patch_embed,
    "count_tokens": check_count_tokens,
    "sample_rows": check_sample_rows,
    "log_softmax_top": check_log_softmax_top,
}


def test_every_operator_has_cases():
    public = set(CHECKS) | {"vision_attention"}
    assert {case.op for case in CASES} == public
    assert len({str(case) for case in CASES}) == len(CASES)
    for kv, width in (("bf16", 1), ("int8", 66)):
        assert np.isnan(reference.kv_decode(np.array([POISON[kv]] * width), np.float32)).all()


# what an op set must refuse


def drawn(ops: ModuleType, name: str) -> dict[str, Any]:
    case = next(case for case in CASES if str(case) == name)
    return arguments_for(ops, case.make(generator(case)))


@pytest.mark.parametrize("bad", [-1, 97, 2**62])
def test_embed_refuses_ids_outside_the_table(ops, bad):
    arguments = drawn(ops, "embed-f32-3x97x33")
    arguments["ids"][1] = bad
    with pytest.raises(ValueError, match="id"):
        ops.embed(**arguments)


def test_attention_refuses_tokens_without_room(ops):
    arguments = drawn(ops, "gated_attention-f32-T17")
    arguments["starts"][0] = 8  # 17 tokens from there need four blocks of 8; there are three
    with pytest.raises(ValueError, match=r"block|token|room"):
        ops.gated_attention(**arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_sampling_refuses_logits_that_are_not_numbers(ops, bad):
    arguments = drawn(ops, "sample_rows-3x5003-plain")
    arguments["logits"][2, 4998] = bad
    ops.sample_rows(**arguments)
    assert (arguments["tokens"] < 0).tolist() == [False, False, True]  # each row for itself
    arguments = drawn(ops, "log_softmax_top-37-5")
    arguments["logits"][0] = bad
    with pytest.raises(ValueError, match="logits"):
        ops.log_softmax_top(**arguments)


def test_sampling_ignores_logits_beyond_the_limit(ops):
    arguments = drawn(ops, "sample_rows-37-greedy-penalties")
    arguments["logits"][0, 30:] = [np.nan, np.inf, 1e30, 1e30, 1e30, 1e30, 1e30]
    ops.sample_rows(**arguments)
    assert 0 <= arguments["tokens"][0] < 30


@pytest.mark.parametrize("token", [-1, 30])
def test_log_softmax_refuses_a_token_beyond_the_limit(ops, token):
    with pytest.raises(ValueError, match="token"):
        ops.log_softmax_top(**drawn(ops, "log_softmax_top-37-5") | {"token": token})
