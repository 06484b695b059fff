"""The operators on an NVIDIA GPU: same names and arguments as `reference.py`, which says what each computes.

Activations are contiguous torch tensors on the GPU, bfloat16 (or float32, for models loaded as "f32"); vectors such as norms may be
numpy arrays, which are uploaded once. torch owns memory, streams, cuBLAS and graph capture; the extension `_cuda` gets addresses
and launches kernels. Small batches (`FEW` rows: decoding, verification) run kernels that give a row the same bits whatever its
batch; larger ones multiply with cuBLAS on bfloat16 weights, or on tiles that are dequantised as needed.

torch is imported when the first function runs, never by importing this module.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from ..errors import ArgumentError, DeviceError
from .layout import merge_order

if TYPE_CHECKING:
    import torch

__all__ = [
    "BlockTable", "Pointers", "Weight", "embed", "gated_attention", "gated_delta_net", "isa", "layer_norm", "linear",
    "concatenate", "copy_from_host", "log_softmax_top", "moe", "num_threads", "pack", "pack_glu", "patch_embed", "place", "rms_norm",
    "require_memory", "rope_table", "sample", "set_num_threads", "swiglu", "to_numpy", "upload", "vision_attention", "zeros",
]  # fmt: skip

Tensor = Any  # torch.Tensor; torch is imported late
FORMATS = ("f32", "bf16", "int8", "int4")
ACTIVATIONS = ("none", "gelu_tanh", "gelu_erf")  # order of enum Activation in csrc/cuda/common.cuh
FEW = 16  # rows up to which every row is computed as if it were alone
DELTA_FEW = 16  # the same for the tokens of one sequence in the delta rule
SPLITS, PREFILL_SPLITS = 128, 4  # into which the keys of attention are dealt
RUN = 128  # columns that share one scale in int8 and int4
DEQUANTISED_BYTES = 64 << 20  # of one tile of a quantised matrix on its way to cuBLAS
_threads = 1
device_resident = True  # arrays of this op set live on a device: generation decodes through model/graph.py


# ----------------------------------------------------------------------------------------------------------- the device


class Device(Protocol):
    """Where the kernels run: the compiled module, the torch device, and how memory is made."""

    module: Any
    torch_device: Any

    def stream(self) -> int: ...
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...


class _Cuda:
    """The GPU."""

    def __init__(self) -> None:
        from .cuda_device import open_device

        self.module, self.torch_device = open_device()

    def stream(self) -> int:
        import torch

        return int(torch.cuda.current_stream(self.torch_device).cuda_stream)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        import torch

        return torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)


_device: Device | None = None


def device() -> Device:
    """The device in use, opened on first call. Raises DeviceError if there is none that can be used."""
    global _device
    if _device is None:
        _device = _Cuda()
    return _device


def use_device(new: Device | None) -> None:
    """Compute on `new` from now on (tests: the emulator); None: open the GPU again when needed."""
    global _device
    _device = new
    _vectors.clear()
    _recent.clear()


def set_num_threads(n: int) -> None:
    """Remember `n` >= 1; the host threads of this process do no arithmetic here."""
    global _threads
    if n < 1:
        raise ArgumentError(f"set_num_threads: n is {n}, expected at least 1")
    _threads = int(n)


def num_threads() -> int:
    """The number last given to `set_num_threads` (1 at first)."""
    return _threads


def isa() -> str:
    """The compute capability in use, such as "sm_90"; "emulated" in tests."""
    dev = device()
    if dev.module.emulated:
        return "emulated"
    import torch

    major, minor = torch.cuda.get_device_capability(dev.torch_device)
    return f"sm_{major}{minor}"


def zeros(shape: Sequence[int], dtype: Any) -> Tensor:
    """A zeroed tensor on the device; dtype np.float32, or np.uint16 for bfloat16. MemoryError if the card is full."""
    import torch

    kind = torch.float32 if np.dtype(dtype) == np.float32 else torch.bfloat16
    try:
        return _new(shape, kind).zero_()
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(str(error)) from None


def to_numpy(x: Tensor) -> np.ndarray:
    """A float32 copy in the host's memory; waits for the device."""
    return x.float().cpu().numpy()


def require_memory(nbytes: int) -> None:
    """DeviceError if the card has not `nbytes` free."""
    import torch

    from .cuda_device import require_memory as require

    dev = device()
    if not dev.module.emulated:
        require(nbytes, torch, dev.torch_device)


def place(weights: Any, dtype: str) -> Any:
    """A dataclass of model/weights.py with its numpy arrays moved to the device, for a model loaded as `dtype`.

    Matrices that are stored in another format than the others (patches: always f32) get the model's activation dtype,
    and the head of a decoder returns float32 logits."""
    if isinstance(weights, np.ndarray):
        return upload(weights)
    if isinstance(weights, list):
        return [place(item, dtype) for item in weights]
    if isinstance(weights, Weight):
        weights.activation_dtype = "float32" if dtype == "f32" else "bfloat16"
    elif dataclasses.is_dataclass(weights) and not isinstance(weights, type):
        values = {field.name: place(getattr(weights, field.name), dtype) for field in dataclasses.fields(weights)}
        weights = dataclasses.replace(weights, **values)
        if hasattr(weights, "head"):
            weights.head.float_output = True
    return weights


def _new(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return device().empty(shape, dtype)


def upload(array: np.ndarray) -> Tensor:
    """A copy of a numpy array on the device, in the dtype of the same name (bfloat16 included)."""
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        host = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    elif array.dtype == np.uint16:
        host = torch.from_numpy(array.view(np.int16))
    else:
        host = torch.from_numpy(array if array.flags.writeable else array.copy())
    return _new(host.shape, host.dtype).copy_(host)


_vectors: dict[int, tuple[weakref.ref[np.ndarray], Tensor]] = {}
_recent: list[tuple[np.ndarray, Tensor]] = []


def _vector(value: Any) -> Tensor:
    """A float32 vector or matrix on the device: a tensor as it is, a numpy array uploaded once while it lives."""
    if not isinstance(value, np.ndarray):
        return value
    known = _vectors.get(id(value))
    if known is not None and known[0]() is value:
        return known[1]
    key = id(value)
    tensor = upload(value.astype(np.float32, copy=False))
    _vectors[key] = (weakref.ref(value, lambda _: _vectors.pop(key, None)), tensor)
    return tensor


def _small(value: Any, dtype: Any = np.int64) -> Tensor:
    """Numbers of one call (lengths, positions, tables) on the device; layers that pass equal ones share the upload."""
    if not isinstance(value, np.ndarray):
        return value
    value = np.ascontiguousarray(value, dtype)
    for known, tensor in _recent:
        if known.dtype == value.dtype and known.shape == value.shape and np.array_equal(known, value):
            return tensor
    tensor = upload(value)
    _recent.insert(0, (value.copy(), tensor))
    del _recent[16:]
    return tensor


def _type(x: Tensor) -> int:
    import torch

    return 1 if x.dtype == torch.bfloat16 else 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else int(tensor.data_ptr())


def _check(op: str, name: str, value: Any, shape: Sequence[int | None], dtypes: Sequence[str]) -> None:
    """ArgumentError unless `value` is a contiguous tensor on the device, of this shape (None: any) and one of these dtypes."""
    import torch

    wanted = f"{' or '.join(dtypes)}[{','.join('_' if n is None else str(n) for n in shape)}]"
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(f"{op}: {name} is a {type(value).__name__}, expected a torch tensor {wanted}")
    found = f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
    fits = value.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, value.shape, strict=False))
    if not fits or str(value.dtype).removeprefix("torch.") not in dtypes:
        raise ArgumentError(f"{op}: {name} is {found}, expected {wanted}")
    if value.device.type != torch.device(device().torch_device).type:
        raise ArgumentError(f"{op}: {name} is on {value.device}, expected {device().torch_device}")
    if not value.is_contiguous():
        raise ArgumentError(f"{op}: {name} is not contiguous; call .contiguous() on it")


ACTIVATION_DTYPES = ("float32", "bfloat16")


# ------------------------------------------------------------------------------------------------- weights, K/V, states


class Weight:
    """A packed matrix [N, K], or E matrices [E, N, K]; layouts in csrc/cuda/weight.cuh. Holds its device memory."""

    def __init__(self, parts: list[_Part], count: int, glu: bool):
        self.parts, self.count, self.glu = parts, count, glu
        rows, columns = sum(part.rows for part in parts), parts[0].columns
        self.shape: tuple[int, ...] = (rows, columns) if count == 1 else (count, rows, columns)
        self.dtype = parts[0].format
        self.activation_dtype = (
            "float32" if self.dtype == "f32" else "bfloat16"
        )  # of what `embed`, `patch_embed` return
        self.float_output = False  # `linear` returns float32: a head
        self.joined: tuple[Weight, Weight] | None = (
            None  # of a router: the shared gate it was joined with, and the result
        )
        self.nbytes = sum(t.numel() * t.element_size() for part in parts for t in part.tensors)
        described = [(p.format, p.rows, p.columns, p.stride, *map(_address, (p.q, p.s, p.d))) for p in parts]
        self.handle = device().module.Matrices(described, count, glu)


@dataclasses.dataclass(slots=True)
class _Part:
    format: str
    rows: int
    columns: int
    stride: int
    q: Tensor  # f32, bf16: [E*N, stride] numbers; int8, int4: uint8 [E*N, bytes]
    s: Tensor | None = None
    d: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.q, self.s, self.d) if t is not None]


def pack(parts: Sequence[np.ndarray], dtype: str | Sequence[str]) -> Weight:
    """Packs matrices [N_i, K] (or [E, N_i, K]) that read the same input, each in its format, into one weight."""
    formats = [dtype] * len(parts) if isinstance(dtype, str) else list(dtype)
    if not parts or len(formats) != len(parts):
        raise ArgumentError(f"pack: {len(parts)} parts, {len(formats)} formats; expected as many of each, at least one")
    made = [_pack_part(np.asarray(part), format) for part, format in zip(parts, formats, strict=True)]
    return Weight(made, parts[0].shape[0] if parts[0].ndim == 3 else 1, False)


def pack_glu(gate: np.ndarray, up: np.ndarray, dtype: str) -> Weight:
    """Packs gate and up [I, K] (or [E, I, K]) into (2I, K) or (E, 2I, K), gate rows first, for `swiglu` and `moe`."""
    if gate.shape != up.shape:
        raise ArgumentError(f"pack_glu: gate is {gate.shape} and up is {up.shape}, expected equal shapes")
    joined = np.concatenate([gate, up], axis=-2)
    return Weight([_pack_part(joined, dtype)], gate.shape[0] if gate.ndim == 3 else 1, True)


def _pack_part(part: np.ndarray, format: str) -> _Part:
    if format not in FORMATS:
        raise ArgumentError(f"pack: unknown weight format {format!r}, expected one of {', '.join(FORMATS)}")
    if part.ndim not in (2, 3) or 0 in part.shape:
        raise ArgumentError(f"pack: a part is {part.shape}, expected [N, K] or [E, N, K], none of them 0")
    rows, columns = part.shape[-2:]
    flat = part.reshape(-1, columns)
    if format in ("int8", "int4"):
        return _quantise(flat, format, rows)
    stride = -(-columns // 8) * 8
    kind = np.float32 if format == "f32" else ml_dtypes.bfloat16
    padded = flat.astype(kind)
    if stride != columns:
        padded = np.concatenate([padded, np.zeros((len(flat), stride - columns), kind)], axis=1)
    return _Part(format, rows, columns, stride, upload(padded))


def _quantise(flat: np.ndarray, format: str, rows: int) -> _Part:
    """Quantises with the CPU's packer, so that both devices hold the same numbers, and lays its blocks out for the GPU."""
    from . import cpu

    packed = cpu.pack([flat], format).arrays[0]
    return from_cpu_blocks(packed, format, len(flat), flat.shape[1], rows)


def from_cpu_blocks(packed: np.ndarray, format: str, total_rows: int, columns: int, rows: int) -> _Part:
    """A part from the CPU's packed bytes (csrc/core/view.h) of an int8 or int4 matrix [total_rows, columns].

    The blocks must be those of one plain matrix: no gated pairs of blocks. `rows`: rows of each expert.
    """
    runs, blocks = -(-columns // RUN), -(-total_rows // 16)
    raw = packed.reshape(blocks, -1)
    if format == "int8":
        q = raw[:, : runs * 2048].reshape(blocks, runs * 32, 16, 4).transpose(0, 2, 1, 3).reshape(blocks * 16, -1)
        s, rest = None, raw[:, runs * 2048 :]
    else:
        q = raw[:, : runs * 1024].reshape(blocks, runs * 16, 16, 4).transpose(0, 2, 1, 3).reshape(blocks * 16, -1)
        scales = raw[:, runs * 1024 : runs * 1088].reshape(blocks, runs * 4, 16)
        s = scales.transpose(0, 2, 1).reshape(blocks * 16, -1)
        rest = raw[:, runs * 1088 :]
    d = np.ascontiguousarray(rest).view(np.uint16).reshape(blocks, runs, 16).transpose(0, 2, 1).reshape(blocks * 16, -1)
    return _Part(
        format, rows, columns, runs * RUN, upload(q[:total_rows]),
        None if s is None else upload(s[:total_rows]), upload(d[:total_rows]),
    )  # fmt: skip


class BlockTable:
    """The K/V blocks of one sequence: tensors [L_attn, 2, Hkv, BLOCK, D], float32 or bfloat16, all alike."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def append(self, block: Tensor) -> None:
        self.blocks.append(self._checked(block))

    def replace(self, i: int, block: Tensor) -> None:
        if not 0 <= i < len(self.blocks):
            raise ArgumentError(f"BlockTable: block {i} of {len(self.blocks)} does not exist")
        self.blocks[i] = self._checked(block)

    def _checked(self, block: Tensor) -> Tensor:
        _check("BlockTable", "block", block, [None, 2, None, None, None], ACTIVATION_DTYPES)
        if self.blocks and (block.shape, block.dtype) != (self.blocks[0].shape, self.blocks[0].dtype):
            first = self.blocks[0]
            raise ArgumentError(
                f"BlockTable: block is {block.dtype}{tuple(block.shape)}, the others are {first.dtype}{tuple(first.shape)}"
            )
        return block


@dataclasses.dataclass(slots=True)
class Pointers:
    """Instead of a list of state tensors: their addresses in device memory, int64 [B], and an offset in elements.

    A captured graph reads them when it runs, so one graph serves any sequence."""

    addresses: Tensor
    offset: int = 0


def _pointers(op: str, name: str, states: Any, shape: Sequence[int]) -> Pointers:
    if isinstance(states, Pointers):
        return states
    if len(states) == 1 and isinstance(states[0], Pointers):
        return states[0]
    for state in states:
        _check(op, name, state, shape, ["float32"])
    return Pointers(_small(np.array([_address(state) for state in states], np.int64)))


# ------------------------------------------------------------------------------------------------------ dense operators


def embed(ids: Any, table: Weight) -> Tensor:
    """ids int64 [T] (numpy, or a tensor on the device) -> [T, H] in the activation dtype of the table's format."""
    import torch

    if isinstance(ids, np.ndarray) and ids.size and not (ids.min() >= 0 and ids.max() < table.shape[0]):
        raise ArgumentError(f"embed: token ids span {ids.min()}..{ids.max()}, expected 0..{table.shape[0] - 1}")
    ids = _small(ids)
    y = _new([len(ids), table.shape[1]], getattr(torch, table.activation_dtype))
    dev = device()
    dev.module.embed(_address(ids), table.handle, _address(y), len(ids), _type(y), dev.stream())
    return y


def rms_norm(x: Tensor, weight: Any, eps: float) -> Tensor:
    weight = _vector(weight)
    _check("rms_norm", "x", x, [None, None], ACTIVATION_DTYPES)
    _check("rms_norm", "weight", weight, [x.shape[1]], ["float32"])
    y, dev = _new(x.shape, x.dtype), device()
    dev.module.rms_norm(_address(x), _address(weight), _address(y), *x.shape, eps, _type(x), dev.stream())
    return y


def layer_norm(x: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    weight, bias = _vector(weight), _vector(bias)
    _check("layer_norm", "x", x, [None, None], ACTIVATION_DTYPES)
    _check("layer_norm", "weight", weight, [x.shape[1]], ["float32"])
    _check("layer_norm", "bias", bias, [x.shape[1]], ["float32"])
    y, dev = _new(x.shape, x.dtype), device()
    dev.module.layer_norm(
        _address(x), _address(weight), _address(bias), _address(y), *x.shape, eps, _type(x), dev.stream()
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
    if w.glu or w.count != 1:
        raise ArgumentError(f"linear: w must be a pack() of [N, K], found shape {w.shape}, glu {w.glu}")
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"linear: unknown activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    N, K = w.shape
    _check("linear", "x", x, [None, K], ACTIVATION_DTYPES)
    norm, bias = _vector(norm), _vector(bias)
    for name, value, n in (("norm", norm, K), ("bias", bias, N)):
        if value is not None:
            _check("linear", name, value, [n], ["float32"])
    if residual is not None:
        _check("linear", "residual", residual, [x.shape[0], N], [str(x.dtype).removeprefix("torch.")])
    kind = ACTIVATIONS.index(activation)
    if x.shape[0] <= FEW:
        return _gemv(x, w, N, norm, eps, bias, kind, residual, w.float_output)
    product = _product(x if norm is None else rms_norm(x, norm, eps), w)
    if w.float_output:
        product = product.float()
    if bias is None and kind == 0 and residual is None:
        return product
    y, dev = _new(product.shape, x.dtype), device()
    dev.module.epilogue(
        _address(product), _address(bias), kind, _address(residual), _address(y), *product.shape, _type(x), dev.stream()
    )
    return y


def swiglu(x: Tensor, w: Weight, *, norm: Any = None, eps: float = 1e-6) -> Tensor:
    if not w.glu or w.count != 1:
        raise ArgumentError(f"swiglu: w must be a pack_glu() of [I, K], found shape {w.shape}, glu {w.glu}")
    _check("swiglu", "x", x, [None, w.shape[1]], ACTIVATION_DTYPES)
    norm, inner = _vector(norm), w.shape[0] // 2
    if norm is not None:
        _check("swiglu", "norm", norm, [w.shape[1]], ["float32"])
    if x.shape[0] <= FEW:
        return _gemv(x, w, inner, norm, eps, None, 0, None)
    product = _product(x if norm is None else rms_norm(x, norm, eps), w)
    y, dev = _new([x.shape[0], inner], x.dtype), device()
    dev.module.glu(_address(product), _address(y), x.shape[0], inner, _type(x), dev.stream())
    return y


def _gemv(
    x: Tensor, w: Weight, N: int, norm: Tensor | None, eps: float, bias: Tensor | None, kind: int,
    residual: Tensor | None, float_output: bool = False,
) -> Tensor:  # fmt: skip
    import torch

    y, dev = _new([x.shape[0], N], torch.float32 if float_output else x.dtype), device()
    dev.module.linear(
        _address(x), w.handle, _address(norm), eps, _address(bias), kind, _address(residual), _address(y),
        x.shape[0], _type(x), int(float_output), dev.stream(),
    )  # fmt: skip
    return y


def _product(h: Tensor, w: Weight) -> Tensor:
    """h W^T through cuBLAS; parts in another format than h's are dequantised a tile of rows at a time."""
    import torch

    dev = device()
    only = w.parts[0]
    if len(w.parts) == 1 and only.q.dtype == h.dtype:
        return torch.matmul(h, only.q[:, : only.columns].T)
    y = _new([h.shape[0], sum(part.rows for part in w.parts)], h.dtype)
    first = 0
    for i, part in enumerate(w.parts):
        if part.q.dtype == h.dtype:
            y[:, first : first + part.rows] = torch.matmul(h, part.q[:, : part.columns].T)
        else:
            tile = max(1, DEQUANTISED_BYTES // (part.columns * h.element_size()))
            room = _new([min(tile, part.rows), part.columns], h.dtype)
            for row in range(0, part.rows, tile):
                n = min(tile, part.rows - row)
                dev.module.dequantise(w.handle, i, row, n, _address(room), _type(h), dev.stream())
                y[:, first + row : first + row + n] = torch.matmul(h, room[:n].T)
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
) -> Tensor:
    import torch

    op, Hk, Dk, Dv = "gated_delta_net", num_k_heads, head_k_dim, head_v_dim
    conv_weight, A_log, dt_bias, norm = map(_vector, (conv_weight, A_log, dt_bias, norm))
    Hv = A_log.shape[0]
    C = 2 * Hk * Dk + Hv * Dv
    _check(op, "proj", proj, [None, C + Hv * Dv + 2 * Hv], ACTIVATION_DTYPES)
    for name, value, shape in (
        ("conv_weight", conv_weight, [4, C]), ("A_log", A_log, [Hv]), ("dt_bias", dt_bias, [Hv]), ("norm", norm, [Dv]),
    ):  # fmt: skip
        _check(op, name, value, shape, ["float32"])
    T, B, longest = _lengths(op, cu_seqlens, proj.shape[0])
    conv = _pointers(op, "conv_states", conv_states, [3, C])
    state = _pointers(op, "states", states, [Hv, Dk, Dv])
    dev = device()
    c, o = _new([T, C], torch.float32), _new([T, Hv * Dv], torch.float32)
    chunks = None
    if longest > DELTA_FEW:
        chunks = _new([dev.module.gated_delta_net_chunk_floats(Hv, Dk, Dv, B, longest)], torch.float32)
    y = _new([T, Hv * Dv], proj.dtype)
    dev.module.gated_delta_net(
        _address(proj), _address(conv_weight), _address(A_log), _address(dt_bias), _address(norm), eps, Hk, Hv, Dk, Dv,
        _address(_small(cu_seqlens)), _address(conv.addresses), conv.offset, _address(state.addresses), state.offset,
        _address(c), _address(o), _address(chunks), _address(y), T, B, longest, _type(proj), dev.stream(),
    )  # fmt: skip
    return y


def _lengths(op: str, cu_seqlens: Any, T: int) -> tuple[int, int, int]:
    """(T, B, longest sequence). Lengths that are on the device already belong to a graph: one token per sequence."""
    if isinstance(cu_seqlens, np.ndarray):
        counts = np.diff(cu_seqlens)
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != T or (counts < 0).any():
            raise ArgumentError(f"{op}: cu_seqlens is {cu_seqlens.tolist()}, expected numbers rising from 0 to {T}")
        return T, len(counts), int(counts.max()) if len(counts) else 0
    B = int(cu_seqlens.shape[0]) - 1
    if B < 1 or T % B:
        raise ArgumentError(f"{op}: {T} rows for {B} sequences; lengths on the device must be equal")
    return T, B, T // B


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
) -> Tensor:
    """`tables`: a list of BlockTables, or (in graphs) of one TableBatch."""
    import torch

    op, Hq, Hkv = "gated_attention", num_heads, num_kv_heads
    q_norm, k_norm = _vector(q_norm), _vector(k_norm)
    D = q_norm.shape[0]
    _check(op, "proj", proj, [None, 2 * (Hq + Hkv) * D], ACTIVATION_DTYPES)
    _check(op, "k_norm", k_norm, [D], ["float32"])
    T, B, longest = _lengths(op, cu_seqlens, proj.shape[0])
    batch = tables[0] if len(tables) == 1 and isinstance(tables[0], TableBatch) else TableBatch.of(tables)
    if T == 0:
        return _new([0, Hq * D], proj.dtype)
    layers, _, heads, block_tokens, width = batch.block_shape
    if (heads, width) != (Hkv, D) or not 0 <= layer < layers:
        raise ArgumentError(f"{op}: blocks are {batch.block_shape}, expected [>{layer}, 2, {Hkv}, _, {D}]")
    if isinstance(starts, np.ndarray):
        for start, n, room in zip(starts, np.diff(cu_seqlens), batch.rooms, strict=True):
            if start < 0 or start + n > room * block_tokens:
                raise ArgumentError(
                    f"{op}: token {start + n - 1} is beyond the {room} blocks of {block_tokens} tokens; reserve them first"
                )
    cos, sin = _small(cos, np.float32), _small(sin, np.float32)
    _check(op, "cos", cos, [T, None], ["float32"])
    _check(op, "sin", sin, [T, cos.shape[1]], ["float32"])
    per_token = longest <= FEW
    splits = SPLITS if per_token else PREFILL_SPLITS
    dev = device()
    q = _new([T, Hq, D], batch.dtype)
    sums, stats = _new([T, Hq, splits, D], torch.float32), _new([T, Hq, splits, 2], torch.float32)
    y = _new([T, Hq * D], proj.dtype)
    dev.module.gated_attention(
        _address(proj), _address(q_norm), _address(k_norm), _address(cos), _address(sin), eps, Hq, Hkv, D, cos.shape[1],
        _address(_small(cu_seqlens)), _address(_small(starts)), _address(batch.addresses), batch.addresses.shape[1],
        layer, block_tokens, _address(q), _address(sums), _address(stats), splits, int(per_token), _address(y), T, B,
        longest, _type(proj), 1 if batch.dtype == torch.bfloat16 else 0, dev.stream(),
    )  # fmt: skip
    return y


@dataclasses.dataclass(slots=True)
class TableBatch:
    """The block tables of B sequences as one device array of addresses [B, room]."""

    addresses: Tensor
    block_shape: tuple[int, ...]
    dtype: torch.dtype
    rooms: list[int]

    @staticmethod
    def of(tables: Sequence[BlockTable]) -> TableBatch:
        import torch

        first = next((table.blocks[0] for table in tables if table.blocks), None)
        if first is None:
            return TableBatch(
                _small(np.zeros((len(tables), 1), np.int64)), (1, 2, 0, 1, 0), torch.float32, [0] * len(tables)
            )
        for table in tables:
            if table.blocks and (table.blocks[0].shape, table.blocks[0].dtype) != (first.shape, first.dtype):
                raise ArgumentError("gated_attention: the tables of a batch hold blocks of different shapes or dtypes")
        room = max(len(table) for table in tables)
        rows = np.zeros((len(tables), room), np.int64)
        for row, table in zip(rows, tables, strict=True):
            row[: len(table)] = [_address(block) for block in table.blocks]
        return TableBatch(_small(rows), tuple(first.shape), first.dtype, [len(table) for table in tables])


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
    _check("moe", "x", x, [None, router.shape[1]], ACTIVATION_DTYPES)
    norm = _vector(norm)
    _check("moe", "norm", norm, [H], ["float32"])
    if gate_up.count != E or down.count != E or not 1 <= top_k <= E:
        raise ArgumentError(
            f"moe: {E} routes, {gate_up.count} and {down.count} experts, top_k {top_k}; they do not fit"
        )
    if residual is not None:
        _check("moe", "residual", residual, [T, H], [str(x.dtype).removeprefix("torch.")])
    if T == 0:
        return _new([0, H], x.dtype)
    dev = device()
    stream = dev.stream()
    logits = _gemv(x, _routes(router, shared_gate), E + 1, norm, eps, None, 0, None, float_output=True)
    experts, coefficients = _new([T, top_k], torch.int64), _new([T, top_k + 1], torch.float32)
    dev.module.moe_route(_address(logits), E, top_k, _address(experts), _address(coefficients), T, stream)
    y = _new([T, H], x.dtype)
    if T <= FEW or x.dtype == torch.float32:
        pitch = max(gate_up.shape[-2], shared_gate_up.shape[0]) // 2
        activation = _new([T, top_k + 1, pitch], torch.float32)
        dev.module.moe_few(
            _address(x), _address(norm), eps, gate_up.handle, down.handle, shared_gate_up.handle, shared_down.handle,
            _address(experts), _address(coefficients), top_k, _address(residual), _address(activation), pitch,
            _address(y), T, _type(x), stream,
        )  # fmt: skip
        return y
    h = rms_norm(x, norm, eps)
    shared = linear(swiglu(h, shared_gate_up), shared_down)
    entries, inner = T * top_k, gate_up.shape[-2] // 2
    room = dev.module.moe_max_tiles(entries, E)
    counts, order, tiles = _new([2 * E], torch.int64), _new([entries], torch.int64), _new([room, 3], torch.int64)
    dev.module.moe_group(
        _address(experts), entries, E, _address(counts), _address(order), _address(tiles), room, stream
    )
    pitch = -(-inner // 8) * 8
    activation = _new([entries, pitch], x.dtype)
    if pitch != inner:
        activation.zero_()
    rows = h if H % 8 == 0 else _padded(h)
    dev.module.moe_grouped(
        _address(rows), rows.shape[1], top_k, gate_up.handle, _address(order), _address(tiles), room,
        _address(activation), pitch, stream,
    )  # fmt: skip
    routed = _new([entries, H], x.dtype)
    dev.module.moe_grouped(
        _address(activation), pitch, 1, down.handle, _address(order), _address(tiles), room, _address(routed), H, stream
    )
    dev.module.moe_scatter(
        _address(routed), _address(shared), _address(coefficients), top_k, _address(residual), _address(y), T, H, stream
    )
    return y


def _padded(h: Tensor) -> Tensor:
    """Rows of h with zeros up to a multiple of 8 columns."""
    wide = _new([h.shape[0], -(-h.shape[1] // 8) * 8], h.dtype).zero_()
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
    _check("patch_embed", "image", image, [None, None, 3], ["uint8"])
    grid_h, grid_w = image.shape[0] // p, image.shape[1] // p
    if image.shape[:2] != (grid_h * p, grid_w * p) or grid_h % m or grid_w % m or 0 in image.shape:
        raise ArgumentError(f"patch_embed: image is {tuple(image.shape)}, expected [h, w, 3] in multiples of {p * m}")
    pos_embed = _vector(pos_embed)
    V, side = weight.shape[0], math.isqrt(pos_embed.shape[0])
    _check("patch_embed", "pos_embed", pos_embed, [side * side, V], ["float32"])
    dev = device()
    x = _new([grid_h * grid_w, 3 * p * p], getattr(torch, weight.activation_dtype))
    kind = _type(x)
    dev.module.patches(
        _address(image), grid_h, grid_w, p, m, *map(float, mean), *map(float, std), _address(x), kind, dev.stream()
    )
    y = linear(x, weight, bias=bias)
    dev.module.add_positions(_address(pos_embed), side, grid_h, grid_w, m, _address(y), V, kind, dev.stream())
    return y


def vision_attention(qkv: Tensor, cos: Any, sin: Any, *, num_heads: int, cu_seqlens: Any) -> Tensor:
    import torch

    P, V = qkv.shape[0], qkv.shape[1] // 3
    d = V // num_heads
    cos, sin = _small(cos, np.float32), _small(sin, np.float32)
    _check("vision_attention", "qkv", qkv, [None, 3 * num_heads * d], ACTIVATION_DTYPES)
    _check("vision_attention", "cos", cos, [P, d // 2], ["float32"])
    _check("vision_attention", "sin", sin, [P, d // 2], ["float32"])
    _, segments, longest = _lengths("vision_attention", cu_seqlens, P)
    dev = device()
    rotated = _new([3, num_heads, P, d], qkv.dtype)
    sums, stats = _new([P, num_heads, d], torch.float32), _new([P, num_heads, 2], torch.float32)
    y = _new([P, V], qkv.dtype)
    dev.module.vision_attention(
        _address(qkv), _address(cos), _address(sin), _address(_small(cu_seqlens)), segments, longest, _address(rotated),
        _address(sums), _address(stats), _address(y), P, num_heads, d, _type(qkv), dev.stream(),
    )  # fmt: skip
    return y


# ------------------------------------------------------------------------------------------------------------- sampling


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    presence_penalty: float,
    frequency_penalty: float,
    repetition_penalty: float,
    output_ids: Any,
    output_counts: Any,
    prompt_ids: Any,
    limit: int,
    uniform: float,
) -> int:
    token = sample_on_device(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, repetition_penalty=repetition_penalty, output_ids=output_ids,
        output_counts=output_counts, prompt_ids=prompt_ids, limit=limit, uniform=uniform,
    )  # fmt: skip
    chosen = int(token.item())
    if chosen < 0:
        raise ArgumentError("sample: logits hold NaN or +inf, or nothing but -inf; the model's output cannot be used")
    return chosen


def sample_on_device(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float, presence_penalty: float,
    frequency_penalty: float, repetition_penalty: float, output_ids: Any, output_counts: Any, prompt_ids: Any,
    limit: int, uniform: float,
) -> Tensor:  # fmt: skip
    """`sample` without waiting: the token as int64 [1] on the device, -1 where `sample` raises."""
    import torch

    _check("sample", "logits", logits, [None], ["float32"])
    if not 0 < limit <= logits.shape[0]:
        raise ArgumentError(f"sample: limit is {limit}, expected 1..{logits.shape[0]}")
    dev = device()
    penalised = repetition_penalty != 1 or frequency_penalty != 0 or presence_penalty != 0
    if penalised and len(output_ids) + len(prompt_ids):
        logits = _new(logits.shape, logits.dtype).copy_(logits)
        seen = np.union1d(prompt_ids, output_ids).astype(np.int64)
        seen_on, ids_on = upload(seen), upload(np.asarray(output_ids, np.int64))
        counts_on = upload(np.asarray(output_counts, np.int64))
        dev.module.penalise(
            _address(logits), _address(seen_on), len(seen), _address(ids_on), _address(counts_on), len(output_ids),
            repetition_penalty, frequency_penalty, presence_penalty, limit, dev.stream(),
        )  # fmt: skip
    k = 1 if temperature == 0 else top_k
    room = -(-limit // SHORTLIST_STRETCH) * k if 0 < k <= SHORTLIST_MAX else 0
    values, ids = _new([max(room, 1)], torch.float32), _new([max(room, 1)], torch.int64)
    token = _new([1], torch.int64)
    dev.module.sample(
        _address(logits), limit, temperature, top_k, top_p, min_p, uniform, _address(values), _address(ids), room,
        _address(token), dev.stream(),
    )  # fmt: skip
    return token


SHORTLIST_STRETCH, SHORTLIST_MAX = 4096, 128  # as in csrc/cuda/sample.cu


def log_softmax_top(logits: Tensor, *, limit: int, k: int, token: int) -> tuple[float, np.ndarray, np.ndarray]:
    import torch

    _check("log_softmax_top", "logits", logits, [None], ["float32"])
    if not 0 < limit <= logits.shape[0] or not 0 <= token < limit:
        raise ArgumentError(
            f"log_softmax_top: limit is {limit}, token {token}; expected 1..{logits.shape[0]}, 0..{limit - 1}"
        )
    x = torch.log_softmax(logits[:limit].double(), 0)
    if torch.isnan(x).any():
        raise ArgumentError(
            "log_softmax_top: logits hold NaN or +inf, or nothing but -inf; the model's output cannot be used"
        )
    order = torch.argsort(x, descending=True, stable=True)[: min(k, limit)]
    return float(x[token]), order.cpu().numpy(), x[order].float().cpu().numpy()


def rope_table(positions: Tensor, frequencies: Any, axes: Any, scale: float) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [T, R/2] of positions int64 [T, 3] that are on the device (model/rope.py, for graphs)."""
    import torch

    frequencies, axes = _vector(frequencies), _small(axes)
    T, F = positions.shape[0], frequencies.shape[0]
    _check("rope_table", "positions", positions, [None, 3], ["int64"])
    cos, sin, dev = _new([T, F], torch.float32), _new([T, F], torch.float32), device()
    dev.module.rope_table(
        _address(positions),
        _address(frequencies),
        _address(axes),
        scale,
        _address(cos),
        _address(sin),
        T,
        F,
        dev.stream(),
    )
    return cos, sin


def copy_from_host(target: Tensor, values: np.ndarray) -> None:
    """Fill a device tensor from a numpy array that may change as soon as this returns."""
    import torch

    target.copy_(torch.from_numpy(values))


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several tensors, one after another."""
    import torch

    return torch.cat(list(parts))
