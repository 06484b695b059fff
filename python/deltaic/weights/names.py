"""Which tensors must a checkpoint of this configuration hold? One table: name, shape, role. `resolve` compares it with
the files in both directions, so that a missing, unexpected or wrongly shaped tensor is an error and never a guess."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..errors import CheckpointError
from ..model.config import FULL_ATTENTION, ModelConfig, TextConfig, VisionConfig
from .checkpoint import Checkpoint, Tensor

# Roles. They decide in which format a tensor is kept (weights/build.py: format_of).
EMBEDDING = "embedding"
HEAD = "head"
PROJECTION = "projection"
EXPERT = "expert"
SMALL = "small"  # matrices whose rounding changes decisions more than it saves bytes: router, gates, decay
PATCH = "patch"
VISION = "vision"
VECTOR = "vector"  # norms, biases, decays, convolution taps, position table: float32 arrays, not packed

LANGUAGE_PREFIXES = ("model.language_model.", "model.")
VISUAL_PREFIX = "model.visual."
_SHOWN_PROBLEMS = 6


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is expected of one tensor. `name` is the checkpoint name without the language or vision model's prefix:
    `layers.0...`, `embed_tokens.weight`, `norm.weight`, `lm_head.weight`, `visual...`, `mtp...`."""

    name: str
    shape: tuple[int, ...]
    role: str


@dataclass(frozen=True, slots=True)
class TensorTable:
    """A checkpoint that fits its configuration. `tensors` and `specs` are keyed by `TensorSpec.name`."""

    tensors: dict[str, Tensor]
    specs: dict[str, TensorSpec]

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint carries the multi-token-prediction layer."""
        return "mtp.fc.weight" in self.tensors


def resolve(checkpoint: Checkpoint, config: ModelConfig) -> TensorTable:
    """Match every tensor of `checkpoint` with the table of `config`.

    Raises CheckpointError with the first few missing, unexpected and wrongly shaped tensors, their files and shapes.
    """
    found = checkpoint.tensors
    expected = expected_tensors(config, found)
    wrong_shape = [
        f"{name} in {found[name].file.path.name} has shape {list(found[name].shape)}, expected {list(spec.shape)}"
        for name, spec in expected.items()
        if name in found and found[name].shape != spec.shape
    ]
    missing = [
        f"{name} {list(spec.shape)} is missing from {checkpoint.source.name}"
        for name, spec in expected.items()
        if name not in found
    ]
    unexpected = [
        f"{name} {list(tensor.shape)} in {tensor.file.path.name} is unexpected{_hint(name, config)}"
        for name, tensor in found.items()
        if name not in expected
    ]
    problems = wrong_shape + missing + unexpected
    if problems:
        # Some of each kind: a misnamed tensor is both missing and unexpected, and the pair explains it.
        share = max(1, _SHOWN_PROBLEMS // sum(1 for kind in (wrong_shape, missing, unexpected) if kind))
        shown = wrong_shape[:share] + missing[:share] + unexpected[:share]
        more = f"\n  and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise CheckpointError(
            f"{checkpoint.source} does not fit {config.architecture} as config.json describes it:\n  "
            + "\n  ".join(shown)
            + more
        )
    specs = {spec.name: spec for spec in expected.values()}
    return TensorTable({spec.name: found[name] for name, spec in expected.items()}, specs)


def _hint(name: str, config: ModelConfig) -> str:
    if name.startswith(VISUAL_PREFIX) and config.vision is None:
        return " (config.json describes no vision tower)"
    return ""


def expected_tensors(config: ModelConfig, found: Collection[str] = ()) -> dict[str, TensorSpec]:
    """Checkpoint name -> spec for every tensor of `config`, in the order of the forward pass.

    `found` are the names in the checkpoint. They decide between the spellings that are all correct: the prefix of the
    language model, fused experts or one by one (per layer), a stored head though it is tied, and with or without MTP.
    Without them: the spelling of the releases.
    """
    text = config.text
    prefix = next((p for p in LANGUAGE_PREFIXES if p + "embed_tokens.weight" in found), LANGUAGE_PREFIXES[0])
    if not found and config.architecture.endswith("ForCausalLM"):
        prefix = LANGUAGE_PREFIXES[1]
    table = {prefix + spec.name: spec for spec in _text_tensors(text, prefix, found)}
    if not text.tie_word_embeddings or "lm_head.weight" in found:
        table["lm_head.weight"] = TensorSpec("lm_head.weight", (text.vocab_size, text.hidden_size), HEAD)
    if config.vision is not None:
        for spec in _vision_tensors(config.vision):
            table["model." + spec.name] = spec
    # Re-exports drop the MTP layer but keep its config key, and some configs lack the key: the files decide.
    mtp = list(_mtp_tensors(text, found))
    if any(spec.name in found for spec in mtp) or (not found and text.mtp_num_hidden_layers):
        table.update((spec.name, spec) for spec in mtp)
    return table


def _text_tensors(c: TextConfig, prefix: str, found: Collection[str]) -> Iterator[TensorSpec]:
    yield TensorSpec("embed_tokens.weight", (c.vocab_size, c.hidden_size), EMBEDDING)
    for i, layer_type in enumerate(c.layer_types):
        layer = f"layers.{i}."
        per_expert = prefix + layer + "mlp.experts.0.gate_proj.weight" in found
        yield from _layer_tensors(c, layer, layer_type, per_expert)
    yield TensorSpec("norm.weight", (c.hidden_size,), VECTOR)


def _layer_tensors(c: TextConfig, layer: str, layer_type: str, per_expert: bool) -> Iterator[TensorSpec]:
    H = c.hidden_size
    yield TensorSpec(layer + "input_layernorm.weight", (H,), VECTOR)
    if layer_type == FULL_ATTENTION:
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        mixer = layer + "self_attn."
        yield TensorSpec(mixer + "q_proj.weight", (2 * query, H), PROJECTION)
        yield TensorSpec(mixer + "k_proj.weight", (key, H), PROJECTION)
        yield TensorSpec(mixer + "v_proj.weight", (key, H), PROJECTION)
        yield TensorSpec(mixer + "q_norm.weight", (c.head_dim,), VECTOR)
        yield TensorSpec(mixer + "k_norm.weight", (c.head_dim,), VECTOR)
        yield TensorSpec(mixer + "o_proj.weight", (H, query), PROJECTION)
    else:
        heads, value = c.linear_num_value_heads, c.linear_num_value_heads * c.linear_value_head_dim
        mixer = layer + "linear_attn."
        yield TensorSpec(mixer + "in_proj_qkv.weight", (c.conv_dim, H), PROJECTION)
        yield TensorSpec(mixer + "in_proj_z.weight", (value, H), PROJECTION)
        yield TensorSpec(mixer + "in_proj_b.weight", (heads, H), SMALL)
        yield TensorSpec(mixer + "in_proj_a.weight", (heads, H), SMALL)
        yield TensorSpec(mixer + "conv1d.weight", (c.conv_dim, 1, c.linear_conv_kernel_dim), VECTOR)
        yield TensorSpec(mixer + "A_log", (heads,), VECTOR)
        yield TensorSpec(mixer + "dt_bias", (heads,), VECTOR)
        yield TensorSpec(mixer + "norm.weight", (c.linear_value_head_dim,), VECTOR)
        yield TensorSpec(mixer + "out_proj.weight", (H, value), PROJECTION)
    yield TensorSpec(layer + "post_attention_layernorm.weight", (H,), VECTOR)
    if c.is_moe:
        yield from _sparse_tensors(c, layer + "mlp.", per_expert)
    else:
        yield from _swiglu_tensors(layer + "mlp.", c.intermediate_size, H, PROJECTION)


def _sparse_tensors(c: TextConfig, mlp: str, per_expert: bool) -> Iterator[TensorSpec]:
    E, H, width = c.num_experts, c.hidden_size, c.moe_intermediate_size
    yield TensorSpec(mlp + "gate.weight", (E, H), SMALL)
    if per_expert:
        for e in range(E):
            yield from _swiglu_tensors(f"{mlp}experts.{e}.", width, H, EXPERT)
    else:
        yield TensorSpec(mlp + "experts.gate_up_proj", (E, 2 * width, H), EXPERT)
        yield TensorSpec(mlp + "experts.down_proj", (E, H, width), EXPERT)
    yield from _swiglu_tensors(mlp + "shared_expert.", c.shared_expert_intermediate_size, H, PROJECTION)
    yield TensorSpec(mlp + "shared_expert_gate.weight", (1, H), SMALL)


def _swiglu_tensors(prefix: str, width: int, H: int, role: str) -> Iterator[TensorSpec]:
    yield TensorSpec(prefix + "gate_proj.weight", (width, H), role)
    yield TensorSpec(prefix + "up_proj.weight", (width, H), role)
    yield TensorSpec(prefix + "down_proj.weight", (H, width), role)


def _vision_tensors(c: VisionConfig) -> Iterator[TensorSpec]:
    W, merged = c.hidden_size, c.hidden_size * c.spatial_merge_size**2
    patch = (W, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
    yield from _affine("visual.patch_embed.proj", patch, PATCH)
    yield TensorSpec("visual.pos_embed.weight", (c.num_position_embeddings, W), VECTOR)
    for i in range(c.depth):
        block = f"visual.blocks.{i}."
        yield from _affine(block + "norm1", (W,), VECTOR)
        yield from _affine(block + "attn.qkv", (3 * W, W), VISION)
        yield from _affine(block + "attn.proj", (W, W), VISION)
        yield from _affine(block + "norm2", (W,), VECTOR)
        yield from _affine(block + "mlp.linear_fc1", (c.intermediate_size, W), VISION)
        yield from _affine(block + "mlp.linear_fc2", (W, c.intermediate_size), VISION)
    yield from _affine("visual.merger.norm", (W,), VECTOR)
    yield from _affine("visual.merger.linear_fc1", (merged, merged), VISION)
    yield from _affine("visual.merger.linear_fc2", (c.out_hidden_size, merged), VISION)


def _affine(name: str, shape: tuple[int, ...], role: str) -> Iterator[TensorSpec]:
    yield TensorSpec(name + ".weight", shape, role)
    yield TensorSpec(name + ".bias", shape[:1], VECTOR)


def _mtp_tensors(c: TextConfig, found: Collection[str]) -> Iterator[TensorSpec]:
    H = c.hidden_size
    yield TensorSpec("mtp.pre_fc_norm_embedding.weight", (H,), VECTOR)
    yield TensorSpec("mtp.pre_fc_norm_hidden.weight", (H,), VECTOR)
    yield TensorSpec("mtp.fc.weight", (H, 2 * H), PROJECTION)
    per_expert = "mtp.layers.0.mlp.experts.0.gate_proj.weight" in found
    yield from _layer_tensors(c, "mtp.layers.0.", FULL_ATTENTION, per_expert)
    yield TensorSpec("mtp.norm.weight", (H,), VECTOR)
