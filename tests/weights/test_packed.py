"""Packed folders: what is written is what would have been packed in memory, bit for bit; what is damaged is refused."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import deltaic
import numpy as np
import pytest
from deltaic.errors import ArgumentError, CheckpointError
from deltaic.model.config_file import load_config
from deltaic.ops import reference
from deltaic.weights import packed as packed_module
from deltaic.weights import streaming
from deltaic.weights.build import mtp_weights, text_weights, vision_weights
from deltaic.weights.checkpoint import open_checkpoint
from deltaic.weights.packed import PACKED_FILE, PackedFile, PackedWriter
from deltaic.weights.precision import Precision
from tiny_checkpoints import CLASSES, build, mtp_tensors, random_model, save_state

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deltaic._core") is None, reason="deltaic._core is not built")

MIXED = {"default": "int4", "layers.0.*": "int8", "layers.3.self_attn.v_proj": "bf16", "layers.2.mlp.*": "f32"}


@pytest.fixture(scope="module")
def cpu() -> ModuleType:
    return importlib.import_module("deltaic.ops.cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with vision and an MTP layer."""
    folder = tmp_path_factory.mktemp("plain")
    model = random_model("Qwen3_5ForConditionalGeneration", tied=True)
    save_state(folder, model, {**model.state_dict(), **mtp_tensors(model.config.get_text_config(), per_expert=False)})
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """Packed as int4, to be damaged."""
    return deltaic.quantize(plain, tmp_path / "packed", threads=2)


def leaves(item: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(item, list):
        for i, entry in enumerate(item):
            yield from leaves(entry, f"{path}.{i}")
    elif is_dataclass(item) and type(item).__module__ == "deltaic.model.weights":
        for field in fields(item):
            yield from leaves(getattr(item, field.name), f"{path}.{field.name}")
    else:
        yield path, item


def assert_same(found: Any, expected: Any) -> None:
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    assert len(pairs) > 10
    for (path, a), (other, b) in pairs:
        assert path == other
        if isinstance(b, np.ndarray):
            assert a.shape == b.shape, path
            assert a.dtype == np.float32
            np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), err_msg=path)
            continue
        assert (a.shape, a.dtype, a.nbytes) == (b.shape, b.dtype, b.nbytes), path
        for (fmt, rows, data), (fmt_b, rows_b, data_b) in zip(a.parts, b.parts, strict=True):
            assert (fmt, rows) == (fmt_b, rows_b), path
            np.testing.assert_array_equal(data, data_b, err_msg=path)


@pytest.mark.parametrize("dtype", ["int4", "int8", "bf16", "f32"])
@pytest.mark.parametrize("class_name", CLASSES)
def test_a_packed_folder_is_what_load_packs(tmp_path: Path, cpu: ModuleType, class_name: str, dtype: str) -> None:
    source = tmp_path / "source"
    model = random_model(class_name, tied=dtype == "int4")
    model.save_pretrained(source, max_shard_size="60KB")  # experts one by one
    check_round_trip(source, tmp_path / "packed", cpu, dtype, None)


@pytest.mark.parametrize("slab", [1, 4096])
@pytest.mark.parametrize("bfloat16", [True, False])
def test_mixed_formats_mtp_fused_experts_and_slabs(
    tmp_path: Path, cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, slab: int, bfloat16: bool
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    model = random_model("Qwen3_5MoeForConditionalGeneration", bfloat16=bfloat16)
    mtp = mtp_tensors(model.config.get_text_config(), per_expert=True)
    state = {name: tensor if bfloat16 else tensor.half() for name, tensor in {**model.state_dict(), **mtp}.items()}
    save_state(source, model, state)  # fused experts, and float16 in the second round
    monkeypatch.setattr(streaming, "SLAB_BYTES", slab)
    check_round_trip(source, tmp_path / "packed", cpu, MIXED, "int8")


def check_round_trip(source: Path, target: Path, cpu: ModuleType, dtype: Any, vision_dtype: str | None) -> None:
    assert deltaic.quantize(source, target, dtype=dtype, vision_dtype=vision_dtype, threads=2) == target
    config = load_config(source)
    precision = Precision.parse(dtype, vision_dtype)
    parts = [text_weights] + [vision_weights] * (config.vision is not None)
    with open_checkpoint(source) as checkpoint, PackedFile(target) as packed:
        assert packed.precision.same_formats(precision)
        for part in (None, ("visual.",), ("mtp.",)):
            packed.verify(cpu, part, "", False)
        parts += [mtp_weights] * packed.has_mtp
        assert packed.has_mtp == ("mtp.fc.weight" in checkpoint.tensors)
        for part in parts:
            expected = build(part, checkpoint, config, cpu, precision, progress=False)
            assert_same(build(part, packed, config, cpu), expected)
            numbers = build(part, packed, config, reference)
            for (path, a), (_, b) in zip(leaves(numbers), leaves(expected), strict=True):
                if not isinstance(b, np.ndarray):
                    decoded = reference.from_packed(b.parts, b.shape[0] if len(b.shape) == 3 else 1, b.shape[-1], b.glu)
                    np.testing.assert_array_equal(a.matrix, decoded.matrix, err_msg=path)
        text = build(text_weights, packed, config, cpu)
    assert (text.head is text.embed) == config.text.tie_word_embeddings
    with open(target / PACKED_FILE, "rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
    assert start % 64 == 0
    from safetensors import safe_open  # the file is one that others can read

    with safe_open(target / PACKED_FILE, "np") as other:
        assert set(other.keys()) == set(packed._file.tensors)


@pytest.mark.parametrize("memory", ["map", "copy"])
def test_weights_are_views_and_outlive_the_file(folder: Path, plain: Path, cpu: ModuleType, memory: str) -> None:
    config = load_config(plain)
    with PackedFile(folder) as packed:
        if memory == "copy":
            packed.copy(None)
        packed.verify(cpu, None, "", False)
        text = build(text_weights, packed, config, cpu)
        vision = build(vision_weights, packed, config, cpu)
    for _, item in [*leaves(text), *leaves(vision)]:
        for array in [item] if isinstance(item, np.ndarray) else [data for _, _, data in item.parts]:
            assert array.ctypes.data % 64 == 0
            assert not array.flags.owndata
            assert memory == "copy" or not array.flags.writeable
    with open_checkpoint(plain) as checkpoint:
        assert_same(text, build(text_weights, checkpoint, config, cpu, "int4", progress=False))
    del packed
    x = np.ones((1, config.text.hidden_size), np.float32)
    assert np.isfinite(cpu.linear(x, text.head)).all()


class Disk:
    """A file that takes at most a megabyte at a time, and remembers up to where it was filled."""

    def __init__(self, file: Any):
        self.file, self.ends = file, []

    def write(self, data: memoryview) -> int:
        count = self.file.write(data[: 1 << 20])
        self.ends.append(self.file.tell())
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_files_are_written_up_to_borders_of_huge_pages(tmp_path: Path, cpu: ModuleType) -> None:
    writer = PackedWriter(tmp_path / PACKED_FILE, 2)
    disk = writer._out = Disk(writer._out)
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 25_000_000, np.uint8)
    writer.begin("a/0")
    ends = []
    for first in range(0, len(data), 333_333):
        before = len(disk.ends)
        writer.write(data[first : first + 333_333])
        ends += disk.ends[-1:] if len(disk.ends) > before else []
    assert len(ends) == 2  # of 8 MB or more each
    assert all(end % (2 << 20) == 0 for end in ends)
    writer.end()
    writer.describe("a", 1, 1, False, [("int4", 1)])
    writer.finish(Precision.parse("int4"), "source", cpu)
    with PackedFile(tmp_path) as packed:
        np.testing.assert_array_equal(packed._padded_bytes(packed._part(None)[0])[: len(data)], data)
        packed.verify(cpu, None, "", False)


def test_memory_copy_is_of_this_process(folder: Path) -> None:
    head = deltaic.load(folder, memory="copy")._runner.text.weights.head
    assert all(data.flags.writeable for _, _, data in head.parts)


def test_float_activations_are_set_on_matrices_that_round(folder: Path, plain: Path, cpu: ModuleType) -> None:
    config = load_config(plain)
    for open_ in (PackedFile, open_checkpoint):
        with open_(folder if open_ is PackedFile else plain) as weights:
            for activations in ("int8", "float32"):
                precision = Precision.parse("int4", activations=activations)
                text = build(text_weights, weights, config, cpu, precision)
                vision = build(vision_weights, weights, config, cpu, precision)
                assert text.layers[0].mixer.in_proj.float_activations is (activations == "float32")
                assert text.head.float_activations is (activations == "float32")
                assert vision.blocks[0].qkv.float_activations is (activations == "float32")


# damage


def raw_header(folder: Path) -> tuple[dict[str, Any], bytes]:
    raw = (folder / PACKED_FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(folder: Path, header: dict[str, Any], data: bytes) -> None:
    raw = json.dumps(header).encode()
    raw += b" " * (-(8 + len(raw)) % 64)
    (folder / PACKED_FILE).write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def sign(header: dict[str, Any]) -> dict[str, Any]:
    """A forged header with the digest that belongs to it."""
    metadata = header["__metadata__"]
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    entries = {
        name: packed_module.Tensor(
            name, e["dtype"], tuple(e["shape"]), e["data_offsets"][0], e["data_offsets"][1] - e["data_offsets"][0], None
        )
        for name, e in tensors.items()
    }
    metadata["digest"] = packed_module._digest(metadata, entries)
    return header


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        deltaic.load(folder, device="reference")


def test_another_version_is_refused(folder: Path) -> None:
    header, data = raw_header(folder)
    header["__metadata__"]["format_version"] = "1"
    write_header(folder, header, data)
    refused(folder, "format version 1, this deltaic reads version 2; pack")
    del header["__metadata__"]["format_version"]
    write_header(folder, header, data)
    refused(folder, "format version None")
    del header["__metadata__"]
    write_header(folder, header, data)
    refused(folder, "format version None")


def test_a_changed_header_is_refused(folder: Path) -> None:
    header, data = raw_header(folder)
    for name in ("precision", "matrices", "checksums", "source", "layout", "digest"):
        changed = json.loads(json.dumps(header))
        changed["__metadata__"][name] = changed["__metadata__"][name].replace("4", "8").replace("s", "t") + " "
        write_header(folder, changed, data)
        refused(folder, "digest")
    del header["__metadata__"]["source"]
    write_header(folder, header, data)
    refused(folder, "digest")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("precision", "{"),
        ("precision", '{"dtype": "int9", "vision_dtype": "bf16"}'),
        ("precision", "[" * 100_000),
        ("matrices", "3"),
        ("matrices", '{"lm": {"count": 1}}'),
        ("matrices", '{"lm": {"count": -1, "columns": 1, "glu": false, "parts": [["int4", 1]]}}'),
        ("matrices", '{"lm": {"count": 1, "columns": 1, "glu": 0, "parts": [["int4", 1]]}}'),
        ("matrices", '{"lm": {"count": 1, "columns": 1, "glu": false, "parts": [["int5", 1]]}}'),
        ("matrices", '{"lm": {"count": 1, "columns": 1, "glu": true, "parts": [["int4", 1], ["int4", 1]]}}'),
        ("matrices", '{"lm": {"count": 1, "columns": 1, "glu": false, "parts": []}}'),
        ("matrices", "{}"),
        ("checksums", '{"a": "0"}'),
        ("checksums", '{"a": "x"}'),
        ("checksums", '{"a": 7}'),
        ("layout", "blocks of 8 rows"),
    ],
)
def test_forged_metadata_does_not_crash(folder: Path, name: str, value: str) -> None:
    header, data = raw_header(folder)
    header["__metadata__"][name] = value
    write_header(folder, sign(header), data)
    refused(folder, "damaged|layout")


def test_forged_sizes_do_not_reach_a_kernel(folder: Path) -> None:
    header, data = raw_header(folder)
    matrices = json.loads(header["__metadata__"]["matrices"])
    parts = [[["int8", 48]], [["int4", 47]]]
    for change in ({"columns": 4096}, {"count": 2}, {"glu": True}, *({"parts": part} for part in parts)):
        forged = {**matrices, "layers.1.mlp.down_proj": {**matrices["layers.1.mlp.down_proj"], **change}}
        header["__metadata__"]["matrices"] = json.dumps(forged)
        write_header(folder, sign(header), data)
        refused(folder, r"layers\.1\.mlp\.down_proj|bytes, expected")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: float) -> None:
    path = folder / PACKED_FILE
    size = path.stat().st_size
    os.truncate(path, int(keep * size) if 0 < keep < 1 else size + keep if keep < 0 else keep)
    refused(folder, "bytes|cannot be mapped|truncated")


def test_a_flipped_bit_is_found_and_named(folder: Path, plain: Path, cpu: ModuleType) -> None:
    header, data = raw_header(folder)
    config = load_config(plain)
    for name in ("layers.2.mlp.gate_up/0", "norm.weight", "visual.blocks.1.attn.qkv/0", "mtp.fc/0"):
        begin, end = header[name]["data_offsets"]
        changed = bytearray(data)
        changed[(begin + end) // 2] ^= 4
        write_header(folder, header, bytes(changed))
        with PackedFile(folder) as packed:
            part = (name.split(".")[0] + ".",) if name.startswith(("visual", "mtp")) else None
            with pytest.raises(CheckpointError, match=f"bytes of {name} do not match"):
                packed.verify(cpu, part, "", False)
            build(text_weights, packed, config, cpu)  # without a check it can be used, and computes something
    refused(folder, "bytes of mtp.fc/0 do not match")
    deltaic.load(folder, device="reference", speculate="off")  # a part that is not used is not read


def test_a_changed_configuration_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    text["layer_types"] = text["layer_types"] * 2
    text["num_hidden_layers"] *= 2
    path.write_text(json.dumps(config))
    refused(folder, "is missing .* missing, 0 unexpected")
    text["layer_types"] = ["linear_attention", "linear_attention", "full_attention"]
    text["num_hidden_layers"] = 3
    path.write_text(json.dumps(config))
    refused(folder, "does not fit config.json")
    text["layer_types"], text["num_hidden_layers"] = ["linear_attention"] * 3 + ["full_attention"], 4
    text["intermediate_size"] += 16
    path.write_text(json.dumps(config))
    refused(folder, r"layers\.0\.mlp\.gate_up is .* config.json asks for")


# writing


def test_what_lies_in_the_folder(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in plain.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "LICENSE", "notes.pdf", "weights.bin"):
        (source / name).write_text(name)
    (source / "model.safetensors.index.json").write_text("{}")
    (source / "sub").mkdir()
    target = deltaic.quantize(source, tmp_path / "packed", threads=1)
    copied = {"config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "LICENSE"}
    assert {path.name for path in target.iterdir()} >= copied | {PACKED_FILE}
    assert not {path.name for path in target.iterdir()} & {"notes.pdf", "weights.bin", "model.safetensors", "sub"}
    assert not (target / "model.safetensors.index.json").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_fingerprint_tells_checkpoints_apart(plain: Path, folder: Path, tmp_path: Path) -> None:
    again = deltaic.quantize(plain, tmp_path / "again", dtype="int8", threads=1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((plain / "config.json").read_bytes())
    raw = bytearray((plain / "model.safetensors").read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    (name,) = [name for name in header if name.endswith("layers.0.input_layernorm.weight") and "mtp" not in name]
    raw[8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0]] ^= 1
    (other / "model.safetensors").write_bytes(raw)
    different = deltaic.quantize(other, tmp_path / "different", threads=1)
    marks = []
    for packed_folder in (folder, again, different):
        with PackedFile(packed_folder) as packed:
            marks.append(packed.fingerprint)
    assert marks[0] == marks[1] != marks[2]


def test_existing_targets(plain: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="packed folder already"):
        deltaic.quantize(plain, folder)
    assert deltaic.quantize(plain, folder, dtype="int8", overwrite=True, threads=1) == folder
    with PackedFile(folder) as packed:
        assert packed.precision.default == "int8"
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    deltaic.quantize(plain, occupied, threads=1)  # an empty folder is as good as none
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to-keep.txt").write_text("dear")
    for wrong, message in [
        (tmp_path / "letters", "not a packed folder"),
        (tmp_path / "letters" / "to-keep.txt", "not a folder"),
        (tmp_path / "nowhere" / "packed", "make it first"),
        (plain, "the checkpoint itself"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            deltaic.quantize(plain, wrong, overwrite=True)
    assert (tmp_path / "letters" / "to-keep.txt").read_text() == "dear"
    with pytest.raises(CheckpointError, match="packed already"):
        deltaic.quantize(folder, tmp_path / "twice")


def test_wrong_arguments_leave_nothing(plain: Path, tmp_path: Path) -> None:
    for arguments in ({"dtype": "int5"}, {"dtype": {"layers.77.*": "int8"}}, {"vision_dtype": "fp8"}, {"threads": 0}):
        with pytest.raises(ArgumentError):
            deltaic.quantize(plain, tmp_path / "packed", **arguments)
    different_halves = {"layers.0.mlp.gate_proj": "int8", "default": "int4"}
    with pytest.raises(ArgumentError, match="packed as one matrix"):
        deltaic.quantize(plain, tmp_path / "packed", dtype=different_halves)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_what_was_there(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, exists: bool
) -> None:
    target = tmp_path / "packed"
    if exists:
        deltaic.quantize(plain, target, dtype="int8", threads=1)
    before = (target / PACKED_FILE).read_bytes() if exists else None
    calls = []

    def fail(self: Any, data: Any) -> None:
        calls.append(data.nbytes)
        if len(calls) == 20:
            raise failure

    monkeypatch.setattr(packed_module.PackedWriter, "write", fail)
    expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        deltaic.quantize(plain, target, overwrite=True, threads=1)
    assert len(calls) == 20
    assert [path.name for path in tmp_path.iterdir()] == (["packed"] if exists else [])
    if exists:
        assert (target / PACKED_FILE).read_bytes() == before


KILLED = """
import os, sys
from deltaic import packing
from deltaic.weights import packed
write = packed.PackedWriter.write
count = 0
def killed(self, data):
    global count
    count += 1
    if count == 30: os._exit(9)
    write(self, data)
packed.PackedWriter.write = killed
packing.quantize(sys.argv[1], sys.argv[2], overwrite=True, threads=1)
"""


def test_a_killed_process_leaves_what_was_there(plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    environment = {**os.environ, "PYTHONPATH": str(Path(deltaic.__file__).parents[1])}
    run = [sys.executable, "-c", KILLED, str(plain), str(target)]
    assert subprocess.run(run, env=environment, timeout=60).returncode == 9
    assert not target.exists()
    deltaic.quantize(plain, target, dtype="int8", threads=1)
    before = (target / PACKED_FILE).read_bytes()
    assert subprocess.run(run, env=environment, timeout=60).returncode == 9
    assert (target / PACKED_FILE).read_bytes() == before


PEAK_MEMORY = """
import sys
import tqdm
from deltaic import packing
from deltaic.machine import resident_bytes
from deltaic.ops.devices import op_set
op_set("cpu").set_num_threads(1)
before = resident_bytes()["peak"]
packing.quantize(sys.argv[1], sys.argv[2], dtype="int4", threads=1)
print(resident_bytes()["peak"] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_peak_memory_is_far_below_the_checkpoint(tmp_path: Path) -> None:
    import torch
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

    sizes = {"vocab_size": 200_000, "hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [3, 3, 2]}
    delta = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    config = Qwen3_5TextConfig(**sizes, **heads, **delta, rope_parameters=rope, tie_word_embeddings=True)
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(config)
    state = {name: torch.full(t.shape, 0.5, dtype=torch.bfloat16) for name, t in model.state_dict().items()}
    source = tmp_path / "source"
    source.mkdir()
    save_state(source, model, {name: t for name, t in state.items() if name != "lm_head.weight"})
    environment = {**os.environ, "PYTHONPATH": str(Path(deltaic.__file__).parents[1])}
    run = [sys.executable, "-c", PEAK_MEMORY, str(source), str(tmp_path / "packed")]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    size = (source / "model.safetensors").stat().st_size
    assert size > 200e6
    assert float(done.stdout) < 0.3 * size, f"{float(done.stdout) / 1e6:.0f} MB for {size / 1e6:.0f} MB"


def test_progress_bars(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deltaic.quantize(plain, tmp_path / "quiet", threads=1)
    assert capsys.readouterr().err == ""
    deltaic.quantize(plain, tmp_path / "loud", threads=1, progress=True)
    shown = capsys.readouterr().err
    for title in ("the text model", "the MTP layer", "the vision tower"):
        assert f"Packing {title}: 100%" in shown
