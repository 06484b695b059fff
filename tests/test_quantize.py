"""Packed folders as users meet them: `deltaic.quantize`, `deltaic.load`, and the command line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import deltaic
import numpy as np
import pytest
from deltaic import cli
from deltaic.errors import ArgumentError, CheckpointError
from deltaic.weights.packed import PACKED_FILE

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deltaic._core") is None, reason="deltaic._core is not built")

TEXT = "the cat sat on the mat"


@pytest.fixture(scope="module")
def packed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in int4. Do not change it: copy it."""
    return deltaic.quantize(tiny_folder, tmp_path_factory.mktemp("packed") / "tiny-int4", threads=2)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (64, 96, 3), np.uint8)


def test_a_packed_model_computes_what_the_checkpoint_does(tiny_folder, packed, picture):
    """Bit for bit, with and without a picture, mapped or copied."""
    question = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": TEXT}]}]
    plain = deltaic.load(tiny_folder, dtype="int4")
    expected = plain.forward(TEXT), plain.forward(plain.prepare(question))
    for options in ({}, {"memory": "copy"}, {"verify": False}, {"dtype": "int4"}, {"dtype": {"default": "int4"}}):
        model = deltaic.load(packed, **options)
        np.testing.assert_array_equal(model.forward(TEXT), expected[0])
        np.testing.assert_array_equal(model.forward(model.prepare(question)), expected[1])
        assert model.dtype == "int4"
        assert model.kv_dtype == "bf16"
        info = model.info()
        assert info["vision_dtype"] == "bf16"
        assert info["activations"] == "int8"
        assert info["weight_bytes"] == plain.info()["weight_bytes"]


def test_op_sets_agree_on_a_packed_folder(packed):
    """The numpy definition, reading the same bytes, gives the same logits up to the rounding of activations."""
    definition = deltaic.load(packed, device="reference", kv_dtype="f32").forward(TEXT)
    exact = deltaic.load(packed, activations="float32", kv_dtype="f32").forward(TEXT)
    rounded = deltaic.load(packed, kv_dtype="f32").forward(TEXT)
    assert np.abs(exact - definition).max() < 1e-4 * np.abs(definition).max()
    assert cosine(rounded, definition) > 0.999
    assert np.abs(rounded - definition).max() > 10 * np.abs(exact - definition).max()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def test_quantised_logits_are_close_to_full_precision(tiny_folder):
    full = deltaic.load(tiny_folder, dtype="f32").forward(TEXT)
    assert cosine(deltaic.load(tiny_folder, dtype="int8").forward(TEXT), full) > 0.999
    assert cosine(deltaic.load(tiny_folder, dtype="int4").forward(TEXT), full) > 0.97
    mixed = {"default": "int8", "lm_head": "f32", "layers.0.*": "bf16"}
    assert cosine(deltaic.load(tiny_folder, dtype=mixed).forward(TEXT), full) > 0.999


def test_a_packed_folder_has_its_own_dtype(packed):
    for wrong in ({"dtype": "int8"}, {"dtype": {"default": "int4", "norm*": "f32"}}, {"vision_dtype": "int8"}):
        with pytest.raises(ArgumentError, match="packed as int4"):
            deltaic.load(packed, **wrong)


def test_damage_to_the_vision_tower_is_found_at_the_first_picture(packed, tmp_path, picture):
    folder = Path(shutil.copytree(packed, tmp_path / "damaged"))
    raw = bytearray((folder / PACKED_FILE).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    raw[start + header["visual.blocks.0.mlp.linear_fc1/0"]["data_offsets"][0]] ^= 255
    (folder / PACKED_FILE).write_bytes(raw)
    model = deltaic.load(folder)
    assert np.isfinite(model.forward(TEXT)).all()
    question = model.prepare([{"role": "user", "content": [{"type": "image", "image": picture}]}])
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"visual\.blocks\.0\.mlp\.linear_fc1/0 do not match"):
            model.forward(question)
    unchecked = deltaic.load(folder, verify=False)
    assert unchecked.forward(question).shape[0] == len(question.token_ids)


# command line


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_quantize_run_and_info(capsys, tiny_folder, tmp_path):
    target = tmp_path / "packed"
    dtype = "int4,lm_head=int8, layers.0.* = bf16"
    code, out, err = run(capsys, "quantize", tiny_folder, "-o", target, "--dtype", dtype, "--vision-dtype", "int8")
    assert (code, out) == (0, "")
    assert f"{target}: " in err
    assert "MB" in err
    code, out, err = run(capsys, "run", target, "the cat", "--max-new-tokens", 3, "--device", "reference")
    assert code == 0
    assert "3 new tokens" in err
    code, out, _ = run(capsys, "info", target, "--json")
    facts = json.loads(out)["model"]
    assert facts["stored_as"] == "int4 (lm_head int8, layers.0.* bf16), vision int8"
    assert facts["file_bytes"] == (target / PACKED_FILE).stat().st_size
    plain = json.loads(run(capsys, "info", tiny_folder, "--json")[1])["model"]
    for name in ("parameters", "vision_parameters", "mtp_parameters", "tensors", "layers", "architecture"):
        assert facts[name] == plain[name]
    code, _, err = run(capsys, "quantize", tiny_folder, "-o", target)
    assert code == 2
    assert "already" in err
    assert run(capsys, "quantize", tiny_folder, "-o", target, "--overwrite", "--dtype", "bf16")[0] == 0
    assert json.loads(run(capsys, "info", target, "--json")[1])["model"]["stored_as"] == "bf16, vision bf16"


@pytest.mark.parametrize("dtype", ["int5", "int4,", "int4,int8", "=int4", "lm_head=", "nothing=int8", "lm_head=int4=x"])
def test_wrong_dtypes_on_the_command_line(capsys, tiny_folder, tmp_path, dtype):
    for arguments in (["run", tiny_folder, "hi"], ["quantize", tiny_folder, "-o", tmp_path / "packed"]):
        code, out, err = run(capsys, *arguments, "--dtype", dtype)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert "dtype" in err
    assert not (tmp_path / "packed").exists()
