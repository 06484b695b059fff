"""Tiny random checkpoints for the tests of loading: written by transformers, or byte by byte."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from deltaic.weights.build import open_source

TEXT = {
    "vocab_size": 160,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
DENSE = {**TEXT, "intermediate_size": 40}
SPARSE = {
    **TEXT,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 44,
    "out_hidden_size": 48,
    "num_position_embeddings": 36,
}
TOKEN_IDS = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
CLASSES = (
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
)


def random_model(class_name: str, *, tied: bool = False, bfloat16: bool = True) -> Any:
    """A transformers model of that class in which every parameter is random."""
    import torch
    from transformers.models.qwen3_5 import configuration_qwen3_5, modeling_qwen3_5
    from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe, modeling_qwen3_5_moe

    moe, multimodal = "Moe" in class_name, class_name.endswith("ConditionalGeneration")
    configurations = configuration_qwen3_5_moe if moe else configuration_qwen3_5
    stem = "Qwen3_5Moe" if moe else "Qwen3_5"
    text = {**(SPARSE if moe else DENSE), "tie_word_embeddings": tied}
    if multimodal:
        make = getattr(configurations, stem + "Config")
        config = make(text_config=text, vision_config=VISION, tie_word_embeddings=tied, **TOKEN_IDS)
    else:
        config = getattr(configurations, stem + "TextConfig")(**text)
    torch.manual_seed(7)
    model = getattr(modeling_qwen3_5_moe if moe else modeling_qwen3_5, class_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.to(torch.bfloat16) if bfloat16 else model


def mtp_tensors(config: Any, per_expert: bool) -> dict[str, Any]:
    """Random mtp.* tensors for a transformers text config (transformers itself has no MTP layer)."""
    import torch

    H, head, heads, kv = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {
        "pre_fc_norm_embedding.weight": (H,),
        "pre_fc_norm_hidden.weight": (H,),
        "fc.weight": (H, 2 * H),
        "norm.weight": (H,),
        "layers.0.input_layernorm.weight": (H,),
        "layers.0.post_attention_layernorm.weight": (H,),
        "layers.0.self_attn.q_proj.weight": (2 * heads * head, H),
        "layers.0.self_attn.k_proj.weight": (kv * head, H),
        "layers.0.self_attn.v_proj.weight": (kv * head, H),
        "layers.0.self_attn.o_proj.weight": (H, heads * head),
        "layers.0.self_attn.q_norm.weight": (head,),
        "layers.0.self_attn.k_norm.weight": (head,),
    }
    if hasattr(config, "num_experts"):
        E, width, shared = config.num_experts, config.moe_intermediate_size, config.shared_expert_intermediate_size
        mlp = "layers.0.mlp."
        shapes[mlp + "gate.weight"] = (E, H)
        shapes[mlp + "shared_expert_gate.weight"] = (1, H)
        for prefix, size in [(mlp + "shared_expert.", shared)] + [
            (f"{mlp}experts.{e}.", width) for e in range(E if per_expert else 0)
        ]:
            shapes.update(swiglu_shapes(prefix, size, H))
        if not per_expert:
            shapes[mlp + "experts.gate_up_proj"] = (E, 2 * width, H)
            shapes[mlp + "experts.down_proj"] = (E, H, width)
    else:
        shapes.update(swiglu_shapes("layers.0.mlp.", config.intermediate_size, H))
    torch.manual_seed(8)
    return {"mtp." + name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}


def swiglu_shapes(prefix: str, width: int, H: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj.weight": (width, H),
        prefix + "up_proj.weight": (width, H),
        prefix + "down_proj.weight": (H, width),
    }


def split_experts(state: dict[str, Any]) -> dict[str, Any]:
    """Fused expert tensors -> one tensor per expert and projection."""
    result = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            half = tensor.shape[1] // 2
            for e in range(tensor.shape[0]):
                stem = name.removesuffix("gate_up_proj")
                result[f"{stem}{e}.gate_proj.weight"] = tensor[e, :half].contiguous()
                result[f"{stem}{e}.up_proj.weight"] = tensor[e, half:].contiguous()
        elif name.endswith("experts.down_proj"):
            for e in range(tensor.shape[0]):
                result[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = tensor[e].contiguous()
        else:
            result[name] = tensor
    return result


def save_state(folder: Path, model: Any, state: dict[str, Any]) -> None:
    """config.json of `model`, and `state` as one safetensors file."""
    from safetensors.torch import save_file

    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file({name: tensor.detach().clone() for name, tensor in state.items()}, folder / "model.safetensors")


def write_safetensors(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """A file of float32 tensors, without the safetensors library."""
    header: dict[str, Any] = {}
    position = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    write_raw(path, header, b"".join(array.tobytes() for array in tensors.values()))


def write_raw(path: Path, header: Any, data: bytes, *, length: int | None = None) -> None:
    """A file with that header (an object, or bytes as they are) and data; `length` lies about the header's length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


@dataclass
class FakeWeight:
    """What FakeOps packs: the values as float32, and the format of each part."""

    values: np.ndarray[Any, Any]
    formats: list[str]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> str:
        return self.formats[0]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


class FakeOps:
    """An op set that packs by concatenation, rounding each part to its format."""

    def pack(self, parts: list[np.ndarray[Any, Any]], dtype: str | list[str]) -> FakeWeight:
        formats = [dtype] * len(parts) if isinstance(dtype, str) else list(dtype)
        assert len(formats) == len(parts)
        rounded = [self._round(part, name) for part, name in zip(parts, formats, strict=True)]
        return FakeWeight(np.concatenate(rounded, axis=-2), formats)

    def pack_glu(self, gate: np.ndarray[Any, Any], up: np.ndarray[Any, Any], dtype: str) -> FakeWeight:
        assert gate.shape == up.shape
        return self.pack([gate, up], dtype)

    @staticmethod
    def _round(part: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
        import ml_dtypes

        assert name in ("f32", "bf16")
        assert part.dtype in (np.float32, ml_dtypes.bfloat16), part.dtype
        assert part.ndim in (2, 3)
        return part.astype(ml_dtypes.bfloat16).astype(np.float32) if name == "bf16" else part.astype(np.float32)


def build(part: Any, weights: Any, config: Any, ops: Any, precision: Any = "bf16", progress: bool | None = None) -> Any:
    """The weights of a part (a function of deltaic.weights.build) of a checkpoint or a packed file."""
    return part(open_source(weights, config, ops, precision), config, progress)
