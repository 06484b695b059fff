"""One engine, one measurement, in a process of its own; started by peers.py with the interpreter that has the engine.

    python peer_worker.py ENGINE MODEL --threads 2 --prompt 512 --new 64

Prints one JSON object. All engines get the same token ids. The prompt is evaluated in one call (in batches of 512),
then tokens are fed one by one. Deltaic runs through its public stream: it also samples and makes text, which is in its
time; the others do not, as their own benchmarks do not. With --new 0 the word "started" is printed when the first token
is there, for whoever times the whole process."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SEED = 20260101
WARM_UP = (32, 4)  # tokens of prompt and answer before the measurement


def token_ids(count: int, seed: int = SEED) -> list[int]:
    """The same plain ids for every engine (ordinary tokens of the family's vocabulary)."""
    state, ids = seed, []
    for _ in range(count):
        state = (1103515245 * state + 12345) % (1 << 31)
        ids.append(1000 + state % 200_000)
    return ids


class Started(Exception):
    """The first token is there, and nothing more was asked for."""


def time_run(
    prefill: Callable[[Sequence[int]], Any], step: Callable[[int], Any], prompt: int, new: int
) -> dict[str, Any]:
    """Seconds of the prompt and of each further token."""
    ids = token_ids(prompt + new)
    start = time.perf_counter()
    prefill(ids[:prompt])
    prefill_seconds = time.perf_counter() - start
    if new == 0:
        print("started", flush=True)
        raise Started
    seconds = []
    for token in ids[prompt:]:
        start = time.perf_counter()
        step(token)
        seconds.append(time.perf_counter() - start)
    return {"prefill": prompt / prefill_seconds, "decode": len(seconds) / sum(seconds)}


def run_deltaic(model: str, threads: int, prompt: int, new: int, dtype: str | None) -> dict[str, Any]:
    import deltaic

    loaded = deltaic.load(model, threads=threads, dtype=dtype, cache_bytes=0)

    def measure(prompt: int, new: int) -> dict[str, Any]:
        pieces: list[Any] = []

        def prefill(ids: Sequence[int]) -> None:
            options = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": SEED}
            pieces.append(iter(loaded.stream(loaded.prepare(list(ids)), max_new_tokens=new + 1, **options)))
            next(pieces[0])

        return time_run(prefill, lambda token: next(pieces[0]), prompt, new)

    if new:
        measure(*WARM_UP)
    return measure(prompt, new)


def run_llama(model: str, threads: int, prompt: int, new: int, dtype: str | None) -> dict[str, Any]:
    import ctypes

    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # must outlive every call
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    loaded = llama_cpp.llama_load_model_from_file(model.encode(), settings)
    context = llama_cpp.llama_context_default_params()
    context.n_ctx, context.n_batch, context.n_ubatch = prompt + new + 64, 512, 512
    context.n_threads = context.n_threads_batch = threads
    session = llama_cpp.llama_new_context_with_model(loaded, context)
    if not loaded or not session:
        raise SystemExit(f"llama.cpp cannot load {model}")

    def feed(ids: Sequence[int]) -> None:
        for first in range(0, len(ids), 512):
            part = ids[first : first + 512]
            tokens = (llama_cpp.llama_token * len(part))(*part)
            code = llama_cpp.llama_decode(session, llama_cpp.llama_batch_get_one(tokens, len(part)))
            if code:
                raise SystemExit(f"llama_decode returned {code}")
        llama_cpp.llama_get_logits_ith(session, -1)  # waits until they are there

    if new:
        time_run(feed, lambda token: feed([token]), *WARM_UP)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(session), True)
    return time_run(feed, lambda token: feed([token]), prompt, new)


def run_transformers(model: str, threads: int, prompt: int, new: int, dtype: str | None) -> dict[str, Any]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
        kind = json.load(file)["architectures"][0]
    loaded = getattr(transformers, kind).from_pretrained(model, dtype=getattr(torch, dtype or "bfloat16")).eval()

    def measure(prompt: int, new: int) -> dict[str, Any]:
        cache: list[Any] = [None]

        def feed(ids: Sequence[int]) -> None:
            output = loaded(
                input_ids=torch.tensor([list(ids)]), past_key_values=cache[0], use_cache=True, logits_to_keep=1
            )
            cache[0] = output.past_key_values

        return time_run(feed, lambda token: feed([token]), prompt, new)

    with torch.no_grad():
        if new:
            measure(*WARM_UP)
        return measure(prompt, new)


ENGINES = {"deltaic": run_deltaic, "llama": run_llama, "transformers": run_transformers}


def peak_resident_bytes() -> int:
    """Largest memory of this process that was in RAM. getrusage would count what its parent had before."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64, help="0: only say when the first token is there")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    try:
        result = ENGINES[args.engine](args.model, args.threads, args.prompt, args.new, args.dtype)
    except Started:
        os._exit(0)
    result["peak_resident_bytes"] = peak_resident_bytes()
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # engines that take long to clean up need not


if __name__ == "__main__":
    main()
