"""The operators on an NVIDIA GPU: same names and arguments as `reference.py`, which says what each computes.

Activations are contiguous torch tensors on the GPU, bfloat16 (or float32, for models loaded as "f32"); vectors such as
norms may be numpy arrays, which are uploaded once. torch owns memory, streams, cuBLAS and graph capture; the extension
`_cuda` gets addresses and launches kernels. Small batches (`FEW` rows: decoding, verification) run kernels that give a
row the same bits whatever its batch; larger ones multiply with cuBLAS on bfloat16 weights, or on tiles that are
dequantised as needed. Steps of few rows are captured graphs: see cuda_tape.py. torch is imported when the first
function runs, never by importing this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .cuda_memory import (
    ACTIVATION_DTYPES,
    Tensor,
    address,
    check,
    copy,
    device,
    free_bytes,
    from_host,
    isa,
    new,
    num_threads,
    require_memory,
    set_num_threads,
    small,
    to_host,
    to_numpy,
    type_of,
    upload,
    use_device,
    vector,
    zeros,
)  # fmt: skip
from .cuda_sampling import count_tokens, log_softmax_top, sample_rows
from .cuda_tape import Tape
from .cuda_weights import (
    BlockTable,
    Part,
    Pointers,
    TableBatch,
    Weight,
    first_rows,
    from_packed,
    pack,
    pack_glu,
    place,
    pointers,
)

SPLIT_INVARIANT = False  # cuBLAS adds in another order for another number of rows

__all__ = [
    "BlockTable",
    "Part",
    "Tape",
    "Weight",
    "activations",
    "checksum",
    "concatenate",
    "copy",
    "count_tokens",
    "device",
    "embed",
    "first_rows",
    "free_bytes",
    "from_host",
    "from_packed",
    "gated_attention",
    "gated_delta_net",
    "gated_delta_net_commit",
    "isa",
    "layer_norm",
    "linear",
    "log_softmax_top",
    "moe",
    "num_threads",
    "pack",
    "pack_glu",
    "patch_embed",
    "place",
    "require_memory",
    "rms_norm",
    "rms_norm_pair",
    "sample_rows",
    "set_num_threads",
    "swiglu",
    "to_host",
    "to_numpy",
    "upload",
    "use_device",
    "vision_attention",
    "wait",
    "zeros",
]  # fmt: skip

ACTIVATIONS = ("none", "gelu_tanh", "gelu_erf")  # order of enum Activation in csrc/cuda/common.cuh
FEW = 16  # rows up to which every row is computed as if it were alone
DELTA_FEW = 16  # the same for the tokens of one sequence in the delta rule
MAX_TRACED = 64  # rows of a sequence that a verify step may have
SPLITS, PREFILL_SPLITS = 128, 4  # into which the keys of attention are dealt
DEQUANTISED_BYTES = 64 << 20  # of one tile of a quantised matrix on its way to cuBLAS
TAPE_ROWS = FEW  # with more, cuBLAS multiplies
device_resident = True  # arrays of this op set live on a device


# ------------------------------------------------------------------------------------------------------ dense operators


def embed(ids: Any, table: Weight) -> Tensor:
    """ids int64 [T] (numpy, or a tensor on the device) -> [T, H] in the activation dtype of the table's format."""
    import torch

    if isinstance(ids, np.ndarray) and ids.size and not (ids.min() >= 0 and ids.max() < table.shape[0]):
        raise ArgumentError(f"embed: token ids span {ids.min()}..{ids.max()}, expected 0..{table.shape[0] - 1}")
    ids = small(ids)
    y = new([len(ids), table.shape[1]], getattr(torch, table.activation_dtype))
    dev = device()
    dev.module.embed(address(ids), table.handle, address(y), len(ids), type_of(y), dev.stream())
    return y


def rms_norm(x: Tensor, weight: Any, eps: float) -> Tensor:
    weight = vector(weight)
    check("rms_norm", "x", x, [None, None], ACTIVATION_DTYPES)
    check("rms_norm", "weight", weight, [x.shape[1]], ["float32"])
    y, dev = new(x.shape, x.dtype), device()
    dev.module.rms_norm(address(x), address(weight), address(y), *x.shape, eps, type_of(x), dev.stream())
    return y


def rms_norm_pair(a: Tensor, a_weight: Any, b: Tensor, b_weight: Any, eps: float) -> Tensor:
    a_weight, b_weight = vector(a_weight), vector(b_weight)
    check("rms_norm_pair", "a", a, [None, None], ACTIVATION_DTYPES)
    check("rms_norm_pair", "b", b, [a.shape[0], a.shape[1]], [str(a.dtype).removeprefix("torch.")])
    for name, weight in (("a_weight", a_weight), ("b_weight", b_weight)):
        check("rms_norm_pair", name, weight, [a.shape[1]], ["float32"])
    T, D = a.shape
    y, dev = new([T, 2 * D], a.dtype), device()
    dev.module.rms_norm_pair(
        address(a), address(a_weight), address(b), address(b_weight), address(y), T, D, eps, type_of(a), dev.stream()
    )
    return y


def layer_norm(x: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    weight, bias = vector(weight), vector(bias)
    check("layer_norm", "x", x, [None, None], ACTIVATION_DTYPES)
    check("layer_norm", "weight", weight, [x.shape[1]], ["float32"])
    check("layer_norm", "bias", bias, [x.shape[1]], ["float32"])
    y, dev = new(x.shape, x.dtype), device()
    dev.module.layer_norm(
        address(x), address(weight), address(bias), address(y), *x.shape, eps, type_of(x), dev.stream()
    )
    return y


def linear(
    x: Tensor,
    w: Weight,
    *,
    norm: Any = None,
    eps: float = 1e-6,
    bias: Any = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    import torch

    if w.glu or w.count != 1:
        raise ArgumentError(f"linear: w must be a pack() of [N, K], found shape {w.shape}, glu {w.glu}")
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"linear: unknown activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    N, K = w.shape
    check("linear", "x", x, [None, K], ACTIVATION_DTYPES)
    norm, bias = vector(norm), vector(bias)
    for name, value, n in (("norm", norm, K), ("bias", bias, N)):
        if value is not None:
            check("linear", name, value, [n], ["float32"])
    if residual is not None:
        check("linear", "residual", residual, [x.shape[0], N], [str(x.dtype).removeprefix("torch.")])
    kind = ACTIVATIONS.index(activation)
    if x.shape[0] <= FEW:
        return _gemv(x, w, N, norm, eps, bias, kind, residual, w.float_output)
    y = _product(x if norm is None else rms_norm(x, norm, eps), w)
    if bias is not None or kind or residual is not None:
        product, y, dev = y, new(y.shape, x.dtype), device()
        dev.module.epilogue(
            address(product), address(bias), kind, address(residual), address(y), *y.shape, type_of(x), dev.stream()
        )
    return copy(y, torch.float32) if w.float_output else y


def swiglu(x: Tensor, w: Weight, *, norm: Any = None, eps: float = 1e-6) -> Tensor:
    if not w.glu or w.count != 1:
        raise ArgumentError(f"swiglu: w must be a pack_glu() of [I, K], found shape {w.shape}, glu {w.glu}")
    check("swiglu", "x", x, [None, w.shape[1]], ACTIVATION_DTYPES)
    norm, inner = vector(norm), w.shape[0] // 2
    if norm is not None:
        check("swiglu", "norm", norm, [w.shape[1]], ["float32"])
    if x.shape[0] <= FEW:
        return _gemv(x, w, inner, norm, eps, None, 0, None)
    product = _product(x if norm is None else rms_norm(x, norm, eps), w)
    y, dev = new([x.shape[0], inner], x.dtype), device()
    dev.module.glu(address(product), address(y), x.shape[0], inner, type_of(x), dev.stream())
    return y


def _gemv(
    x: Tensor, w: Weight, N: int, norm: Tensor | None, eps: float, bias: Tensor | None, kind: int,
    residual: Tensor | None, float_output: bool = False,
) -> Tensor:  # fmt: skip
    import torch

    y, dev = new([x.shape[0], N], torch.float32 if float_output else x.dtype), device()
    dev.module.linear(
        address(x), w.handle, address(norm), eps, address(bias), kind, address(residual), address(y),
        x.shape[0], type_of(x), int(float_output), dev.stream(),
    )  # fmt: skip
    return y


def _product(h: Tensor, w: Weight) -> Tensor:
    """h W^T through cuBLAS; parts in another format than h's are dequantised a tile of rows at a time."""
    import torch

    dev = device()
    dev.stream()
    y = new([h.shape[0], sum(part.rows for part in w.parts)], h.dtype)
    first = 0
    for i, part in enumerate(w.parts):
        if part.q.dtype == h.dtype:
            torch.mm(h, part.q[:, : part.columns].T, out=y[:, first : first + part.rows])
        else:
            tile = max(1, DEQUANTISED_BYTES // (part.columns * h.element_size()))
            room = new([min(tile, part.rows), part.columns], h.dtype)
            for row in range(0, part.rows, tile):
                n = min(tile, part.rows - row)
                dev.module.dequantise(w.handle, i, row, n, address(room), type_of(h), dev.stream())
                torch.mm(h, room[:n].T, out=y[:, first + row : first + row + n])
        first += part.rows
    return y


# --------------------------------------------------------------------------------------------- the two kinds of mixer


def gated_delta_net(
    proj: Tensor,
    conv_weight: Any,
    A_log: Any,
    dt_bias: Any,
    norm: Any,
    *,
    eps: float,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    cu_seqlens: Any,
    conv_states: Any,
    states: Any,
    trace: Tensor | Pointers | None = None,
) -> Tensor:
    import torch

    op, Hk, Dk, Dv = "gated_delta_net", num_k_heads, head_k_dim, head_v_dim
    conv_weight, A_log, dt_bias, norm = map(vector, (conv_weight, A_log, dt_bias, norm))
    Hv = A_log.shape[0]
    C = 2 * Hk * Dk + Hv * Dv
    check(op, "proj", proj, [None, C + Hv * Dv + 2 * Hv], ACTIVATION_DTYPES)
    for name, value, shape in (
        ("conv_weight", conv_weight, [4, C]), ("A_log", A_log, [Hv]), ("dt_bias", dt_bias, [Hv]), ("norm", norm, [Dv]),
    ):  # fmt: skip
        check(op, name, value, shape, ["float32"])
    T, B, longest = _lengths(op, cu_seqlens, proj.shape[0])
    conv = pointers(op, "conv_states", conv_states, [3, C], shared=True)
    state = pointers(op, "states", states, [Hv, Dk, Dv], shared=True)
    dev = device()
    c, o = new([T, C], torch.float32), new([T, Hv * Dv], torch.float32)
    chunks, traced = None, None
    if trace is not None:
        traced = pointers(op, "trace", [trace], [T, C + Hk * Dk + Hv * Dv + Hv], shared=True)
        if longest > MAX_TRACED:
            raise ArgumentError(f"{op}: with a trace, a sequence may have at most {MAX_TRACED} rows")
    elif longest > DELTA_FEW:
        chunks = new([dev.module.gated_delta_net_chunk_floats(Hv, Dk, Dv, B, longest)], torch.float32)
    y = new([T, Hv * Dv], proj.dtype)
    dev.module.gated_delta_net(
        address(proj), address(conv_weight), address(A_log), address(dt_bias), address(norm), eps, Hk, Hv, Dk, Dv,
        address(small(cu_seqlens)), address(conv.addresses), conv.offset, address(state.addresses), state.offset,
        address(c), address(o), address(chunks), 0 if traced is None else address(traced.addresses),
        0 if traced is None else traced.offset, address(y), T, B, longest, type_of(proj), dev.stream(),
    )  # fmt: skip
    return y


def gated_delta_net_commit(
    trace: Tensor | Pointers,
    *,
    num_k_heads: int,
    cu_seqlens: Any,
    counts: Any,
    conv_states: Sequence[Tensor | Pointers],
    states: Sequence[Tensor | Pointers],
) -> None:
    op, Hk = "gated_delta_net_commit", num_k_heads
    if not states:
        return
    L, Hv, Dk, Dv = states[0].shape
    C = 2 * Hk * Dk + Hv * Dv
    traced = pointers(op, "trace", [trace], [L, None, C + Hk * Dk + Hv * Dv + Hv])
    T, B, _ = _lengths(op, cu_seqlens, trace.shape[1])
    if isinstance(counts, np.ndarray):
        for b, (n, rows) in enumerate(zip(counts.tolist(), np.diff(cu_seqlens).tolist(), strict=True)):
            if not 0 <= n <= rows:
                raise ArgumentError(f"{op}: counts[{b}] is {n}, expected 0 to the {rows} rows of the sequence")
    conv, state = pointers(op, "conv_states", conv_states, [L, 3, C]), pointers(op, "states", states, [L, Hv, Dk, Dv])
    dev = device()
    dev.module.gated_delta_net_commit(
        address(traced.addresses), Hk, Hv, Dk, Dv, address(small(cu_seqlens)), address(small(counts)),
        address(conv.addresses), address(state.addresses), L, T, B, dev.stream(),
    )  # fmt: skip


def _lengths(op: str, cu_seqlens: Any, T: int) -> tuple[int, int, int]:
    """(T, B, a bound on the longest sequence). Lengths that are on the device belong to a graph, and are not known: it
    has few rows, which all sequences may have together."""
    if isinstance(cu_seqlens, np.ndarray):
        counts = np.diff(cu_seqlens)
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != T or (counts < 0).any():
            raise ArgumentError(f"{op}: cu_seqlens is {cu_seqlens.tolist()}, expected numbers rising from 0 to {T}")
        return T, len(counts), int(counts.max()) if len(counts) else 0
    if T > FEW:
        raise ArgumentError(f"{op}: {T} rows of sequences whose lengths are on the device, expected {FEW} at most")
    return T, int(cu_seqlens.shape[0]) - 1, T


def gated_attention(
    proj: Tensor,
    q_norm: Any,
    k_norm: Any,
    cos: Any,
    sin: Any,
    *,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    layer: int,
    cu_seqlens: Any,
    starts: Any,
    tables: Any,
    prefill: bool = False,
) -> Tensor:
    """`tables`: a list of BlockTables, or (in graphs) of one TableBatch. `prefill` changes nothing: the form follows
    from the longest sequence alone."""
    import torch

    op, Hq, Hkv = "gated_attention", num_heads, num_kv_heads
    q_norm, k_norm = vector(q_norm), vector(k_norm)
    D = q_norm.shape[0]
    check(op, "proj", proj, [None, 2 * (Hq + Hkv) * D], ACTIVATION_DTYPES)
    check(op, "k_norm", k_norm, [D], ["float32"])
    T, B, longest = _lengths(op, cu_seqlens, proj.shape[0])
    batch = tables[0] if len(tables) == 1 and isinstance(tables[0], TableBatch) else TableBatch.of(tables)
    if T == 0:
        return new([0, Hq * D], proj.dtype)
    layers, _, heads, block_tokens, width = batch.block_shape
    if (heads, width) != (Hkv, D) or not 0 <= layer < layers:
        raise ArgumentError(f"{op}: blocks are {batch.block_shape}, expected [>{layer}, 2, {Hkv}, _, {D}]")
    if isinstance(starts, np.ndarray):
        for start, n, room in zip(starts, np.diff(cu_seqlens), batch.rooms, strict=True):
            if start < 0 or start + n > room * block_tokens:
                raise ArgumentError(f"{op}: token {start + n - 1} is beyond the {room} blocks of {block_tokens} tokens")
    cos, sin = small(cos, np.float32), small(sin, np.float32)
    check(op, "cos", cos, [T, None], ["float32"])
    check(op, "sin", sin, [T, cos.shape[1]], ["float32"])
    per_token = longest <= FEW
    splits = SPLITS if per_token else PREFILL_SPLITS
    dev = device()
    q = new([T, Hq, D], batch.dtype)
    sums, stats = new([T, Hq, splits, D], torch.float32), new([T, Hq, splits, 2], torch.float32)
    y = new([T, Hq * D], proj.dtype)
    dev.module.gated_attention(
        address(proj), address(q_norm), address(k_norm), address(cos), address(sin), eps, Hq, Hkv, D, cos.shape[1],
        address(small(cu_seqlens)), address(small(starts)), address(batch.addresses), batch.addresses.shape[1],
        layer, block_tokens, address(q), address(sums), address(stats), splits, int(per_token), address(y), T, B,
        longest, type_of(proj), 1 if batch.dtype == torch.bfloat16 else 0, dev.stream(),
    )  # fmt: skip
    return y


# --------------------------------------------------------------------------------------------------- mixture of experts


def moe(
    x: Tensor,
    router: Weight,
    gate_up: Weight,
    down: Weight,
    shared_gate_up: Weight,
    shared_down: Weight,
    shared_gate: Weight,
    *,
    top_k: int,
    norm: Any,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    import torch

    if not (gate_up.glu and shared_gate_up.glu):
        raise ArgumentError("moe: gate_up and shared_gate_up must come from pack_glu()")
    T, H = x.shape
    E = router.shape[0]
    check("moe", "x", x, [None, router.shape[1]], ACTIVATION_DTYPES)
    norm = vector(norm)
    check("moe", "norm", norm, [H], ["float32"])
    if gate_up.count != E or down.count != E or not 1 <= top_k <= E:
        raise ArgumentError(
            f"moe: {E} routes, {gate_up.count} and {down.count} experts, top_k {top_k}; they do not fit"
        )
    if residual is not None:
        check("moe", "residual", residual, [T, H], [str(x.dtype).removeprefix("torch.")])
    if T == 0:
        return new([0, H], x.dtype)
    dev = device()
    stream = dev.stream()
    logits = _gemv(x, _routes(router, shared_gate), E + 1, norm, eps, None, 0, None, float_output=True)
    experts, coefficients = new([T, top_k], torch.int64), new([T, top_k + 1], torch.float32)
    dev.module.moe_route(address(logits), E, top_k, address(experts), address(coefficients), T, stream)
    y = new([T, H], x.dtype)
    if T <= FEW or x.dtype == torch.float32:
        pitch = max(gate_up.shape[-2], shared_gate_up.shape[0]) // 2
        activation = new([T, top_k + 1, pitch], torch.float32)
        dev.module.moe_few(
            address(x), address(norm), eps, gate_up.handle, down.handle, shared_gate_up.handle, shared_down.handle,
            address(experts), address(coefficients), top_k, address(residual), address(activation), pitch,
            address(y), T, type_of(x), stream,
        )  # fmt: skip
        return y
    h = rms_norm(x, norm, eps)
    shared = linear(swiglu(h, shared_gate_up), shared_down)
    entries, inner = T * top_k, gate_up.shape[-2] // 2
    room = dev.module.moe_max_tiles(entries, E)
    order, tiles = new([entries], torch.int64), new([room, 3], torch.int64)
    dev.module.moe_group(address(experts), entries, E, address(order), address(tiles), room, stream)
    pitch = -(-inner // 8) * 8
    activation = new([entries, pitch], x.dtype)
    if pitch != inner:
        activation.zero_()
    rows = h if H % 8 == 0 else _padded(h)
    dev.module.moe_grouped(
        address(rows), rows.shape[1], top_k, gate_up.handle, address(order), address(tiles), room,
        address(activation), pitch, stream,
    )  # fmt: skip
    routed = new([entries, H], x.dtype)
    dev.module.moe_grouped(
        address(activation), pitch, 1, down.handle, address(order), address(tiles), room, address(routed), H, stream
    )
    dev.module.moe_scatter(
        address(routed), address(shared), address(coefficients), top_k, address(residual), address(y), T, H, stream
    )
    return y


def _padded(h: Tensor) -> Tensor:
    """Rows of h with zeros up to a multiple of 8 columns."""
    wide = new([h.shape[0], -(-h.shape[1] // 8) * 8], h.dtype).zero_()
    wide[:, : h.shape[1]] = h
    return wide


def _routes(router: Weight, shared_gate: Weight) -> Weight:
    """The router and the shared expert's gate as one weight [E + 1, H]; made once, nothing is copied."""
    if router.joined is None or router.joined[0] is not shared_gate:
        router.joined = (shared_gate, Weight([*router.parts, *shared_gate.parts], 1, False))
    return router.joined[1]


# --------------------------------------------------------------------------------------------------------- vision tower


def patch_embed(
    image: Any,
    weight: Weight,
    bias: Any,
    pos_embed: Any,
    *,
    patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    import torch

    p, m = patch_size, merge_size
    if isinstance(image, np.ndarray):
        image = upload(image)
    check("patch_embed", "image", image, [None, None, 3], ["uint8"])
    grid_h, grid_w = image.shape[0] // p, image.shape[1] // p
    if image.shape[:2] != (grid_h * p, grid_w * p) or grid_h % m or grid_w % m or 0 in image.shape:
        raise ArgumentError(f"patch_embed: image is {tuple(image.shape)}, expected [h, w, 3] in multiples of {p * m}")
    pos_embed = vector(pos_embed)
    V, side = weight.shape[0], math.isqrt(pos_embed.shape[0])
    check("patch_embed", "pos_embed", pos_embed, [side * side, V], ["float32"])
    dev = device()
    x = new([grid_h * grid_w, 3 * p * p], getattr(torch, weight.activation_dtype))
    kind = type_of(x)
    dev.module.patches(
        address(image), grid_h, grid_w, p, m, *map(float, mean), *map(float, std), address(x), kind, dev.stream()
    )
    y = linear(x, weight, bias=bias)
    dev.module.add_positions(address(pos_embed), side, grid_h, grid_w, m, address(y), V, kind, dev.stream())
    return y


def vision_attention(
    qkv: Tensor, cos: Any, sin: Any, *, num_heads: int, cu_seqlens: Any, rounded: bool = False
) -> Tensor:
    import torch

    P, V = qkv.shape[0], qkv.shape[1] // 3
    d = V // num_heads
    cos, sin = small(cos, np.float32), small(sin, np.float32)
    check("vision_attention", "qkv", qkv, [None, 3 * num_heads * d], ACTIVATION_DTYPES)
    check("vision_attention", "cos", cos, [P, d // 2], ["float32"])
    check("vision_attention", "sin", sin, [P, d // 2], ["float32"])
    _, segments, longest = _lengths("vision_attention", cu_seqlens, P)
    dev = device()
    rotated = new([3, num_heads, P, d], qkv.dtype)
    sums, stats = new([P, num_heads, d], torch.float32), new([P, num_heads, 2], torch.float32)
    y = new([P, V], qkv.dtype)
    dev.module.vision_attention(
        address(qkv), address(cos), address(sin), address(small(cu_seqlens)), segments, longest, address(rotated),
        address(sums), address(stats), address(y), P, num_heads, d, type_of(qkv), dev.stream(),
    )  # fmt: skip
    return y


# ------------------------------------------------------------------------------------------------- beside the operators


def activations(rows: np.ndarray, table: Weight) -> Tensor:
    """float32 rows [T, H] of the host in the activation dtype of a model whose embedding table is `table`."""
    import torch

    return copy(upload(rows), getattr(torch, table.activation_dtype))


def wait() -> None:
    """Return when the device has done everything that it was given."""
    device().wait()


def checksum(data: np.ndarray, first: int = 0) -> int:
    """The checksum of bytes in the host's memory, as ops/cpu.py has it."""
    from . import cpu

    return cpu.checksum(data, first)


def concatenate(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Several tensors, one after another along `axis`."""
    import torch

    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    device().stream()
    return torch.cat(list(parts), dim=axis, out=new(shape, parts[0].dtype))
