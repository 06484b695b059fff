"""From files to packed weights: every number arrives where the model expects it, in the format that was asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltaic.errors import ArgumentError, CheckpointError
from deltaic.model.config import ModelConfig
from deltaic.model.config_file import load_config
from deltaic.model.weights import DeltaMixer, SparseFFN, weight_bytes
from deltaic.weights.build import mtp_weights, text_weights, vision_weights
from deltaic.weights.checkpoint import Checkpoint, open_checkpoint
from deltaic.weights.precision import Precision
from tiny_checkpoints import CLASSES, FakeOps, build, mtp_tensors, random_model, save_state, split_experts

SWIGLU = ("gate_proj.weight", "up_proj.weight")


def load(folder: Path) -> tuple[Checkpoint, ModelConfig]:
    return open_checkpoint(folder), load_config(folder)


def numbers(state: dict[str, Any], name: str) -> np.ndarray[Any, Any]:
    return state[name].detach().float().numpy()


def rounded(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import ml_dtypes

    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def check_layer(layer: Any, state: dict[str, Any], prefix: str, matrix: Any) -> None:
    """Compare one built layer with transformers' (fused) state; `matrix` is the rounding of packed matrices."""
    vectors = {"input_norm": "input_layernorm.weight", "post_norm": "post_attention_layernorm.weight"}
    for field, name in vectors.items():
        np.testing.assert_array_equal(getattr(layer, field), numbers(state, prefix + name))
    mixer = layer.mixer
    if isinstance(mixer, DeltaMixer):
        stem = prefix + "linear_attn."
        rows = [numbers(state, f"{stem}in_proj_{part}.weight") for part in ("qkv", "z", "b", "a")]
        np.testing.assert_array_equal(mixer.in_proj.values, matrix(np.concatenate(rows)))
        conv = numbers(state, stem + "conv1d.weight")
        assert mixer.conv_weight.shape == (4, conv.shape[0])
        for tap in range(4):
            np.testing.assert_array_equal(mixer.conv_weight[tap], conv[:, 0, tap])
        for field, name in {"A_log": "A_log", "dt_bias": "dt_bias", "norm": "norm.weight"}.items():
            np.testing.assert_array_equal(getattr(mixer, field), numbers(state, stem + name))
        arrays = [mixer.conv_weight, mixer.A_log, mixer.dt_bias, mixer.norm]
        np.testing.assert_array_equal(mixer.out_proj.values, matrix(numbers(state, stem + "out_proj.weight")))
    else:
        stem = prefix + "self_attn."
        rows = [numbers(state, f"{stem}{part}_proj.weight") for part in ("q", "k", "v")]
        np.testing.assert_array_equal(mixer.qkv_proj.values, matrix(np.concatenate(rows)))
        np.testing.assert_array_equal(mixer.q_norm, numbers(state, stem + "q_norm.weight"))
        np.testing.assert_array_equal(mixer.k_norm, numbers(state, stem + "k_norm.weight"))
        arrays = [mixer.q_norm, mixer.k_norm]
        np.testing.assert_array_equal(mixer.o_proj.values, matrix(numbers(state, stem + "o_proj.weight")))
    for array in [*arrays, layer.input_norm, layer.post_norm]:
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.flags.owndata  # not a view that would keep the mapping's pages
    stem, ffn = prefix + "mlp.", layer.ffn
    if isinstance(ffn, SparseFFN):
        np.testing.assert_array_equal(ffn.router.values, matrix(numbers(state, stem + "gate.weight")))
        np.testing.assert_array_equal(ffn.gate_up.values, matrix(numbers(state, stem + "experts.gate_up_proj")))
        np.testing.assert_array_equal(ffn.down.values, matrix(numbers(state, stem + "experts.down_proj")))
        np.testing.assert_array_equal(
            ffn.shared_gate.values, matrix(numbers(state, stem + "shared_expert_gate.weight"))
        )
        gate_up, down, stem = ffn.shared_gate_up, ffn.shared_down, stem + "shared_expert."
    else:
        gate_up, down = ffn.gate_up, ffn.down
    np.testing.assert_array_equal(
        gate_up.values, matrix(np.concatenate([numbers(state, stem + name) for name in SWIGLU]))
    )
    np.testing.assert_array_equal(down.values, matrix(numbers(state, stem + "down_proj.weight")))


def check_vision(vision: Any, state: dict[str, Any], matrix: Any) -> None:
    stem = "model.visual."
    patch = numbers(state, stem + "patch_embed.proj.weight")
    width = patch.shape[0]
    expected = np.stack([(patch[i, :, 0] + patch[i, :, 1]).ravel() for i in range(width)])
    np.testing.assert_array_equal(vision.patch.values, expected)
    assert vision.patch.formats == ["f32"]
    np.testing.assert_array_equal(vision.pos_embed, numbers(state, stem + "pos_embed.weight"))
    np.testing.assert_array_equal(vision.patch_b, numbers(state, stem + "patch_embed.proj.bias"))
    np.testing.assert_array_equal(vision.merger_norm_w, numbers(state, stem + "merger.norm.weight"))
    np.testing.assert_array_equal(vision.merger_norm_b, numbers(state, stem + "merger.norm.bias"))
    pairs = [(vision, "fc1", "merger.linear_fc1"), (vision, "fc2", "merger.linear_fc2")]
    for i, block in enumerate(vision.blocks):
        prefix = f"blocks.{i}."
        pairs += [(block, "qkv", prefix + "attn.qkv"), (block, "proj", prefix + "attn.proj")]
        pairs += [(block, "fc1", prefix + "mlp.linear_fc1"), (block, "fc2", prefix + "mlp.linear_fc2")]
        for norm in ("norm1", "norm2"):
            np.testing.assert_array_equal(getattr(block, norm + "_w"), numbers(state, f"{stem}{prefix}{norm}.weight"))
            np.testing.assert_array_equal(getattr(block, norm + "_b"), numbers(state, f"{stem}{prefix}{norm}.bias"))
    for owner, field, name in pairs:
        np.testing.assert_array_equal(getattr(owner, field).values, matrix(numbers(state, f"{stem}{name}.weight")))
        np.testing.assert_array_equal(getattr(owner, field + "_b"), numbers(state, f"{stem}{name}.bias"))
    assert len(vision.blocks) == 2


def check_text(text: Any, state: dict[str, Any], matrix: Any, tied: bool) -> None:
    prefix = "model.language_model." if "model.language_model.norm.weight" in state else "model."
    embedding = numbers(state, prefix + "embed_tokens.weight")
    np.testing.assert_array_equal(text.embed.values, matrix(embedding))
    if tied:
        assert text.head is text.embed
    else:
        np.testing.assert_array_equal(text.head.values, matrix(numbers(state, "lm_head.weight")))
    np.testing.assert_array_equal(text.norm, numbers(state, prefix + "norm.weight"))
    assert len(text.layers) == 4
    for i, layer in enumerate(text.layers):
        check_layer(layer, state, f"{prefix}layers.{i}.", matrix)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("class_name", CLASSES)
def test_what_transformers_saves(tmp_path: Path, class_name: str, tied: bool, sharded: bool) -> None:
    """All four classes. transformers writes experts one by one; here the files are compared with its fused state."""
    model = random_model(class_name, tied=tied)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if sharded else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == sharded
    checkpoint, config = load(tmp_path)
    state = model.state_dict()
    check_text(build(text_weights, checkpoint, config, FakeOps(), "bf16"), state, rounded, tied)
    if config.vision is None:
        with pytest.raises(ArgumentError, match="no vision tower"):
            build(vision_weights, checkpoint, config, FakeOps(), "bf16")
    else:
        check_vision(build(vision_weights, checkpoint, config, FakeOps(), "bf16"), state, rounded)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_float32_checkpoint(tmp_path: Path, dtype: str) -> None:
    model = random_model("Qwen3_5MoeForConditionalGeneration", bfloat16=False)
    model.save_pretrained(tmp_path)
    checkpoint, config = load(tmp_path)
    matrix = rounded if dtype == "bf16" else lambda array: array
    text = build(text_weights, checkpoint, config, FakeOps(), dtype)
    check_text(text, model.state_dict(), matrix, tied=False)
    check_vision(build(vision_weights, checkpoint, config, FakeOps(), dtype), model.state_dict(), matrix)
    assert text.layers[0].mixer.in_proj.formats == [dtype] * 4


def test_float16_checkpoint(tmp_path: Path) -> None:
    model = random_model("Qwen3_5ForCausalLM", bfloat16=False).half()
    model.save_pretrained(tmp_path)
    checkpoint, config = load(tmp_path)
    text = build(text_weights, checkpoint, config, FakeOps(), "f32")
    check_text(text, model.state_dict(), lambda array: array, tied=False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("per_expert", [False, True], ids=["fused", "per_expert"])
@pytest.mark.parametrize("class_name", CLASSES)
def test_both_expert_forms_mtp_and_stored_tied_head(
    tmp_path: Path, class_name: str, per_expert: bool, tied: bool
) -> None:
    model = random_model(class_name, tied=tied)
    fused = dict(model.state_dict())
    stored = split_experts(fused) if per_expert else fused
    text_config = model.config.get_text_config()
    mtp = mtp_tensors(text_config, per_expert=not per_expert)  # the other form, as some releases have it
    save_state(tmp_path, model, {**stored, **mtp})
    checkpoint, config = load(tmp_path)
    assert ("lm_head.weight" in checkpoint.tensors) == (not tied or "lm_head.weight" in fused)
    check_text(build(text_weights, checkpoint, config, FakeOps(), "bf16"), fused, rounded, tied)
    built = build(mtp_weights, checkpoint, config, FakeOps(), "bf16")
    state = mtp_tensors(text_config, per_expert=False) if "Moe" not in class_name else fuse(mtp)
    check_layer(built.layer, state, "mtp.layers.0.", rounded)
    np.testing.assert_array_equal(built.fc.values, numbers(mtp, "mtp.fc.weight"))
    np.testing.assert_array_equal(built.embedding_norm, numbers(mtp, "mtp.pre_fc_norm_embedding.weight"))
    np.testing.assert_array_equal(built.hidden_norm, numbers(mtp, "mtp.pre_fc_norm_hidden.weight"))
    np.testing.assert_array_equal(built.norm, numbers(mtp, "mtp.norm.weight"))


def fuse(state: dict[str, Any]) -> dict[str, Any]:
    """The MTP experts in fused form, whichever form they are in."""
    import torch

    stem = "mtp.layers.0.mlp.experts."
    if stem + "down_proj" in state:
        return state
    experts = range(len([name for name in state if name.startswith(stem) and name.endswith("down_proj.weight")]))
    halves = [torch.cat([state[f"{stem}{e}.{name}"] for name in SWIGLU]) for e in experts]
    downs = [state[f"{stem}{e}.down_proj.weight"] for e in experts]
    return {**state, stem + "gate_up_proj": torch.stack(halves), stem + "down_proj": torch.stack(downs)}


def test_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    model = random_model("Qwen3_5ForCausalLM", tied=True)
    state = dict(model.state_dict())
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_state(tmp_path, model, state)
    checkpoint, config = load(tmp_path)
    text = build(text_weights, checkpoint, config, FakeOps(), "bf16")
    assert text.head is text.embed
    state["lm_head.weight"][-1, -1] += 1
    save_state(tmp_path, model, state)
    checkpoint, config = load(tmp_path)
    with pytest.raises(CheckpointError, match="differs from embed_tokens"):
        build(text_weights, checkpoint, config, FakeOps(), "bf16")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].float()
    save_state(tmp_path, model, state)
    checkpoint, config = load(tmp_path)
    with pytest.raises(CheckpointError, match="differs from embed_tokens"):
        build(text_weights, checkpoint, config, FakeOps(), "bf16")


def test_arguments_are_refused_before_work(tmp_path: Path) -> None:
    random_model("Qwen3_5ForCausalLM").save_pretrained(tmp_path)
    checkpoint, config = load(tmp_path)
    with pytest.raises(ArgumentError, match="'int4'"):
        build(text_weights, checkpoint, config, object(), "int5")
    with pytest.raises(ArgumentError, match="matches no tensor"):
        build(text_weights, checkpoint, config, object(), Precision.parse({"layers.4.*": "int8"}))
    with pytest.raises(CheckpointError, match="multi-token-prediction"):
        build(mtp_weights, checkpoint, config, FakeOps(), "bf16")


def test_running_out_of_memory_is_said(tmp_path: Path) -> None:
    class NoMemory(FakeOps):
        def pack(self, parts: Any, dtype: Any) -> Any:
            raise MemoryError

    random_model("Qwen3_5ForCausalLM").save_pretrained(tmp_path)
    checkpoint, config = load(tmp_path)
    with pytest.raises(CheckpointError, match=r"not enough memory to pack model\.embed_tokens\.weight"):
        build(text_weights, checkpoint, config, NoMemory(), "bf16")


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_model("Qwen3_5ForConditionalGeneration", tied=True).save_pretrained(tmp_path)
    checkpoint, config = load(tmp_path)
    capsys.readouterr()
    build(text_weights, checkpoint, config, FakeOps(), "bf16")  # stderr is no terminal here
    build(text_weights, checkpoint, config, FakeOps(), "bf16", progress=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    build(text_weights, checkpoint, config, FakeOps(), "bf16", progress=True)
    build(vision_weights, checkpoint, config, FakeOps(), "bf16", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Packing the text model: 100%" in captured.err
    assert "Packing the vision tower: 100%" in captured.err


def test_weight_bytes_counts_a_tied_head_once(tmp_path: Path) -> None:
    sizes = {}
    for tied in (False, True):
        model = random_model("Qwen3_5ForCausalLM", tied=tied)
        model.save_pretrained(tmp_path)
        checkpoint, config = load(tmp_path)
        sizes[tied] = weight_bytes(build(text_weights, checkpoint, config, FakeOps(), "f32"))
    head = 4 * config.text.vocab_size * config.text.hidden_size
    assert sizes[False] - sizes[True] == head
    assert sizes[True] == sum(4 * parameter.numel() for parameter in model.parameters())


PEAK_MEMORY = """
import resource, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from tiny_checkpoints import FakeOps, build, write_safetensors
from deltaic.model.config_file import load_config
from deltaic.model.weights import weight_bytes
from deltaic.weights.build import text_weights
from deltaic.weights.checkpoint import open_checkpoint

class Weight:
    formats = ["f32"]
    def __init__(self, parts): self.values = [np.array(part, dtype="V2") for part in parts]
    nbytes = property(lambda self: sum(value.nbytes for value in self.values))

class Ops:  # keeps a copy of the 16 bits of every number, as a packed bfloat16 matrix does
    def pack(self, parts, dtype): return Weight([part.view("V2") for part in parts])
    def pack_glu(self, gate, up, dtype): return Weight([gate.view("V2"), up.view("V2")])

folder = sys.argv[1]
import ml_dtypes, tqdm
checkpoint, config = open_checkpoint(folder), load_config(folder)
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
before = peak()
weights = build(text_weights, checkpoint, config, Ops(), "bf16")
print((peak() - before) / weight_bytes(weights), weight_bytes(weights))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("per_expert", [False, True], ids=["fused", "per_expert"])
def test_peak_memory(tmp_path: Path, per_expert: bool) -> None:
    """Peak resident memory while loading is at most 15 % above what stays, mapped pages of the files included."""
    import torch
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeForCausalLM

    sizes = {"vocab_size": 16384, "hidden_size": 256, "num_hidden_layers": 12, "moe_intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 64}
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [3, 3, 2]}
    config = Qwen3_5MoeTextConfig(
        **sizes, **heads, rope_parameters=rope, linear_num_key_heads=2, linear_num_value_heads=4
    )
    with torch.device("meta"):
        model = Qwen3_5MoeForCausalLM(config)
    state = {name: torch.full(tensor.shape, 0.5, dtype=torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_state(tmp_path, model, split_experts(state) if per_expert else state)
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ratio, kept = map(float, done.stdout.split())
    assert kept > 150e6
    assert ratio <= 1.15, f"peak is {ratio:.3f} of the {kept / 1e6:.0f} MB that stay"
