"""How fast is this model on this machine, and how fast could it be? Times prefill and decode, and in the same run the
machine itself: how fast memory can be read, how fast numbers can be multiplied. What a token must read, divided by the
bandwidth, is the time that no implementation can beat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import integer
from .errors import ContextLengthError
from .machine import preemptions, resident_bytes

if TYPE_CHECKING:
    from .api import Model

PROBE_BYTES = 256 << 20  # far more than any cache
_PEAK_SECONDS = 0.05
_SEED = 20260101
_DISTURBED = 5  # involuntary switches; one or two come with every timer


def check_lengths(prompt: int, new: int, repeat: int) -> None:
    """Raises ArgumentError for lengths that cannot be measured."""
    integer("prompt", prompt, 1, 1 << 24)
    integer("new", new, 2, 1 << 24)
    integer("repeat", repeat, 1, 1000)


def measure(load: Callable[[], Model], *, prompt: int = 512, new: int = 128, repeat: int = 5) -> dict[str, Any]:
    """Load a model and time it: `repeat` times a random prompt of `prompt` tokens and `new` sampled tokens.

    Speeds are medians over the repetitions (tokens per second), latencies percentiles over all tokens (milliseconds),
    memory what is resident after them (bytes). A token is disturbed if other processes took the processor from this one
    several times while it was computed; such tokens say more about them than about the model. The machine's limits are
    probed before each repetition. Raises what `load` raises, ArgumentError, ContextLengthError.
    """
    check_lengths(prompt, new, repeat)
    start = perf_counter()
    model = load()
    load_seconds = perf_counter() - start
    if prompt + new > model.context_length:
        raise ContextLengthError(
            f"prompt {prompt} and new {new} make {prompt + new} tokens, the model's context has room for "
            f"{model.context_length}"
        )
    probe = Probe(model)
    prefills, decodes, latencies, disturbed = [], [], [], []
    for run in range(repeat):
        probe.run()
        prefill, steps, switches = _one_run(model, prompt, new, seed=_SEED + run)
        prefills.append(prompt / prefill)
        decodes.append(len(steps) / sum(steps))
        latencies += steps
        disturbed += [n >= _DISTURBED for n in switches]
    memory = resident_bytes()
    traffic = traffic_per_token(model, prompt + new // 2)
    decode, bandwidth = median(decodes), probe.bandwidth
    milliseconds = 1e3 * np.array(latencies)
    quiet = milliseconds[~np.array(disturbed)]
    return {
        **{name: model.info()[name] for name in ("architecture", "device", "isa", "threads", "dtype", "activations")},
        "prompt_tokens": prompt,
        "new_tokens": new,
        "repeat": repeat,
        "load_seconds": load_seconds,
        "prefill_tokens_per_second": median(prefills),
        "decode_tokens_per_second": decode,
        **{f"latency_p{p}_ms": float(np.percentile(milliseconds, p)) for p in (50, 90, 99)},
        "latency_max_ms": float(milliseconds.max()),
        "disturbed_tokens": sum(disturbed),
        "latency_p99_undisturbed_ms": float(np.percentile(quiet, 99)) if len(quiet) else None,
        "memory": None if memory is None else {name: memory[name] for name in ("now", "private")},
        **traffic,
        "read_bandwidth": bandwidth,
        "decode_bandwidth_fraction": traffic["bytes_read_per_token"] * decode / bandwidth if bandwidth else None,
        "prefill_operations_per_second": 2 * matrix_elements(model) * median(prefills),
        "peak_int8": probe.peaks["int8"],
        "peak_f32": probe.peaks["f32"],
    }


def _one_run(model: Model, prompt: int, new: int, seed: int) -> tuple[float, list[float], list[int]]:
    """Seconds of prefill, and of each decoded token after the first (sampling included), and how often other processes
    took the processor while it was computed."""
    from .generate.cache import PrefixCache
    from .generate.loop import generate_ids
    from .generate.options import SamplingParams
    from .generate.reading import Reading
    from .generate.sampling import Sampler

    vocabulary = model.config.text.vocab_size
    ids = np.random.default_rng(seed).integers(0, vocabulary, prompt)
    special = [i for i in (model.config.image_token_id, model.config.video_token_id) if i is not None]
    ids[np.isin(ids, special)] = 0
    made = model.prepare(ids.tolist())
    sampler = Sampler(
        model._ops,
        SamplingParams(temperature=1.0, top_k=20, top_p=0.95, seed=seed),
        limit=vocabulary,
        prompt_ids=made.token_ids,
    )
    state = model.new_state()
    state.reserve(prompt + new)
    # without a cache: what one run has read must not shorten the next
    reading = Reading(PrefixCache(0), made, border_id=None, image_token_id=None, split_invariant=True)
    tokens = generate_ids(model._runner, made, reading, sampler, blank=lambda: state, end_ids=(), max_new_tokens=new)
    marks, switches = [perf_counter()], [preemptions()]
    for _ in tokens:
        marks.append(perf_counter())
        switches.append(preemptions())
    steps = [after - before for before, after in pairwise(marks)]
    return steps[0], steps[1:], [after - before for before, after in pairwise(switches)][1:]


class Probe:
    """The limits of the machine as the model's op set reaches them; medians over all calls of `run`."""

    def __init__(self, model: Model):
        ops: Any = model._ops
        self._ops: Any = ops if hasattr(ops, "probe_read") else None
        self._bandwidths: list[float] = []
        self._peaks: dict[str, list[float]] = {"f32": [], "int8": []}

    def run(self) -> None:
        """Measure once."""
        if self._ops is None:
            return
        self._bandwidths.append(read_bandwidth(self._ops, np.ones(PROBE_BYTES, np.uint8)))
        for kind, found in self._peaks.items():
            try:
                found.append(self._peak(kind))
            except ValueError:  # this instruction set has none
                continue

    def _peak(self, kind: str) -> float:
        rounds = 1000
        while True:
            start = perf_counter()
            operations: int = self._ops.probe_peak(kind, rounds)  # type: ignore[union-attr]
            seconds = perf_counter() - start
            if seconds >= _PEAK_SECONDS:
                return operations / seconds
            rounds = int(rounds * min(100, max(2, 1.2 * _PEAK_SECONDS / seconds)))

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second that all threads read together; None where the op set cannot tell."""
        return median(self._bandwidths) if self._bandwidths else None

    @property
    def peaks(self) -> dict[str, float | None]:
        """Operations per second (a multiply-add counts two) in float32 and int8."""
        return {kind: median(found) if found else None for kind, found in self._peaks.items()}


def read_bandwidth(ops: Any, data: np.ndarray, rounds: int = 3) -> float:
    """Bytes per second at which all threads of an op set together read `data` (contiguous) in order; of the fastest
    round."""
    fastest = float("inf")
    for _ in range(rounds):
        start = perf_counter()
        ops.probe_read(data)
        fastest = min(fastest, perf_counter() - start)
    return data.nbytes / fastest


# ------------------------------------------------------------------------------------------ what a token needs


def traffic_per_token(model: Model, context: int) -> dict[str, int]:
    """Bytes that one decoded token must move at a context of `context` tokens, of sequence state and weights.

    Read: every matrix and vector once (of the experts only the chosen ones, of the embedding one row), the state of the
    delta layers, all keys and values. Written: the state of the delta layers and one token's keys and values.
    """
    config = model.config.text
    weights = model._runner.text.weights
    chosen = config.num_experts_per_tok / config.num_experts if config.is_moe else 1.0

    def read(item: Any) -> float:
        if isinstance(item, (list, tuple)):
            return sum(map(read, item))
        if hasattr(item, "nbytes"):  # an array or a packed matrix
            return float(item.nbytes)
        parts = {field.name: getattr(item, field.name) for field in fields(item)}
        routed = ("gate_up", "down") if "router" in parts else ()
        return sum(read(part) * (chosen if name in routed else 1.0) for name, part in parts.items())

    state = model.new_state()
    fixed = state.conv.nbytes + state.delta.nbytes
    state.reserve(1)
    block = state.kv.blocks[0]
    per_token = block.nbytes // block.shape[3] if config.num_attention_layers else 0
    screen = model._runner.text.screen  # some rows of the head besides, which are not counted
    weight_bytes = read(weights.layers) + weights.norm.nbytes + (weights.head if screen is None else screen).nbytes
    weight_bytes += weights.embed.nbytes / weights.embed.shape[0]
    return {
        "weight_bytes_per_token": round(weight_bytes),
        "state_bytes": fixed,
        "kv_bytes_per_token_of_context": per_token,
        "bytes_read_per_token": round(weight_bytes) + fixed + per_token * context,
        "bytes_written_per_token": fixed + per_token,
    }


def matrix_elements(model: Model) -> int:
    """Numbers in the matrices that every token of a prompt meets (chosen experts; not embedding, not head)."""
    config = model.config.text
    total = 0.0
    for layer in model._runner.text.weights.layers:
        for part in (layer.mixer, layer.ffn):
            for field in fields(part):
                weight = getattr(part, field.name)
                if isinstance(weight, np.ndarray):
                    continue
                share = config.num_experts_per_tok / weight.shape[0] if len(weight.shape) == 3 else 1.0
                total += share * float(np.prod(weight.shape, dtype=float))
    return round(total)


def as_table(facts: dict[str, Any]) -> str:
    """The result of `measure` for people."""

    def percent(value: float | None, of: float | None) -> str:
        return "" if value is None or not of else f" ({100 * value / of:.0f} %"

    bandwidth = facts["read_bandwidth"]
    rows = [
        ("model", f"{facts['architecture']}, {facts['dtype']}, activations {facts['activations']}"),
        ("machine", f"{facts['device']} {facts['isa']}, {facts['threads']} threads"),
        ("load", f"{facts['load_seconds']:.2f} s"),
        ("prefill", f"{facts['prefill_tokens_per_second']:.1f} tokens/s, {facts['prompt_tokens']} tokens"),
        ("decode", f"{facts['decode_tokens_per_second']:.1f} tokens/s, {facts['new_tokens']} tokens"),
        (
            "latency",
            f"p50 {facts['latency_p50_ms']:.1f}, p90 {facts['latency_p90_ms']:.1f}, p99 {facts['latency_p99_ms']:.1f}, "
            f"longest {facts['latency_max_ms']:.1f} ms per token",
        ),
        ("reads", f"{facts['bytes_read_per_token'] / 1e6:.0f} MB per token"),
    ]
    if facts["disturbed_tokens"] and facts["latency_p99_undisturbed_ms"] is not None:
        share = 100 * facts["disturbed_tokens"] / (facts["repeat"] * (facts["new_tokens"] - 1))
        alone = f"p99 of the others {facts['latency_p99_undisturbed_ms']:.1f} ms"
        rows.insert(6, ("", f"{share:.1f} % of the tokens were disturbed by other processes, {alone}"))
    if bandwidth is not None:
        rate = facts["bytes_read_per_token"] * facts["decode_tokens_per_second"]
        rows.append(("bandwidth", f"{rate / 1e9:.1f} of {bandwidth / 1e9:.1f} GB/s{percent(rate, bandwidth)})"))
        operations = facts["prefill_operations_per_second"]
        peaks = [f"{name} {facts['peak_' + name] / 1e9:.0f}" for name in ("int8", "f32") if facts["peak_" + name]]
        rows.append(("arithmetic", f"prefill {operations / 1e9:.0f} Gop/s; peak {', '.join(peaks)}"))
    if facts["memory"] is not None:
        memory = facts["memory"]
        private = f"{memory['private'] / 1e6:.0f} MB of it private"
        rows.append(("memory", f"{memory['now'] / 1e6:.0f} MB resident, {private}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)
