"""What attention promises beyond its values: a row gets the same bits in any company, and bad arguments are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from deltaic.ops import cpu as ops
from deltaic.ops.reference import kv_encode

HQ, HKV, D, R, BLOCK, LAYERS = 6, 2, 24, 12, 16, 2


@pytest.fixture(autouse=True)
def restore_threads():
    threads = ops.num_threads()
    yield
    ops.set_num_threads(threads)


class Sequence:
    """New rows of one sequence and a cache with `start` tokens; NaN wherever nothing was stored."""

    def __init__(self, rng: np.random.Generator, start: int, rows: int, dtype: str) -> None:
        self.start, self.rows, self.dtype = start, rows, dtype
        angle = rng.normal(size=(rows, R // 2)).astype(np.float32)
        self.proj = rng.normal(size=(rows, (2 * HQ + 2 * HKV) * D)).astype(np.float32)
        self.cos, self.sin = np.cos(angle), np.sin(angle)
        count = -(-(start + rows) // BLOCK)
        values = rng.normal(size=(count, LAYERS, 2, HKV, BLOCK, D)).astype(np.float32)
        flat = values.transpose(0, 4, 1, 2, 3, 5).reshape(count * BLOCK, LAYERS, 2, HKV, D).copy()
        flat[start:] = np.nan
        values = np.ascontiguousarray(flat.reshape(count, BLOCK, LAYERS, 2, HKV, D).transpose(0, 2, 3, 4, 1, 5))
        stored = {"f32": np.float32, "bf16": np.uint16, "int8": np.uint8}[dtype]
        with np.errstate(invalid="ignore"):
            self.blocks = kv_encode(values, stored)

    def table(self, tokens: int = BLOCK) -> ops.BlockTable:
        """A copy, in blocks of so many tokens."""
        table = ops.BlockTable()
        rows = np.concatenate(list(self.blocks), axis=3)
        rows = np.pad(rows, [(0, 0)] * 3 + [(0, -rows.shape[3] % tokens), (0, 0)])
        for block in np.split(rows, rows.shape[3] // tokens, axis=3):
            table.append(np.ascontiguousarray(block))
        return table


def attend(parts: list[tuple[Sequence, int, int]], tables: list[ops.BlockTable]) -> list[np.ndarray]:
    """One call with rows first..last - 1 of each sequence; the earlier rows are in its table already."""
    norm = np.linspace(-0.5, 0.5, D, dtype=np.float32)
    proj, cos, sin = (
        np.concatenate([getattr(s, name)[first:last] for s, first, last in parts]) for name in ("proj", "cos", "sin")
    )
    cut = np.cumsum([0] + [last - first for _, first, last in parts])
    starts = np.array([s.start + first for s, first, _ in parts])
    y = ops.gated_attention(
        proj, norm, norm, cos, sin, eps=1e-6, num_heads=HQ, num_kv_heads=HKV, layer=1, cu_seqlens=cut, starts=starts,
        tables=tables,
    )  # fmt: skip
    return np.split(y, cut[1:-1])


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("start", [0, 5, 250, 8185])
def test_decoded_rows_have_the_same_bits_in_any_company(rng, dtype, start):
    one, other = Sequence(rng, start, 32, dtype), Sequence(rng, 40, 70, dtype)
    together = attend([(one, 0, 32)], [one.table()])[0]
    table = one.table()
    alone = np.concatenate([attend([(one, t, t + 1)], [table])[0] for t in range(32)])
    np.testing.assert_array_equal(alone, together)
    table = one.table()
    some = np.concatenate([attend([(one, a, b)], [table])[0] for a, b in [(0, 3), (3, 10), (10, 32)]])
    np.testing.assert_array_equal(some, together)
    beside = attend([(other, 0, 70), (one, 0, 32), (other, 0, 1)], [other.table(), one.table(), other.table()])[1]
    np.testing.assert_array_equal(beside, together)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("start", [100, 5000])
def test_neither_the_size_of_blocks_nor_threads_change_a_bit(rng, dtype, start):
    """Rows that lie in one block are called from memory ahead; few threads take all heads of a piece together."""
    step = Sequence(rng, start, 3, dtype)
    found = []
    for threads in (1, 2, 7):
        ops.set_num_threads(threads)
        for tokens in (5, BLOCK, 128, 300):
            found.append(attend([(step, 0, 3)], [step.table(tokens)])[0])
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("cut", [33, 64, 100, 217])
def test_a_prompt_in_two_long_parts_has_the_same_bits(rng, dtype, cut):
    prompt = Sequence(rng, 3, 250, dtype)
    whole, parts = prompt.table(), prompt.table()
    y = attend([(prompt, 0, 250)], [whole])[0]
    halves = [attend([(prompt, a, b)], [parts])[0] for a, b in [(0, cut), (cut, 250)]]
    np.testing.assert_array_equal(np.concatenate(halves), y)
    np.testing.assert_array_equal(np.array(whole.blocks), np.array(parts.blocks))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_row_is_rounded_alike_read_and_generated(rng, dtype):
    """Both paths round the same numbers, if any, in the same way: only the order of sums is left to differ."""
    prompt = Sequence(rng, 0, 300, dtype)
    read, table = attend([(prompt, 0, 300)], [prompt.table()])[0], prompt.table()
    generated = np.concatenate([attend([(prompt, t, t + 1)], [table])[0] for t in range(300)])
    np.testing.assert_allclose(generated, read, atol=3e-6 * np.abs(read).max())


def test_threads_do_not_change_a_bit(rng):
    prompt, step = Sequence(rng, 0, 300, "bf16"), Sequence(rng, 700, 2, "f32")
    qkv, angle = rng.normal(size=(150, 3 * 72)).astype(np.float32), rng.normal(size=(150, 12)).astype(np.float32)
    found = []
    for threads in (1, 2, 5):
        ops.set_num_threads(threads)
        found.append(attend([(prompt, 0, 300), (step, 0, 2)], [prompt.table(), step.table()]))
        cut = np.array([0, 110, 150])
        for rounded in (False, True):
            cos, sin = np.cos(angle), np.sin(angle)
            found[-1].append(ops.vision_attention(qkv, cos, sin, num_heads=3, cu_seqlens=cut, rounded=rounded))
    np.testing.assert_equal(found[1], found[0])
    np.testing.assert_equal(found[2], found[0])


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
def test_a_later_token_that_is_not_a_number_leaves_earlier_ones_alone(rng, dtype):
    step = Sequence(rng, 20, 4, dtype)
    y = attend([(step, 0, 4)], [step.table()])[0]
    step.proj[3] = np.nan
    broken = attend([(step, 0, 4)], [step.table()])[0]
    np.testing.assert_array_equal(broken[:3], y[:3])
    assert np.isnan(broken[3]).all()


def gated_arguments(rng: np.random.Generator) -> dict[str, Any]:
    s = Sequence(rng, 4, 3, "f32")
    norm = np.zeros(D, np.float32)
    return {
        "proj": s.proj, "q_norm": norm, "k_norm": norm, "cos": s.cos, "sin": s.sin, "eps": 1e-6, "num_heads": HQ,
        "num_kv_heads": HKV, "layer": 0, "cu_seqlens": np.array([0, 3]), "starts": np.array([4]), "tables": [s.table()],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": np.array([0, 4])}, "cu_seqlens"),
        ({"cu_seqlens": np.array([1, 3])}, "cu_seqlens"),
        ({"cu_seqlens": np.array([0, 9, 3]), "starts": np.array([0, 0]), "tables": 2}, "cu_seqlens"),
        ({"starts": np.array([-1])}, "starts"),
        ({"starts": np.array([14])}, "no room"),
        ({"starts": np.array([2**62])}, "no room"),
        ({"starts": np.array([2**63 - 1])}, "no room"),
        ({"tables": [ops.BlockTable()]}, "no room"),
        ({"tables": []}, "expected 1"),
        ({"layer": LAYERS}, "too few layers"),
        ({"layer": -1}, "layer"),
        ({"num_heads": HQ + 1}, "proj"),
        ({"num_heads": -HQ}, "proj|num_heads|negative"),
        ({"num_heads": HQ - 1, "num_kv_heads": HKV + 1}, "multiple"),
        ({"num_heads": HQ - 2, "num_kv_heads": HKV + 2}, "other heads"),
        ({"num_heads": HQ + HKV, "num_kv_heads": 0}, "num_kv_heads"),
        ({"cos": np.zeros((3, D), np.float32), "sin": np.zeros((3, D), np.float32)}, "half a head"),
    ],
)
def test_bad_gated_attention_arguments_are_refused(rng, changes, message):
    arguments = gated_arguments(rng)
    if changes.get("tables") == 2:
        changes = changes | {"tables": arguments["tables"] * 2}
    with pytest.raises(ValueError, match=message):
        ops.gated_attention(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 1}, "half a head"),
        ({"cu_seqlens": np.array([0, 5, 4])}, "cu_seqlens"),
        ({"cu_seqlens": np.array([], np.int64)}, "cu_seqlens"),
        ({"cu_seqlens": np.array([0, 7, -2, 4])}, "cu_seqlens"),
    ],
)
def test_bad_vision_attention_arguments_are_refused(changes, message):
    half = np.zeros((4, 4), np.float32)
    arguments = {"qkv": np.zeros((4, 48), np.float32), "cos": half, "sin": half, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        ops.vision_attention(**arguments | {"cu_seqlens": np.array([0, 4])} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 0}, "patch_size"),
        ({"patch_size": -4}, "patch_size"),
        ({"patch_size": 2**40}, "patch_size"),
        ({"merge_size": 0}, "merge_size"),
        ({"merge_size": 3}, "multiples"),
        ({"patch_size": 8}, "columns"),
        ({"image": np.zeros((12, 16, 3), np.uint8)}, "multiples"),
        ({"image": np.zeros((16, 16, 4), np.uint8)}, "image"),
        ({"pos_embed": np.zeros((8, 5), np.float32)}, "square"),
        ({"pos_embed": np.zeros((0, 5), np.float32)}, "square"),
        ({"mean": (0.5, 0.5)}, "mean"),
    ],
)
def test_bad_patch_embed_arguments_are_refused(changes, message):
    arguments = {
        "image": np.zeros((16, 16, 3), np.uint8), "weight": ops.pack([np.zeros((5, 48), np.float32)], "f32"),
        "bias": np.zeros(5, np.float32), "pos_embed": np.zeros((9, 5), np.float32), "patch_size": 4, "merge_size": 2,
        "mean": (0.5, 0.5, 0.5), "std": (1, 1, 1),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.patch_embed(**arguments | changes)
