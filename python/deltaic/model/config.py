"""What is a model made of? Frozen dataclasses with Hugging Face's names; `config_file` reads them from config.json."""

from __future__ import annotations

from dataclasses import dataclass

LINEAR_ATTENTION = "linear_attention"
FULL_ATTENTION = "full_attention"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of the attention layers (partial, three axes interleaved, optionally YaRN)."""

    theta: float
    rotary_dim: int
    mrope_section: tuple[int, int, int]
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The decoder. `intermediate_size` is 0 for sparse models; `num_experts` and the three fields after it are 0 for
    dense ones. `num_experts_per_tok` is the router's top-k."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    mtp_num_hidden_layers: int

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward part is a mixture of sparse experts."""
        return self.num_experts > 0

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: all q, all k and all v of a delta layer."""
        return (
            2 * self.linear_num_key_heads * self.linear_key_head_dim
            + self.linear_num_value_heads * self.linear_value_head_dim
        )

    @property
    def delta_trace_width(self) -> int:
        """Columns of the trace of a delta layer's verify step: u, k, w and e^log_decay (ops/reference.py)."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        values = self.linear_num_value_heads * self.linear_value_head_dim
        return self.conv_dim + keys + values + self.linear_num_value_heads

    @property
    def num_delta_layers(self) -> int:
        """Number of Gated DeltaNet layers."""
        return self.layer_types.count(LINEAR_ATTENTION)

    @property
    def num_attention_layers(self) -> int:
        """Number of gated full-attention layers."""
        return self.layer_types.count(FULL_ATTENTION)


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower; `num_position_embeddings` is the square of the side of the learned position table."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    out_hidden_size: int
    in_channels: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole checkpoint. The four vision token ids are None for text-only models. They may lie outside the vocabulary
    (transformers writes its defaults whatever the vocabulary is); such a model can then only be given text."""

    text: TextConfig
    vision: VisionConfig | None
    architecture: str
    image_token_id: int | None
    video_token_id: int | None
    vision_start_token_id: int | None
    vision_end_token_id: int | None
    eos_token_ids: tuple[int, ...]
