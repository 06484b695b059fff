"""The delta rule (recurrent and chunked) and gated attention (decoding and prompts) against the definition."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from deltaic.ops import cuda, reference
from helpers import TYPES, array, assert_close, normal, rounded, tensor


def delta_case(rng, lengths, kind, Hk=2, Hv=4, Dk=12, Dv=20):
    T, C = sum(lengths), 2 * Hk * Dk + Hv * Dv
    return {
        "proj": rounded(normal(rng, T, C + Hv * Dv + 2 * Hv), kind),
        "conv_weight": normal(rng, 4, C),
        "A_log": normal(rng, Hv),
        "dt_bias": normal(rng, Hv),
        "norm": normal(rng, Dv),
        "eps": 1e-6,
        "num_k_heads": Hk,
        "head_k_dim": Dk,
        "head_v_dim": Dv,
        "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "conv_states": [normal(rng, 3, C) for _ in lengths],
        "states": [normal(rng, Hv, Dk, Dv) for _ in lengths],
    }


def run_delta(case, kind):
    on_device = dict(case, proj=tensor(case["proj"], kind))
    for name in ("conv_states", "states"):
        on_device[name] = [tensor(x) for x in case[name]]
    return cuda.gated_delta_net(**on_device), on_device


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("lengths", [[1], [4, 0, 7], [3, 21], [70, 1], [130]])
def test_gated_delta_net(device, rng, kind, lengths):
    case = delta_case(rng, lengths, kind)
    y, after = run_delta(case, kind)
    expected = copy.deepcopy(case)
    assert_close(y, reference.gated_delta_net(**expected), kind, factor=4)
    for name in ("conv_states", "states"):
        for found, wanted in zip(after[name], expected[name], strict=True):
            assert_close(found, wanted, "f32", factor=4)


def test_gated_delta_net_at_full_width(device, rng):
    """128 x 128 heads, as in every released model: all rows and columns of the tiles are in use."""
    for lengths in ([2], [66]):
        case = delta_case(rng, lengths, "f32", Hk=1, Hv=2, Dk=128, Dv=128)
        y, after = run_delta(case, "f32")
        expected = copy.deepcopy(case)
        assert_close(y, reference.gated_delta_net(**expected), "f32", factor=4)
        assert_close(after["states"][0], expected["states"][0], "f32", factor=4)


@pytest.mark.parametrize("decay", [80.0, 1e-5])
def test_strong_and_weak_decay(device, rng, decay):
    case = delta_case(rng, [65], "f32")
    case["proj"][:, -4:], case["dt_bias"][:] = 0, 0
    case["A_log"][:] = np.log(decay / np.log(2))
    y, _ = run_delta(case, "f32")
    assert_close(y, reference.gated_delta_net(**copy.deepcopy(case)), "f32", factor=8)


def test_delta_rule_in_parts_is_the_whole(device, rng):
    """Decoded one by one, in threes or at once (up to DELTA_FEW tokens): the same bits."""
    case = delta_case(rng, [9], "bf16")
    whole, after = run_delta(case, "bf16")
    for step in (1, 3):
        part = dict(case, conv_states=[tensor(case["conv_states"][0])], states=[tensor(case["states"][0])])
        rows = []
        for t in range(0, 9, step):
            part["proj"], part["cu_seqlens"] = tensor(case["proj"][t : t + step], "bf16"), np.array([0, step])
            rows.append(array(cuda.gated_delta_net(**part)))
        np.testing.assert_array_equal(np.concatenate(rows), array(whole))
        np.testing.assert_array_equal(array(part["states"][0]), array(after["states"][0]))
        np.testing.assert_array_equal(array(part["conv_states"][0]), array(after["conv_states"][0]))


def attention_case(rng, lengths, starts, kind, kv, Hq=4, Hkv=2, D=16, half=4, block=8):
    T = sum(lengths)
    angle = normal(rng, T, half)
    case = {
        "proj": rounded(normal(rng, T, 2 * (Hq + Hkv) * D), kind),
        "q_norm": normal(rng, D), "k_norm": normal(rng, D), "cos": np.cos(angle), "sin": np.sin(angle),
        "eps": 1e-6, "num_heads": Hq, "num_kv_heads": Hkv, "layer": 1,
        "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), "starts": np.array(starts, np.int64),
    }  # fmt: skip
    tables, on_device = [], []
    for n, start in zip(lengths, starts, strict=True):
        table, other = reference.BlockTable(), cuda.BlockTable()
        for _ in range(-(-(n + start) // block)):
            values = rounded(normal(rng, 2, 2, Hkv, block, D), kv)
            table.append(reference.kv_encode(values, np.uint16 if kv == "bf16" else np.float32))
            other.append(tensor(values, kv))
        tables.append(table)
        on_device.append(other)
    return case, tables, on_device


def check_attention(rng, lengths, starts, kind, kv, **sizes):
    case, tables, on_device = attention_case(rng, lengths, starts, kind, kv, **sizes)
    y = cuda.gated_attention(**dict(case, proj=tensor(case["proj"], kind)), tables=on_device)
    expected = reference.gated_attention(**case, tables=tables)
    assert_close(y, expected, "bf16" if kv == "bf16" else kind, factor=2)
    for table, other in zip(tables, on_device, strict=True):
        for block, found in zip(table.blocks, other.blocks, strict=True):
            np.testing.assert_allclose(
                array(found), reference.kv_decode(block, np.float32), rtol=1e-5 if kv == "f32" else 2**-7, atol=1e-5
            )
    return case, on_device, y


@pytest.fixture
def few_splits(monkeypatch):
    """As many splits as small tests can fill."""
    monkeypatch.setattr(cuda, "SPLITS", 4)


@pytest.mark.parametrize(("kind", "kv"), [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")])
@pytest.mark.parametrize(
    ("lengths", "starts"), [([1], [0]), ([1, 1], [37, 70]), ([3, 0, 2], [5, 0, 40]), ([19, 20], [0, 13])]
)
def test_gated_attention(device, few_splits, rng, kind, kv, lengths, starts):
    check_attention(rng, lengths, starts, kind, kv)


@pytest.mark.parametrize(("D", "half", "Hq", "Hkv"), [(64, 16, 4, 1), (72, 8, 3, 3), (256, 32, 2, 1)])
def test_gated_attention_widths(device, few_splits, rng, D, half, Hq, Hkv):
    check_attention(rng, [2], [33], "bf16", "bf16", D=D, half=half, Hq=Hq, Hkv=Hkv)
    check_attention(rng, [18], [3], "bf16", "bf16", D=D, half=half, Hq=Hq, Hkv=Hkv)


def test_attention_row_is_its_own(device, few_splits, rng):
    """Three tokens verified at once get the bits of three decoded one by one."""
    case, _, on_device = attention_case(rng, [3], [40], "bf16", "bf16")
    again = cuda.BlockTable()
    for block in on_device[0].blocks:
        again.append(block.clone())
    together = array(cuda.gated_attention(**dict(case, proj=tensor(case["proj"], "bf16")), tables=on_device))
    for t in range(3):
        rows = slice(t, t + 1)
        one = dict(
            case, proj=tensor(case["proj"][rows], "bf16"), cos=case["cos"][rows], sin=case["sin"][rows],
            cu_seqlens=np.array([0, 1]), starts=np.array([40 + t]),
        )  # fmt: skip
        np.testing.assert_array_equal(array(cuda.gated_attention(**one, tables=[again]))[0], together[t])


def test_attention_refuses_what_does_not_fit(device, rng):
    case, _, on_device = attention_case(rng, [3], [40], "bf16", "bf16")
    case["proj"] = tensor(case["proj"], "bf16")
    with pytest.raises(cuda.ArgumentError, match="token 98 is beyond the 6 blocks of 8"):
        cuda.gated_attention(**dict(case, starts=np.array([96])), tables=on_device)
    with pytest.raises(cuda.ArgumentError, match="expected numbers rising from 0 to 3"):
        cuda.gated_attention(**dict(case, cu_seqlens=np.array([0, 4])), tables=on_device)
    with pytest.raises(cuda.ArgumentError, match="blocks are"):
        cuda.gated_attention(**dict(case, layer=2), tables=on_device)
    with pytest.raises(cuda.ArgumentError, match="the others are"):
        on_device[0].append(tensor(np.zeros((1, 2, 2, 8, 16), np.float32)))
