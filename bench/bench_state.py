"""What do states as values bring, and what do they cost? Turn 10 of a conversation, files, forks, the cache under load.

    python bench/make_checkpoint.py 0.8B /tmp/random-0.8B
    python bench/bench_state.py /tmp/random-0.8B                                   # everything, a minute of load
    python bench/bench_state.py /tmp/random-0.8B load --minutes 10 --json
    python bench/bench_state.py /tmp/random-0.8B file --file-tokens 32768 --folder /mnt/disk

turns  time to first token of turn 10 of a conversation, with a cold cache and with the one that turns 1 to 9 left
prefixes  what is read, and how long that takes, where a prompt begins like an earlier one: 20 questions after one
       system prompt, one after the other and in one batch; a prompt asked again, with another last message, branched
messages  time to first token of short prompts of one to five messages, read in one pass that leaves the checkpoints
       between messages, beside a pass for each message
file   rates of saving and loading a long state, beside those of writing (with fsync) and reading as many plain bytes
fork   seconds for a fork, and for the first write after it
load   the cache's bytes and the process's memory while random prompts come in that share beginnings

Prints figures (or one JSON object) and writes a plot of each part that was run to bench/results.
"""

from __future__ import annotations

import argparse
import gc
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

import deltaic
import numpy as np
import parts
from common import medians, random_ids, timed
from deltaic.generate import prefill
from deltaic.machine import resident_bytes
from deltaic.model.state import State

MIB = 2.0**20
WORDS = ("the", "cat", "dog", "mat", "sun", "sat", "ran", "on", "under", "over", "and", "or", "red", "is", "was")


def words(model: deltaic.Model, tokens: int, rng: np.random.Generator) -> str:
    """Text of about `tokens` tokens."""
    sample = " ".join(rng.choice(WORDS, 400))
    per_word = len(model.tokenizer.encode(sample)) / 400
    return " ".join(rng.choice(WORDS, max(1, round(tokens / per_word))))


# ------------------------------------------------------------------------------- turns


def bench_turns(model: deltaic.Model, args: argparse.Namespace) -> dict[str, Any]:
    """Ten turns of args.tokens in all: nine long questions and answers, and a short last question."""
    rng = np.random.default_rng(0)
    options = {"temperature": 0.0, "max_new_tokens": args.answer_tokens, "thinking": False}
    question = args.tokens // 9 - args.answer_tokens
    messages: list[dict[str, Any]] = []
    warm = []
    for turn in range(10):
        text = words(model, question if turn < 9 else 30, rng)
        messages.append({"role": "user", "content": text})
        result = model.chat(messages, **options)
        warm.append(result)
        messages.append({"role": "assistant", "content": words(model, args.answer_tokens, rng)})
    model.cache.clear()
    cold = model.chat(messages[:-1], **options)
    assert cold.token_ids == result.token_ids, "a cached turn gave other tokens than a cold one"
    return {
        "prompt_tokens": [r.prompt_tokens for r in warm],
        "cached_tokens": [r.cached_tokens for r in warm],
        "first_token_seconds": [r.time_to_first_token for r in warm],
        "cold_first_token_seconds": cold.time_to_first_token,
        "share_of_cold": result.time_to_first_token / cold.time_to_first_token,
    }


# ------------------------------------------------------------------------------- prefixes


def bench_prefixes(model: deltaic.Model, args: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    options = {"temperature": 0.0, "max_new_tokens": 4, "thinking": False}
    system = {"role": "system", "content": words(model, args.tokens // 4, rng)}
    questions = [[system, {"role": "user", "content": words(model, 20, rng)}] for _ in range(20)]
    cases: dict[str, Any] = {}

    def ask(name: str, messages: list[dict[str, Any]]) -> None:
        cases[name] = model.chat(messages, **options)

    model.cache.clear()
    for i, messages in enumerate(questions):
        ask(f"question {i + 1}", messages)
    model.cache.clear()
    began = time.perf_counter()
    batch = model.generate_batch(questions, **options)
    seconds = time.perf_counter() - began
    alone = [cases[f"question {i + 1}"] for i in range(20)]
    assert [r.token_ids for r in batch] == [r.token_ids for r in alone], "a batch gave other tokens"
    talk = [system]
    for role in ("user", "assistant") * 3:
        talk.append({"role": role, "content": words(model, args.tokens // 20, rng)})
    other = {"role": "user", "content": words(model, 20, rng)}
    ask("conversation", talk[:-1])
    ask("asked again", talk[:-1])
    ask("last message edited", [*talk[:-2], other])
    ask("branched after turn 1", [*talk[:3], other])
    return {
        "cases": {
            name: {
                "prompt_tokens": r.prompt_tokens,
                "cached_tokens": r.cached_tokens,
                "first_token_seconds": r.time_to_first_token,
                "cache_miss_reason": r.cache_miss_reason,
            }
            for name, r in cases.items()
        },
        "batch_cached_tokens": [r.cached_tokens for r in batch],
        "batch_seconds": seconds,
    }


# ------------------------------------------------------------------------------- files


# ------------------------------------------------------------------------------- messages


def bench_messages(model: deltaic.Model, args: argparse.Namespace) -> dict[str, Any]:
    """Messages of about 20 tokens, nothing cached; the two ways in turn."""
    rng = np.random.default_rng(0)
    said = [{"role": ("user", "assistant")[i % 2], "content": words(model, 20, rng)} for i in range(5)]

    def first_token(count: int, marks: int) -> None:
        model.cache.clear()
        prefill.MARKS = marks
        model.chat(said[:count], max_new_tokens=1, thinking=False, temperature=0.0)

    most, cases = prefill.MARKS, {}
    for count in (1, 3, 5):
        ways = {"one pass": most, "a pass each": 0}
        found = medians({name: (lambda m=marks, n=count: first_token(n, m)) for name, marks in ways.items()}, 11)
        cases[count] = {"tokens": len(model.prepare(said[:count], thinking=False)), **found}
    prefill.MARKS = most
    return {"cases": cases}


def long_state(model: deltaic.Model, tokens: int) -> State:
    """A state of `tokens` tokens with random contents, as no prompt that long needs to be read for it."""
    rng = np.random.default_rng(0)
    state = model.new_state()
    state.reserve(tokens)
    state.delta[:] = rng.standard_normal(state.delta.shape, np.float32)
    noise = np.frombuffer(rng.bytes(state.kv.blocks[0].nbytes), state.kv.blocks[0].dtype)
    for i, block in enumerate(state.kv.blocks):
        block[:] = np.roll(noise, i).reshape(block.shape)  # no two alike, in case the disk compresses
    state.length, state.token_ids = tokens, random_ids(model, rng, tokens)
    return state


def drop_from_page_cache(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_plain(path: Path, pieces: list[memoryview]) -> None:
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            while piece:
                piece = piece[file.write(piece) :]
        os.fsync(file.fileno())


def read_plain(path: Path, piece_bytes: int) -> None:
    piece = bytearray(piece_bytes)
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass


def bench_file(model: deltaic.Model, args: argparse.Namespace) -> dict[str, Any]:
    """Best of several rounds, ours and plain in turn: disks and neighbours vary."""
    state = long_state(model, args.file_tokens)
    pieces = [memoryview(block.reshape(-1).view(np.uint8)) for block in state.kv.blocks]
    times: dict[str, list[float]] = {"save": [], "load": [], "write": [], "read": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        ours, plain = Path(folder) / "state", Path(folder) / "plain"
        for _ in range(args.rounds):
            times["write"].append(timed(lambda: write_plain(plain, pieces)))
            times["save"].append(timed(lambda: state.save(ours)))
            drop_from_page_cache(plain)
            times["read"].append(timed(lambda: read_plain(plain, len(pieces[0]))))
            drop_from_page_cache(ours)
            began = time.perf_counter()
            loaded = State.load(ours, model._ops)
            times["load"].append(time.perf_counter() - began)
            assert np.array_equal(loaded.delta, state.delta)
            del loaded
        nbytes, plain_bytes = ours.stat().st_size, plain.stat().st_size
    rates = {
        name: (plain_bytes if name in ("write", "read") else nbytes) / min(seconds) for name, seconds in times.items()
    }
    return {
        "tokens": args.file_tokens,
        "bytes": nbytes,
        "bytes_per_second": rates,
        "save_share": rates["save"] / rates["write"],
        "load_share": rates["load"] / rates["read"],
    }


# ------------------------------------------------------------------------------- forks


def bench_fork(model: deltaic.Model, args: argparse.Namespace) -> dict[str, Any]:
    """A fork shares; its first write copies the matrices and one block."""
    state = long_state(model, args.file_tokens)
    fork, write = [], []
    for _ in range(20):
        began = time.perf_counter()
        twin = state.fork()
        fork.append(time.perf_counter() - began)
        write.append(timed(lambda twin=twin: twin.reserve(twin.length + 1)))
    arrays = state.conv.nbytes + state.delta.nbytes
    return {
        "tokens": args.file_tokens,
        "state_bytes": state.nbytes,
        "fork_seconds": min(fork),
        "first_write_seconds": min(write),
        "first_write_bytes": arrays + state.kv.blocks[0].nbytes,
    }


# ------------------------------------------------------------------------------- the cache under load


def resident() -> int:
    """Bytes of this process in RAM; 0 where the system does not tell."""
    return (resident_bytes() or {"now": 0})["now"]


def bench_load(model: deltaic.Model, args: argparse.Namespace) -> dict[str, Any]:
    """Random prompts that begin like others, until the time is over. The budget is small, so that much is dropped."""
    rng = np.random.default_rng(int.from_bytes(secrets.token_bytes(4), "little"))
    one = model.new_state().bytes_for(args.load_tokens)
    model.cache.clear()
    model.cache.budget = args.budget_checkpoints * one
    heads = [words(model, args.load_tokens // 2, rng) for _ in range(4)]
    samples, prompts, cached, total = [], 0, 0, 0
    ends = time.monotonic() + 60 * args.minutes
    while time.monotonic() < ends:
        head = {"role": "system", "content": heads[rng.integers(len(heads))]}
        tail = {"role": "user", "content": words(model, int(rng.integers(1, args.load_tokens // 2)), rng)}
        result = model.chat([head, tail], temperature=0.0, max_new_tokens=4)
        prompts, cached, total = prompts + 1, cached + result.cached_tokens, total + result.prompt_tokens
        samples.append((60 * args.minutes - ends + time.monotonic(), model.cache.nbytes, resident()))
    quarters = [[r for _, _, r in part] for part in np.array_split(np.array(samples), 4)]  # a state comes and goes
    model.cache.clear()
    gc.collect()
    return {
        "minutes": args.minutes,
        "prompts": prompts,
        "cached_share": cached / max(1, total),
        "budget": model.cache.budget,
        "largest": max(n for _, n, _ in samples),
        "checkpoint_bytes": one,
        "resident_growth_in_second_half": float(np.median(quarters[3]) - np.median(quarters[2])),
        "resident_after_clearing": resident(),
        "samples": samples[:: max(1, len(samples) // 500)],
    }


# ------------------------------------------------------------------------------- what is shown


def describe(part: str, f: dict[str, Any]) -> str:
    if part == "turns":
        return (
            f"turns  turn 10 of {f['prompt_tokens'][-1]} tokens: first token after "
            f"{f['first_token_seconds'][-1]:.2f} s ({f['cached_tokens'][-1]} cached), cold "
            f"{f['cold_first_token_seconds']:.2f} s: {100 * f['share_of_cold']:.1f} %"
        )
    if part == "prefixes":
        lines = [
            f"  {name:22s} {c['prompt_tokens']:5d} tokens, {c['cached_tokens']:5d} cached, first token after "
            f"{c['first_token_seconds']:.3f} s"
            for name, c in f["cases"].items()
        ]
        cached = f["batch_cached_tokens"]
        batch = (
            f"  all 20 in one batch    {sum(n > 0 for n in cached)} of 20 from the cache, {f['batch_seconds']:.2f} s"
        )
        return "\n".join(["prefixes", *lines, batch])
    if part == "messages":
        lines = [
            f"  {count} messages, {c['tokens']:4d} tokens: {1e3 * c['one pass']:.1f} ms, with a pass for each message "
            f"{1e3 * c['a pass each']:.1f} ms"
            for count, c in f["cases"].items()
        ]
        return "\n".join(["messages  first token of", *lines])
    if part == "file":
        r = f["bytes_per_second"]
        return (
            f"file   {f['tokens']} tokens, {f['bytes'] / MIB:.0f} MiB: save {r['save'] / 1e6:.0f} MB/s "
            f"({100 * f['save_share']:.0f} % of plain writing), load {r['load'] / 1e6:.0f} MB/s "
            f"({100 * f['load_share']:.0f} % of plain reading)"
        )
    if part == "fork":
        return (
            f"fork   {f['tokens']} tokens, {f['state_bytes'] / MIB:.0f} MiB: fork {1e3 * f['fork_seconds']:.2f} ms, "
            f"first write {1e3 * f['first_write_seconds']:.2f} ms for {f['first_write_bytes'] / MIB:.1f} MiB"
        )
    return (
        f"load   {f['minutes']:g} min, {f['prompts']} prompts, {100 * f['cached_share']:.0f} % of tokens cached: "
        f"at most {f['largest'] / MIB:.0f} of {f['budget'] / MIB:.0f} MiB; process grew by "
        f"{f['resident_growth_in_second_half'] / MIB:.1f} MiB in the second half"
    )


def plot(part: str, f: dict[str, Any], figure: Any, axis: Any) -> None:
    if part == "turns":
        turns = range(1, 11)
        axis.bar(turns, f["prompt_tokens"], color="lightgrey", label="tokens of the prompt")
        axis.bar(turns, f["cached_tokens"], color="tab:blue", label="from the cache")
        axis.set(xlabel="turn", ylabel="tokens", title="A conversation of ten turns")
        seconds = axis.twinx()
        seconds.plot(turns, f["first_token_seconds"], "o-", color="tab:orange", label="first token")
        seconds.plot([10], [f["cold_first_token_seconds"]], "x", color="tab:red", label="first token, cold")
        seconds.set_ylabel("seconds")
        seconds.legend(loc="upper center")
        axis.legend(loc="upper left")
    elif part == "prefixes":
        names = list(f["cases"])
        axis.barh(names, [c["prompt_tokens"] for c in f["cases"].values()], color="lightgrey", label="tokens")
        axis.barh(names, [c["cached_tokens"] for c in f["cases"].values()], color="tab:blue", label="from the cache")
        axis.set(xlabel="tokens of the prompt", title="Prompts that begin like others")
        axis.tick_params(axis="y", labelsize=7)
        axis.invert_yaxis()
        axis.legend()
    elif part == "messages":
        for way in ("a pass each", "one pass"):
            counts = [c["tokens"] for c in f["cases"].values()]
            axis.plot(counts, [1e3 * c[way] for c in f["cases"].values()], "o-", label=way)
        axis.set(xlabel="tokens of the prompt", ylabel="ms", title="One, three, five messages", ylim=(0, None))
        axis.legend()
    elif part == "file":
        rates = {name: rate / 1e6 for name, rate in f["bytes_per_second"].items()}
        labels = {"write": "plain write", "save": "State.save", "read": "plain read", "load": "State.load"}
        axis.bar(list(labels.values()), [rates[name] for name in labels])
        axis.set(ylabel="MB/s", title=f"State of {f['tokens']} tokens, {f['bytes'] / MIB:.0f} MiB")
    elif part == "fork":
        axis.bar(["fork", "first write"], [1e3 * f["fork_seconds"], 1e3 * f["first_write_seconds"]])
        axis.set(ylabel="ms", title=f"State of {f['tokens']} tokens, {f['state_bytes'] / MIB:.0f} MiB")
    else:
        seconds, cache, resident = zip(*f["samples"], strict=True)
        axis.plot(seconds, [n / MIB for n in cache], label="cache")
        axis.plot(seconds, [n / MIB for n in resident], label="process")
        axis.axhline(f["budget"] / MIB, linestyle=":", color="grey", label="budget")
        axis.set(xlabel="seconds", ylabel="MiB", title="Random prompts", ylim=(0, None))
        axis.legend()


def main() -> None:
    benches: dict[str, parts.Bench] = {
        "turns": bench_turns,
        "prefixes": bench_prefixes,
        "messages": bench_messages,
        "file": bench_file,
        "fork": bench_fork,
        "load": bench_load,
    }
    parser = parts.parser(__doc__ or "", benches)
    parser.add_argument("--tokens", type=int, default=8000, help="turns: tokens of the conversation")
    parser.add_argument("--answer-tokens", type=int, default=64, help="turns: tokens of an answer")
    parser.add_argument("--file-tokens", type=int, default=32768, help="file, fork: tokens of the state")
    parser.add_argument("--folder", help="file: where to write; default: the system's folder for temporary files")
    parser.add_argument("--rounds", type=int, default=5, help="file: how often; the best counts")
    parser.add_argument("--minutes", type=float, default=1.0, help="load: how long")
    parser.add_argument("--load-tokens", type=int, default=256, help="load: tokens of a prompt at most")
    parser.add_argument("--budget-checkpoints", type=int, default=8, help="load: the budget in checkpoints of a prompt")
    parts.run(parser, benches, describe=describe, plot=plot, plots="state")


if __name__ == "__main__":
    main()
