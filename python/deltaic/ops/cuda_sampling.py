"""How is a token chosen on the GPU? `sample`, `sample_rows` and `log_softmax_top` of reference.py; only the tokens
leave it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentError, unusable_logits
from .cuda_memory import Tensor, address, check, copy, device, new, small, upload

SHORTLIST_STRETCH, SHORTLIST_MAX = 4096, 128  # as in csrc/cuda/sample.cu


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
    import torch

    check("sample", "logits", logits, [None], ["float32"])
    _check_limit("sample", limit, logits.shape[0])
    dev = device()
    penalised = repetition_penalty != 1 or frequency_penalty != 0 or presence_penalty != 0
    if penalised and len(output_ids) + len(prompt_ids):
        logits = copy(logits)
        seen = np.union1d(prompt_ids, output_ids).astype(np.int64)
        seen_on, ids_on = upload(seen), upload(np.asarray(output_ids, np.int64))
        counts_on = upload(np.asarray(output_counts, np.int64))
        dev.module.penalise(
            address(logits), address(seen_on), len(seen), address(ids_on), address(counts_on), len(output_ids),
            repetition_penalty, frequency_penalty, presence_penalty, limit, dev.stream(),
        )  # fmt: skip
    token = new([1], torch.int64)
    _choose(logits[None], temperature, top_k, top_p, min_p, limit, None, uniform, None, token)
    chosen = int(token.item())
    if chosen < 0:
        raise unusable_logits("sample")
    return chosen


def sample_rows(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    limit: int,
    unused: Any,
    draws: Any,
    tokens: Any,
) -> None:
    """draws and tokens: both of the host, or both on the device, as in a graph; these tokens are not waited for."""
    import torch

    op, T = "sample_rows", logits.shape[0]
    check(op, "logits", logits, [None, None], ["float32"])
    draws = small(draws)
    check(op, "draws", draws, [T], ["int64"])
    chosen = new([T], torch.int64) if isinstance(tokens, np.ndarray) else tokens
    check(op, "tokens", chosen, [T], ["int64"])
    _check_limit(op, limit, logits.shape[1])
    _choose(logits, temperature, top_k, top_p, min_p, limit, unused, 0.0, draws, chosen)
    if chosen is not tokens:
        tokens[:] = chosen.cpu().numpy()


def _choose(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, limit: int, unused: Any,
    uniform: float, draws: Tensor | None, tokens: Tensor,
) -> None:  # fmt: skip
    """tokens [T] from logits [T, V], without waiting; uniform: the random number where there are no draws."""
    import torch

    T, V = logits.shape
    k = 1 if temperature == 0 else top_k
    room = -(-limit // SHORTLIST_STRETCH) * k if 0 < k <= SHORTLIST_MAX else 0
    values, ids = new([T, max(room, 1)], torch.float32), new([T, max(room, 1)], torch.int64)
    masked = 0 if unused is None else len(unused)
    dev = device()
    dev.module.sample(
        address(logits), T, V, limit, address(small(unused)) if masked else 0, masked, temperature, top_k, top_p, min_p,
        uniform, address(draws), address(values), address(ids), room, address(tokens), dev.stream(),
    )  # fmt: skip


def _check_limit(op: str, limit: int, vocabulary: int) -> None:
    if not 0 < limit <= vocabulary:
        raise ArgumentError(f"{op}: limit is {limit}, expected 1..{vocabulary}")


def log_softmax_top(logits: Tensor, *, limit: int, k: int, token: int) -> tuple[float, np.ndarray, np.ndarray]:
    import torch

    check("log_softmax_top", "logits", logits, [None], ["float32"])
    if not 0 < limit <= logits.shape[0] or not 0 <= token < limit:
        raise ArgumentError(
            f"log_softmax_top: limit is {limit}, token {token}; expected 1..{logits.shape[0]}, 0..{limit - 1}"
        )
    x = torch.log_softmax(logits[:limit].double(), 0)
    if torch.isnan(x).any():
        raise unusable_logits("log_softmax_top")
    order = torch.argsort(x, descending=True, stable=True)[: min(k, limit)]
    return float(x[token]), order.cpu().numpy(), x[order].float().cpu().numpy()
