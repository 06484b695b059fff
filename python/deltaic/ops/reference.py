"""The definition of every operator, in plain numpy: shapes, formula and source in each docstring.

The other op sets (`ops.cpu`, ...) have the same names and arguments and are tested against this file. Nothing here is
fast on purpose. Every operator computes in the dtype of its first floating-point argument, so float64 inputs give
float64 results: the whole model can be run in double precision as an executable specification.

Notation: T tokens, H hidden width, Hq / Hkv query and key-value heads, D head width, Hk / Hv key and value heads of the
delta rule, Dk / Dv their widths, C = 2*Hk*Dk + Hv*Dv convolution channels, E experts, I feed-forward width, P patches,
V vision width, B sequences. `cu_seqlens [B+1]` holds the first row of each sequence and, last, the number of rows.
"Qwen3.5" below stands for transformers 5.18, models/qwen3_5/modeling_qwen3_5.py (and qwen3_5_moe for the experts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, unusable_logits
from . import bpe, quantise
from .layout import KV_GROUP, kv_head_dim, kv_width, merge_order

Array = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

SPLIT_INVARIANT = False  # numpy's matrix products add in another order for another number of rows
MAX_TRACED = 64  # rows of a sequence that a verify step may have
L2_EPS = 1e-6  # fixed in Qwen3.5; it is not rms_norm_eps
FORMATS = ("f32", "bf16", "int8", "int4")
checksum = quantise.checksum
bpe_merge = bpe.bpe_merge
_threads = 1


# ---------------------------------------------------------------------------------------------------------- the machine


def set_num_threads(n: int) -> None:
    """Remember `n` >= 1. numpy decides for itself how many threads it uses; results never depend on this."""
    global _threads
    if n < 1:
        raise ArgumentError(f"set_num_threads: n is {n}, expected at least 1")
    _threads = int(n)


def num_threads() -> int:
    """The number last given to `set_num_threads` (1 at first)."""
    return _threads


def isa() -> str:
    """The name of the instruction set whose kernels run: here always "numpy"."""
    return "numpy"


# -------------------------------------------------------------------------------------------------- weights, K/V blocks


@dataclass(slots=True)
class Weight:
    """A packed matrix [N, K], or E matrices [E, N, K]. Opaque outside its op set, but for

    `shape`; `dtype`, the storage format, one of FORMATS (of the first part, if parts differ); `nbytes`, as stored; and
    `float_activations`, which may be set: False lets an op set round the activations that meet an int8 or int4 matrix
    to int8, per token and run of 128 columns (x ~ q * amax / 127), and those that meet a bf16 matrix to bfloat16. Here
    products always take them unrounded: what a rounding op set may differ by follows from its steps.
    """

    matrix: npt.NDArray[np.float32]  # the stored values: rounded already, or decoded
    dtype: str
    nbytes: int
    is_glu: bool = False
    float_activations: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape


def pack(parts: Sequence[npt.NDArray], dtype: str | Sequence[str]) -> Weight:
    """Join row blocks that read the same input into one weight.

    parts: float32 or bfloat16 arrays [N_i, K], or [E, N_i, K]; dtype: one of FORMATS for all, or one per part (what
    int8 and int4 mean: ops/quantise.py). Returns a Weight (sum N_i, K) or (E, sum N_i, K); output columns of `linear`
    come in the order of the parts.
    """
    formats = [dtype] * len(parts) if isinstance(dtype, str) else list(dtype)
    if not parts or len(formats) != len(parts):
        raise ArgumentError(f"pack: {len(parts)} parts, {len(formats)} formats; expected as many of each, at least one")
    stored = [_round_to(part, fmt) for part, fmt in zip(parts, formats, strict=True)]
    nbytes = sum(_stored_bytes(part, fmt) for part, fmt in zip(stored, formats, strict=True))
    return Weight(np.concatenate(stored, axis=-2), formats[0], nbytes)


def pack_glu(gate: npt.NDArray, up: npt.NDArray, dtype: str) -> Weight:
    """Join gate and up projection, both [I, K] or [E, I, K], into (2I, K) or (E, 2I, K) for `swiglu` and `moe`.

    Only these two operators may read it: another op set is free to interleave the rows.
    """
    if gate.shape != up.shape:
        raise ArgumentError(f"pack_glu: gate is {gate.shape} and up is {up.shape}, expected equal shapes")
    joined = pack([gate, up], dtype)
    return Weight(joined.matrix, joined.dtype, joined.nbytes, is_glu=True)


def from_packed(parts: Sequence[tuple[str, int, npt.NDArray[np.uint8]]], count: int, columns: int, glu: bool) -> Weight:
    """A weight from bytes that the compiled op set packed: parts (format, rows, bytes), `count` experts, K columns.

    With `glu` there is one part, and `rows` counts gate and up each.
    """
    numbers = [quantise.unpack(data, fmt, count, rows, columns, glu=glu) for fmt, rows, data in parts]
    matrix = np.concatenate(numbers, axis=1)
    nbytes = sum(data.nbytes for _, _, data in parts)
    return Weight(matrix if count > 1 else matrix[0], parts[0][0], nbytes, is_glu=glu)


def first_rows(weight: Weight, rows: int) -> Weight:
    """The first `rows` (or all, if there are fewer) rows of a matrix of one part, on the same memory."""
    part = weight.matrix[:rows]
    return Weight(part, weight.dtype, weight.nbytes * len(part) // len(weight.matrix), False, weight.float_activations)


def _round_to(part: npt.NDArray, dtype: str) -> npt.NDArray[np.float32]:
    if dtype not in FORMATS:
        raise ArgumentError(f"pack: unknown weight format {dtype!r}, expected one of {', '.join(FORMATS)}")
    if dtype in ("int8", "int4"):
        return quantise.quantise(part.reshape(-1, part.shape[-1]), dtype).decode().reshape(part.shape)
    if dtype == "bf16":
        part = part.astype(ml_dtypes.bfloat16)
    return part.astype(np.float32)


def _stored_bytes(part: npt.NDArray, dtype: str) -> int:
    """Without the padding to blocks of 16 rows, which belongs to one layout."""
    if dtype in ("f32", "bf16"):
        return part.size * (4 if dtype == "f32" else 2)
    return part.size // part.shape[-1] * quantise.block_bytes(dtype, part.shape[-1]) // quantise.ROWS


class BlockTable:
    """The K/V blocks of one sequence, in order: block i holds tokens [i*BLOCK, (i+1)*BLOCK) of every attention layer.

    A block is an array [L_attn, 2, Hkv, BLOCK, width], index 1: 0 = K, 1 = V. Rows of D numbers are float32 or uint16
    (the bits of bfloat16), width D; or uint8: groups of 64 numbers, each a float16 scale (2 bytes, little-endian) and
    then a byte v + 128 per number, which is scale * v, v in -127..127 (the last group may be shorter).
    All blocks of a table have the same shape and dtype; ArgumentError otherwise.
    """

    __slots__ = ("blocks",)

    def __init__(self) -> None:
        self.blocks: list[npt.NDArray] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def append(self, block: npt.NDArray) -> None:
        self._check(block)
        self.blocks.append(block)

    def replace(self, i: int, block: npt.NDArray) -> None:
        self._check(block)
        if not 0 <= i < len(self.blocks):
            raise ArgumentError(f"BlockTable: block {i} of {len(self.blocks)} does not exist")
        self.blocks[i] = block

    def _check(self, block: npt.NDArray) -> None:
        if block.ndim != 5 or block.shape[1] != 2 or block.dtype not in (np.float32, np.uint16, np.uint8):
            raise ArgumentError(
                f"BlockTable: block is {block.dtype}{block.shape}, expected float32, uint16 or uint8 "
                "[L, 2, Hkv, BLOCK, width]"
            )
        if self.blocks and (block.shape, block.dtype) != (self.blocks[0].shape, self.blocks[0].dtype):
            first = self.blocks[0]
            raise ArgumentError(
                f"BlockTable: block is {block.dtype}{block.shape}, the others are {first.dtype}{first.shape}"
            )


def kv_encode(values: Array, dtype: npt.DTypeLike) -> npt.NDArray:
    """Numbers [..., D] as a K/V block stores them, [..., width]: float32, the bits of the nearest bfloat16 (ties to
    even) in uint16, or groups of int8 in uint8: scale = max |x| / 127, v = x / scale, both rounded to nearest even."""
    if np.dtype(dtype) == np.uint8:
        return _kv_encode_int8(values.astype(np.float32))
    if np.dtype(dtype) == np.uint16:
        return values.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    return values.astype(dtype)


def _kv_encode_int8(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    stored = np.empty((*x.shape[:-1], kv_width(np.uint8, x.shape[-1])), np.uint8)
    for g, first in enumerate(range(0, x.shape[-1], KV_GROUP)):
        group = x[..., first : first + KV_GROUP]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            scale = (np.abs(group).max(axis=-1, keepdims=True) / np.float32(127)).astype("<f2")
            value = np.rint(group / scale.astype(np.float32))
        place = first + 2 * g
        stored[..., place : place + 2] = scale.view(np.uint8)
        value = np.where(value >= -127, np.minimum(value, 127), -127)  # also where a scale of 0 or infinity made a NaN
        stored[..., place + 2 : place + 2 + group.shape[-1]] = value + 128
    return stored


def kv_decode(stored: npt.NDArray, dtype: npt.DTypeLike) -> Array:
    """The numbers [..., D] that rows of a K/V block [..., width] store, in `dtype`."""
    if stored.dtype == np.uint8:
        x = np.empty((*stored.shape[:-1], kv_head_dim(np.uint8, stored.shape[-1])), dtype)
        for g, first in enumerate(range(0, x.shape[-1], KV_GROUP)):
            place, count = first + 2 * g, min(KV_GROUP, x.shape[-1] - first)
            scale = np.ascontiguousarray(stored[..., place : place + 2]).view("<f2").astype(dtype)
            x[..., first : first + count] = (stored[..., place + 2 : place + 2 + count].astype(dtype) - 128) * scale
        return x
    if stored.dtype == np.uint16:
        return stored.view(ml_dtypes.bfloat16).astype(dtype)
    return stored.astype(dtype)


def kv_read(table: BlockTable, layer: int, length: int, dtype: npt.DTypeLike) -> tuple[Array, Array]:
    """Keys and values [Hkv, length, D] of the first `length` tokens of attention layer `layer`."""
    rows = np.concatenate([kv_decode(block[layer], dtype) for block in table.blocks], axis=2)[:, :, :length]
    return rows[0], rows[1]


# ----------------------------------------------------------------------------------------------- element-wise functions


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    """log(1 + e^x), without overflow."""
    return np.logaddexp(0, x)


def softmax(x: Array) -> Array:
    """e^x / sum e^x over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu_tanh(x: Array) -> Array:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))): "gelu_pytorch_tanh", in the blocks of the vision tower."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def gelu_erf(x: Array) -> Array:
    """x/2 * (1 + erf(x / sqrt 2)): the exact GELU, in the merger of the vision tower."""
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x.ravel()], dtype=x.dtype).reshape(x.shape)
    return 0.5 * x * (1 + erf)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding with half-split pairing on the first R = 2 * cos.shape[-1] dims; the others pass through.

    x [T, heads, D]; cos, sin [T, R/2].  y[f] = x[f] cos - x[f+R/2] sin ;  y[f+R/2] = x[f+R/2] cos + x[f] sin.
    Source: Qwen3.5, apply_rotary_pos_emb (text, partial) and apply_rotary_pos_emb_vision (R = D).
    """
    half = cos.shape[-1]
    c, s = cos[:, None, :].astype(x.dtype), sin[:, None, :].astype(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * c - second * s, second * c + first * s, rest], axis=-1)


_ACTIVATIONS = {"none": lambda x: x, "gelu_tanh": gelu_tanh, "gelu_erf": gelu_erf}


# ------------------------------------------------------------------------------------------------------ dense operators


def embed(ids: Ints, table: Weight) -> Array:
    """Rows of the embedding table: ids [T] -> [T, H] float32. An id outside [0, N) is an ArgumentError."""
    if ids.size and not (ids.min() >= 0 and ids.max() < table.shape[0]):
        raise ArgumentError(f"embed: token ids span {ids.min()}..{ids.max()}, expected 0..{table.shape[0] - 1}")
    return table.matrix[ids]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Zero-centred RMSNorm over the last axis: (1 + w) * x / sqrt(mean(x^2) + eps). x [..., D], weight [D].

    Source: Qwen3.5, Qwen3_5RMSNorm. (The norm inside `gated_delta_net` is the plain one, without the 1.)
    """
    return (1 + weight.astype(x.dtype)) * _unit_rms(x, eps)


def rms_norm_pair(a: Array, a_weight: Array, b: Array, b_weight: Array, eps: float) -> Array:
    """Two rows as one: rms_norm(a, a_weight) and, behind it, rms_norm(b, b_weight). a, b [T, D] -> [T, 2 * D].

    Source: Qwen3.5, the input of the multi-token-prediction layer.
    """
    return np.concatenate([rms_norm(a, a_weight, eps), rms_norm(b, b_weight, eps)], axis=-1)


def _unit_rms(x: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """LayerNorm over the last axis: w * (x - mean) / sqrt(var + eps) + b, var without Bessel's correction. x [T, D]."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return weight.astype(x.dtype) * _unit_rms(centred, eps) + bias.astype(x.dtype)


def linear(
    x: Array,
    w: Weight,
    *,
    norm: Array | None = None,
    eps: float = 1e-6,
    bias: Array | None = None,
    activation: str = "none",
    residual: Array | None = None,
) -> Array:
    """y = activation(rms_norm(x, norm) W^T + bias) + residual; each of the four may be left out. x [T, K] -> [T, N].

    norm [K] (zero-centred), bias [N], residual [T, N]; activation "none" | "gelu_tanh" | "gelu_erf".
    """
    if w.is_glu or w.matrix.ndim != 2:
        raise ArgumentError(f"linear: w must be a pack() of [N, K], found shape {w.shape}, glu {w.is_glu}")
    if activation not in _ACTIVATIONS:
        raise ArgumentError(f"linear: unknown activation {activation!r}, expected one of {sorted(_ACTIVATIONS)}")
    h = x if norm is None else rms_norm(x, norm, eps)
    y = h @ w.matrix.astype(x.dtype).T
    if bias is not None:
        y = y + bias.astype(x.dtype)
    y = _ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def swiglu(x: Array, w: Weight, *, norm: Array | None = None, eps: float = 1e-6) -> Array:
    """silu(h Wg^T) * (h Wu^T) with h = rms_norm(x, norm), or x where norm is None. x [T, K] -> [T, I].

    w comes from `pack_glu`, shape (2I, K). Source: Qwen3.5, Qwen3_5MLP (before down_proj).
    """
    if not w.is_glu or w.matrix.ndim != 2:
        raise ArgumentError(f"swiglu: w must be a pack_glu() of [I, K], found shape {w.shape}, glu {w.is_glu}")
    return _swiglu(x if norm is None else rms_norm(x, norm, eps), w.matrix)


def _swiglu(h: Array, matrix: npt.NDArray[np.float32]) -> Array:
    gate, up = np.split(h @ matrix.astype(h.dtype).T, 2, axis=-1)
    return silu(gate) * up


# ----------------------------------------------------------------------------------------------------- gated delta rule


def gated_delta_net(
    proj: Array,
    conv_weight: Array,
    A_log: Array,
    dt_bias: Array,
    norm: Array,
    *,
    eps: float,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    cu_seqlens: Ints,
    conv_states: Sequence[Array],
    states: Sequence[Array],
    trace: Array | None = None,
) -> Array:
    """Everything of a Gated DeltaNet layer between its input and its output projection, for B ragged sequences.

    proj [T, C + Hv*Dv + 2*Hv]: columns u (C: all q, all k, all v) | z (Hv*Dv) | b (Hv) | a (Hv)
    conv_weight [4, C] (tap 3 meets the current token), A_log [Hv], dt_bias [Hv], norm [Dv] (plain weight)
    conv_states: per sequence [3, C], the last rows of u before convolution, oldest first; states: per sequence
    [Hv, Dk, Dv]. Both are updated in place, unless there is a trace. Returns [T, Hv*Dv]. Per sequence:

        c   = silu(sum_j conv_weight[j] * u[t-3+j])            causal depthwise convolution, then split into q, k, v
        q   = q / sqrt(sum q^2 + 1e-6) / sqrt(Dk)              k = k / sqrt(sum k^2 + 1e-6)
        beta = sigmoid(b)                                      log_decay = -exp(A_log) * softplus(a + dt_bias)
        o   = delta_rule(q, k, v, beta, log_decay)             value head j reads q and k of head j // (Hv/Hk)
        y   = norm * o / sqrt(mean o^2 + eps) * silu(z)

    trace [T, C + Hk*Dk + Hv*Dv + Hv]: where given, conv_states and states stay as they are (the rows are drafts, to be
    verified) and each row of trace takes what `gated_delta_net_commit` needs to apply it: u (C) | k, normalised (Hk*Dk)
    | w, the error of `delta_rule` (Hv*Dv) | e^log_decay (Hv). A sequence may then have at most 64 rows. Op sets that
    are SPLIT_INVARIANT give every row of such a step the bits that it gets when rows come one at a time.
    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024); Qwen3.5, Qwen3_5GatedDeltaNet.
    """
    if trace is not None:
        if (np.diff(cu_seqlens) > MAX_TRACED).any():
            raise ArgumentError(f"gated_delta_net: with a trace, a sequence may have at most {MAX_TRACED} rows")
        conv_states, states = [x.copy() for x in conv_states], [x.copy() for x in states]
    return _gated_delta_net(
        delta_rule, proj, conv_weight, A_log, dt_bias, norm, eps=eps, num_k_heads=num_k_heads,
        head_k_dim=head_k_dim, head_v_dim=head_v_dim, cu_seqlens=cu_seqlens, conv_states=conv_states, states=states,
        trace=trace,
    )  # fmt: skip


def gated_delta_net_commit(
    trace: Array,
    *,
    num_k_heads: int,
    cu_seqlens: Ints,
    counts: Ints,
    conv_states: Sequence[Array],
    states: Sequence[Array],
) -> None:
    """Apply the first counts[b] rows of each sequence of a traced step to its states, as if they had come untraced.

    trace [L, T, ...]: of L layers, filled by `gated_delta_net`; counts int64 [B], from 0 to the rows of each sequence;
    conv_states: per sequence [L, 3, C]; states: per sequence [L, Hv, Dk, Dv]. Both are updated in place; they must be
    what they were when the trace was made. Per row and value head S <- e^log_decay * S + k w^T, in the order and with
    the roundings of decoding, so that the states get the bits of decoding.
    """
    Hk = num_k_heads
    for b, (conv_state, state) in enumerate(zip(conv_states, states, strict=True)):
        L, Hv, Dk, Dv = state.shape
        C = 2 * Hk * Dk + Hv * Dv
        first, n = int(cu_seqlens[b]), int(counts[b])
        if not 0 <= n <= cu_seqlens[b + 1] - first:
            raise ArgumentError(f"gated_delta_net_commit: counts[{b}] is {n}, expected 0 to the rows of the sequence")
        u, k, w, decay = np.split(trace[:, first : first + n], np.cumsum([C, Hk * Dk, Hv * Dv]), axis=2)
        k = np.repeat(k.reshape(L, n, Hk, Dk), Hv // Hk, axis=2)
        w = w.reshape(L, n, Hv, Dv)
        for t in range(n):
            state *= decay[:, t, :, None, None]
            state += k[:, t, :, :, None] * w[:, t, :, None, :]
        conv_state[...] = np.concatenate([conv_state, u], axis=1)[:, n:]


def gated_delta_net_chunked(*args: Any, chunk: int = 64, **kwargs: Any) -> Array:
    """`gated_delta_net`, same arguments, in the chunked form that fast kernels use for many tokens. chunk >= 1."""
    return _gated_delta_net(partial(delta_rule_chunked, chunk=chunk), *args, **kwargs)


def _gated_delta_net(
    rule: Callable[..., Array], proj: Array, conv_weight: Array, A_log: Array, dt_bias: Array, norm: Array, *,
    eps: float, num_k_heads: int, head_k_dim: int, head_v_dim: int, cu_seqlens: Ints,
    conv_states: Sequence[Array], states: Sequence[Array], trace: Array | None = None,
) -> Array:  # fmt: skip
    Hk, Dk, Dv = num_k_heads, head_k_dim, head_v_dim
    T, Hv, C = proj.shape[0], A_log.shape[0], conv_weight.shape[1]
    u, z, b, a = np.split(proj, [C, C + Hv * Dv, C + Hv * Dv + Hv], axis=1)
    beta = sigmoid(b)
    log_decay = -np.exp(A_log.astype(proj.dtype)) * softplus(a + dt_bias.astype(proj.dtype))
    o = np.empty((T, Hv, Dv), proj.dtype)
    errors = None if trace is None else np.empty((T, Hv, Dv), proj.dtype)
    keys = np.empty((T, Hk * Dk), proj.dtype)
    for i, (conv_state, state) in enumerate(zip(conv_states, states, strict=True)):
        rows = slice(cu_seqlens[i], cu_seqlens[i + 1])
        c = silu(_causal_conv1d(u[rows], conv_weight, conv_state))
        q, k, v = np.split(c, [Hk * Dk, 2 * Hk * Dk], axis=1)
        q = np.repeat(_unit_l2(q.reshape(-1, Hk, Dk)), Hv // Hk, axis=1) / math.sqrt(Dk)
        k = _unit_l2(k.reshape(-1, Hk, Dk))
        keys[rows] = k.reshape(-1, Hk * Dk)
        k, given = np.repeat(k, Hv // Hk, axis=1), {} if errors is None else {"errors": errors[rows]}
        o[rows] = rule(q, k, v.reshape(-1, Hv, Dv), beta[rows], log_decay[rows], state, **given)
    if trace is not None and errors is not None:
        trace[...] = np.concatenate([u, keys, errors.reshape(T, Hv * Dv), np.exp(log_decay)], axis=1)
    y = norm.astype(proj.dtype) * _unit_rms(o, eps) * silu(z.reshape(T, Hv, Dv))
    return y.reshape(T, Hv * Dv)


def _unit_l2(x: Array) -> Array:
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + x.dtype.type(L2_EPS))


def _causal_conv1d(u: Array, weight: Array, conv_state: Array) -> Array:
    """out[t] = sum_j weight[j] * u[t - (taps-1) + j]; rows before u come from conv_state [taps-1, C], updated."""
    taps, T = weight.shape[0], u.shape[0]
    window = np.concatenate([conv_state.astype(u.dtype), u])
    conv_state[...] = window[T:]
    return sum(weight[j].astype(u.dtype) * window[j : j + T] for j in range(taps))


def delta_rule(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array, state: Array, errors: Array | None = None
) -> Array:
    """The recurrence, token by token: q, k [T, Hv, Dk], v [T, Hv, Dv], beta, log_decay [T, Hv] -> o [T, Hv, Dv].

        S = e^log_decay * S ;  w = beta * (v - S^T k) ;  S = S + k w^T ;  o = S^T q

    The error is taken against the decayed state, the output read after the update. state [Hv, Dk, Dv] changes in place.
    errors [T, Hv, Dv], where given, takes w.
    """
    S = state.astype(q.dtype)
    o = np.empty_like(v)
    for t in range(q.shape[0]):
        S *= np.exp(log_decay[t])[:, None, None]
        w = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", S, k[t]))
        S += k[t][:, :, None] * w[:, None, :]
        if errors is not None:
            errors[t] = w
        o[t] = np.einsum("hkv,hk->hv", S, q[t])
    state[...] = S
    return o


def delta_rule_chunked(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array, state: Array, chunk: int = 64
) -> Array:
    """`delta_rule` for chunks of tokens at once. Per head, with G_i the sum of log_decay up to token i of the chunk:

        A_ij = beta_i e^(G_i-G_j) (k_i . k_j)  for j < i, else 0
        P_ij = e^(G_i-G_j) (q_i . k_j)         for j <= i, else 0
        (I + A) W = beta (V - e^G K S)          unit lower triangular
        O = e^G Q S + P W                       S <- e^(G_last) S + (e^(G_last-G) K)^T W

    The difference G_i - G_j is masked before the exponential: above the diagonal it is positive and could overflow.
    """
    S = state.astype(q.dtype)
    o = np.empty_like(v)
    for start in range(0, q.shape[0], chunk):
        rows = slice(start, start + chunk)
        Q, K, V = (x[rows].swapaxes(0, 1) for x in (q, k, v))  # [Hv, n, D]
        B, G = beta[rows].T[:, :, None], np.cumsum(log_decay[rows].T, axis=1)[:, :, None]
        n = Q.shape[1]
        visible = np.tril(np.ones((n, n), bool))
        D = np.exp(np.where(visible, G - G.swapaxes(1, 2), -np.inf))
        A = np.tril(B * D * (K @ K.swapaxes(1, 2)), -1)
        W = np.linalg.solve(np.eye(n, dtype=q.dtype) + A, B * (V - np.exp(G) * (K @ S)))
        o[rows] = (np.exp(G) * (Q @ S) + (D * (Q @ K.swapaxes(1, 2))) @ W).swapaxes(0, 1)
        S = np.exp(G[:, -1:]) * S + (np.exp(G[:, -1:] - G) * K).swapaxes(1, 2) @ W
    state[...] = S
    return o


# ------------------------------------------------------------------------------------------------------ gated attention


def gated_attention(
    proj: Array,
    q_norm: Array,
    k_norm: Array,
    cos: Array,
    sin: Array,
    *,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    layer: int,
    cu_seqlens: Ints,
    starts: Ints,
    tables: Sequence[BlockTable],
    prefill: bool = False,
) -> Array:
    """Everything of a full-attention layer between its input and its output projection, for B ragged sequences.

    proj [T, Hq*2*D + 2*Hkv*D]: columns per query head (q D | gate D), then all k heads, then all v heads
    q_norm, k_norm [D] (zero-centred); cos, sin [T, R/2]; layer: index among the attention layers
    starts [B]: tokens already in each cache; tables: B BlockTables with room for starts[b] + (new rows) tokens.
    Returns [T, Hq*D]. Per sequence:

        q = rotate(rms_norm(q, q_norm)) ;  k = rotate(rms_norm(k, k_norm)) ;  k and v are stored at starts[b]..
        o = causal_attention(q, stored k, stored v)  ;  y = o * sigmoid(gate)

    K and V are used as stored (rounded to the blocks' dtype), so a prompt in one call equals the same prompt in many.
    Where they are stored as bfloat16, an op set may round to it what meets them: the queries, and the probabilities
    (before they are divided by their sum). Here neither is rounded.
    prefill: the rows are a prompt's; an op set with other code for few rows must then add in the order that it uses for
    many. (Here there is one order.)
    Source: Qwen3.5, Qwen3_5Attention.
    """
    T, D = proj.shape[0], q_norm.shape[0]
    heads, k, v = np.split(proj, [num_heads * 2 * D, (num_heads * 2 + num_kv_heads) * D], axis=1)
    q, gate = np.split(heads.reshape(T, num_heads, 2 * D), 2, axis=2)
    q = rotate(rms_norm(q, q_norm, eps), cos, sin)
    k = rotate(rms_norm(k.reshape(T, num_kv_heads, D), k_norm, eps), cos, sin)
    v = v.reshape(T, num_kv_heads, D)
    o = np.empty_like(q)
    for i, (start, table) in enumerate(zip(starts, tables, strict=True)):
        rows = slice(cu_seqlens[i], cu_seqlens[i + 1])
        _kv_append(table, layer, int(start), k[rows], v[rows])
        if k[rows].shape[0]:
            keys, values = kv_read(table, layer, int(start) + k[rows].shape[0], q.dtype)
            o[rows] = causal_attention(q[rows], keys, values)
    return (o * sigmoid(gate)).reshape(T, num_heads * D)


def _kv_append(table: BlockTable, layer: int, start: int, k: Array, v: Array) -> None:
    for t in range(k.shape[0]):
        size = table.blocks[0].shape[3] if table.blocks else 0
        if start + t >= size * len(table):
            raise ArgumentError(f"gated_attention: token {start + t} is beyond the {len(table)} blocks of {size}")
        block = table.blocks[(start + t) // size]
        block[layer, 0, :, (start + t) % size] = kv_encode(k[t], block.dtype)
        block[layer, 1, :, (start + t) % size] = kv_encode(v[t], block.dtype)


def causal_attention(q: Array, keys: Array, values: Array) -> Array:
    """softmax(q k^T / sqrt(D)) v, where q holds the last T of S tokens and token i sees tokens 0..i.

    q [T, Hq, D], keys, values [Hkv, S, D] -> [T, Hq, D]; query head h reads key-value head h // (Hq/Hkv).
    Causality is by place in the sequence, never by rotary position (the tokens of an image share a temporal position).
    """
    T, Hq, D = q.shape
    Hkv, S, _ = keys.shape
    visible = np.arange(S)[None, :] <= np.arange(S - T, S)[:, None]
    o = np.empty_like(q)
    for h in range(Hq):
        scores = q[:, h] @ keys[h // (Hq // Hkv)].T / math.sqrt(D)
        o[:, h] = softmax(np.where(visible, scores, -np.inf)) @ values[h // (Hq // Hkv)]
    return o


# --------------------------------------------------------------------------------------------------- mixture of experts


def moe(
    x: Array,
    router: Weight,
    gate_up: Weight,
    down: Weight,
    shared_gate_up: Weight,
    shared_down: Weight,
    shared_gate: Weight,
    *,
    top_k: int,
    norm: Array,
    eps: float,
    residual: Array | None = None,
) -> Array:
    """Sparse feed-forward with a gated shared expert. x [T, H] -> [T, H], with h = rms_norm(x, norm):

        logits = h router^T ;  top = the top_k experts of largest logit (equal ones: lower index first)
        c      = softmax of the logits of top          (= softmax over all experts, renormalised over top)
        y      = sum_{e in top} c_e ffn_e(h) + sigmoid(h . shared_gate) * ffn_shared(h)  (+ residual)
        ffn(h) = (silu(h Wg^T) * (h Wu^T)) Wd^T

    router [E, H]; gate_up (E, 2I, H) and shared_gate_up (2Is, H) from `pack_glu`; down (E, H, I); shared_down (H, Is);
    shared_gate [1, H]. Source: Qwen3.5, Qwen3_5MoeSparseMoeBlock.
    """
    if not (gate_up.is_glu and shared_gate_up.is_glu):
        raise ArgumentError("moe: gate_up and shared_gate_up must come from pack_glu()")
    h = rms_norm(x, norm, eps)
    # einsum adds in the same order for every row, which a blocked product need not do: equal experts stay equal
    logits = np.einsum("th,eh->te", h, router.matrix.astype(x.dtype))
    top = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    coefficients = softmax(np.take_along_axis(logits, top, axis=1))
    shared = _swiglu(h, shared_gate_up.matrix) @ shared_down.matrix.astype(x.dtype).T
    y = sigmoid(h @ shared_gate.matrix.astype(x.dtype).T) * shared
    for e in range(router.shape[0]):
        token, place = np.nonzero(top == e)
        if token.size:
            out = _swiglu(h[token], gate_up.matrix[e]) @ down.matrix[e].astype(x.dtype).T
            y[token] += coefficients[token, place][:, None] * out
    return y if residual is None else y + residual


# --------------------------------------------------------------------------------------------------------- vision tower


def patch_embed(
    image: npt.NDArray[np.uint8],
    weight: Weight,
    bias: Array,
    pos_embed: Array,
    *,
    patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Array:
    """Patches of one still image, projected, plus their interpolated positions. Computes in the dtype of pos_embed.

    image uint8 [h, w, 3], h and w multiples of patch_size * merge_size; weight [V, 3*p*p], columns (channel, y, x):
    the checkpoint's [V, 3, 2, p, p] summed over its temporal axis, as both frames are the same picture; bias [V];
    pos_embed [S*S, V]. Returns [P, V], P = (h/p)*(w/p), rows in merge-block order (`merge_order`).

        y = ((pixels/255 - mean) / std) W^T + bias + bilinear(pos_embed)

    Bilinear with aligned corners: patch row r of n rows lies at r*(S-1)/(n-1) (0 if n = 1) on the S x S table.
    Source: Qwen3.5, Qwen3_5VisionPatchEmbed and the position interpolation of Qwen3_5VisionModel.forward.
    """
    dtype, p = pos_embed.dtype, patch_size
    grid_h, grid_w = image.shape[0] // p, image.shape[1] // p
    if image.shape != (grid_h * p, grid_w * p, 3) or grid_h % merge_size or grid_w % merge_size:
        raise ArgumentError(f"patch_embed: image is {image.shape}, expected [h, w, 3] in multiples of {p * merge_size}")
    pixels = (image.astype(dtype) / 255 - np.asarray(mean, dtype)) / np.asarray(std, dtype)
    patches = pixels.reshape(grid_h, p, grid_w, p, 3).transpose(0, 2, 4, 1, 3).reshape(grid_h, grid_w, -1)
    row, col = merge_order(grid_h, grid_w, merge_size)

    side = math.isqrt(pos_embed.shape[0])
    table = pos_embed.reshape(side, side, -1)
    r0, r1, fr = (a[row] for a in _corners(grid_h, side, dtype))
    c0, c1, fc = (a[col] for a in _corners(grid_w, side, dtype))
    fr, fc = fr[:, None], fc[:, None]
    top = (1 - fc) * table[r0, c0] + fc * table[r0, c1]
    bottom = (1 - fc) * table[r1, c0] + fc * table[r1, c1]

    return patches[row, col] @ weight.matrix.astype(dtype).T + bias.astype(dtype) + (1 - fr) * top + fr * bottom


def _corners(n: int, side: int, dtype: np.dtype) -> tuple[Ints, Ints, Array]:
    """For n aligned-corner samples of `side` table rows: the row before, the row after, the weight of the latter."""
    s = np.arange(n, dtype=dtype) * dtype.type(side - 1) / max(n - 1, 1)
    before = np.floor(s)
    index = before.astype(np.int64)
    return index, np.minimum(index + 1, side - 1), s - before


def vision_attention(
    qkv: Array, cos: Array, sin: Array, *, num_heads: int, cu_seqlens: Ints, rounded: bool = False
) -> Array:
    """Unmasked attention inside each segment. qkv [P, 3*V]: columns all q, all k, all v -> [P, V].

    cos, sin [P, dh/2] with dh = V / num_heads: `rotate` over the whole head on q and k; softmax(q k^T / sqrt(dh)) v.
    rounded: an op set may round what it multiplies (q, k, v and probabilities) to bfloat16; here nothing is rounded.
    Source: Qwen3.5, Qwen3_5VisionAttention.
    """
    P, V = qkv.shape[0], qkv.shape[1] // 3
    q, k, v = (x.reshape(P, num_heads, V // num_heads) for x in np.split(qkv, 3, axis=1))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    o = np.empty_like(q)
    for first, last in pairwise(cu_seqlens):
        for h in range(num_heads):
            scores = q[first:last, h] @ k[first:last, h].T / math.sqrt(V // num_heads)
            o[first:last, h] = softmax(scores) @ v[first:last, h] if last > first else 0
    return o.reshape(P, V)


# ------------------------------------------------------------------------------------------------------------- sampling


def count_tokens(ids: Ints, seen: Sequence[Ints]) -> None:
    """Enter the generated tokens ids[b] [S] in seen[b] [65, R], see layout.new_seen. Ids below 0 stand for no token."""
    for row, array in zip(ids, seen, strict=True):
        words, counts = array[0].view(np.uint64), array[1:].reshape(-1)
        for token in row[row >= 0].tolist():
            words[token // 64] |= np.uint64(1 << token % 64)
            counts[token] += 1


@dataclass(frozen=True)
class Screen:
    """A head, and what helps to find its largest logits: here nothing."""

    head: Weight
    nbytes: int = 0


def screen(head: Weight) -> Screen | None:
    """What `linear_top` needs beside a head [V, K]; None where an op set would save nothing by it."""
    return Screen(head)


def linear_top(
    x: Array,
    screen: Screen,
    *,
    norm: Array | None = None,
    eps: float = 1e-6,
    k: int,
    presence_penalty: float,
    frequency_penalty: float,
    repetition_penalty: float,
    limit: int,
    unused: Ints,
    seen: Sequence[Ints],
    cu_seqlens: Ints,
    fed: Ints,
) -> Array:
    """`linear` with a head, as far as `sample_rows` with this top_k (1 where its temperature is 0) and with the same of
    its other arguments may need it: logits [T, V], of which those that are not among the k largest of their row, once
    penalties are taken off, may be -inf. All others are those of `linear`, bit for bit.

    Here all that may be are -inf. Another op set may miss one of the k largest with a probability that it states."""
    logits = linear(x, screen.head, norm=norm, eps=eps)
    for t, row in enumerate(logits):
        value = row[:limit].astype(np.float64)
        if len(seen):
            text = _what_was_said(seen, cu_seqlens, fed, len(logits), t, limit)
            value = _penalised(value, *text, presence_penalty, frequency_penalty, repetition_penalty)
        value[unused[unused < limit]] = -np.inf
        row[:limit][value < np.sort(value)[-min(k, limit)]] = -np.inf
        row[limit:] = -np.inf
    return logits


def sample_rows(
    logits: Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    presence_penalty: float,
    frequency_penalty: float,
    repetition_penalty: float,
    limit: int,
    unused: Ints,
    draws: Ints,
    seen: Sequence[Ints],
    cu_seqlens: Ints,
    fed: Ints,
    tokens: Ints,
) -> None:
    """Fill tokens [T] with an id chosen from each row of logits [T, V], of which only the first `limit` count, and the
    ids `unused` [u] do not. In this order:

    1. repetition: l = l/r if l > 0 else l*r, for ids in prompt or output; then, for ids in output,
       l -= frequency * count + presence
    2. temperature 0: the largest, lowest id on ties, and done. Otherwise l = l / temperature
    3. top_k: the k largest (0 = all). top_p: the shortest run of descending probability whose sum reaches it (1 = all).
       min_p: those with p >= min_p * (largest p) (0 = all). Equal logits: lower id first throughout
    4. inverse of the cumulative distribution of the rest, in descending order, at draws / 2^53, draws [T] in [0, 2^53)

    The penalties of 1 take what the text of sequence b holds from seen[b] [65, R] (see layout.new_seen), and from fed
    [A], the ids that were fed in the A rows of B sequences, sequence b in rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1.
    The first of each is in `seen` by then; the others, drafts, belong to the output for the rows from theirs on. Rows
    of logits are the last T of these. Without penalties `seen` may be empty, and nothing is read of the other two.

    -1 stands for no token: NaN or +inf among a row's logits, or nothing but -inf. Computes in float64. The logits may
    be overwritten, and `tokens` may not overlap `fed`.
    """
    if not 0 < limit <= logits.shape[1]:
        raise ArgumentError(f"sample_rows: limit is {limit}, expected 1..{logits.shape[1]}")
    logits[:, unused] = -np.inf
    for t, row in enumerate(logits):
        tokens[t] = -1
        if not _usable(row, limit):
            continue
        x = row[:limit].astype(np.float64)
        if len(seen):
            text = _what_was_said(seen, cu_seqlens, fed, len(logits), t, limit)
            x = _penalised(x, *text, presence_penalty, frequency_penalty, repetition_penalty)
        tokens[t] = _choose(x, temperature, top_k, top_p, min_p, float(draws[t]) / 2**53)


def _penalised(
    x: npt.NDArray[np.float64],
    held: npt.NDArray[np.bool_],
    counts: Ints,
    presence_penalty: float,
    frequency_penalty: float,
    repetition_penalty: float,
) -> npt.NDArray[np.float64]:
    """Step 1 of `sample_rows`."""
    y = x.copy()
    y[held] = np.where(x[held] > 0, x[held] / repetition_penalty, x[held] * repetition_penalty)
    y -= frequency_penalty * counts + presence_penalty * (counts > 0)
    return y


def _what_was_said(
    seen: Sequence[Ints], cu_seqlens: Ints, fed: Ints, rows: int, t: int, limit: int
) -> tuple[npt.NDArray[np.bool_], Ints]:
    """Which of the first `limit` ids are in prompt or output before row t of so many, drafts included, and how often
    they are in the output."""
    r = len(fed) - rows + t
    b = int(np.searchsorted(cu_seqlens, r, side="right")) - 1
    drafts = fed[cu_seqlens[b] + 1 : r + 1]
    bits = np.unpackbits(np.ascontiguousarray(seen[b][0]).view(np.uint8), bitorder="little")
    held, counts = bits.astype(bool)[:limit], seen[b][1:].reshape(-1)[:limit].copy()
    drafts = drafts[(drafts >= 0) & (drafts < limit)]
    held[drafts] = True
    np.add.at(counts, drafts, 1)
    return held, counts


def _choose(
    x: npt.NDArray[np.float64], temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> int:
    """Steps 2 to 4 of `sample_rows`."""
    if temperature == 0:
        return int(np.argmax(x))
    order = np.argsort(-x, kind="stable")[: top_k or None]
    p = softmax(x[order] / temperature)
    if top_p < 1:
        p = p[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
    p = p[p >= min_p * p[0]]
    cumulative = np.cumsum(p)
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(order[min(place, len(p) - 1)])


def log_softmax_top(logits: Array, *, limit: int, k: int, token: int) -> tuple[float, Ints, npt.NDArray[np.float32]]:
    """Log-probability of `token` and the k most probable ids with theirs, of the softmax over the first `limit` logits.

    Returns (logprob, ids int64 [k], logprobs float32 [k]), descending, lower id first on ties; k is cut to `limit`.
    """
    x = _valid_logits("log_softmax_top", logits, limit)
    if not 0 <= token < limit:
        raise ArgumentError(f"log_softmax_top: token is {token}, expected 0..{limit - 1}")
    x = x - x.max()
    logprobs = x - np.log(np.sum(np.exp(x)))
    ids = np.argsort(-x, kind="stable")[:k].astype(np.int64)
    return float(logprobs[token]), ids, logprobs[ids].astype(np.float32)


def _usable(logits: Array, limit: int) -> bool:
    return not np.isnan(logits[:limit]).any() and bool(np.isfinite(logits[:limit].max(initial=-np.inf)))


def _valid_logits(op: str, logits: Array, limit: int) -> npt.NDArray[np.float64]:
    if not 0 < limit <= logits.shape[0]:
        raise ArgumentError(f"{op}: limit is {limit}, expected 1..{logits.shape[0]}")
    x = logits[:limit].astype(np.float64)
    if not _usable(logits, limit):
        raise unusable_logits(op)
    return x
