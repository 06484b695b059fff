"""How is a token chosen on the GPU? `sample` and `log_softmax_top` of reference.py; only the token leaves it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentError
from .cuda_memory import Tensor, address, check, device, new, upload

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

    check("sample", "logits", logits, [None], ["float32"])
    if not 0 < limit <= logits.shape[0]:
        raise ArgumentError(f"sample: limit is {limit}, expected 1..{logits.shape[0]}")
    dev = device()
    penalised = repetition_penalty != 1 or frequency_penalty != 0 or presence_penalty != 0
    if penalised and len(output_ids) + len(prompt_ids):
        logits = new(logits.shape, logits.dtype).copy_(logits)
        seen = np.union1d(prompt_ids, output_ids).astype(np.int64)
        seen_on, ids_on = upload(seen), upload(np.asarray(output_ids, np.int64))
        counts_on = upload(np.asarray(output_counts, np.int64))
        dev.module.penalise(
            address(logits), address(seen_on), len(seen), address(ids_on), address(counts_on), len(output_ids),
            repetition_penalty, frequency_penalty, presence_penalty, limit, dev.stream(),
        )  # fmt: skip
    k = 1 if temperature == 0 else top_k
    room = -(-limit // SHORTLIST_STRETCH) * k if 0 < k <= SHORTLIST_MAX else 0
    values, ids = new([max(room, 1)], torch.float32), new([max(room, 1)], torch.int64)
    token = new([1], torch.int64)
    dev.module.sample(
        address(logits), limit, temperature, top_k, top_p, min_p, uniform, address(values), address(ids), room,
        address(token), dev.stream(),
    )  # fmt: skip
    return token


def sample_rows(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    limit: int,
    unused: np.ndarray,
    draws: np.ndarray,
    tokens: np.ndarray,
) -> None:
    check("sample_rows", "logits", logits, [None, None], ["float32"])
    if len(unused):
        logits[:, upload(unused)] = -np.inf
    none = np.empty(0, np.int64)
    for t in range(logits.shape[0]):
        tokens[t] = sample(
            logits[t], temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, presence_penalty=0.0,
            frequency_penalty=0.0, repetition_penalty=1.0, output_ids=none, output_counts=none, prompt_ids=none,
            limit=limit, uniform=float(draws[t]) / 2**53,
        )  # fmt: skip


def log_softmax_top(logits: Tensor, *, limit: int, k: int, token: int) -> tuple[float, np.ndarray, np.ndarray]:
    import torch

    check("log_softmax_top", "logits", logits, [None], ["float32"])
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
