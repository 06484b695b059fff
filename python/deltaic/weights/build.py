"""Which weights does a model have? Asks a source (a checkpoint that is packed on the way, or a packed folder that is
mapped) for every matrix and vector of the decoder, the vision tower and the multi-token-prediction layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentError, CheckpointError
from ..model.config import FULL_ATTENTION, ModelConfig, TextConfig
from ..model.weights import (
    AttentionMixer,
    DeltaMixer,
    DenseFFN,
    Layer,
    MtpWeights,
    SparseFFN,
    TextWeights,
    VisionBlock,
    VisionWeights,
)
from .checkpoint import Checkpoint
from .packed import PackedFile
from .packer import Packer
from .precision import Precision
from .source import KeyRecorder, Source


def open_source(
    weights: Checkpoint | PackedFile, config: ModelConfig, ops: Any, precision: str | Precision = "bf16"
) -> Source:
    """The source of `weights` for an op set (a module with `pack`, `pack_glu` and `from_packed`). A packed file takes
    from `precision` the activations only.

    Raises CheckpointError if the weights do not fit `config`, ArgumentError for a precision that cannot be.
    """
    if not isinstance(precision, Precision):
        precision = Precision.parse(precision)
    if isinstance(weights, PackedFile):
        keys = record_keys(config, has_mtp=weights.has_mtp)
        weights.check_keys(keys.matrices, keys.vectors)
        return weights.source(config, ops, precision.activations)
    return Packer(weights, config, ops, precision)


def record_keys(config: ModelConfig, *, has_mtp: bool) -> KeyRecorder:
    """All matrices and vectors of a model, in the order in which they are packed."""
    recorder = KeyRecorder("config.json", has_mtp=has_mtp)
    text_weights(recorder, config)
    if has_mtp:
        mtp_weights(recorder, config)
    if config.vision is not None:
        vision_weights(recorder, config)
    return recorder


def text_weights(source: Source, config: ModelConfig, progress: bool | None = None) -> TextWeights:
    """The decoder. progress: True shows a bar on stderr, False none, None one if stderr is a terminal.

    Raises CheckpointError if the weights do not fit `config`, or memory runs out."""
    text = config.text
    with source.progress_bar("the text model", None, progress):
        # The two largest matrices come first: while they are mapped, little else is packed yet.
        if text.tie_word_embeddings:
            source.check_tied_head()
        embed = source.matrix("embed_tokens")
        head = embed if text.tie_word_embeddings else source.matrix("lm_head")
        layers = [_layer(source, text, f"layers.{i}.", kind) for i, kind in enumerate(text.layer_types)]
        return TextWeights(embed, layers, source.vector("norm.weight"), head)


def vision_weights(source: Source, config: ModelConfig, progress: bool | None = None) -> VisionWeights:
    """The vision tower. Raises as `text_weights`, and ArgumentError if the model has none."""
    if config.vision is None:
        raise ArgumentError(f"{source.where} has no vision tower: config.json describes none")
    with source.progress_bar("the vision tower", ("visual.",), progress):
        patch, patch_b = source.affine("visual.patch_embed.proj", _sum_frames)
        blocks = [_vision_block(source, f"visual.blocks.{i}.") for i in range(config.vision.depth)]
        fc1, fc1_b = source.affine("visual.merger.linear_fc1")
        fc2, fc2_b = source.affine("visual.merger.linear_fc2")
        return VisionWeights(
            patch=patch,
            patch_b=patch_b,
            pos_embed=source.vector("visual.pos_embed.weight"),
            blocks=blocks,
            merger_norm_w=source.vector("visual.merger.norm.weight"),
            merger_norm_b=source.vector("visual.merger.norm.bias"),
            fc1=fc1,
            fc1_b=fc1_b,
            fc2=fc2,
            fc2_b=fc2_b,
        )


def mtp_weights(source: Source, config: ModelConfig, progress: bool | None = None) -> MtpWeights:
    """The multi-token-prediction layer. Raises as `text_weights`, and CheckpointError if the files hold none."""
    if not source.has_mtp:
        raise CheckpointError(f"{source.where} holds no multi-token-prediction layer (mtp.* tensors)")
    with source.progress_bar("the MTP layer", ("mtp.",), progress):
        return MtpWeights(
            embedding_norm=source.vector("mtp.pre_fc_norm_embedding.weight"),
            hidden_norm=source.vector("mtp.pre_fc_norm_hidden.weight"),
            fc=source.matrix("mtp.fc"),
            layer=_layer(source, config.text, "mtp.layers.0.", FULL_ATTENTION),
            norm=source.vector("mtp.norm.weight"),
        )


def _layer(source: Source, config: TextConfig, layer: str, layer_type: str) -> Layer:
    mixer = _attention if layer_type == FULL_ATTENTION else _delta
    return Layer(
        input_norm=source.vector(layer + "input_layernorm.weight"),
        mixer=mixer(source, layer),
        post_norm=source.vector(layer + "post_attention_layernorm.weight"),
        ffn=_sparse(source, layer + "mlp.", config.num_experts) if config.is_moe else _dense(source, layer + "mlp."),
    )


def _delta(source: Source, layer: str) -> DeltaMixer:
    mixer = layer + "linear_attn."
    return DeltaMixer(
        in_proj=source.matrix(mixer + "in_proj", [f"{mixer}in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")]),
        conv_weight=source.vector(mixer + "conv1d.weight", _taps_first),
        A_log=source.vector(mixer + "A_log"),
        dt_bias=source.vector(mixer + "dt_bias"),
        norm=source.vector(mixer + "norm.weight"),
        out_proj=source.matrix(mixer + "out_proj"),
    )


def _attention(source: Source, layer: str) -> AttentionMixer:
    mixer = layer + "self_attn."
    return AttentionMixer(
        qkv_proj=source.matrix(mixer + "qkv_proj", [f"{mixer}{part}_proj.weight" for part in ("q", "k", "v")]),
        q_norm=source.vector(mixer + "q_norm.weight"),
        k_norm=source.vector(mixer + "k_norm.weight"),
        o_proj=source.matrix(mixer + "o_proj"),
    )


def _dense(source: Source, mlp: str) -> DenseFFN:
    return DenseFFN(source.glu(mlp + "gate_up", mlp), source.matrix(mlp + "down_proj"))


def _sparse(source: Source, mlp: str, num_experts: int) -> SparseFFN:
    router = source.matrix(mlp + "gate")
    gate_up, down = source.experts(mlp + "experts.", num_experts)
    return SparseFFN(
        router=router,
        gate_up=gate_up,
        down=down,
        shared_gate_up=source.glu(mlp + "shared_expert.gate_up", mlp + "shared_expert."),
        shared_down=source.matrix(mlp + "shared_expert.down_proj"),
        shared_gate=source.matrix(mlp + "shared_expert_gate"),
    )


def _vision_block(source: Source, block: str) -> VisionBlock:
    qkv, qkv_b = source.affine(block + "attn.qkv")
    proj, proj_b = source.affine(block + "attn.proj")
    fc1, fc1_b = source.affine(block + "mlp.linear_fc1")
    fc2, fc2_b = source.affine(block + "mlp.linear_fc2")
    return VisionBlock(
        norm1_w=source.vector(block + "norm1.weight"),
        norm1_b=source.vector(block + "norm1.bias"),
        qkv=qkv,
        qkv_b=qkv_b,
        proj=proj,
        proj_b=proj_b,
        norm2_w=source.vector(block + "norm2.weight"),
        norm2_b=source.vector(block + "norm2.bias"),
        fc1=fc1,
        fc1_b=fc1_b,
        fc2=fc2,
        fc2_b=fc2_b,
    )


def _taps_first(conv: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[C, 1, 4] as stored -> [4, C], so that one tap is contiguous over the channels."""
    return conv[:, 0, :].T


def _sum_frames(patch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[W, 3, 2, p, p] -> [W, 3*p*p]: a still picture shows the same pixels to both frames, so their weights add up."""
    return patch.astype(np.float32).sum(axis=2).reshape(patch.shape[0], -1)
