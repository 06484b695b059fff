"""What does config.json say about the model? Every value is checked for type, range and consistency before anything is
allocated; what is not supported is refused by name."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from ..fileio import read_json_object
from .config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, RopeConfig, TextConfig, VisionConfig
from .json_section import MISSING, Section, show

# architecture -> (sparse experts, may carry a vision tower, accepted model_type values)
_ARCHITECTURES: dict[str, tuple[bool, bool, tuple[str, ...]]] = {
    "Qwen3_5ForCausalLM": (False, False, ("qwen3_5_text", "qwen3_5")),
    "Qwen3_5ForConditionalGeneration": (False, True, ("qwen3_5",)),
    "Qwen3_5MoeForCausalLM": (True, False, ("qwen3_5_moe_text", "qwen3_5_moe")),
    "Qwen3_5MoeForConditionalGeneration": (True, True, ("qwen3_5_moe",)),
}

# Keys that deltaic does not read, with the only values under which leaving them unread is right.
_MODEL_TYPES = ("qwen3_5", "qwen3_5_moe")
_TEXT_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3_5_text", "qwen3_5_moe_text", *_MODEL_TYPES),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attn_output_gate": (True,),
    "output_gate_type": ("swish",),
    "mamba_ssm_dtype": ("float32",),
    "mtp_use_dedicated_embeddings": (False,),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1,),
    "norm_topk_prob": (True,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "final_logit_softcapping": (None,),
}
_VISION_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3_5_vision", "qwen3_5_moe_vision", *_MODEL_TYPES),
    "hidden_act": ("gelu_pytorch_tanh",),
    "deepstack_visual_indexes": ([], None),
    "in_channels": (3,),
}
_ROPE_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "mrope_interleaved": (True,),
    "beta_fast": (None, 32),
    "beta_slow": (None, 1),
    "mscale": (None,),
    "mscale_all_dim": (None,),
    "truncate": (None, True),
}
_VISION_ROPE_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "rope_type": ("axial", "default"),
    "rope_theta": (10000,),
}

_MAX_STATE_BYTES = 64 << 30  # float32 delta matrices of one sequence; the largest release needs 0.4 GiB
_MAX_PARAMETERS = 1 << 43  # keeps every byte count far inside 64 bits; the largest release has 2^38.5
_MAX_EXPERT_MATRICES = 1 << 18  # layers * experts; the largest release has 30,720


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Read `folder`/config.json (and the end ids of generation_config.json, if that file exists).

    Raises ConfigError if a file is missing or malformed, or if a value is absent, absurd, inconsistent or unsupported.
    """
    folder = Path(folder)
    root = Section(read_json_object(folder / "config.json"), "config.json")
    path = folder / "generation_config.json"
    return _parse(root, Section(read_json_object(path), path.name) if os.path.lexists(path) else None)


def _parse(root: Section, generation: Section | None) -> ModelConfig:
    architecture, is_moe, has_vision = _architecture(root)
    for section in (root, *(root.section(key) for key in ("text_config",) if root.has(key))):
        for key in ("quantization_config", "compression_config"):
            if section.has(key):
                raise section.error(
                    key,
                    "is present, and quantised checkpoints are not supported yet",
                    "use the bfloat16 release of the model",
                )
    nested = root.has("text_config")
    if has_vision and not nested:
        raise root.error("text_config", "is missing", f"{architecture} needs it")
    text_section = root.section("text_config") if nested else root
    text = _text(text_section, root, is_moe)

    vision = None
    if has_vision and root.has("vision_config") and not root.boolean("language_model_only", default=False):
        vision = _vision(root.section("vision_config"), text)
    ids = {
        key: root.integer(key, 0, 2**31 - 1, default=MISSING if vision else None)
        for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    for key, token in ids.items():
        twin = next((other for other in ids if other != key and ids[other] == token), None)
        if vision and twin:
            raise root.error(key, f"is {token}, the same as {twin}", "expected four different ids")

    # The files disagree about the end ids in several releases, so every id that any of them names ends a generation.
    sources = [root, text_section] + ([generation] if generation else [])
    eos = [token for source in sources for token in source.token_ids("eos_token_id", text.vocab_size)]
    return ModelConfig(text, vision, architecture, eos_token_ids=tuple(dict.fromkeys(eos)), **ids)


def _architecture(root: Section) -> tuple[str, bool, bool]:
    names = root.array("architectures")
    known = ", ".join(_ARCHITECTURES)
    if len(names) != 1 or not isinstance(names[0], str):
        raise root.error("architectures", f"is {show(names)}", f"expected a list with one of {known}")
    name = names[0]
    if name not in _ARCHITECTURES:
        raise root.error("architectures", f"names {show(name)}, which is not supported", f"supported are {known}")
    is_moe, has_vision, model_types = _ARCHITECTURES[name]
    root.accept("model_type", model_types)
    return name, is_moe, has_vision


def _text(section: Section, root: Section, is_moe: bool) -> TextConfig:
    for key, values in _TEXT_ACCEPTED.items():
        section.accept(key, values)
    layers = section.integer("num_hidden_layers", 1, 1024)
    hidden = section.integer("hidden_size", 1, 1 << 16)
    heads = section.integer("num_attention_heads", 1, 1024)
    kv_heads = section.integer("num_key_value_heads", 1, 1024)
    head_dim = section.integer("head_dim", 2, 1024)
    key_heads = section.integer("linear_num_key_heads", 1, 1024)
    value_heads = section.integer("linear_num_value_heads", 1, 1024)
    if heads % kv_heads:
        raise section.error("num_attention_heads", f"is {heads}, not a multiple of num_key_value_heads = {kv_heads}")
    if value_heads % key_heads:
        raise section.error(
            "linear_num_value_heads", f"is {value_heads}, not a multiple of linear_num_key_heads = {key_heads}"
        )
    max_positions = section.integer("max_position_embeddings", 1, 1 << 28)

    intermediate = experts = top_k = expert_width = shared_width = 0
    if is_moe:
        experts = section.integer("num_experts", 1, 8192)
        top_k = section.integer("num_experts_per_tok", 1, 1024)
        expert_width = section.integer("moe_intermediate_size", 1, 1 << 20)
        shared_width = section.integer("shared_expert_intermediate_size", 1, 1 << 20)
        if top_k > experts:
            raise section.error("num_experts_per_tok", f"is {top_k}, more than num_experts = {experts}")
        if layers * experts > _MAX_EXPERT_MATRICES:
            raise section.error(
                "num_experts",
                f"times num_hidden_layers is {layers * experts}",
                f"at most {_MAX_EXPERT_MATRICES} is supported",
            )
    else:
        intermediate = section.integer("intermediate_size", 1, 1 << 20)
        section.accept("num_experts", (None, 0))

    # The top level decides about tying; text_config repeats the key with its own default.
    tie_section = root if root.has("tie_word_embeddings") else section
    text = TextConfig(
        vocab_size=section.integer("vocab_size", 1, 1 << 24),
        hidden_size=hidden,
        num_hidden_layers=layers,
        layer_types=_layer_types(section, layers),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=section.integer("linear_key_head_dim", 1, 1024),
        linear_value_head_dim=section.integer("linear_value_head_dim", 1, 1024),
        linear_conv_kernel_dim=section.integer("linear_conv_kernel_dim", 4, 4),
        intermediate_size=intermediate,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=expert_width,
        shared_expert_intermediate_size=shared_width,
        rms_norm_eps=section.number("rms_norm_eps", 1e-20, 1.0),
        max_position_embeddings=max_positions,
        rope=_rope(section, head_dim),
        tie_word_embeddings=tie_section.boolean("tie_word_embeddings", default=False),
        mtp_num_hidden_layers=section.integer("mtp_num_hidden_layers", 0, 1, default=0),
    )
    _check_total_size(section, text)
    return text


def _check_total_size(section: Section, text: TextConfig) -> None:
    """Refuse combinations of values that are each in range, but together ask for absurd memory."""
    state = (
        4 * text.num_delta_layers * text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    )
    if state > _MAX_STATE_BYTES:
        raise section.error(
            "linear_num_value_heads",
            f"and the linear head sizes ask for {state / 2**30:.0f} GiB of state",
            f"at most {_MAX_STATE_BYTES >> 30} GiB per sequence are supported",
        )
    attention_width = text.num_attention_heads * text.head_dim * 3 + 2 * text.num_key_value_heads * text.head_dim
    delta_width = text.conv_dim + 2 * text.linear_num_value_heads * text.linear_value_head_dim
    ffn_width = 3 * (
        text.intermediate_size + text.num_experts * text.moe_intermediate_size + text.shared_expert_intermediate_size
    )
    per_layer = max(attention_width, delta_width) + ffn_width
    parameters = text.hidden_size * (2 * text.vocab_size + text.num_hidden_layers * per_layer)
    if parameters > _MAX_PARAMETERS:
        raise section.error(
            "hidden_size",
            f"and the other sizes ask for about {parameters:.1e} parameters",
            f"at most {_MAX_PARAMETERS:.1e} are supported",
        )


def _layer_types(section: Section, layers: int) -> tuple[str, ...]:
    if not section.has("layer_types"):
        interval = section.integer("full_attention_interval", 1, 1024, default=4)
        return tuple(LINEAR_ATTENTION if (i + 1) % interval else FULL_ATTENTION for i in range(layers))
    types = section.array("layer_types")
    if len(types) != layers:
        raise section.error("layer_types", f"has {len(types)} entries", f"num_hidden_layers is {layers}")
    for i, name in enumerate(types):
        if name not in (LINEAR_ATTENTION, FULL_ATTENTION):
            raise section.error(
                f"layer_types[{i}]",
                f"is {show(name)}, which is not supported",
                f"expected {LINEAR_ATTENTION!r} or {FULL_ATTENTION!r}",
            )
    return tuple(types)


def _rope(section: Section, head_dim: int) -> RopeConfig:
    """`rope_parameters`, or the older `rope_scaling` with `rope_theta` beside it."""
    key = "rope_scaling" if section.has("rope_scaling") else "rope_parameters"
    if key == "rope_scaling" and section.has("rope_parameters"):
        if section.values["rope_scaling"] != section.values["rope_parameters"]:
            raise section.error("rope_scaling", "contradicts rope_parameters", "remove one of them")
        key = "rope_parameters"
    rope = section.section(key)
    for name, values in _ROPE_ACCEPTED.items():
        rope.accept(name, values)
    type_key = "rope_type" if rope.has("rope_type") else "type"
    rope_type = rope.values.get(type_key)
    if rope_type is None:
        rope_type = "default"
    if rope_type not in ("default", "yarn"):
        raise rope.error(type_key, f"is {show(rope_type)}, which is not supported yet", "expected 'default' or 'yarn'")

    # transformers always writes partial_rotary_factor = 0.25 one level up, so the inner value decides.
    def inner_or_outer(name: str) -> Section:
        return rope if rope.has(name) or not section.has(name) else section

    theta = inner_or_outer("rope_theta").number("rope_theta", 1.0 + 1e-6, 1e12)
    partial = inner_or_outer("partial_rotary_factor").number("partial_rotary_factor", 0.0, 1.0)
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise rope.error(
            "partial_rotary_factor",
            f"is {partial}: {rotary_dim} of head_dim = {head_dim} dimensions rotate",
            "expected an even number of at least 2",
        )
    factor, original, attention_factor = 1.0, 0, None
    if rope_type == "yarn":
        factor = rope.number("factor", 1.0, 1e4)
        original = rope.integer("original_max_position_embeddings", 1, 1 << 28)
        if rope.has("attention_factor"):
            attention_factor = rope.number("attention_factor", 1e-6, 1e6)
    return RopeConfig(
        theta, rotary_dim, _mrope_section(rope, rotary_dim // 2), rope_type, factor, original, attention_factor
    )


def _mrope_section(rope: Section, frequencies: int) -> tuple[int, int, int]:
    if not rope.has("mrope_section"):
        # The family's [11, 11, 10], cut to the frequencies there are: what transformers computes without the key.
        height = min(11, len(range(1, frequencies, 3)))
        width = min(10, len(range(2, frequencies, 3)))
        return frequencies - height - width, height, width
    value = rope.array("mrope_section")
    if len(value) != 3 or any(type(n) is not int or n < 0 for n in value) or sum(value) != frequencies:
        raise rope.error(
            "mrope_section",
            f"is {show(value)}",
            f"expected three numbers with the sum {frequencies} (half of the rotated dimensions)",
        )
    return value[0], value[1], value[2]


def _vision(section: Section, text: TextConfig) -> VisionConfig:
    for key, values in _VISION_ACCEPTED.items():
        section.accept(key, values)
    if section.has("rope_parameters"):
        for key, values in _VISION_ROPE_ACCEPTED.items():
            section.section("rope_parameters").accept(key, values)
    hidden = section.integer("hidden_size", 4, 1 << 16)
    heads = section.integer("num_heads", 1, 1024)
    if hidden % heads or (hidden // heads) % 4:
        raise section.error(
            "hidden_size", f"is {hidden}, with num_heads = {heads}", "expected heads of a width that is a multiple of 4"
        )
    positions = section.integer("num_position_embeddings", 1, 1 << 20)
    if math.isqrt(positions) ** 2 != positions:
        raise section.error("num_position_embeddings", f"is {positions}", "expected a square number")
    out_hidden = section.integer("out_hidden_size", 1, 1 << 16)
    if out_hidden != text.hidden_size:
        raise section.error(
            "out_hidden_size", f"is {out_hidden}", f"hidden_size of the text model is {text.hidden_size}"
        )
    return VisionConfig(
        depth=section.integer("depth", 1, 1024),
        hidden_size=hidden,
        num_heads=heads,
        intermediate_size=section.integer("intermediate_size", 1, 1 << 18),
        patch_size=section.square("patch_size", 1, 64),
        temporal_patch_size=section.square("temporal_patch_size", 2, 2),
        spatial_merge_size=section.integer("spatial_merge_size", 1, 8),
        num_position_embeddings=positions,
        out_hidden_size=out_hidden,
        in_channels=section.integer("in_channels", 3, 3, default=3),
    )
