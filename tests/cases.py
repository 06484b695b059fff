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
from deltaic.ops.layout import KV_DTYPES, new_seen

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


NO_TEXT: dict[str, Any] = {"seen": [], "cu_seqlens": np.empty(0, np.int64), "fed": np.empty(0, np.int64)}
NO_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, **NO_TEXT}
PLAIN_CHOICE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "unused": np.empty(0, np.int64),
                **NO_PENALTIES}  # fmt: skip


def seen_of(V: int, output: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """What a text holds that generated the ids `output` after the ids `prompt`."""
    seen = new_seen(V, prompt)
    reference.count_tokens(output[None], [seen])
    return seen


def chosen(
    ops: ModuleType, logits: np.ndarray, uniform: float, *, output: Any = (), prompt: Any = (), **options: Any
) -> int:
    """What sample_rows chooses from one row [V], after a text that generated the ids `output` after `prompt`; -1: none.
    options: those that differ from PLAIN_CHOICE, and limit where it is not V."""
    upload = getattr(ops, "upload", np.array)
    seen, tokens = seen_of(len(logits), np.array(output, np.int64), np.array(prompt, np.int64)), np.empty(1, np.int64)
    given = PLAIN_CHOICE | {"limit": len(logits), "cu_seqlens": np.array([0, 1]), "fed": np.array([-1])} | options
    draws = np.array([int(uniform * 2**53)])
    ops.sample_rows(upload(logits[None]), **given | {"draws": draws, "seen": [upload(seen)], "tokens": tokens})
    return int(tokens[0])


def count_tokens(rng: Rng, V: int, B: int, S: int) -> dict[str, Any]:
    ids = rng.integers(0, V, (B, S))
    ids[:, : S // 3] = ids[:, S // 3 : 2 * (S // 3)]  # some twice
    ids[rng.random((B, S)) < 0.2] = -1
    return {"ids": ids, "seen": [seen_of(V, rng.integers(0, V, 9), rng.integers(0, V, 5)) for _ in range(B)]}


for _V, _B, _S in [(1, 1, 1), (64, 2, 4), (700, 3, 16), (5003, 1, 1), (9, 0, 1), (9, 2, 0)]:
    add("count_tokens", f"{_V}-{_B}x{_S}", count_tokens, V=_V, B=_B, S=_S)


def sample_rows(
    rng: Rng, lengths: tuple[int, ...], V: int, limit: int, skipped: int = 0, ties: bool = False, **changes: Any
) -> dict[str, Any]:
    """So many rows of each text, of which the first `skipped` have no logits. Texts and drafts hold likely ids, so that
    penalties change the choice."""
    T = sum(lengths) - skipped
    logits = normal(rng, T, V, scale=3)
    likely = np.argsort(-logits[:, :limit].mean(0)).astype(np.int64)[:20] if T else np.zeros(1, np.int64)
    seen = []
    for _ in lengths:
        output = np.concatenate([np.tile(rng.choice(likely, 6), 2), rng.choice(likely, 5), rng.integers(0, V, 10)])
        seen.append(seen_of(V, output, np.concatenate([rng.choice(likely, 5), rng.integers(0, V, 10)])))
    given = {name: changes.get(name, PLAIN_CHOICE[name]) for name in PLAIN_CHOICE if name not in NO_TEXT}
    penalised = any(given[name] != NO_PENALTIES[name] for name in NO_PENALTIES if name not in NO_TEXT)
    text = {"seen": seen, "cu_seqlens": offsets(lengths), "fed": rng.choice(likely, sum(lengths))}
    # of small vocabularies none, of others the likeliest and some ids that nobody asks about
    if V in (704, 5003):
        given["unused"] = np.unique([*logits[:, :limit].argmax(1), limit, V - 1])
    return {
        "logits": np.round(logits) if ties else logits,
        "limit": limit,
        "draws": np.full(T, changes["draw"]) if "draw" in changes else rng.integers(0, 2**53, T),
        "tokens": np.full(T, -1),
        **given,
        **(text if penalised else NO_TEXT),
    }


_LAST = int(0.99999 * 2**53)
_SETTINGS: dict[str, dict[str, Any]] = {
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
    "first": {"draw": 0},
    "last": {"draw": _LAST},  # the last candidate that the filters keep, but for the unfiltered ones
    "last-top_k": {"draw": _LAST, "temperature": 5.0, "top_k": 7},
    "last-top_p": {"draw": _LAST, "temperature": 0.5, "top_p": 0.6},
    "last-min_p": {"draw": _LAST, "temperature": 0.5, "min_p": 0.05},
}  # fmt: skip
for _V, _limit in [(20, 1), (37, 30), (5000, 4999), (100_000, 99_000)]:
    for _name, _changes in _SETTINGS.items():
        add("sample_rows", f"{_V}-{_name}", sample_rows, lengths=(1,), V=_V, limit=_limit, **_changes)
for _lengths, _V, _limit in [((0,), 5, 5), ((1,), 1, 1), ((1,), 704, 688), ((3,), 5003, 4999), ((2, 1, 3), 704, 688)]:
    for _name in (
        "greedy",
        "plain",
        "first",
        "family",
        "last-top_p",
        "last-min_p",
        "greedy-penalties",
        "everything",
        "frequency",
    ):
        for _ties in (False, True):
            _full = f"{'-'.join(map(str, _lengths))}x{_V}-{_name}" + "-ties" * _ties
            add("sample_rows", _full, sample_rows, lengths=_lengths, V=_V, limit=_limit, ties=_ties,
                **_SETTINGS[_name])  # fmt: skip
for _lengths, _skipped in [((4,), 3), ((3, 2), 3), ((2, 0, 2), 1)]:
    for _name in ("greedy-penalties", "family", "everything"):
        _full = f"{'-'.join(map(str, _lengths))}-after-{_skipped}-{_name}"
        add("sample_rows", _full, sample_rows, lengths=_lengths, V=700, limit=690, skipped=_skipped, **_SETTINGS[_name])


def log_softmax_top(rng: Rng, V: int, limit: int, k: int) -> dict[str, Any]:
    return {"logits": normal(rng, V, scale=4), "limit": limit, "k": k, "token": int(rng.integers(limit))}


for _V, _limit, _k in [(1, 1, 1), (37, 30, 0), (37, 30, 5), (37, 30, 100), (5003, 4999, 20)]:
    add("log_softmax_top", f"{_V}-{_k}", log_softmax_top, V=_V, limit=_limit, k=_k)
