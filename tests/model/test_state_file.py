"""States as values: forks and files never change a bit of what follows, and a file that is not right is refused."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import deltaic
import numpy as np
import pytest
from deltaic.errors import ContextLengthError, StateError
from deltaic.model import state_file
from deltaic.model.state import BLOCK_TOKENS, State, total_nbytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import picture

SOURCE = Path(deltaic.__file__).parents[1]
SLOW = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def ids(rng, count):
    return rng.integers(0, 256, count)


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request, device):
    folder = request.getfixturevalue("tiny_folder" if request.param == "dense" else "tiny_moe_folder")
    return deltaic.load(folder, device=device, dtype="f32", kv_dtype="bf16")


@pytest.fixture
def fed(model, rng):
    """A state that has seen a picture and ends in the middle of a block."""
    state = model.new_state()
    model.forward(model.prepare("<|vision_start|><|image_pad|><|vision_end|>what?", images=[picture()]), state)
    model.forward(ids(rng, 150), state)
    assert state.length % BLOCK_TOKENS
    return state


# ------------------------------------------------------------------------------- forks


def test_a_fork_and_its_origin_do_not_touch_each_other(model, fed, rng):
    left, right = ids(rng, 40), ids(rng, 300)
    expected = [model.forward(tail, fed.fork()) for tail in (left, right)]
    twin = fed.fork()
    for tail, one, other, found in ((left, fed, twin, expected[0]), (right, twin, fed, expected[1])):
        before = [buffer.copy() for buffer in other.buffers()]
        length, tokens = other.length, list(other.token_ids)
        assert np.array_equal(model.forward(tail, one), found)
        assert all(np.array_equal(a, b) for a, b in zip(before, other.buffers(), strict=True))
        assert (other.length, other.token_ids) == (length, tokens)


def test_forks_share_memory_until_they_are_written(model, fed, rng):
    alone = fed.nbytes
    twins = [fed.fork() for _ in range(5)]
    assert total_nbytes([fed, *twins]) == alone == twins[0].nbytes
    model.forward(ids(rng, 1), twins[0])
    block = fed.kv.blocks[0].nbytes
    arrays = fed.conv.nbytes + fed.delta.nbytes
    assert total_nbytes([fed, *twins]) == alone + block + arrays  # its own last block and matrices
    del twins
    model.forward(ids(rng, 1), fed)


def test_writing_what_is_shared_without_asking_is_an_error(fed):
    twin = fed.fork()
    for state in (fed, twin):
        with pytest.raises(ValueError, match="read-only"):
            state.delta[0] = 0.0
    twin.reserve(twin.length + 1)
    twin.delta[0] = 0.0
    assert fed.delta[0].any()


def test_a_fork_of_a_full_block_copies_none(model, rng):
    state = model.new_state()
    model.forward(ids(rng, BLOCK_TOKENS), state)
    twin = state.fork()
    model.forward(ids(rng, 3), twin)
    assert twin.kv.blocks[0] is state.kv.blocks[0]


def test_room_reserved_ahead_stays_with_its_owner(model, rng):
    state = model.new_state()
    state.reserve(1000)
    model.forward(ids(rng, 10), state)
    twin = state.fork()
    assert len(twin.kv) == 1
    expected = model.forward(tail := ids(rng, 300), twin)
    assert np.array_equal(model.forward(tail, state), expected)


# ------------------------------------------------------------------------------- files


def test_a_loaded_state_goes_on_bit_for_bit(model, fed, rng, tmp_path):
    fed.save(tmp_path / "state")
    loaded = State.load(tmp_path / "state")
    names = ("length", "rope_delta", "token_ids", "images", "kv_dtype", "fingerprint")
    assert all(getattr(loaded, name) == getattr(fed, name) for name in names)
    assert loaded.images == [(1, 6, loaded.images[0][2])]
    tail = ids(rng, 200)
    expected = model.forward(tail, fed)
    assert np.array_equal(model.forward(tail, loaded), expected)
    fed.save(str(tmp_path / "state"))  # over the old one, which the loaded state no longer needs
    assert State.load(tmp_path / "state").length == fed.length


def test_another_process_goes_on_bit_for_bit(tiny_folder, tiny_model, device, rng, tmp_path):
    state = tiny_model.new_state()
    tiny_model.forward(ids(rng, 200), state)
    state.save(tmp_path / "state")
    np.save(tmp_path / "tail.npy", tail := ids(rng, 20))
    script = (
        "import sys, numpy as np, deltaic; folder, device, work = sys.argv[1:];"
        "model = deltaic.load(folder, device=device, dtype='f32', threads=int(open(work + '/threads').read()));"
        "tail = np.load(work + '/tail.npy');"
        "np.save(work + '/logits.npy', model.forward(tail, deltaic.State.load(work + '/state')))"
    )
    (tmp_path / "threads").write_text(str(tiny_model.threads))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    arguments = [sys.executable, "-c", script, str(tiny_folder), device, str(tmp_path)]
    subprocess.run(arguments, env=environment, check=True, timeout=120)
    assert np.array_equal(np.load(tmp_path / "logits.npy"), tiny_model.forward(tail, state))


def test_the_file_is_a_safetensors_file(fed, tmp_path):
    from safetensors import safe_open

    fed.save(tmp_path / "state")
    with safe_open(tmp_path / "state", "numpy") as file:
        assert file.metadata()["fingerprint"] == fed.fingerprint
        assert np.array_equal(file.get_tensor("delta"), fed.delta)
        assert file.get_tensor("token_ids").tolist() == fed.token_ids


def test_another_model_refuses_it(model, fed, tiny_folder, tiny_moe_folder, device, tmp_path):
    fed.save(tmp_path / "state")
    same = deltaic.load(model.folder, device=device, dtype="f32", kv_dtype="f32")  # K/V of the other dtype goes on
    same.forward([1], State.load(tmp_path / "state"))
    other_folder = tiny_moe_folder if model.folder == tiny_folder else tiny_folder
    for other in (
        deltaic.load(other_folder, device=device, dtype="f32"),
        deltaic.load(model.folder, device=device, dtype="bf16"),
    ):
        with pytest.raises(StateError, match="another model"):
            other.forward([1], State.load(tmp_path / "state"))


def test_one_changed_byte_anywhere_is_refused(fed, tmp_path):
    path = tmp_path / "state"
    fed.save(path)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    places = {0, 7, 9, header - 1, header, len(good) - 1, len(good) - 33}
    places |= {int(i) for i in np.random.default_rng(0).integers(0, len(good), 60)}
    for place in places:
        for bit in (0, 7):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(StateError):
                State.load(path)
    path.write_bytes(good)
    State.load(path)


def test_swapped_parts_are_refused(fed, tmp_path):
    path = tmp_path / "state"
    fed.save(path)
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    size = state_file._SUM_BYTES
    for a, b, n in ((start, start + 8, 8), (start + 4096, start + 8192, 4096), (start, start + size, size)):
        bad = bytearray(good)
        bad[a : a + n], bad[b : b + n] = good[b : b + n], good[a : a + n]
        if bad == good:
            continue
        path.write_bytes(bad)
        with pytest.raises(StateError, match="altered"):
            State.load(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, -33, -32, -1])
def test_truncated_files_are_refused(fed, tmp_path, keep):
    path = tmp_path / "state"
    fed.save(path)
    good = path.read_bytes()
    path.write_bytes(good[: int(len(good) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(StateError, match=r"cut off|not a state file"):
        State.load(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(StateError, match="grown"):
        State.load(path)


def test_foreign_files_are_refused(model, tmp_path, rng):
    path = tmp_path / "state"
    header = json.dumps({"__metadata__": {"format": "pt"}, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    good = {"format": "deltaic-state", "version": "1"}
    huge = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**82]}
    contents = [
        b"",
        b"\x80\x04K\x01.",
        rng.bytes(5000),
        (model.folder / "model.safetensors").read_bytes(),
        len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4,
    ]
    for tensors in (
        {},
        {"conv": huge},
        {"conv": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"conv": 3},
    ):
        raw = json.dumps({"__metadata__": good, **tensors}).encode()
        contents.append(len(raw).to_bytes(8, "little") + raw)
    contents += [len(raw).to_bytes(8, "little") + raw for raw in (b"[" * 10**5, b"[]", b"3", b'{"__metadata__": 3}')]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(StateError):
            State.load(path)
    for missing in (tmp_path / "none", tmp_path, "", "\0", None, 3):
        with pytest.raises(StateError):
            State.load(missing)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StateError, match="regular"):
        State.load(tmp_path / "pipe")


@pytest.mark.parametrize(
    "change",
    [
        {"length": "-1"}, {"length": "x"}, {"length": "1000000"}, {"kv_block": "[1]"}, {"kv_block": "x"},
        {"kv_dtype": "int8"}, {"kv_dtype": "fp8"},
        {"images": "[[1]]"}, {"images": "3"}, {"context": "3"}, {"rope_delta": "1.5"},
    ],
)  # fmt: skip
def test_consistent_files_with_absurd_facts_are_refused(fed, tmp_path, change):
    state_file.save_state(fed, tmp_path / "state", metadata=change)
    with pytest.raises(StateError, match="not a usable state"):
        State.load(tmp_path / "state")


@pytest.mark.parametrize("drop", ["conv", "delta", "token_ids", "kv.1"])
def test_files_without_a_tensor_are_refused(fed, tmp_path, drop):
    fed.save(tmp_path / "state")
    metadata, arrays = state_file.read_arrays(tmp_path / "state")
    del arrays[drop]
    del metadata["format"], metadata["version"]
    state_file.write_arrays(tmp_path / "state", metadata, arrays, durable=False)
    with pytest.raises(StateError, match="not a usable state"):
        State.load(tmp_path / "state")


def test_a_save_that_fails_leaves_the_old_file_and_no_other(fed, rng, model, tmp_path, monkeypatch):
    path = tmp_path / "state"
    fed.save(path)
    good = path.read_bytes()
    model.forward(ids(rng, 3), fed)

    def full(*args):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(StateError, match="No space left"):
                fed.save(path)
        assert path.read_bytes() == good
        assert os.listdir(tmp_path) == ["state"]
    for wrong in (tmp_path / "none" / "state", tmp_path, "\0", 3):
        with pytest.raises(StateError):
            fed.save(wrong)


def test_half_written_states_are_neither_forked_nor_saved(model, fed, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    twin = fed.fork()
    with monkeypatch.context() as patch:
        patch.setattr(model._runner.text, "run_layers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.forward([1, 2], fed)
    for action in (fed.fork, lambda: fed.save(tmp_path / "state")):
        with pytest.raises(StateError, match="half-written"):
            action()
    assert not list(tmp_path.iterdir())
    model.forward([1, 2], twin)  # what was shared is whole


def test_the_context_goes_with_the_state(tiny_folder, device, tmp_path):
    model = deltaic.load(tiny_folder, device=device, dtype="f32", context=100)
    state = model.new_state()
    model.forward([1] * 90, state)
    state.save(tmp_path / "state")
    with pytest.raises(ContextLengthError, match="100"):
        model.forward([1] * 11, State.load(tmp_path / "state"))
    with pytest.raises(ContextLengthError, match="100"):
        State.load(tmp_path / "state").reserve(101)


@pytest.mark.skipif(os.name != "posix", reason="permissions of files are checked on POSIX")
def test_files_respect_the_umask(fed, tmp_path):
    before = os.umask(0o077)
    try:
        fed.save(tmp_path / "state")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o600


# ------------------------------------------------------------------------------- any order of operations

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(0, 9), st.integers(1, 140)),
        st.tuples(st.just("look"), st.integers(0, 9), st.just(0)),
        st.tuples(st.sampled_from(["fork", "file", "drop"]), st.integers(0, 9), st.just(0)),
    ),
    min_size=4,
    max_size=14,
)


@settings(max_examples=8, **SLOW)
@given(operations=OPERATIONS, seed=st.integers(0, 2**32 - 1))
def test_no_operation_changes_what_follows(model, tmp_path_factory, operations, seed):
    """Feed, fork, save and load, drop, in any order: a state that is left gives the bits of one that was only fed."""
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("states") / "state"
    seen = model.prepare("<|vision_start|><|image_pad|><|vision_end|>", images=[picture(int(rng.integers(3)))])
    pool = [(model.new_state(), [])]
    for name, which, count in operations:
        state, fed = pool[which % len(pool)]
        if name == "feed":
            fed.append(ids(rng, count))
            model.forward(fed[-1], state)
        elif name == "look":
            fed.append(seen)
            model.forward(seen, state)
        elif name == "fork":
            pool.append((state.fork(), list(fed)))
        elif name == "file":
            state.save(path)
            pool[which % len(pool)] = (State.load(path), fed)
        elif len(pool) > 1:
            del pool[which % len(pool)]
    probe = ids(rng, 5)
    for state, fed in pool:
        fresh = model.new_state()
        for piece in fed:
            model.forward(piece, fresh)
        assert state.token_ids == fresh.token_ids
        assert np.array_equal(model.forward(probe, state), model.forward(probe, fresh))
