"""What does speculative decoding cost, what does it bring, and does it change a token?

    python bench/make_checkpoint.py 0.8B /tmp/random-0.8B && deltaic quantize /tmp/random-0.8B -o /tmp/random-0.8B-int4
    python bench/bench_speculate.py /tmp/random-0.8B-int4                 # every part
    python bench/bench_speculate.py /tmp/random-0.8B-int4 costs losing
    python bench/bench_speculate.py equal --tokens 10000

costs   seconds of verify + logits + commit by rows, beside a plain step; of drafts by depth and head; of catching up
losing  "auto" against "off", alternating, on text that nothing predicts: a random model sampled at temperature 1, and
        the miniature at temperature 20
copying "lookup" against "off" on a random model that is made to repeat itself, and on the miniature's "Repeat: ..."
gain    the miniature's tokens per forward pass and tokens per second with every mode, on its own kinds of task
equal   greedy and sampled tokens with every mode and depth against plain decoding, on the miniature and a random model

Prints figures, or one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import deltaic
import numpy as np
import parts
from common import endless, medians, random_ids
from deltaic.cli import MINIATURE
from deltaic.generate.costs import Costs
from deltaic.generate.options import SamplingParams
from deltaic.generate.sampling import Sampler
from deltaic.generate.speculate import Drafting
from deltaic.model.replay import Replay

TASKS = [
    "Count from 3 to 12.",
    "Count from 17 to 29.",
    "Name the days of the week.",
    "Repeat: Ben likes the old hat.",
    "What is 3 + 4?",
]
PICTURES = ["Describe the picture.", "How many objects are there?"]


# ------------------------------------------------------------------------------- costs


def bench_costs(model: deltaic.Model, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of one sequence with a short context."""
    runner, rng = model._runner, np.random.default_rng(0)
    ids = np.array(random_ids(model, rng, 64))
    state = model.new_state()
    hidden = list(runner.hidden(model.prepare(ids.tolist()), state, [64]))[-1][-1:]
    state.reserve(4096)

    def plain() -> None:
        runner.logits(runner.step(1, state))

    def verify(rows: int) -> None:
        v = runner.verify([state], [list(range(1, rows + 1))])
        runner.logits(v.hidden)
        runner.commit(v, [rows])

    steps: dict[Any, Callable[[], Any]] = {"plain": plain}
    steps |= {rows: (lambda rows=rows: verify(rows)) for rows in (1, 2, 3, 4, 5, 6, 8)}
    found = medians(steps, args.repeat)
    result: dict[str, Any] = {
        "plain_ms": 1e3 * found["plain"],
        "verify": {rows: found[rows] / found["plain"] for rows in steps if rows != "plain"},
    }
    if runner.mtp is not None:

        def draft(depth: int, rows: int) -> None:
            first = state.length - rows
            state.mtp_first = first - state.mtp_length
            tokens = list(range(1, rows + 1))
            runner.draft([Drafting(state, first, np.repeat(hidden, rows, axis=0), tokens, depth, sampler)])

        sampler = Sampler(model._ops, SamplingParams(temperature=0.0), limit=model._sampled_ids[0], prompt_ids=ids)
        head, whole = runner.mtp.head, model._runner.text.weights.head
        drafts: dict[Any, Callable[[], Any]] = {d: (lambda d=d: draft(d, 1)) for d in (1, 2, 3, 4)}
        drafts["catching up, 32 rows"] = lambda: draft(0, 32)
        found_drafts = medians(drafts, args.repeat)
        replay = runner.mtp.replay
        runner.mtp.head, runner.mtp.replay = whole, Replay(model._ops)  # tapes hold the head
        with_whole = medians({1: drafts[1]}, args.repeat)[1]
        runner.mtp.head, runner.mtp.replay = head, replay
        result["drafts"] = {name: seconds / found["plain"] for name, seconds in found_drafts.items()}
        result["draft from the whole head"] = with_whole / found["plain"]
    return result


# ------------------------------------------------------------------------------- losing


def speeds(
    model: deltaic.Model, prompt: Any, modes: tuple[str, ...], args: argparse.Namespace, **options: Any
) -> dict[str, Any]:
    """Tokens per second with each mode, in turn; the seeds are the same, and so are the tokens."""
    rates: dict[str, list[float]] = {mode: [] for mode in modes}
    counts: dict[str, list[int]] = {mode: [0, 0, 0] for mode in modes}
    for seed in range(args.repeat):
        texts = set()
        for mode in modes if seed % 2 == 0 else reversed(modes):
            r = model.generate(prompt, seed=seed, speculate=mode, max_new_tokens=args.new, **options)
            rates[mode].append(r.tokens_per_second)
            counts[mode] = [
                a + b for a, b in zip(counts[mode], (r.completion_tokens, r.drafted, r.accepted), strict=True)
            ]
            texts.add(tuple(r.token_ids))
        assert len(texts) == 1, "a mode changed the tokens"
    return {
        mode: {
            "tokens_per_second": statistics.median(rates[mode]),
            "drafted": counts[mode][1],
            "accepted": counts[mode][2],
            "tokens_per_forward": (counts[mode][0] - args.repeat)
            / max(1, counts[mode][0] - args.repeat - counts[mode][2]),
        }
        for mode in modes
    }


def bench_losing(model: deltaic.Model | None, args: argparse.Namespace) -> dict[str, Any]:
    """MODEL at temperature 1, and the miniature so hot that its tokens are drawn nearly evenly."""
    small = deltaic.load(MINIATURE, threads=args.threads, cache_bytes=0)
    small.__dict__["end_ids"] = frozenset()
    found: dict[str, Any] = {}
    for name, m, temperature in (("MODEL", model, 1.0), ("miniature", small, 20.0)):
        if m is None:
            continue
        prompt = random_ids(m, np.random.default_rng(0), 64)
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "presence_penalty": 0.0}
        found[name] = speeds(m, prompt, ("off", "auto"), args, **sampling)
        rates = {mode: found[name][mode]["tokens_per_second"] for mode in ("off", "auto")}
        found[name]["auto / off"] = rates["auto"] / rates["off"]
    return found


def bench_copying(model: deltaic.Model, args: argparse.Namespace) -> dict[str, Any]:
    """A random model copies nothing by itself: a repetition penalty below 1 makes it say what it said before."""
    prompt = random_ids(model, np.random.default_rng(1), 64)
    modes = ("off", "lookup", "auto")
    found: dict[str, Any] = {"loop": speeds(model, prompt, modes, args, temperature=0.0, frequency_penalty=-2.0)}
    small = deltaic.load(MINIATURE, dtype="f32", threads=model.threads)
    repeat = small.prepare([{"role": "user", "content": "Repeat: Ben likes the old hat."}])
    found["miniature"] = speeds(small, repeat, modes, args, temperature=0.0)
    for name in ("loop", "miniature"):
        found[name]["lookup / off"] = (
            found[name]["lookup"]["tokens_per_second"] / found[name]["off"]["tokens_per_second"]
        )
    return found


class CostsOf(Costs):
    """The costs of another model, in plain steps of it."""

    def __init__(self, measured: dict[str, Any]) -> None:
        super().__init__()
        rows, drafts = {1: 1.0, **measured["verify"]}, {0: 0.0, **measured["drafts"]}
        del rows[1]
        self._of_rows = np.interp(np.arange(10), [1, *rows], [1.0, *rows.values()])
        self._of_drafts = [drafts[d] for d in range(5)]

    known = True  # type: ignore[assignment]

    def step(self, rows: int) -> float:
        return float(self._of_rows[rows])

    def rounds(self, most: int) -> list[float]:
        return [self.step(1 + depth) + self._of_drafts[depth] for depth in range(most + 1)]

    def can_pay(self, most: int) -> bool:
        return True

    def record_step(self, rows: int, seconds: float) -> None:
        pass

    def record_round(self, depth: int, seconds: float) -> None:
        pass


def bench_gain(other: deltaic.Model | None, args: argparse.Namespace) -> dict[str, Any]:
    """Per kind of task the median of --repeat runs, modes in turn. With MODEL, also what "auto" would do if the
    miniature's steps cost what those of MODEL do."""
    measured = None if other is None else bench_costs(other, args)
    found: dict[str, Any] = {}
    for dtype in ("bf16", "f32"):
        model = deltaic.load(MINIATURE, dtype=dtype, threads=args.threads, cache_bytes=0)
        for name, options in {
            "greedy": {"temperature": 0.0},
            "sampled": {"temperature": 1.0, "top_k": 20, "top_p": 1.0, "presence_penalty": 0.0},
        }.items():
            found[f"{dtype}, {name}"] = gains(model, measured, options, args)
    return found


def gains(
    model: deltaic.Model, measured: dict[str, Any] | None, options: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    runner = model._runner
    own, borrowed = runner.costs, None if measured is None else CostsOf(measured)
    modes = ["off", "mtp", "lookup", "auto", *(["auto, costs of MODEL"] if borrowed else [])]
    prompts = list(tasks(model))
    seconds: dict[str, list[list[float]]] = {mode: [[] for _ in prompts] for mode in modes}
    counts = {mode: [0, 0, 0] for mode in modes}
    learnt: dict[str, Any] = {mode: ([], 0) for mode in modes}  # each goes on with what it learnt itself
    for repeat in range(args.repeat + 1):
        for i, prompt in enumerate(prompts):
            for mode in modes if repeat % 2 else reversed(modes):
                runner.costs = borrowed if borrowed and "MODEL" in mode else own
                runner.acceptances, runner.rests = learnt[mode]
                r = model.generate(prompt, seed=1, speculate=mode.split(",")[0], max_new_tokens=args.new, **options)
                learnt[mode] = runner.acceptances, runner.rests
                if repeat:  # the first makes tapes
                    decoded = r.completion_tokens - 1
                    seconds[mode][i].append(decoded / r.tokens_per_second)
                    new = (decoded, r.drafted, r.accepted)
                    counts[mode] = [a + b for a, b in zip(counts[mode], new, strict=True)]
    found: dict[str, Any] = {}
    for mode, (n, drafted, accepted) in counts.items():
        found[mode] = {
            "tokens_per_second": n / args.repeat / sum(statistics.median(s) for s in seconds[mode]),
            "tokens_per_forward": n / (n - accepted),
            "accepted": accepted / max(1, drafted),
        }
    found["auto / off"] = found["auto"]["tokens_per_second"] / found["off"]["tokens_per_second"]
    if borrowed:
        mode = "auto, costs of MODEL"
        del found[mode]["tokens_per_second"]
    runner.costs = own
    return found


def tasks(model: deltaic.Model) -> Iterator[Any]:
    """What the miniature was taught."""
    for text in TASKS:
        yield model.prepare([{"role": "user", "content": text}])
    for picture in sorted((MINIATURE / "pictures").glob("*.png")):
        for text in PICTURES:
            yield model.prepare([{"role": "user", "content": text}], images=[picture], thinking=True)


# ------------------------------------------------------------------------------- equal


def bench_equal(model: deltaic.Model | None, args: argparse.Namespace) -> dict[str, Any]:
    models = []
    if not args.only_model:
        models = [deltaic.load(MINIATURE, dtype=dtype, threads=args.threads) for dtype in ("f32", "int4")]
    if model is not None:
        models.append(model)
    found = {}
    for m in models:
        for name, options in {
            "greedy": {"temperature": 0.0, "presence_penalty": 0.0},
            "sampled": {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "presence_penalty": 1.5},
        }.items():
            total = args.tokens if m.folder == MINIATURE else args.model_tokens
            title = f"{m.folder.name} {m.dtype} {name}"
            found[title] = compare(m, total, options)
            print(title, found[title], file=sys.stderr, flush=True)
    return found


def compare(model: deltaic.Model, total: int, options: dict[str, Any]) -> dict[str, Any]:
    """Tokens of every mode and depth against those of plain decoding, until there are `total` of these."""
    runner, length = model._runner, min(512, total, model.context_length // 2)
    settings = [(mode, depth) for mode in ("mtp", "lookup", "auto") for depth in (1, 2, 3, 4, None)]
    same, compared, seed = 0, 0, 0
    drafted = accepted = 0

    def answer(mode: str) -> deltaic.GenerationResult:
        with endless(model):
            return model.generate(prompt, seed=seed, speculate=mode, max_new_tokens=length, **options)

    while compared < total:
        prompt = random_ids(model, np.random.default_rng(seed), 8)
        plain = answer("off")
        for mode, depth in settings:
            runner.fixed_depth = depth
            tokens = answer(mode)
            runner.fixed_depth = None
            same += sum(a == b for a, b in zip(plain.token_ids, tokens.token_ids, strict=True))
            drafted, accepted = drafted + tokens.drafted, accepted + tokens.accepted
        compared += len(plain.token_ids)
        seed += 1
    return {
        "plain tokens": compared, "modes and depths": len(settings), "equal": same / (compared * len(settings)),
        "drafted": drafted, "accepted": accepted,
    }  # fmt: skip


def describe(part: str, f: dict[str, Any]) -> str:
    return f"{part} {json.dumps(f, indent=2)}"


def main() -> None:
    benches: dict[str, parts.Bench] = {
        "costs": bench_costs,
        "losing": bench_losing,
        "copying": bench_copying,
        "gain": bench_gain,
        "equal": bench_equal,
    }
    parser = parts.parser(__doc__ or "", benches, needs_model=False)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--new", type=int, default=128, help="tokens per generation")
    parser.add_argument("--tokens", type=int, default=10_000, help="plain tokens that are compared with each mode")
    parser.add_argument("--model-tokens", type=int, default=200, help="the same for MODEL")
    parser.add_argument("--only-model", action="store_true", help="equal: not the miniature")
    parts.run(parser, benches, describe=describe, with_model=("costs", "copying"))


if __name__ == "__main__":
    main()
