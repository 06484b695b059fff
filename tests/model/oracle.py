"""Random transformers models to compare with, and their weights and configurations in deltaic's form.

Every parameter is random, norms, biases, A_log and dt_bias included: a weight left at 0 or 1 would hide a missing term.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from deltaic.model.config import ModelConfig
from deltaic.model.config_file import load_config
from deltaic.model.state import State
from deltaic.model.text import TextModel
from deltaic.model.vision import VisionModel
from deltaic.weights.build import open_source, text_weights, vision_weights
from deltaic.weights.checkpoint import Checkpoint, open_checkpoint
from deltaic.weights.precision import Precision
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


@torch.no_grad()
def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a text model with all matrices rounded to bfloat16, as `dtype="bf16"` packs them."""
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if p.ndim >= 2 and not name.endswith("conv1d.weight"):
            p.copy_(p.bfloat16())
    return model


@torch.no_grad()
def torch_logits(model: torch.nn.Module, ids: np.ndarray, **inputs: torch.Tensor) -> np.ndarray:
    """Logits [T, vocab] of one sequence in one forward pass."""
    return model(input_ids=torch.from_numpy(ids)[None], use_cache=False, **inputs).logits[0].numpy()


# the deltaic side


def exact(dtype: str) -> Precision:
    """Matrices in `dtype`, activations unrounded: what is compared is the mathematics."""
    return Precision.parse(dtype, activations="float32")


def build_text(model: torch.nn.Module, ops: ModuleType, dtype: str = "f32") -> TextModel:
    """The same decoder on an op set, through a checkpoint as transformers saves it."""
    with saved(model) as (config, checkpoint):
        source = open_source(checkpoint, config, ops, exact(dtype))
        return TextModel(config.text, text_weights(source, config, False), ops)


def build_vision(model: torch.nn.Module, ops: ModuleType, dtype: str = "f32") -> VisionModel:
    """The same vision tower on an op set, through a checkpoint as transformers saves it."""
    with saved(model) as (config, checkpoint):
        source = open_source(checkpoint, config, ops, exact(dtype))
        return VisionModel(config.vision, vision_weights(source, config, False), ops)


@contextmanager
def saved(model: torch.nn.Module) -> Iterator[tuple[ModelConfig, Checkpoint]]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield load_config(Path(folder)), open_checkpoint(folder)


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
