"""The operators in C++: same names and arguments as `reference.py`, which says what each computes.

Every function allocates its output, calls the compiled kernel and returns. Shapes and dtypes are checked by the
extension from the contracts in `csrc/ops.h`; a call that does not fit raises `ContractError`, an ArgumentError.
Activations are C-contiguous float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltaic import _core
from deltaic._core import BlockTable, Tape, Weight
from deltaic.errors import ArgumentError

from .memory import zeros

__all__ = [
    "BlockTable",
    "Tape",
    "Weight",
    "bpe_merge",
    "checksum",
    "count_tokens",
    "embed",
    "first_rows",
    "from_packed",
    "gated_attention",
    "gated_delta_net",
    "gated_delta_net_commit",
    "isa",
    "layer_norm",
    "linear",
    "linear_top",
    "log_softmax_top",
    "moe",
    "num_threads",
    "pack",
    "pack_glu",
    "packed_parts",
    "patch_embed",
    "probe_peak",
    "probe_read",
    "rms_norm",
    "rms_norm_pair",
    "sample_rows",
    "screen",
    "set_num_threads",
    "swiglu",
    "vision_attention",
    "zeros",
]

Array = np.ndarray
FORMATS: tuple[str, ...] = _core.formats
ACTIVATIONS = ("none", "gelu_tanh", "gelu_erf")  # order of enum Activation in csrc/cpu/activation.h
BLOCK_ROWS = 16
TAPE_ROWS = 32  # with more, the kernels take so long that the calls around them do not matter
SPLIT_INVARIANT = True  # the rows of a prompt get the same bits wherever its reading is interrupted (with prefill=True)


def isa() -> str:
    """Name of the instruction set in use."""
    return _core.isa


def num_threads() -> int:
    """Threads that the operators use."""
    return _core.thread_count()


def set_num_threads(threads: int) -> None:
    """Sets the size of the process-wide pool (1..1024)."""
    _core.set_thread_count(threads)


def _plain(array: Array) -> Array:
    """A float32 or bfloat16 array as the extension takes it: C-contiguous float32, or uint16 with the bfloat16 bits."""
    if array.dtype.name == "bfloat16":
        return np.ascontiguousarray(array).view(np.uint16)
    return np.ascontiguousarray(array, dtype=np.float32)


def _packed(shape: tuple[int, ...], format: str, interleave: int) -> Array:
    """Uninitialised bytes for experts * blocks of 16 rows."""
    experts, rows, columns = shape
    blocks = -(-rows // BLOCK_ROWS) * interleave
    return np.empty(experts * blocks * _core.block_bytes(format, columns), np.uint8)


def _pack_into(packed: Array, source: Array, format: str, first: int, step: int) -> None:
    experts = source.shape[0]
    stride = packed.shape[0] // experts
    for expert in range(experts):
        rows = _plain(source[expert])
        _core.pack(rows, FORMATS.index(format), first, step, packed[expert * stride : (expert + 1) * stride])


def _three(array: Array) -> Array:
    return array if array.ndim == 3 else array[None]


def pack(parts: Sequence[Array], dtype: str | Sequence[str]) -> Weight:
    """Packs matrices [N_i, K] (or [E, N_i, K]) that read the same input, each in its format, into one weight."""
    formats = [dtype] * len(parts) if isinstance(dtype, str) else list(dtype)
    segments = []
    for part, format in zip(parts, formats, strict=True):
        source = _three(part)
        packed = _packed(source.shape, format, 1)
        _pack_into(packed, source, format, 0, 1)
        segments.append((format, source.shape[1], packed))
    first = _three(parts[0])
    return Weight(segments, first.shape[0], first.shape[2], False)


def pack_glu(gate: Array, up: Array, dtype: str) -> Weight:
    """Packs gate and up [I, K] (or [E, I, K]) with their blocks of 16 rows alternating, for `swiglu` and `moe`."""
    gate3, up3 = _three(gate), _three(up)
    packed = _packed(gate3.shape, dtype, 2)
    _pack_into(packed, gate3, dtype, 0, 2)
    _pack_into(packed, up3, dtype, 1, 2)
    return Weight([(dtype, gate3.shape[1], packed)], gate3.shape[0], gate3.shape[2], True)


def packed_parts(weight: Weight) -> list[tuple[str, int, Array]]:
    """(format, rows, bytes) of each part: what `from_packed` takes. With glu, `rows` counts gate and up each."""
    return weight.parts


def from_packed(parts: Sequence[tuple[str, int, Array]], count: int, columns: int, glu: bool) -> Weight:
    """A weight on bytes that `pack` or `pack_glu` made earlier, kept alive but not copied. They may be read-only."""
    return Weight(list(parts), count, columns, glu)


def first_rows(weight: Weight, rows: int) -> Weight:
    format, total, data = weight.parts[0]
    stop = min(-(-rows // BLOCK_ROWS), -(-total // BLOCK_ROWS)) * _core.block_bytes(format, weight.shape[1])
    part = Weight([(format, min(rows, total), data[:stop])], 1, weight.shape[1], False)
    part.float_activations = weight.float_activations
    return part


@dataclass(slots=True)
class Screen:
    """A head, and beside it what tells which of its rows may have the largest logits: csrc/cpu/screen.cpp.

    sketch   int4, of four bits per weight
    dither   float32 [K], random numbers in (-1/2, 1/2) that were added to the columns before they were rounded
    bounds   float32 [ceil(N / 16), 2], of 16 rows each, for what the sketch may miss
    history  int64 [2], written by `linear_top`: in how many calls the sketch is not tried, and in how many it was not
             after it had last been of no use
    """

    head: Weight
    sketch: Weight
    dither: Array
    bounds: Array
    history: Array

    @property
    def nbytes(self) -> int:
        """Of what is there beside the head."""
        return self.sketch.nbytes + self.dither.nbytes + self.bounds.nbytes


def screen(head: Weight) -> Screen | None:
    """For `linear_top`; None where it would not save anything: a head that is int4 itself."""
    ((format, rows, _),) = head.parts
    if format == "int4":
        return None
    columns, blocks = head.shape[1], -(-rows // BLOCK_ROWS)
    dither = np.random.default_rng(0x5C4EE7).uniform(-0.5, 0.5, columns).astype(np.float32)
    sketch = np.empty(blocks * _core.block_bytes("int4", columns), np.uint8)
    bounds = np.empty((blocks, 2), np.float32)
    _core.pack_screen(head, dither, sketch, bounds)
    return Screen(head, Weight([("int4", rows, sketch)], 1, columns, False), dither, bounds, np.zeros(2, np.int64))


def checksum(data: Array, first: int = 0) -> int:
    """The 64-bit checksum of bytes [n], n a multiple of 64, at the speed of memory (definition: ops/quantise.py)."""
    result = np.empty(1, np.int64)
    _core.checksum(data, first, result)
    return int(result.view(np.uint64)[0])


def probe_read(data: Array) -> None:
    """Reads bytes [n] once, on all threads: time it to learn the bandwidth of memory."""
    _core.probe_read(data, np.empty(1, np.int64))


def probe_peak(kind: str, rounds: int) -> int:
    """Multiplies and adds in registers, on all threads; returns how many operations that were. kind: "f32" or "int8"
    (a ContractError where the instruction set has no int8 dot product). Time it to learn the peak."""
    kinds = ("f32", "int8")
    if kind not in kinds:
        raise ArgumentError(f"probe_peak: kind is {kind!r}, expected one of {', '.join(kinds)}")
    operations = np.empty(1, np.int64)
    _core.probe_peak(kinds.index(kind), rounds, operations)
    return int(operations[0])


def embed(ids: Array, table: Weight) -> Array:
    y = _core.empty((ids.shape[0], table.shape[1]))
    _core.embed(ids, table, y)
    return y


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    y = _core.empty(x.shape)
    _core.rms_norm(x, weight, eps, y)
    return y


def rms_norm_pair(a: Array, a_weight: Array, b: Array, b_weight: Array, eps: float) -> Array:
    y = _core.empty((a.shape[0], 2 * a.shape[1]))
    _core.rms_norm_pair(a, a_weight, b, b_weight, eps, y)
    return y


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    y = np.empty_like(x)
    _core.layer_norm(x, weight, bias, eps, y)
    return y


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
    y = _core.empty((x.shape[0], w.shape[0]))
    _core.linear(x, w, norm, eps, bias, ACTIVATIONS.index(activation), residual, y)
    return y


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
    unused: Array,
    seen: Sequence[Array],
    cu_seqlens: Array,
    fed: Array,
) -> Array:
    y = _core.empty((x.shape[0], screen.head.shape[0]))
    _core.linear_top(
        x, screen.head, screen.sketch, screen.dither, screen.bounds, screen.history, norm, eps, k, presence_penalty,
        frequency_penalty, repetition_penalty, limit, unused, seen, cu_seqlens, fed, y,
    )  # fmt: skip
    return y


def swiglu(x: Array, w: Weight, *, norm: Array | None = None, eps: float = 1e-6) -> Array:
    y = _core.empty((x.shape[0], w.shape[0] // 2))
    _core.swiglu(x, w, norm, eps, y)
    return y


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
    cu_seqlens: Array,
    starts: Array,
    tables: list[BlockTable],
    prefill: bool = False,
) -> Array:
    y = _core.empty((proj.shape[0], num_heads * q_norm.shape[0]))
    _core.gated_attention(
        proj, q_norm, k_norm, cos, sin, eps, num_heads, num_kv_heads, layer, cu_seqlens, starts, tables, int(prefill), y
    )
    return y


def patch_embed(
    image: Array,
    weight: Weight,
    bias: Array,
    pos_embed: Array,
    *,
    patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Array:
    size = max(patch_size, 1)  # the extension refuses a size below 1
    y = np.empty(((image.shape[0] // size) * (image.shape[1] // size), weight.shape[0]), np.float32)
    moments = np.array(mean, np.float32), np.array(std, np.float32)
    _core.patch_embed(image, weight, bias, pos_embed, patch_size, merge_size, *moments, y)
    return y


def vision_attention(
    qkv: Array, cos: Array, sin: Array, *, num_heads: int, cu_seqlens: Array, rounded: bool = False
) -> Array:
    y = np.empty((qkv.shape[0], qkv.shape[1] // 3), np.float32)
    _core.vision_attention(qkv, cos, sin, num_heads, cu_seqlens, int(rounded), y)
    return y


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
    cu_seqlens: Array,
    conv_states: Sequence[Array],
    states: Sequence[Array],
    trace: Array | None = None,
) -> Array:
    y = _core.empty((proj.shape[0], A_log.shape[0] * head_v_dim))
    _core.gated_delta_net(
        proj, conv_weight, A_log, dt_bias, norm, eps, num_k_heads, head_k_dim,
        cu_seqlens, list(conv_states), list(states), trace, y,
    )  # fmt: skip
    return y


def gated_delta_net_commit(
    trace: Array,
    *,
    num_k_heads: int,
    cu_seqlens: Array,
    counts: Array,
    conv_states: Sequence[Array],
    states: Sequence[Array],
) -> None:
    _core.gated_delta_net_commit(trace, num_k_heads, cu_seqlens, counts, list(conv_states), list(states))


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
    y = _core.empty(x.shape)
    _core.moe(
        x, router, gate_up, down, shared_gate_up, shared_down, shared_gate, norm, eps, top_k, residual, y,
    )  # fmt: skip
    return y


def count_tokens(ids: Array, seen: Sequence[Array]) -> None:
    _core.count_tokens(ids, seen)


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
    unused: Array,
    draws: Array,
    seen: Sequence[Array],
    cu_seqlens: Array,
    fed: Array,
    tokens: Array,
) -> None:
    _core.sample_rows(
        logits, temperature, top_k, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty, limit,
        unused, draws, seen, cu_seqlens, fed, tokens,
    )  # fmt: skip


def log_softmax_top(logits: Array, *, limit: int, k: int, token: int) -> tuple[float, Array, Array]:
    k = max(0, min(k, limit))
    logprob, top_ids, top_logprobs = np.empty(1, np.float32), np.empty(k, np.int64), np.empty(k, np.float32)
    _core.log_softmax_top(logits, limit, k, token, logprob, top_ids, top_logprobs)
    return float(logprob[0]), top_ids, top_logprobs


def bpe_merge(ids: Array, begins: Array, slots: Array, pairs: Array, merged: Array) -> Array:
    out, count = np.empty(ids.shape, np.int64), np.empty(1, np.int64)
    _core.bpe_merge(ids, begins, slots, pairs, merged, out, count)
    return out[: int(count[0])]
