"""Which inputs are worth trying for each operator? Awkward ones: lengths around 16 and 64, widths that are no multiple
of 16, Dk != Dv, Hv != Hk, states that are not zero, sequences of no and of one token in a batch, many block borders,
extreme decays.

`CASES` lists them; `case.make(rng)` draws the arguments. Arrays are float32; weights are `Packed`, K/V caches `Cache`,
because each op set has its own form of these: `arguments_for` makes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from deltaic.ops import reference
from deltaic.ops.layout import KV_DTYPES

Rng = np.random.Generator
LENGTHS = (1, 2, 17, 63, 64, 65, 130)


@dataclass
class Packed:
    """A weight before packing: rows of `parts` in the formats `dtype`; two parts, gate and up, if `glu`."""

    parts: list[np.ndarray]
    dtype: str | list[str]
    glu: bool = False

    def build(self, ops: ModuleType) -> Any:
        weight = ops.pack_glu(*self.parts, self.dtype) if self.glu else ops.pack(self.parts, self.dtype)
        weight.float_activations = True  # the definition knows no rounding
        return weight


@dataclass
class Cache:
    """The K/V blocks of one sequence."""

    blocks: list[np.ndarray]

    def build(self, ops: ModuleType) -> Any:
        table = ops.BlockTable()
        for block in self.blocks:
            table.append(block.copy())
        return table


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Callable[[Rng], dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def arguments_for(ops: ModuleType, arguments: dict[str, Any], dtype: type = np.float32) -> dict[str, Any]:
    """A private copy of `arguments` as `ops` takes them, its float arrays (not weights, not caches) as `dtype`."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(v) for v in value]
        if isinstance(value, (Packed, Cache)):
            return value.build(ops)
        if isinstance(value, np.ndarray):
            return value.astype(dtype) if value.dtype == np.float32 else value.copy()
        return copy.copy(value)

    return {name: convert(value) for name, value in arguments.items()}


def normal(rng: Rng, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * rng.normal(size=shape)).astype(np.float32)


def matrix(rng: Rng, *shape: int) -> np.ndarray:
    return normal(rng, *shape, scale=shape[-1] ** -0.5)


def offsets(lengths: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


CASES: list[Case] = []


def add(op: str, name: str, make: Callable[..., dict[str, Any]], **fixed: Any) -> None:
    CASES.append(Case(op, name, lambda rng: make(rng, **fixed)))


# dense operators


def linear(
    rng: Rng, T: int, K: int, parts: tuple[int, ...], dtype: Any, norm: bool, bias: bool, activation: str,
    residual: bool,
) -> dict[str, Any]:  # fmt: skip
    return {
        "x": normal(rng, T, K),
        "w": Packed([matrix(rng, n, K) for n in parts], dtype),
        "norm": normal(rng, K, scale=0.3) if norm else None,
        "eps": 1e-6,
        "bias": normal(rng, sum(parts)) if bias else None,
        "activation": activation,
        "residual": normal(rng, T, sum(parts)) if residual else None,
    }


_PLAIN = {"norm": False, "bias": False, "activation": "none", "residual": False}
_FUSIONS = {
    "plain": _PLAIN,
    "norm": _PLAIN | {"norm": True},
    "residual": _PLAIN | {"residual": True},
    "gelu_tanh": _PLAIN | {"bias": True, "activation": "gelu_tanh"},
    "gelu_erf": _PLAIN | {"norm": True, "bias": True, "activation": "gelu_erf"},
    "all": {"norm": True, "bias": True, "activation": "gelu_tanh", "residual": True},
}
_SHAPES = [(0, 20, 30), (1, 33, 1), (1, 256, 97), (2, 48, 97), (3, 1, 5), (17, 100, 31), (63, 16, 16), (64, 257, 64)]
_SHAPES += [(65, 31, 130), (130, 80, 49)]
for _dtype in ("f32", "bf16"):
    for _i, (_T, _K, _N) in enumerate(_SHAPES):
        for _fusion in ("plain", list(_FUSIONS)[1 + _i % 5]):
            _name = f"{_dtype}-{_T}x{_K}x{_N}-{_fusion}"
            add("linear", _name, linear, T=_T, K=_K, parts=(_N,), dtype=_dtype, **_FUSIONS[_fusion])
for _T in (1, 5, 40):
    add("linear", f"mixed-{_T}", linear, T=_T, K=50, parts=(37, 16, 3, 3), dtype=["bf16", "bf16", "f32", "f32"],
        **_FUSIONS["norm"])  # fmt: skip


def swiglu(rng: Rng, T: int, K: int, width: int, dtype: str, norm: bool) -> dict[str, Any]:
    weight = Packed([matrix(rng, width, K), matrix(rng, width, K)], dtype, glu=True)
    return {"x": normal(rng, T, K, scale=3), "w": weight, "norm": normal(rng, K) if norm else None, "eps": 1e-6}


for _dtype in ("f32", "bf16"):
    for _T, _K, _width in [(0, 8, 8), (1, 33, 19), (2, 64, 1), (17, 100, 31), (65, 48, 32), (130, 31, 50)]:
        for _norm in (False, True):
            _name = f"{_dtype}-{_T}x{_K}x{_width}{'-norm' * _norm}"
            add("swiglu", _name, swiglu, T=_T, K=_K, width=_width, dtype=_dtype, norm=_norm)


def embed(rng: Rng, T: int, N: int, H: int, dtype: str) -> dict[str, Any]:
    return {"ids": rng.integers(0, N, T), "table": Packed([normal(rng, N, H)], dtype)}


for _dtype in ("f32", "bf16"):
    for _T, _N, _H in [(0, 5, 8), (1, 1, 1), (3, 97, 33), (130, 50, 48)]:
        add("embed", f"{_dtype}-{_T}x{_N}x{_H}", embed, T=_T, N=_N, H=_H, dtype=_dtype)


def norm(rng: Rng, T: int, D: int, scale: float, layer: bool) -> dict[str, Any]:
    x = normal(rng, T, D, scale=scale)
    x[-1:] = 0  # eps alone keeps this row finite
    return {"x": x, "weight": normal(rng, D)} | ({"bias": normal(rng, D)} if layer else {}) | {"eps": 1e-6}


def norm_pair(rng: Rng, T: int, D: int, scale: float) -> dict[str, Any]:
    a, b = (norm(rng, T, D, scale, layer=False) for _ in range(2))
    return {"a": a["x"], "a_weight": a["weight"], "b": b["x"], "b_weight": b["weight"], "eps": a["eps"]}


for _T, _D, _scale in [(0, 8, 1), (1, 24, 1), (2, 1, 1), (3, 17, 1e-4), (5, 1000, 1e8), (65, 128, 1)]:
    add("rms_norm", f"{_T}x{_D}-{_scale:g}", norm, T=_T, D=_D, scale=_scale, layer=False)
    add("rms_norm_pair", f"{_T}x{_D}-{_scale:g}", norm_pair, T=_T, D=_D, scale=_scale)
    add("layer_norm", f"{_T}x{_D}-{_scale:g}", norm, T=_T, D=_D, scale=_scale, layer=True)


# gated delta rule


def gated_delta_net(
    rng: Rng, lengths: tuple[int, ...], heads: tuple[int, int], dims: tuple[int, int], decay: float | None, scale: float
) -> dict[str, Any]:
    (Hk, Hv), (Dk, Dv), T = heads, dims, sum(lengths)
    C = 2 * Hk * Dk + Hv * Dv
    proj, A_log, dt_bias = normal(rng, T, C + Hv * Dv + 2 * Hv), normal(rng, Hv), normal(rng, Hv)
    proj[:, :C] *= scale
    if decay is not None:  # every token decays by e^-decay exactly: softplus(0) = ln 2
        proj[:, -Hv:], dt_bias[:] = 0, 0
        A_log[:] = np.log(decay / np.log(2))
    return {
        "proj": proj,
        "conv_weight": normal(rng, 4, C),
        "A_log": A_log,
        "dt_bias": dt_bias,
        "norm": normal(rng, Dv),
        "eps": 1e-6,
        "num_k_heads": Hk,
        "head_k_dim": Dk,
        "head_v_dim": Dv,
        "cu_seqlens": offsets(lengths),
        "conv_states": [normal(rng, 3, C, scale=scale) for _ in lengths],
        "states": [normal(rng, Hv, Dk, Dv) for _ in lengths],
    }


_DELTA = {"heads": (3, 6), "dims": (12, 20), "decay": None, "scale": 1.0}
for _T in (*LENGTHS, 200):
    add("gated_delta_net", f"T{_T}", gated_delta_net, lengths=(_T,), **_DELTA)
_WIDTHS = [((1, 1), (5, 7)), ((2, 2), (16, 16)), ((1, 4), (8, 24)), ((5, 10), (33, 18)), ((2, 4), (128, 128))]
for _heads, _dims in _WIDTHS:
    for _T in (1, 66):
        _name = f"T{_T}-heads{_heads[0]}:{_heads[1]}-dims{_dims[0]}:{_dims[1]}"
        add("gated_delta_net", _name, gated_delta_net, lengths=(_T,), **_DELTA | {"heads": _heads, "dims": _dims})
for _lengths in [(0, 1, 17, 0, 64, 2), (65, 0, 130), (1, 1, 1), (0,)]:
    _name = "batch" + "-".join(map(str, _lengths))
    add("gated_delta_net", _name, gated_delta_net, lengths=_lengths, **_DELTA)
for _decay in (100.0, 1e-4):
    add("gated_delta_net", f"decay{_decay:g}", gated_delta_net, lengths=(1, 130), **_DELTA | {"decay": _decay})
add("gated_delta_net", "tiny", gated_delta_net, lengths=(1, 70), **_DELTA | {"scale": 1e-3})
add("gated_delta_net", "large", gated_delta_net, lengths=(1, 70), **_DELTA | {"scale": 1e3})


def side_by_side(layers: list[dict[str, Any]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The conv_states and states of several layers that share a batch, as [L, ...] per sequence."""
    conv, states = (
        [np.stack(of_layers) for of_layers in zip(*(layer[name] for layer in layers), strict=True)]
        for name in ("conv_states", "states")
    )
    return conv, states


def gated_delta_net_commit(
    ops: ModuleType, layers: list[dict[str, Any]], trace: Any, counts: list[int], conv: list[Any], states: list[Any]
) -> None:
    """Call the operator for these layers."""
    ops.gated_delta_net_commit(
        trace,
        num_k_heads=layers[0]["num_k_heads"],
        cu_seqlens=layers[0]["cu_seqlens"],
        counts=np.array(counts, np.int64),
        conv_states=conv,
        states=states,
    )


# gated attention

KV_LAYERS, KV_LAYER = 3, 1
# What a cache holds where nothing was written.
POISON = {"f32": np.float32(np.nan), "bf16": np.uint16(0x7FC0), "int8": np.uint8(0xFF)}


def gated_attention(
    rng: Rng, lengths: tuple[int, ...], starts: tuple[int, ...], heads: tuple[int, int], dims: tuple[int, int],
    block: int, kv: str, sharpness: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    (Hq, Hkv), (D, R), T = heads, dims, sum(lengths)
    angle = normal(rng, T, R // 2, scale=3)
    return {
        "proj": normal(rng, T, (2 * Hq + 2 * Hkv) * D),
        "q_norm": normal(rng, D) + np.float32(sharpness - 1),
        "k_norm": normal(rng, D),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "eps": 1e-6,
        "num_heads": Hq,
        "num_kv_heads": Hkv,
        "layer": KV_LAYER,
        "cu_seqlens": offsets(lengths),
        "starts": np.array(starts, np.int64),
        "tables": [_cache(rng, s, s + n, Hkv, D, block, kv) for s, n in zip(starts, lengths, strict=True)],
    }


def _cache(rng: Rng, filled: int, room: int, Hkv: int, D: int, block: int, kv: str) -> Cache:
    blocks = []
    for i in range(-(-room // block)):
        values = normal(rng, KV_LAYERS, 2, Hkv, block, D)
        stored = reference.kv_encode(values, KV_DTYPES[kv])
        stored[:, :, :, max(filled - i * block, 0) :] = POISON[kv]
        blocks.append(stored)
    return Cache(blocks)


_ATTENTION = {"heads": (6, 3), "dims": (24, 12), "block": 8}
for _kv in ("f32", "bf16", "int8"):
    for _T in LENGTHS:
        add("gated_attention", f"{_kv}-T{_T}", gated_attention, lengths=(_T,), starts=(0,), kv=_kv, **_ATTENTION)
    for _start in (1, 7, 8, 63, 130):
        _one = {"lengths": (1,), "starts": (_start,), "kv": _kv}
        add("gated_attention", f"{_kv}-one-at{_start}", gated_attention, **_one, **_ATTENTION)
        _one["lengths"] = (19,)
        add("gated_attention", f"{_kv}-some-at{_start}", gated_attention, **_one, **_ATTENTION)
    _batch = {"lengths": (1, 0, 20, 1, 66), "starts": (40, 5, 0, 0, 15), "kv": _kv}
    add("gated_attention", f"{_kv}-batch", gated_attention, **_batch, **_ATTENTION)
    _decode = {"lengths": (1, 1, 1), "starts": (300, 0, 8), "kv": _kv}
    add("gated_attention", f"{_kv}-decode-batch", gated_attention, **_decode, **_ATTENTION)
    _real = {"heads": (8, 2), "dims": (256, 64), "block": 128, "kv": _kv}
    add("gated_attention", f"{_kv}-real-one", gated_attention, lengths=(1,), starts=(150,), **_real)
    add("gated_attention", f"{_kv}-real-some", gated_attention, lengths=(70,), starts=(90,), **_real)
    for _heads, _dims in [((1, 1), (2, 2)), ((5, 1), (7, 4)), ((4, 4), (33, 32))]:
        _odd = {"heads": _heads, "dims": _dims, "block": 16, "kv": _kv}
        _name = f"{_kv}-heads{_heads[0]}:{_heads[1]}-dims{_dims[0]}:{_dims[1]}"
        add("gated_attention", _name, gated_attention, lengths=(1, 37), starts=(20, 3), **_odd)
    _sharp = {"lengths": (1, 40), "starts": (50, 9), "kv": _kv, "sharpness": 30.0}
    add("gated_attention", f"{_kv}-sharp", gated_attention, **_sharp, **_ATTENTION)


# mixture of experts


def moe(
    rng: Rng, T: int, H: int, E: int, top_k: int, widths: tuple[int, int], dtype: str, residual: bool, ties: bool
) -> dict[str, Any]:
    width, shared = widths
    router = matrix(rng, E, H)
    if ties:
        router[1::2] = router[: E // 2 * 2 : 2]
    return {
        "x": normal(rng, T, H),
        "router": Packed([router], "f32"),
        "gate_up": Packed([matrix(rng, E, width, H), matrix(rng, E, width, H)], dtype, glu=True),
        "down": Packed([matrix(rng, E, H, width)], dtype),
        "shared_gate_up": Packed([matrix(rng, shared, H), matrix(rng, shared, H)], dtype, glu=True),
        "shared_down": Packed([matrix(rng, H, shared)], dtype),
        "shared_gate": Packed([matrix(rng, 1, H)], "f32"),
        "top_k": top_k,
        "norm": normal(rng, H, scale=0.3),
        "eps": 1e-6,
        "residual": normal(rng, T, H) if residual else None,
    }


for _dtype in ("f32", "bf16"):
    _MOE = {"H": 50, "E": 5, "top_k": 3, "widths": (19, 21), "dtype": _dtype, "residual": True, "ties": False}
    for _T in (0, *LENGTHS):
        add("moe", f"{_dtype}-T{_T}", moe, T=_T, **_MOE)
    add("moe", f"{_dtype}-no-residual", moe, T=9, **_MOE | {"residual": False})
    add("moe", f"{_dtype}-all-experts", moe, T=9, **_MOE | {"top_k": 5})
    add("moe", f"{_dtype}-one-expert", moe, T=9, **_MOE | {"E": 1, "top_k": 1})
    add("moe", f"{_dtype}-many", moe, T=20, **_MOE | {"H": 64, "E": 64, "top_k": 8, "widths": (32, 16)})
    for _T in (1, 33):
        add("moe", f"{_dtype}-ties-T{_T}", moe, T=_T, **_MOE | {"E": 6, "ties": True})


# vision


def patch_embed(
    rng: Rng, grid: tuple[int, int], patch: int, merge: int, side: int, V: int, dtype: str
) -> dict[str, Any]:
    return {
        "image": rng.integers(0, 256, (grid[0] * patch, grid[1] * patch, 3), dtype=np.uint8),
        "weight": Packed([matrix(rng, V, 3 * patch * patch)], dtype),
        "bias": normal(rng, V),
        "pos_embed": normal(rng, side * side, V),
        "patch_size": patch,
        "merge_size": merge,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.5, 0.25, 0.4),
    }


for _dtype in ("f32", "bf16"):
    for _grid in [(2, 2), (2, 6), (6, 10), (10, 2), (14, 14), (18, 6)]:
        _patch = {"grid": _grid, "patch": 16, "merge": 2, "side": 7, "V": 40, "dtype": _dtype}
        add("patch_embed", f"{_dtype}-{_grid[0]}x{_grid[1]}", patch_embed, **_patch)
    _small = {"grid": (9, 3), "patch": 5, "merge": 3, "side": 4, "V": 27, "dtype": _dtype}
    add("patch_embed", f"{_dtype}-merge3", patch_embed, **_small)
    add("patch_embed", f"{_dtype}-merge1", patch_embed, **_small | {"grid": (1, 7), "merge": 1})


def vision_attention(rng: Rng, lengths: tuple[int, ...], heads: int, width: int) -> dict[str, Any]:
    P = sum(lengths)
    angle = normal(rng, P, width // 2, scale=3)
    return {
        "qkv": normal(rng, P, 3 * heads * width),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "num_heads": heads,
        "cu_seqlens": offsets(lengths),
    }


for _lengths in [(4,), (60,), (65,), (12, 0, 35, 1), (130, 17)]:
    for _heads, _width in [(2, 12), (3, 72), (1, 64)]:
        _name = "-".join(map(str, _lengths)) + f"-heads{_heads}x{_width}"
        add("vision_attention", _name, vision_attention, lengths=_lengths, heads=_heads, width=_width)


# sampling


def sample(rng: Rng, V: int, limit: int, spread: float = 3.0, **changes: Any) -> dict[str, Any]:
    logits = normal(rng, V, scale=spread)
    likely = np.argsort(-logits[:limit]).astype(np.int64)[:20]  # penalties that hit these change the choice
    output = np.unique(np.concatenate([likely[:10], rng.integers(0, V, 10)]))
    prompt = np.unique(np.concatenate([likely[5:], rng.integers(0, V, 10)]))
    return {
        "logits": logits,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "output_ids": output,
        "output_counts": rng.integers(1, 5, len(output)),
        "prompt_ids": prompt,
        "limit": limit,
        "uniform": float(rng.random()),
    } | changes


_SETTINGS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 3.0},
    "cold": {"temperature": 0.01},
    "top_k": {"top_k": 20},
    "top_k-1": {"top_k": 1},
    "top_k-beyond": {"top_k": 10**6},
    "top_p": {"top_p": 0.8},
    "top_p-tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.05},
    "min_p-1": {"min_p": 1.0},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "greedy-penalties": {"temperature": 0.0, "presence_penalty": -2.0, "repetition_penalty": 0.5},
    "family": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "presence_penalty": 1.5},
    "everything": {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "presence_penalty": 0.5,
                   "frequency_penalty": 0.2, "repetition_penalty": 1.1},
    "presence": {"temperature": 0.0, "presence_penalty": 3.0},
    "frequency": {"temperature": 0.0, "frequency_penalty": 2.0},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.5},
    "first": {"uniform": 0.0},
    "last": {"uniform": 0.99999},  # the last candidate that the filters keep, but for the unfiltered ones
    "last-top_k": {"uniform": 0.99999, "temperature": 5.0, "top_k": 7},
    "last-top_p": {"uniform": 0.99999, "temperature": 0.5, "top_p": 0.6},
    "last-min_p": {"uniform": 0.99999, "temperature": 0.5, "min_p": 0.05},
}  # fmt: skip
for _V, _limit in [(20, 1), (37, 30), (5003, 4999), (100_000, 99_000)]:
    for _name, _changes in _SETTINGS.items():
        add("sample", f"{_V}-{_name}", sample, V=_V, limit=_limit, **_changes)


def sample_rows(rng: Rng, T: int, V: int, limit: int, ties: bool, **changes: Any) -> dict[str, Any]:
    logits = normal(rng, T, V)
    filters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **changes}
    draws, tokens = rng.integers(0, 2**53, T), np.full(T, -1)
    # of small vocabularies none, of others the likeliest and some ids that nobody asks about
    unused = np.unique([*logits[:, :limit].argmax(1), limit, V - 1]) if V > 100 else np.empty(0, np.int64)
    arrays = {"logits": np.round(logits) if ties else logits, "unused": unused, "draws": draws, "tokens": tokens}
    return {"limit": limit, **arrays, **filters}


for _T, _V, _limit in [(0, 5, 5), (1, 1, 1), (1, 704, 688), (3, 5003, 4999)]:
    for _name in ("greedy", "plain", "first", "family", "last-top_p", "last-min_p"):
        _changes = {k: v for k, v in _SETTINGS[_name].items() if k not in ("uniform", "presence_penalty")}
        add("sample_rows", f"{_T}x{_V}-{_name}", sample_rows, T=_T, V=_V, limit=_limit, ties=False, **_changes)
        add("sample_rows", f"{_T}x{_V}-{_name}-ties", sample_rows, T=_T, V=_V, limit=_limit, ties=True, **_changes)


def log_softmax_top(rng: Rng, V: int, limit: int, k: int) -> dict[str, Any]:
    return {"logits": normal(rng, V, scale=4), "limit": limit, "k": k, "token": int(rng.integers(limit))}


for _V, _limit, _k in [(1, 1, 1), (37, 30, 0), (37, 30, 5), (37, 30, 100), (5003, 4999, 20)]:
    add("log_softmax_top", f"{_V}-{_k}", log_softmax_top, V=_V, limit=_limit, k=_k)
