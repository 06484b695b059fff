"""Random transformers models to compare with, and their weights and configurations in deltaic's form.

Every parameter is random, norms, biases, A_log and dt_bias included: a weight left at 0 or 1 would hide a missing term.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from deltaic.model.config import RopeConfig, TextConfig, VisionConfig
from deltaic.model.state import State
from deltaic.model.text import TextModel
from deltaic.model.vision import VisionModel
from deltaic.model.weights import (
    AttentionMixer,
    DeltaMixer,
    DenseFFN,
    Layer,
    SparseFFN,
    TextWeights,
    VisionBlock,
    VisionWeights,
)
from transformers import (
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)

torch.set_num_threads(1)

LINEAR, FULL = "linear_attention", "full_attention"
IMAGE_TOKEN = 90
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the plainest formulas on the torch side

# Widths are not multiples of 16, head counts not powers of two, key width != value width wherever the model allows it.
DENSE = {
    "vocab_size": 97, "hidden_size": 42, "intermediate_size": 70, "layer_types": [LINEAR, LINEAR, LINEAR, FULL],
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                        "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
ODD_HEADS = DENSE | {
    "hidden_size": 50, "layer_types": [FULL, LINEAR, LINEAR, FULL, LINEAR], "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 24, "linear_num_key_heads": 3, "linear_num_value_heads": 6,
    "linear_key_head_dim": 12, "linear_value_head_dim": 20, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
                        "mrope_section": [2, 2, 2], "mrope_interleaved": True},
}  # fmt: skip
MOE = {k: v for k, v in ODD_HEADS.items() if k != "intermediate_size"} | {
    "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 26, "shared_expert_intermediate_size": 18,
}  # fmt: skip
YARN = DENSE | {
    "rope_parameters": DENSE["rope_parameters"]
    | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
}
TEXT_MODELS = {"dense": DENSE, "odd_heads": ODD_HEADS, "moe": MOE, "yarn": YARN}
VISION = {
    "depth": 3, "hidden_size": 24, "num_heads": 2, "intermediate_size": 44, "patch_size": 16, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "num_position_embeddings": 49, "in_channels": 3,
}  # fmt: skip


def max_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over largest expected value."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# ------------------------------------------------------------------------------------------------------- the torch side


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw every parameter: embeddings N(0, 1), norms around their neutral value, matrices 0.5 / sqrt(fan-in), the rest
    N(0, 0.5). With matrices twice as large the model is chaotic: rounding its weights to bfloat16 moves logits by 10 %.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        values = torch.randn(p.shape, generator=generator)
        if name.endswith(("embed_tokens.weight", "pos_embed.weight")):
            scale, shift = 1.0, 0.0
        elif name.endswith("linear_attn.norm.weight") or (".visual." in name and "norm" in name and p.ndim == 1):
            scale, shift = 0.3, 1.0
        elif name.endswith("patch_embed.proj.weight"):
            scale, shift = 0.5 * p[0].numel() ** -0.5, 0.0
        elif p.ndim >= 2 and "conv1d" not in name:
            scale, shift = 0.5 * p.shape[-1] ** -0.5, 0.0
        else:
            scale, shift = 0.5, 0.0
        p.copy_(values * scale + shift)
        assert not ((p == 0) | (p == 1)).any(), name
    return model.float().eval()


def torch_text_model(fields: dict, seed: int = 0) -> torch.nn.Module:
    """A random Qwen3_5ForCausalLM, or its MoE sibling where `fields` has experts."""
    fields = fields | {"num_hidden_layers": len(fields["layer_types"])}
    if "num_experts" in fields:
        config, cls = Qwen3_5MoeTextConfig(**fields), Qwen3_5MoeForCausalLM
    else:
        config, cls = Qwen3_5TextConfig(**fields), Qwen3_5ForCausalLM
    return randomise(cls._from_config(config, **EAGER), seed)


def torch_vision_model(fields: dict, seed: int = 0) -> torch.nn.Module:
    """A random Qwen3_5ForConditionalGeneration, or its MoE sibling where `fields` (of the text model) has experts."""
    fields = fields | {"num_hidden_layers": len(fields["layer_types"])}
    is_moe = "num_experts" in fields
    config = (Qwen3_5MoeConfig if is_moe else Qwen3_5Config)(
        text_config=fields,
        vision_config=VISION | {"out_hidden_size": fields["hidden_size"]},
        image_token_id=IMAGE_TOKEN,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=fields["tie_word_embeddings"],
    )
    cls = Qwen3_5MoeForConditionalGeneration if is_moe else Qwen3_5ForConditionalGeneration
    return randomise(cls._from_config(config, **EAGER), seed)


KEPT_IN_F32 = ("conv1d.weight", "in_proj_b.weight", "in_proj_a.weight", "mlp.gate.weight", "shared_expert_gate.weight")


@torch.no_grad()
def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a text model whose matrices are rounded to bfloat16, those apart that `text_weights` keeps in float32."""
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if p.ndim >= 2 and not name.endswith(KEPT_IN_F32):
            p.copy_(p.bfloat16())
    return model


@torch.no_grad()
def torch_logits(model: torch.nn.Module, ids: np.ndarray, **inputs: torch.Tensor) -> np.ndarray:
    """Logits [T, vocab] of one sequence in one forward pass."""
    return model(input_ids=torch.from_numpy(ids)[None], use_cache=False, **inputs).logits[0].numpy()


# the deltaic side


def text_config(hf: Qwen3_5TextConfig | Qwen3_5MoeTextConfig) -> TextConfig:
    """The same configuration in deltaic's dataclass."""
    rope, is_moe = hf.rope_parameters, hasattr(hf, "num_experts")
    same = [
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
        "linear_conv_kernel_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
    ]  # fmt: skip
    sparse = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]
    return TextConfig(
        **{name: getattr(hf, name) for name in same},
        **{name: getattr(hf, name) if is_moe else 0 for name in sparse},
        intermediate_size=0 if is_moe else hf.intermediate_size,
        layer_types=tuple(hf.layer_types),
        rope=RopeConfig(
            theta=rope["rope_theta"],
            rotary_dim=int(hf.head_dim * rope["partial_rotary_factor"]),
            mrope_section=tuple(rope["mrope_section"]),
            rope_type=rope["rope_type"],
            factor=rope.get("factor", 1.0),
            original_max_position_embeddings=rope.get("original_max_position_embeddings", 0),
            attention_factor=rope.get("attention_factor"),
        ),
        mtp_num_hidden_layers=0,
    )


def vision_config(hf: object) -> VisionConfig:
    """The same configuration in deltaic's dataclass."""
    return VisionConfig(**{name: getattr(hf, name) for name in VisionConfig.__dataclass_fields__})


class Tensors:
    """A state dict as float32 numpy arrays, looked up below a prefix."""

    def __init__(self, state_dict: dict[str, torch.Tensor], prefix: str = ""):
        self.state_dict, self.prefix = state_dict, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        return self.state_dict[self.prefix + name].detach().float().numpy().copy()

    def below(self, prefix: str) -> Tensors:
        return Tensors(self.state_dict, self.prefix + prefix)


def text_weights(model: torch.nn.Module, config: TextConfig, ops: ModuleType, dtype: str = "f32") -> TextWeights:
    """Pack the decoder. Gates of the delta rule, the router and the shared expert's gate stay in float32."""
    state_dict = model.state_dict()
    inner = "model.language_model." if hasattr(model.model, "language_model") else "model."
    t = Tensors(state_dict, inner)
    layers = []
    for i, kind in enumerate(config.layer_types):
        w = t.below(f"layers.{i}.")
        mixer = _delta(w.below("linear_attn."), ops, dtype) if kind == LINEAR else _attention(w, ops, dtype)
        ffn = (_sparse if config.is_moe else _dense)(w.below("mlp."), ops, dtype)
        layers.append(Layer(w["input_layernorm.weight"], mixer, w["post_attention_layernorm.weight"], ffn))
    embed = ops.pack([t["embed_tokens.weight"]], dtype)
    tied = config.tie_word_embeddings
    head = embed if tied else ops.pack([Tensors(state_dict)["lm_head.weight"]], dtype)
    return TextWeights(embed, layers, t["norm.weight"], head)


def _delta(w: Tensors, ops: ModuleType, dtype: str) -> DeltaMixer:
    parts = [w[f"in_proj_{name}.weight"] for name in ("qkv", "z", "b", "a")]
    return DeltaMixer(
        in_proj=ops.pack(parts, [dtype, dtype, "f32", "f32"]),
        conv_weight=np.ascontiguousarray(w["conv1d.weight"][:, 0].T),
        A_log=w["A_log"],
        dt_bias=w["dt_bias"],
        norm=w["norm.weight"],
        out_proj=ops.pack([w["out_proj.weight"]], dtype),
    )


def _attention(w: Tensors, ops: ModuleType, dtype: str) -> AttentionMixer:
    w = w.below("self_attn.")
    qkv = ops.pack([w[f"{name}_proj.weight"] for name in "qkv"], dtype)
    return AttentionMixer(qkv, w["q_norm.weight"], w["k_norm.weight"], ops.pack([w["o_proj.weight"]], dtype))


def _dense(w: Tensors, ops: ModuleType, dtype: str) -> DenseFFN:
    gate_up = ops.pack_glu(w["gate_proj.weight"], w["up_proj.weight"], dtype)
    return DenseFFN(gate_up, ops.pack([w["down_proj.weight"]], dtype))


def _sparse(w: Tensors, ops: ModuleType, dtype: str) -> SparseFFN:
    gate, up = (np.ascontiguousarray(x) for x in np.split(w["experts.gate_up_proj"], 2, axis=1))
    shared = w.below("shared_expert.")
    return SparseFFN(
        router=ops.pack([w["gate.weight"]], "f32"),
        gate_up=ops.pack_glu(gate, up, dtype),
        down=ops.pack([w["experts.down_proj"]], dtype),
        shared_gate_up=ops.pack_glu(shared["gate_proj.weight"], shared["up_proj.weight"], dtype),
        shared_down=ops.pack([shared["down_proj.weight"]], dtype),
        shared_gate=ops.pack([w["shared_expert_gate.weight"]], "f32"),
    )


def vision_weights(model: torch.nn.Module, config: VisionConfig, ops: ModuleType, dtype: str = "f32") -> VisionWeights:
    """Pack the vision tower; the two temporal slices of the patch projection are added."""
    t = Tensors(model.state_dict(), "model.visual.")

    def linear(w: Tensors, name: str) -> tuple[object, np.ndarray]:
        return ops.pack([w[name + ".weight"]], dtype), w[name + ".bias"]

    blocks = []
    for i in range(config.depth):
        w = t.below(f"blocks.{i}.")
        norms = [(w[f"norm{n}.weight"], w[f"norm{n}.bias"]) for n in (1, 2)]
        attention = (*linear(w, "attn.qkv"), *linear(w, "attn.proj"))
        mlp = (*linear(w, "mlp.linear_fc1"), *linear(w, "mlp.linear_fc2"))
        blocks.append(VisionBlock(*norms[0], *attention, *norms[1], *mlp))
    patch = t["patch_embed.proj.weight"].sum(axis=2).reshape(config.hidden_size, -1)
    merger = t.below("merger.")
    return VisionWeights(
        ops.pack([patch], dtype),
        t["patch_embed.proj.bias"],
        t["pos_embed.weight"],
        blocks,
        merger["norm.weight"],
        merger["norm.bias"],
        *linear(merger, "linear_fc1"),
        *linear(merger, "linear_fc2"),
    )


def build_text(model: torch.nn.Module, ops: ModuleType, dtype: str = "f32") -> TextModel:
    config = text_config(model.config.get_text_config())
    return TextModel(config, text_weights(model, config, ops, dtype), ops)


def build_vision(model: torch.nn.Module, ops: ModuleType, dtype: str = "f32") -> VisionModel:
    config = vision_config(model.config.vision_config)
    return VisionModel(config, vision_weights(model, config, ops, dtype), ops)


def text_positions(first: int, count: int) -> np.ndarray:
    """Positions [T, 3] of plain text: the same on all axes."""
    return np.repeat(np.arange(first, first + count, dtype=np.int64)[:, None], 3, axis=1)


def feed(model: TextModel, state: State, ids: np.ndarray) -> np.ndarray:
    """Consume text tokens with one state; logits [T, vocab]."""
    positions = text_positions(state.length, len(ids))
    cu_seqlens = np.array([0, len(ids)], np.int64)
    return model.logits(model.forward(model.embed(ids), positions, [state], cu_seqlens))


# --------------------------------------------------------------------------------------------------------------- images


@dataclass
class Picture:
    """What `VisionModel` reads of an image, with the statistics of the released checkpoints."""

    pixels: np.ndarray
    grid: tuple[int, int, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


def random_picture(rng: np.random.Generator, grid_h: int, grid_w: int) -> Picture:
    pixels = rng.integers(0, 256, (grid_h * 16, grid_w * 16, 3), dtype=np.uint8)
    return Picture(pixels, (1, grid_h, grid_w))


def torch_pixels(pictures: list[Picture]) -> dict[str, torch.Tensor]:
    """`pixel_values` and `image_grid_thw` as transformers' own processor makes them (without resizing)."""
    processor = Qwen2VLImageProcessorPil(
        do_resize=False, patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return dict(processor([p.pixels for p in pictures], return_tensors="pt", input_data_format="channels_last"))


def picture_tokens(picture: Picture) -> int:
    return math.prod(picture.grid) // 4
