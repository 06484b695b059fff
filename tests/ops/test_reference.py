"""The reference operators against known answers, against each other, and against their own invariants."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cases import PLAIN_CHOICE, chosen, seen_of
from deltaic.errors import ArgumentError
from deltaic.ops import reference as ops
from deltaic.ops.layout import merge_order

HK, HV, DK, DV = 3, 6, 5, 7
C = 2 * HK * DK + HV * DV


def delta_arguments(rng, lengths, decay=None):
    T = sum(lengths)
    proj = rng.normal(size=(T, C + HV * DV + 2 * HV))
    A_log, dt_bias = rng.normal(size=HV), rng.normal(size=HV)
    if decay is not None:  # log_decay = -exp(A_log) * softplus(a + dt_bias): fix it through A_log
        proj[:, -HV:], dt_bias[:] = 0, 0
        A_log[:] = np.log(decay / np.log(2))
    return {
        "proj": proj,
        "conv_weight": rng.normal(size=(4, C)),
        "A_log": A_log,
        "dt_bias": dt_bias,
        "norm": rng.normal(size=DV),
        "eps": 1e-6,
        "num_k_heads": HK,
        "head_k_dim": DK,
        "head_v_dim": DV,
        "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]),
        "conv_states": [rng.normal(size=(3, C)) for _ in lengths],
        "states": [rng.normal(size=(HV, DK, DV)) for _ in lengths],
    }


def copied(kwargs):
    return {k: [x.copy() for x in v] if isinstance(v, list) else v for k, v in kwargs.items()}


@pytest.mark.parametrize("decay", [None, 100.0, 1e-4])
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_chunked_delta_rule_is_the_recurrence(rng, chunk, decay):
    kwargs = delta_arguments(rng, [65, 0, 1, 20], decay)
    a, b = copied(kwargs), copied(kwargs)
    ya, yb = ops.gated_delta_net(**a), ops.gated_delta_net_chunked(**b, chunk=chunk)
    np.testing.assert_allclose(yb, ya, rtol=0, atol=1e-11 * np.abs(ya).max())
    for x, y in zip(a["states"] + a["conv_states"], b["states"] + b["conv_states"], strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-12 * max(1.0, np.abs(x).max()))


def test_delta_rule_recalls_what_it_stored():
    """With beta = 1 and no decay, the state returns exactly the value last written under a unit key."""
    k = np.eye(4)[None, :3].swapaxes(0, 1)  # 3 tokens, 1 head, orthonormal keys
    v = np.arange(1.0, 7.0).reshape(3, 1, 2)
    state = np.full((1, 4, 2), 9.0)
    ops.delta_rule(k, k, v, np.ones((3, 1)), np.zeros((3, 1)), state)
    np.testing.assert_array_equal(state[0, :3], v[:, 0])
    np.testing.assert_array_equal(state[0, 3], [9, 9])  # a direction that no key touched


def test_delta_net_split_anywhere(rng):
    kwargs = delta_arguments(rng, [9])
    whole = copied(kwargs)
    y = ops.gated_delta_net(**whole)
    for cut in range(1, 9):
        parts = copied(kwargs)
        out = []
        for rows in (slice(0, cut), slice(cut, 9)):
            part = dict(parts, proj=kwargs["proj"][rows], cu_seqlens=np.array([0, rows.stop - rows.start]))
            out.append(ops.gated_delta_net(**part))
        np.testing.assert_allclose(np.concatenate(out), y, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(parts["states"][0], whole["states"][0], rtol=1e-12, atol=1e-13)
        np.testing.assert_array_equal(parts["conv_states"][0], whole["conv_states"][0])


def test_causal_conv1d_by_hand():
    state = np.array([[1.0], [2.0], [3.0]])
    out = ops._causal_conv1d(np.array([[4.0], [5.0]]), np.array([[1000.0], [100.0], [10.0], [1.0]]), state)
    assert out.ravel().tolist() == [1234.0, 2345.0]
    assert state.ravel().tolist() == [3.0, 4.0, 5.0]


def new_table(tokens, dtype, block=4, layers=2, Hkv=2, D=6):
    table = ops.BlockTable()
    for _ in range(-(-tokens // block)):
        table.append(np.zeros((layers, 2, Hkv, block, D), dtype))
    return table


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_attention_one_shot_equals_cached(rng, dtype):
    T, Hq, Hkv, D, R = 11, 6, 2, 6, 4
    proj = rng.normal(size=(T, (2 * Hq + 2 * Hkv) * D))
    q_norm, k_norm, angle = rng.normal(size=D), rng.normal(size=D), rng.normal(size=(T, R // 2))
    common = {"eps": 1e-6, "num_heads": Hq, "num_kv_heads": Hkv, "layer": 1}

    def run(table, first, last):
        rows = slice(first, last)
        return ops.gated_attention(
            proj[rows], q_norm, k_norm, np.cos(angle[rows]), np.sin(angle[rows]), **common,
            cu_seqlens=np.array([0, last - first]), starts=np.array([first]), tables=[table],
        )  # fmt: skip

    whole, parts = new_table(T, dtype), new_table(T, dtype)
    y = run(whole, 0, T)
    out = np.concatenate([run(parts, t, u) for t, u in [(0, 3), (3, 4), (4, 9), (9, 11)]])
    np.testing.assert_allclose(out, y, rtol=1e-12, atol=1e-13)
    for a, b in zip(whole.blocks, parts.blocks, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not a[0].any()  # the other layer's part of the block is untouched


def test_causal_attention_by_hand():
    """Equal keys: token i averages the values 0..i of the key-value head that its query head reads."""
    values = np.stack([np.arange(3.0), 10 * np.arange(3.0)])[:, :, None]
    o = ops.causal_attention(np.ones((3, 4, 1)), np.ones((2, 3, 1)), values)
    np.testing.assert_allclose(o[:, :, 0], [[0, 0, 0, 0], [0.5, 0.5, 5, 5], [1, 1, 10, 10]])


def test_attention_without_room_is_an_error(rng):
    table = new_table(4, np.float32)
    with pytest.raises(ArgumentError, match="token 4"):
        ops.gated_attention(
            rng.normal(size=(5, 16 * 6)), np.ones(6), np.ones(6), np.ones((5, 2)), np.ones((5, 2)), eps=1e-6,
            num_heads=6, num_kv_heads=2, layer=0, cu_seqlens=np.array([0, 5]), starts=np.array([0]), tables=[table],
        )  # fmt: skip


def test_bfloat16_storage():
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.14159, 1e-40])
    bits = ops.kv_encode(x, np.uint16)
    assert bits.tolist() == [0x3F80, 0x3F80, 0x3F82, 0xC049, 0x0001]  # ties go to the even neighbour
    assert ops.kv_decode(bits, np.float64).tolist()[:4] == [1.0, 1.0, 1 + 2**-6, -3.140625]


def test_pack():
    a, b = np.full((2, 3), 1 + 2**-9, np.float32), np.ones((1, 3), ml_dtypes.bfloat16)
    w = ops.pack([a, b], ["f32", "bf16"])
    assert (w.shape, w.dtype, w.nbytes) == ((3, 3), "f32", 2 * 3 * 4 + 3 * 2)
    assert (w.matrix[:2] == a).all()
    assert ops.pack([a], "bf16").matrix[0, 0] == 1.0
    assert ops.pack_glu(np.zeros((5, 2, 3)), np.zeros((5, 2, 3)), "f32").shape == (5, 4, 3)
    with pytest.raises(ArgumentError, match="int3"):
        ops.pack([a], "int3")
    with pytest.raises(ArgumentError, match="2 formats"):
        ops.pack([a], ["f32", "f32"])
    with pytest.raises(ArgumentError, match="pack_glu"):
        ops.swiglu(np.zeros((1, 3)), w)
    with pytest.raises(ArgumentError, match="glu True"):
        ops.linear(np.zeros((1, 3)), ops.pack_glu(a, a, "f32"))


def test_embed_refuses_ids_outside_the_table():
    table = ops.pack([np.eye(4, dtype=np.float32)], "f32")
    assert ops.embed(np.array([3, 0]), table).tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    for bad in (-1, 4):
        with pytest.raises(ArgumentError, match="token ids"):
            ops.embed(np.array([0, bad]), table)


def test_moe_breaks_ties_towards_the_lower_expert(rng):
    H, E, width = 4, 5, 3
    router = ops.pack([np.tile(rng.normal(size=(1, H)), (E, 1))], "f32")  # all experts equal
    experts = [rng.normal(size=(E, width, H)) for _ in range(2)]
    down = rng.normal(size=(E, H, width))
    zeros = np.zeros((width, H))
    shared = ops.pack_glu(zeros, zeros, "f32"), ops.pack([zeros.T], "f32"), ops.pack([np.ones((1, H))], "f32")

    def run(chosen, top_k):
        r = ops.pack([router.matrix[chosen]], "f32")
        gate_up, d = ops.pack_glu(*(x[chosen] for x in experts), "f32"), ops.pack([down[chosen]], "f32")
        return ops.moe(x, r, gate_up, d, *shared, top_k=top_k, norm=np.zeros(H), eps=1e-6)

    x = rng.normal(size=(2, H))
    np.testing.assert_allclose(run([0, 1, 2, 3, 4], 2), run([0, 1], 2), rtol=1e-12)
    assert np.abs(run([3, 4], 2) - run([0, 1], 2)).max() > 1e-2


def test_merge_order():
    row, col = merge_order(4, 6, 2)
    assert list(zip(row.tolist(), col.tolist(), strict=True))[:6] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3)]
    assert sorted(zip(row.tolist(), col.tolist(), strict=True)) == [(r, c) for r in range(4) for c in range(6)]


def test_patch_embed_positions_by_hand():
    """Aligned corners: the four corner patches get exactly the table's corners, the middle ones an interpolation."""
    image = np.zeros((8, 12, 3), np.uint8)
    table = np.arange(9.0)[:, None]  # 3 x 3, value = 3 * row + col
    w = ops.pack([np.ones((1, 12), np.float32)], "f32")
    y = ops.patch_embed(image, w, np.zeros(1), table, patch_size=2, merge_size=2, mean=[0] * 3, std=[1] * 3)
    row, col = merge_order(4, 6, 2)
    np.testing.assert_allclose(y[:, 0], 3 * row * 2 / 3 + col * 2 / 5, atol=1e-12)


def distribution(logits, **changes):
    """The probabilities that `sample_rows` realises, by sweeping the draw."""
    n = 2000
    draws = [chosen(ops, logits, (i + 0.5) / n, **changes) for i in range(n)]
    return np.bincount(draws, minlength=len(logits)) / n


def test_sample_filters():
    p = np.array([0.1, 0.4, 0.2, 0.3])
    logits = np.log(p)
    near = {"rtol": 0, "atol": 1e-3}
    np.testing.assert_allclose(distribution(logits), p, **near)
    np.testing.assert_allclose(distribution(logits, top_k=2), [0, 4 / 7, 0, 3 / 7], **near)
    np.testing.assert_allclose(distribution(logits, top_p=0.65), [0, 4 / 7, 0, 3 / 7], **near)
    np.testing.assert_allclose(distribution(logits, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9], **near)
    np.testing.assert_allclose(distribution(logits, min_p=0.45), [0, 4 / 9, 2 / 9, 3 / 9], **near)
    np.testing.assert_allclose(distribution(logits, temperature=0.5), p**2 / (p**2).sum(), **near)
    np.testing.assert_allclose(distribution(logits, limit=2), [0.2, 0.8, 0, 0], **near)
    assert distribution(logits, top_p=1e-9).tolist() == [0, 1, 0, 0]  # at least one is always kept


def test_sample_penalties_and_greedy():
    logits, said = np.array([1.0, 3.0, 3.0, -1.0]), {"output": [1, 1, 1]}

    def pick(x, **changes):
        return chosen(ops, np.array(x), 0.5, temperature=0.0, **changes)

    assert pick(logits) == 1  # the lower id on a tie
    assert pick(logits, **said, presence_penalty=0.1) == 2
    assert pick(logits, **said, frequency_penalty=0.1) == 2
    assert pick([1.0, 1.4], **said, frequency_penalty=0.1) == 1
    assert pick([1.0, 1.2], **said, frequency_penalty=0.1) == 0
    assert pick(logits, prompt=[1], repetition_penalty=1.1) == 2
    assert pick([-1.0, -0.9], prompt=[1], repetition_penalty=1.2) == 0  # negative ones are multiplied
    assert pick(logits, prompt=[1], presence_penalty=1.0, frequency_penalty=1.0) == 1  # a prompt was not generated


def test_drafts_are_penalised_from_their_own_row_on():
    """Of two texts: the first fed token of each has been said, the others are drafts."""
    logits, seen = (
        np.tile([5.0, 4.9, 4.8, 4.7], (5, 1)),
        [seen_of(4, np.array([0]), np.array([], np.int64)) for _ in "ab"],
    )
    given = PLAIN_CHOICE | {"temperature": 0.0, "limit": 4, "draws": np.zeros(5, np.int64), "seen": seen}
    given |= {"cu_seqlens": np.array([0, 3, 5]), "fed": np.array([3, 1, 2, 3, 1]), "presence_penalty": 1.0}
    tokens = np.zeros(5, np.int64)
    ops.sample_rows(logits, **given, tokens=tokens)
    assert tokens.tolist() == [1, 2, 3, 1, 2]
    last = np.zeros(2, np.int64)  # of the same rows, with logits for two only
    ops.sample_rows(logits[:2], **given | {"draws": np.zeros(2, np.int64)}, tokens=last)
    assert last.tolist() == [1, 2]


@pytest.mark.parametrize("bad", [[0.0, np.nan], [0.0, np.inf], [-np.inf, -np.inf]])
def test_unusable_logits(bad):
    assert chosen(ops, np.array(bad), 0.0) == -1
    with pytest.raises(ArgumentError, match="logits"):
        ops.log_softmax_top(np.array(bad), limit=2, k=1, token=0)


def test_log_softmax_top():
    p = np.array([0.1, 0.4, 0.2, 0.2, 0.1])
    logprob, ids, logprobs = ops.log_softmax_top(np.log(p) + 5, limit=4, k=3, token=0)
    assert logprob == pytest.approx(np.log(0.1 / 0.9))
    assert ids.tolist() == [1, 2, 3]
    np.testing.assert_allclose(logprobs, np.log([0.4 / 0.9, 0.2 / 0.9, 0.2 / 0.9]), rtol=1e-6)
