"""The writer of random checkpoints: what it writes loads, is random everywhere, and comes in shards when large."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from deltaic.model.config_file import load_config
from deltaic.weights.build import mtp_weights, text_weights, vision_weights
from deltaic.weights.checkpoint import INDEX_FILE, open_checkpoint
from tiny_checkpoints import FakeOps, build

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import make_checkpoint


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "VOCAB_SIZE", 4096)
    monkeypatch.setattr(make_checkpoint, "FIRST_SPECIAL_ID", 4000)


def test_everything_loads_and_nothing_is_left_at_zero_or_one(tmp_path: Path) -> None:
    parameters, size = make_checkpoint.make_checkpoint("tiny", tmp_path)
    config = load_config(tmp_path)
    assert config.eos_token_ids == (4000, 4002)
    assert config.image_token_id == 4012
    with open_checkpoint(tmp_path) as checkpoint:
        assert sum(tensor.nbytes for tensor in checkpoint.tensors.values()) == size
        assert sum(int(np.prod(tensor.shape)) for tensor in checkpoint.tensors.values()) == parameters
        for name, tensor in checkpoint.tensors.items():
            values = tensor.read().astype(np.float32)
            assert np.isfinite(values).all(), name
            assert np.mean((values == 0) | (values == 1)) < 0.05, (
                name
            )  # a draw may round to 1, a tensor may not be left there
            assert values.std() > 1e-3, name
        embedding = checkpoint.tensors["model.language_model.embed_tokens.weight"].read().astype(np.float32)
        assert abs(embedding.std() * 8 - 1) < 0.01  # 64 inputs
        for part in (text_weights, vision_weights, mtp_weights):
            build(part, checkpoint, config, FakeOps(), "bf16")


def test_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForConditionalGeneration

    make_checkpoint.make_checkpoint("tiny", tmp_path)
    model, report = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert model.config.text_config.rope_parameters["rope_theta"] == 1e7


def test_shards_and_parts_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "SHARD_BYTES", 100_000)
    make_checkpoint.make_checkpoint("tiny", tmp_path, layers=2, vision=False, mtp=False)
    config = load_config(tmp_path)
    assert config.vision is None
    assert config.text.num_hidden_layers == 2
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) > 2
    with open_checkpoint(tmp_path) as checkpoint:
        assert not any(name.startswith(("mtp.", "model.visual.")) for name in checkpoint.tensors)
        build(text_weights, checkpoint, config, FakeOps(), "f32")
    # Writing again over it must not leave shards of the first time behind.
    monkeypatch.setattr(make_checkpoint, "SHARD_BYTES", 10**9)
    make_checkpoint.make_checkpoint("tiny", tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_tokenizer_has_a_text_for_every_id(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    ids = make_checkpoint.make_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.token_to_id("<|image_pad|>") == ids["<|image_pad|>"]
    assert all(tokenizer.id_to_token(i) for i in range(4000 + len(ids)))
    text = "Grüße, 世界! 12\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|im_end|>").ids == [ids["<|im_end|>"]]
    other = tmp_path / "copy"
    other.mkdir()
    assert make_checkpoint.copy_tokenizer(tmp_path, other)["<|im_end|>"] == ids["<|im_end|>"]
    assert (other / "chat_template.jinja").exists()
