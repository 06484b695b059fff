"""What does the model own? Plain dataclasses that hold the packed weights, one per noun of the architecture. Norms,
convolutions, decays and biases are float32 numpy arrays; every matrix is a handle of the op set that packed it.

Letters: H hidden, V vocabulary, C = conv_dim, Hv/Dv delta value heads and their width, D head_dim, E experts, I
feed-forward width, W vision width, S side of the learned vision position table."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Weight(Protocol):
    """A matrix [N, K], or a stack of them [E, N, K], in the layout of the op set that packed it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(slots=True)
class DeltaMixer:
    """Gated DeltaNet. Rows of `in_proj`: qkv (C), z (Hv*Dv), b (Hv), a (Hv)."""

    in_proj: Weight
    conv_weight: Array  # [4, C], taps first, oldest token first
    A_log: Array  # [Hv]
    dt_bias: Array  # [Hv]
    norm: Array  # [Dv], plain (not zero-centred)
    out_proj: Weight  # [H, Hv*Dv]


@dataclass(slots=True)
class AttentionMixer:
    """Gated full attention. Rows of `qkv_proj`: per query head q (D) then gate (D); all k heads; all v heads."""

    qkv_proj: Weight
    q_norm: Array  # [D], zero-centred
    k_norm: Array  # [D], zero-centred
    o_proj: Weight  # [H, Hq*D]


@dataclass(slots=True)
class DenseFFN:
    """SwiGLU."""

    gate_up: Weight  # (2I, H)
    down: Weight  # [H, I]


@dataclass(slots=True)
class SparseFFN:
    """Routed SwiGLU experts and one gated shared expert."""

    router: Weight  # [E, H]
    gate_up: Weight  # (E, 2I, H)
    down: Weight  # (E, H, I)
    shared_gate_up: Weight  # (2Is, H)
    shared_down: Weight  # [H, Is]
    shared_gate: Weight  # [1, H]


@dataclass(slots=True)
class Layer:
    """One decoder layer: mixer and feed-forward part, each after its zero-centred norm [H]."""

    input_norm: Array
    mixer: DeltaMixer | AttentionMixer
    post_norm: Array
    ffn: DenseFFN | SparseFFN


@dataclass(slots=True)
class TextWeights:
    """The decoder. `head` is the same object as `embed` when the two are tied."""

    embed: Weight  # [V, H]
    layers: list[Layer]
    norm: Array  # [H], zero-centred
    head: Weight  # [V, H]


@dataclass(slots=True)
class VisionBlock:
    """One block of the vision tower. Rows of `qkv`: q, k, v, each W wide."""

    norm1_w: Array
    norm1_b: Array
    qkv: Weight  # [3W, W]
    qkv_b: Array
    proj: Weight  # [W, W]
    proj_b: Array
    norm2_w: Array
    norm2_b: Array
    fc1: Weight
    fc1_b: Array
    fc2: Weight
    fc2_b: Array


@dataclass(slots=True)
class VisionWeights:
    """The vision tower and its merger. `patch` is the sum over the two frames, for still pictures."""

    patch: Weight  # [W, 3*patch*patch], columns (c, y, x)
    patch_b: Array
    pos_embed: Array  # [S*S, W]
    blocks: list[VisionBlock]
    merger_norm_w: Array
    merger_norm_b: Array
    fc1: Weight  # [4W, 4W]
    fc1_b: Array
    fc2: Weight  # [H, 4W]
    fc2_b: Array


@dataclass(slots=True)
class MtpWeights:
    """The multi-token-prediction layer; embedding table and head are those of the decoder."""

    embedding_norm: Array  # [H], zero-centred
    hidden_norm: Array  # [H], zero-centred
    fc: Weight  # [H, 2H], embedding half first
    layer: Layer
    norm: Array  # [H], zero-centred


def weight_bytes(weights: Any) -> int:
    """Bytes held by a dataclass of this file (arrays and packed matrices; a tied head counts once)."""
    seen: dict[int, int] = {}

    def visit(item: Any) -> None:
        if hasattr(item, "nbytes"):
            seen[id(item)] = int(item.nbytes)
        elif isinstance(item, list):
            for entry in item:
                visit(entry)
        elif is_dataclass(item):
            for field in fields(item):
                visit(getattr(item, field.name))

    visit(weights)
    return sum(seen.values())
