"""How is a token chosen on the GPU? `count_tokens`, `sample_rows` and `log_softmax_top` of reference.py; only the token
leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ArgumentError, unusable_logits
from .cuda_memory import Tensor, address, check, device, new, small
from .cuda_weights import Pointers, pointers

SHORTLIST_STRETCH, SHORTLIST_MAX = 4096, 128  # as in csrc/cuda/sample.cu


def count_tokens(ids: Any, seen: Sequence[Tensor | Pointers]) -> None:
    if not seen:
        return
    arrays = pointers("count_tokens", "seen", seen, [65, None], "int64")
    ids = small(ids)
    check("count_tokens", "ids", ids, [arrays.addresses.shape[0], None], ["int64"])
    dev = device()
    dev.module.count_tokens(
        address(ids), ids.shape[1], address(arrays.addresses), ids.shape[0], arrays.shape[1], dev.stream()
    )


def sample_rows(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    presence_penalty: float,
    frequency_penalty: float,
    repetition_penalty: float,
    limit: int,
    unused: Any,
    draws: Any,
    seen: Sequence[Tensor | Pointers],
    cu_seqlens: Any,
    fed: Any,
    tokens: Any,
) -> None:
    """draws and tokens: both of the host, or both on the device, as in a graph; these tokens are not waited for."""
    import torch

    op = "sample_rows"
    check(op, "logits", logits, [None, None], ["float32"])
    T, V = logits.shape
    draws = small(draws)
    check(op, "draws", draws, [T], ["int64"])
    chosen = new([T], torch.int64) if isinstance(tokens, np.ndarray) else tokens
    check(op, "tokens", chosen, [T], ["int64"])
    if not 0 < limit <= V:
        raise ArgumentError(f"{op}: limit is {limit}, expected 1..{V}")
    texts, B, words, skipped = None, 0, 0, 0
    if seen:
        texts = pointers(op, "seen", seen, [65, None], "int64")
        B, words = int(texts.addresses.shape[0]), texts.shape[1]
        cu_seqlens, fed = small(cu_seqlens), small(fed)
        skipped = fed.shape[0] - T
        if cu_seqlens.shape[0] != B + 1 or skipped < 0:
            raise ArgumentError(
                f"{op}: cu_seqlens has {cu_seqlens.shape[0]} numbers and fed {fed.shape[0]} ids, expected {B + 1}, and "
                f"at least {T}"
            )
        if 64 * words < limit:
            raise ArgumentError(f"{op}: seen has room for {64 * words} ids, limit is {limit}")
    k = 1 if temperature == 0 else top_k
    room = -(-limit // SHORTLIST_STRETCH) * k if 0 < k <= SHORTLIST_MAX else 0
    values, ids = new([T, max(room, 1)], torch.float32), new([T, max(room, 1)], torch.int64)
    masked = len(unused)
    dev = device()
    dev.module.sample(
        address(logits), T, V, limit, address(small(unused)) if masked else 0, masked,
        address(texts.addresses) if texts else 0, B, words, address(cu_seqlens) if B else 0, address(fed) if B else 0,
        skipped, presence_penalty, frequency_penalty, repetition_penalty, temperature, top_k, top_p, min_p,
        address(draws), address(values), address(ids), room, address(chosen), dev.stream(),
    )  # fmt: skip
    if chosen is not tokens:
        tokens[:] = chosen.cpu().numpy()


def log_softmax_top(logits: Tensor, *, limit: int, k: int, token: int) -> tuple[float, np.ndarray, np.ndarray]:
    import torch

    check("log_softmax_top", "logits", logits, [None], ["float32"])
    if not 0 < limit <= logits.shape[0] or not 0 <= token < limit:
        raise ArgumentError(
            f"log_softmax_top: limit is {limit}, token {token}; expected 1..{logits.shape[0]}, 0..{limit - 1}"
        )
    device().stream()
    x = torch.log_softmax(logits[:limit].double(), 0)
    if torch.isnan(x).any():
        raise unusable_logits("log_softmax_top")
    order = torch.argsort(x, descending=True, stable=True)[: min(k, limit)]
    return float(x[token]), order.cpu().numpy(), x[order].float().cpu().numpy()
