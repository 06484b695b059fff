"""Reading safetensors: views are right, every lie in a header is an error, nothing crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from deltaic.errors import CheckpointError
from deltaic.weights.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import write_raw, write_safetensors


def entry(begin: Any, end: Any, shape: Any = (2, 2), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(2, 3, 4).to(torch.float16),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        for name, tensor in tensors.items():
            array = checkpoint.tensors[name].read()
            assert array.shape == tuple(tensor.shape) == checkpoint.tensors[name].shape
            assert not array.flags.writeable
            np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())
            checkpoint.tensors[name].file.release()
            np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())
        assert checkpoint.tensors["b"].read().dtype == ml_dtypes.bfloat16
    # Views outlive the checkpoint: the mapping lives as long as they do.
    np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())


def test_misaligned_data_is_readable_and_aligned_in_memory(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32)
    for padding in range(4):
        header = json.dumps({"x": entry(0, 16)}).encode() + b" " * padding
        write_raw(tmp_path / SINGLE_FILE, header, values.tobytes())
        array = open_checkpoint(tmp_path).tensors["x"].read()
        np.testing.assert_array_equal(array.ravel(), values)
        assert array.flags.aligned
        assert not array.flags.writeable


BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "overlap": ({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24), "overlaps"),
    "same range twice": ({"a": entry(0, 16), "b": entry(0, 16)}, bytes(16), "overlaps"),
    "hole": ({"a": entry(0, 16), "b": entry(20, 36)}, bytes(36), "hole"),
    "hole at the start": ({"a": entry(4, 20)}, bytes(20), "hole"),
    "trailing bytes": ({"a": entry(0, 16)}, bytes(17), "holds 17"),
    "data truncated": ({"a": entry(0, 16)}, bytes(15), "truncated"),
    "no data": ({"a": entry(0, 16)}, b"", "truncated"),
    "end before begin": ({"a": entry(16, 0)}, bytes(16), "takes 16"),
    "negative offset": ({"a": entry(-16, 0)}, bytes(16), "data_offsets"),
    "huge offset": ({"a": entry(0, 10**30)}, bytes(16), "data_offsets"),
    "fractional offset": ({"a": entry(0, 16.0)}, bytes(16), "data_offsets"),
    "boolean offset": ({"a": entry(False, 16)}, bytes(16), "data_offsets"),
    "three offsets": ({"a": {**entry(0, 16), "data_offsets": [0, 8, 16]}}, bytes(16), "data_offsets"),
    "offsets no list": ({"a": {**entry(0, 16), "data_offsets": "0-16"}}, bytes(16), "data_offsets"),
    "shape too small": ({"a": entry(0, 16, [2])}, bytes(16), "takes 8"),
    "shape too large": ({"a": entry(0, 16, [5])}, bytes(16), "takes 20"),
    "negative shape": ({"a": entry(0, 16, [-2, -2])}, bytes(16), "shape"),
    "absurd shape": ({"a": entry(0, 16, [10**12, 10**12])}, bytes(16), "takes"),
    "overflowing shape": ({"a": entry(0, 16, [2**63, 2**63])}, bytes(16), "shape"),
    "textual shape": ({"a": entry(0, 16, ["4"])}, bytes(16), "shape"),
    "shape no list": ({"a": entry(0, 16, 4)}, bytes(16), "shape"),
    "nested shape": ({"a": entry(0, 16, [[4]])}, bytes(16), "shape"),
    "rank 9": ({"a": entry(0, 16, [1] * 8 + [4])}, bytes(16), "shape"),
    "integer dtype": ({"a": entry(0, 16, dtype="I32")}, bytes(16), "I32"),
    "fp8 dtype": ({"a": entry(0, 4, dtype="F8_E4M3")}, bytes(4), "not supported yet"),
    "unknown dtype": ({"a": entry(0, 16, dtype="F31")}, bytes(16), "F31"),
    "dtype no text": ({"a": entry(0, 16, dtype=["F32"])}, bytes(16), "dtype"),
    "missing dtype": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, bytes(16), "expected dtype"),
    "extra key": ({"a": {**entry(0, 16), "scale": 2}}, bytes(16), "expected dtype"),
    "entry no object": ({"a": [0, 16]}, bytes(16), "expected dtype"),
    "metadata no object": ({"__metadata__": 3, "a": entry(0, 16)}, bytes(16), "__metadata__"),
    "metadata no strings": ({"__metadata__": {"n": 3}, "a": entry(0, 16)}, bytes(16), "__metadata__"),
    "list": ([1, 2], b"", "not a JSON object"),
    "number": (b"17", b"", "not a JSON object"),
    "no JSON": (b"{'a': 1}", b"", "JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "JSON"),
    "empty header": (b"", b"", "JSON"),
    "endless number": (b'{"a": ' + b"9" * 9999 + b"}", b"", "JSON"),
    "deep nesting": (b'{"a": ' + b"[" * 100_000, b"", "nested too deeply"),
    "deep nesting, closed": (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", b"", "expected dtype"),
    "key twice": (
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        bytes(4),
        "'a' twice",
    ),
    "inner key twice": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', b"", "'dtype' twice"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header(tmp_path: Path, case: str) -> None:
    header, data, message = BAD_HEADERS[case]
    write_raw(tmp_path / SINGLE_FILE, header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert SINGLE_FILE in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", [b"", b"\0", bytes(7)])
def test_file_shorter_than_a_length(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="at least 8"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [3, 10**6, 200_000_000, 2**63, 2**64 - 1])
def test_lying_header_length(tmp_path: Path, length: int) -> None:
    write_raw(tmp_path / SINGLE_FILE, {"a": entry(0, 16)}, bytes(16), length=length)
    with pytest.raises(CheckpointError, match=r"header|JSON"):
        open_checkpoint(tmp_path)


def test_header_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / SINGLE_FILE).open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # sparse: takes no room on the disk
    with pytest.raises(CheckpointError, match="header"):
        open_checkpoint(tmp_path)


def test_file_without_tensors(tmp_path: Path) -> None:
    write_raw(tmp_path / SINGLE_FILE, {}, b"")
    assert open_checkpoint(tmp_path).tensors == {}


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    write_safetensors(tmp_path / SINGLE_FILE, {"a": np.ones(100_000, np.float32)})
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / SINGLE_FILE, 4096)
    with pytest.raises(CheckpointError, match="shrank"):
        checkpoint.tensors["a"].read()


def test_file_replaced_after_opening_is_still_the_old_one(tmp_path: Path) -> None:
    write_safetensors(tmp_path / SINGLE_FILE, {"a": np.ones(1000, np.float32)})
    checkpoint = open_checkpoint(tmp_path)
    write_safetensors(tmp_path / "new", {"a": np.zeros(1, np.float32)})
    os.replace(tmp_path / "new", tmp_path / SINGLE_FILE)
    assert checkpoint.tensors["a"].read().sum() == 1000


def sharded(folder: Path) -> dict[str, Any]:
    """Two shards with two tensors each; returns the index."""
    weight_map = {}
    for shard in (1, 2):
        file_name = f"model-{shard:05d}-of-00002.safetensors"
        tensors = {f"s{shard}.{name}": np.full((2, 3), shard, np.float32) for name in "ab"}
        write_safetensors(folder / file_name, tensors)
        weight_map.update(dict.fromkeys(tensors, file_name))
    index = {"metadata": {"total_size": 96}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return index


def test_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.source.name == INDEX_FILE
    assert sorted(checkpoint.tensors) == ["s1.a", "s1.b", "s2.a", "s2.b"]
    assert checkpoint.tensors["s2.b"].read().tolist() == [[2.0] * 3] * 2


def test_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is missing.*2 tensors.*s2\.a"):
        open_checkpoint(tmp_path)


def test_broken_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    os.truncate(tmp_path / "model-00002-of-00002.safetensors", 40)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"s1.a": "model-00002-of-00002.safetensors"}, "s1.a.*does not hold it"),
        ({"s9.z": "model-00001-of-00002.safetensors"}, "s9.z.*does not hold it"),
        ({"s1.a": None}, "plain name"),
        ({"s1.a": "../model-00001-of-00002.safetensors"}, "plain name"),
        ({"s1.a": "/etc/x.safetensors"}, "plain name"),
        ({"s1.a": "..\\x.safetensors"}, "plain name"),
        ({"s1.a": "C:x.safetensors"}, "plain name"),
        ({"s1.a": "x\0.safetensors"}, "plain name"),
        ({"s1.a": "pytorch_model.bin"}, "plain name"),
        ({"s1.a": ["x.safetensors"]}, "plain name"),
        ({"s1.a": "n" * 300 + ".safetensors"}, "missing"),
    ],
)
def test_bad_weight_map(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    index = sharded(tmp_path)
    index["weight_map"].update(change)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_tensor_in_a_shard_that_the_index_does_not_list(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    del index["weight_map"]["s1.b"]
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"s1\.b.*does not list it"):
        open_checkpoint(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    again = {name: np.zeros((2, 3), np.float32) for name in ("s1.a", "s2.a", "s2.b")}
    write_safetensors(tmp_path / "model-00002-of-00002.safetensors", again)
    with pytest.raises(CheckpointError, match=r"s1\.a.*says it is in model-00001"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', b'{"weight_map": {"a"', b"\xff\xfe"]
)
def test_bad_index(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weight_map|JSON"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickle_is_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match="convert"):
        open_checkpoint(tmp_path)


def test_absent_or_strange_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no weight file"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found other\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / SINGLE_FILE).mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path)
    (tmp_path / SINGLE_FILE).rmdir()
    (tmp_path / SINGLE_FILE).symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE_FILE)
    code = (
        "import sys\n"
        "from deltaic.errors import CheckpointError\n"
        "from deltaic.weights.checkpoint import open_checkpoint\n"
        "try: open_checkpoint(sys.argv[1])\n"
        "except CheckpointError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "refused", done.stderr


# --- Fuzzing: any header gives tensors that can be read, or a CheckpointError -----------------------------------------

SIZES = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**63, 10**30]), st.booleans(), st.floats(), st.none())
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "", None]),
            "shape": st.one_of(st.lists(SIZES, max_size=4), st.none(), st.text(max_size=3)),
            "data_offsets": st.one_of(st.lists(SIZES, max_size=3), st.none()),
        }
    ),
    st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4)), st.lists, max_leaves=5),
)


def try_open(folder: Path) -> bool:
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError:
        return False
    for tensor in checkpoint.tensors.values():
        array = tensor.read()
        assert array.shape == tensor.shape
        assert array.nbytes == tensor.nbytes
        array.tobytes()
        tensor.file.release()
    checkpoint.close()
    return True


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(header=st.dictionaries(st.text(max_size=6), ENTRIES, max_size=4), data=st.binary(max_size=64))
def test_fuzz_header_values(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    write_raw(tmp_path / SINGLE_FILE, header, data)
    try_open(tmp_path)


@FUZZ
@given(content=st.binary(max_size=200))
def test_fuzz_whole_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    try_open(tmp_path)


@FUZZ
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    position=st.integers(0, 10**6),
    byte=st.integers(0, 255),
    cut=st.one_of(st.none(), st.integers(0, 10**6)),
)
def test_fuzz_damaged_good_file(
    tmp_path: Path, shapes: list[list[int]], position: int, byte: int, cut: int | None
) -> None:
    path = tmp_path / SINGLE_FILE
    write_safetensors(path, {f"t{i}": np.ones(shape, np.float32) for i, shape in enumerate(shapes)})
    assert try_open(tmp_path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(bytes(content) if cut is None else bytes(content[: cut % len(content)]))
    opened = try_open(tmp_path)
    assert cut is None or not opened


@FUZZ
@given(
    weight_map=st.one_of(
        st.none(),
        st.dictionaries(
            st.sampled_from(["s1.a", "s1.b", "s2.a", "s2.b", "x"]),
            st.one_of(
                st.sampled_from(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
                st.text(max_size=8),
                st.integers(),
            ),
        ),
    )
)
def test_fuzz_index(tmp_path: Path, weight_map: Any) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    try_open(tmp_path)
