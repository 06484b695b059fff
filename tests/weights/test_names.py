"""The table of tensors: strict in both directions, and its totals are those of the released models."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltaic.errors import CheckpointError
from deltaic.model.config import ModelConfig
from deltaic.model.config_file import load_config
from deltaic.weights.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from deltaic.weights.names import expected_tensors, resolve
from tiny_checkpoints import write_safetensors

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import make_checkpoint

# Published totals of the safetensors files: all parameters, of these MTP, of these vision.
TOTALS = {
    "0.8B": (873_438_784, 20_452_864, 100_592_896),
    "2B": (2_274_069_824, 60_828_160, 331_416_576),
    "4B": (4_659_865_088, 120_599_552, 333_514_240),
    "9B": (9_653_104_368, 243_290_624, 456_010_480),
    "27B": (27_781_427_952, 424_699_392, 460_730_096),
    "35B-A3B": (35_951_822_704, 844_640_768, 446_571_248),
}
IDS = {token: i for i, token in enumerate(make_checkpoint.SPECIAL_TOKENS)}


def tiny_config(
    folder: Path, shape: str = "tiny", *, vision: bool = True, mtp: bool = True, **text: Any
) -> ModelConfig:
    content = make_checkpoint.make_config(shape, None, vision, mtp, IDS)
    section = content.get("text_config", content)
    section.update({"vocab_size": 64, **text})
    (folder / "config.json").write_text(json.dumps(content))
    return load_config(folder)


def tensors_for(config: ModelConfig) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.ones(spec.shape, np.float32) for name, spec in expected_tensors(config).items()}


def check(folder: Path, config: ModelConfig, tensors: dict[str, np.ndarray[Any, Any]]) -> Any:
    write_safetensors(folder / SINGLE_FILE, tensors)
    return resolve(open_checkpoint(folder), config)


@pytest.mark.parametrize("shape", TOTALS)
def test_totals_of_the_releases(tmp_path: Path, shape: str) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(make_checkpoint.make_config(shape, None, True, True, {**IDS, "<|endoftext|>": 248044}))
    )
    table = expected_tensors(load_config(tmp_path))
    sizes = {name: math.prod(spec.shape) for name, spec in table.items()}
    mtp = [name for name in sizes if name.startswith("mtp.")]
    vision = [name for name in sizes if name.startswith("model.visual.")]
    found = (sum(sizes.values()), sum(sizes[name] for name in mtp), sum(sizes[name] for name in vision))
    assert found == TOTALS[shape]
    if shape != "35B-A3B":
        assert len(mtp) == 15
    assert ("lm_head.weight" in table) == (shape in ("9B", "27B", "35B-A3B"))


def test_exact_match(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    tensors = tensors_for(config)
    table = check(tmp_path, config, tensors)
    assert table.has_mtp
    assert len(table.tensors) == len(tensors)
    assert table.tensors["layers.3.self_attn.q_norm.weight"].shape == (32,)
    assert table.tensors["visual.pos_embed.weight"].shape == (64, 32)


def test_every_tensor_is_needed_and_its_shape_checked(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    tensors = tensors_for(config)
    assert len(tensors) > 90
    for name, array in tensors.items():
        others = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(CheckpointError, match=r"is missing from model\.safetensors") as caught:
            check(tmp_path, config, others)
        assert f"{name} {list(array.shape)} is missing" in str(caught.value)
        wrong = np.ones((*array.shape[:-1], array.shape[-1] + 1), np.float32)
        with pytest.raises(CheckpointError) as caught:
            check(tmp_path, config, {**tensors, name: wrong})
        expected = f"{name} in model.safetensors has shape {list(wrong.shape)}, expected {list(array.shape)}"
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.4.input_layernorm.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.linear_attn.conv1d.bias",
        "model.language_model.layers.0.mlp.gate_proj.weight_scale_inv",
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.input_layernorm.weight",
        "model.visual.blocks.2.norm1.weight",
        "model.visual.deepstack_merger_list.0.norm.weight",
        "mtp.layers.1.input_layernorm.weight",
        "mtp.embed_tokens.weight",
        "lm_head.bias",
        "adapter",
        "",
    ],
)
def test_unexpected_tensor(tmp_path: Path, name: str) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        check(tmp_path, config, {**tensors_for(config), name: np.ones((2, 3), np.float32)})
    assert f"{name} [2, 3] in model.safetensors is unexpected" in str(caught.value)


def test_vision_tensors_without_vision_config(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    tensors = tensors_for(config)
    for change in ({"language_model_only": True}, {"vision_config": None}):
        content = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**content, **change}))
        text_only = load_config(tmp_path)
        with pytest.raises(CheckpointError, match=r"config\.json describes no vision tower") as caught:
            check(tmp_path, text_only, tensors)
        assert "more" in str(caught.value)
        without = {name: array for name, array in tensors.items() if not name.startswith("model.visual.")}
        assert "norm.weight" in check(tmp_path, text_only, without).tensors


def test_long_lists_are_shortened(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    tensors = tensors_for(config)
    with pytest.raises(CheckpointError) as caught:
        check(tmp_path, config, {f"x.{name}": array for name, array in tensors.items()})
    message = str(caught.value)
    assert len(message) < 1500
    shown = message.count("is missing") + message.count("is unexpected")
    # Nothing of the MTP layer is there, so it is not asked for.
    expected = 2 * len(tensors) - len([name for name in tensors if name.startswith("mtp.")])
    assert f"and {expected - shown} more" in message
    assert "is missing" in message
    assert "is unexpected" in message


@pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
def test_both_prefixes_for_both_kinds(tmp_path: Path, prefix: str) -> None:
    for vision in (True, False):
        config = tiny_config(tmp_path, vision=vision)
        own = "model.language_model." if vision else "model."
        tensors = {
            prefix + name.removeprefix(own) if name.startswith(own) and "visual" not in name else name: array
            for name, array in tensors_for(config).items()
        }
        table = check(tmp_path, config, tensors)
        assert table.tensors["layers.0.linear_attn.A_log"].name == prefix + "layers.0.linear_attn.A_log"


def test_mtp_is_all_or_nothing_whatever_the_config_says(tmp_path: Path) -> None:
    with_key, without_key = tiny_config(tmp_path, mtp=True), tiny_config(tmp_path, mtp=False)
    tensors = tensors_for(with_key)
    bare = {name: array for name, array in tensors.items() if not name.startswith("mtp.")}
    for config in (with_key, without_key):
        assert check(tmp_path, config, tensors).has_mtp
        assert not check(tmp_path, config, bare).has_mtp
        with pytest.raises(CheckpointError, match=r"mtp\..* is missing"):
            check(tmp_path, config, {**bare, "mtp.norm.weight": tensors["mtp.norm.weight"]})


def test_untied_needs_a_head_and_tied_allows_one(tmp_path: Path) -> None:
    untied = tiny_config(tmp_path, vision=False, tie_word_embeddings=False)
    tied = tiny_config(tmp_path, vision=False, tie_word_embeddings=True)
    tensors = tensors_for(tied)
    head = {"lm_head.weight": np.ones((64, 64), np.float32)}
    assert "lm_head.weight" in check(tmp_path, tied, {**tensors, **head}).tensors
    assert "lm_head.weight" in check(tmp_path, untied, {**tensors, **head}).tensors
    with pytest.raises(CheckpointError, match=r"lm_head.weight \[64, 64\] is missing"):
        check(tmp_path, untied, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head.weight in model.safetensors has shape \[63, 64\]"):
        check(tmp_path, tied, {**tensors, "lm_head.weight": np.ones((63, 64), np.float32)})


SPARSE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}


def sparse(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray[Any, Any]]]:
    tiny_config(folder, vision=False)
    content = json.loads((folder / "config.json").read_text())
    content.update({**SPARSE, "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text"})
    (folder / "config.json").write_text(json.dumps(content))
    config = load_config(folder)
    return config, tensors_for(config)


def test_expert_forms_may_differ_from_layer_to_layer_but_not_within_one(tmp_path: Path) -> None:
    config, tensors = sparse(tmp_path)
    stem = "model.layers.2.mlp.experts."
    mixed = {name: array for name, array in tensors.items() if not name.startswith(stem)}
    for e in range(3):
        for name, shape in {"gate": (8, 64), "up": (8, 64), "down": (64, 8)}.items():
            mixed[f"{stem}{e}.{name}_proj.weight"] = np.ones(shape, np.float32)
    check(tmp_path, config, mixed)
    with pytest.raises(CheckpointError, match=r"experts.gate_up_proj \[3, 16, 64\] in .* is unexpected"):
        check(tmp_path, config, {**mixed, stem + "gate_up_proj": tensors[stem + "gate_up_proj"]})
    extra = {f"{stem}3.{name}": mixed[f"{stem}2.{name}"] for name in ("gate_proj.weight", "up_proj.weight")}
    with pytest.raises(CheckpointError, match=r"experts\.3\.gate_proj.* is unexpected"):
        check(tmp_path, config, {**mixed, **extra})
    del mixed[stem + "1.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj.* is missing"):
        check(tmp_path, config, mixed)


def test_messages_name_the_shard(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    tensors = tensors_for(config)
    tensors["model.visual.pos_embed.weight"] = np.ones((49, 32), np.float32)
    vision = {name: array for name, array in tensors.items() if name.startswith("model.visual.")}
    text = {name: array for name, array in tensors.items() if name not in vision}
    write_safetensors(tmp_path / "v.safetensors", vision)
    write_safetensors(tmp_path / "t.safetensors", text)
    weight_map = {**dict.fromkeys(vision, "v.safetensors"), **dict.fromkeys(text, "t.safetensors")}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"pos_embed.weight in v.safetensors has shape \[49, 32\], expected \[64"):
        resolve(open_checkpoint(tmp_path), config)
