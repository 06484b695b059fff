"""What a State holds, how it grows, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from deltaic.errors import ArgumentError, ContextLengthError, StateError
from deltaic.model.state import BLOCK_TOKENS, State
from oracle import ODD_HEADS

with oracle.saved(oracle.torch_text_model(ODD_HEADS)) as (config, _):
    CONFIG = config.text
CONV_DIM = 2 * 3 * 12 + 6 * 20


def test_a_new_state_is_empty_and_zero(ops):
    state = State(CONFIG, ops)
    assert (state.conv.shape, state.conv.dtype) == ((3, 3, CONV_DIM), np.float32)
    assert (state.delta.shape, state.delta.dtype) == ((3, 6, 12, 20), np.float32)
    assert not state.conv.any()
    assert not state.delta.any()
    assert (len(state.kv), state.length, state.rope_delta, state.token_ids) == (0, 0, 0, [])
    assert state.nbytes == 4 * (3 * 3 * CONV_DIM + 3 * 6 * 12 * 20)


def test_an_empty_state_like_another_shares_nothing_with_it(ops):
    state = State(CONFIG, ops, "bf16", context=300, fingerprint="f", mtp=True)
    state.reserve(1)
    state.delta[:], state.length, state.token_ids = 1.0, 1, [7]
    twin = state.fork().empty()
    assert (twin.length, twin.token_ids, len(twin.kv), twin.intact) == (0, [], 0, True)
    assert not twin.delta.any()
    assert (twin.kv_dtype, twin.context, twin.fingerprint, twin.with_mtp) == ("bf16", 300, "f", True)
    assert twin.fits(state)
    twin.reserve(1)
    twin.conv[:] = 2.0
    assert not state.conv.any()
    assert twin.bytes_for(300) == state.bytes_for(300)


def test_the_arrays_begin_cache_lines(tmp_path):
    """Of a new state, of a fork that has its own, and of one from a file: vectors then do not lie across two lines."""
    ops = pytest.importorskip("deltaic.ops.cpu")
    state = State(CONFIG, ops)
    state.reserve(1)
    fork = state.fork()
    fork.reserve(1)
    state.save(tmp_path / "state")
    for some in (state, fork, State.load(tmp_path / "state", ops)):
        assert [buffer.ctypes.data % 64 for buffer in some.buffers()] == [0] * len(list(some.buffers()))
    assert fork.delta.ctypes.data != state.delta.ctypes.data


@pytest.mark.parametrize(("kv_dtype", "stored"), [("f32", np.float32), ("bf16", np.uint16), ("int8", np.uint8)])
def test_reserve_grows_block_by_block_without_copying(ops, kv_dtype, stored):
    state = State(CONFIG, ops, kv_dtype)
    empty = state.nbytes
    for tokens, blocks in [(0, 0), (1, 1), (BLOCK_TOKENS, 1), (BLOCK_TOKENS + 1, 2), (5, 2), (1000, 8)]:
        before = [block.ctypes.data for block in state.kv.blocks]
        state.reserve(tokens)
        assert len(state.kv) == blocks
        assert [block.ctypes.data for block in state.kv.blocks][: len(before)] == before
    shape = (2, 2, 3, BLOCK_TOKENS, 26 if kv_dtype == "int8" else 24)  # int8: a group of 24 and its scale
    assert all((block.shape, block.dtype) == (shape, stored) for block in state.kv.blocks)
    assert state.nbytes == empty + 8 * np.prod(shape) * np.dtype(stored).itemsize


def test_more_than_the_context_is_refused(ops):
    state = State(CONFIG, ops)
    for absurd in (CONFIG.max_position_embeddings + 1, 10**12, 2**63, 10**30):
        with pytest.raises(ContextLengthError, match=str(absurd)):
            state.reserve(absurd)
    assert len(state.kv) == 0
    state.reserve(CONFIG.max_position_embeddings)
    assert len(state.kv) * BLOCK_TOKENS == CONFIG.max_position_embeddings


@pytest.mark.parametrize("head_dim", [2**40, 2**60])
def test_running_out_of_memory_is_an_error(ops, head_dim):
    state = State(replace(CONFIG, head_dim=head_dim), ops)
    with pytest.raises(StateError, match="no memory"):
        state.reserve(1)
    assert len(state.kv) == 0


def test_unknown_kv_dtype_is_refused(ops):
    with pytest.raises(ArgumentError, match="fp8"):
        State(CONFIG, ops, "fp8")
