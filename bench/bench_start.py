"""How long from starting the process to the first token? Cold processes, warm file cache.

    python bench/bench_start.py PACKED_FOLDER --repeat 5

Each repetition starts, for each way of holding the weights in turn (load's `memory`), an interpreter that imports
deltaic, loads the model, prepares a prompt of about 20 tokens and streams until the first token is there, and then 64
more. Printed are medians of the whole (as the parent sees it) and of its parts (as the child sees them), the speed of
the tokens after, and how much of the mapped file the system holds in huge pages."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import pairwise
from statistics import median

from common import environment

CHILD = """
import json, sys, time
marks = [("interpreter", time.time())]
import numpy
marks.append(("import numpy", time.time()))
import deltaic.loading, deltaic.ops.cpu
marks.append(("import deltaic", time.time()))
model = deltaic.load(sys.argv[1], progress=False, **json.loads(sys.argv[2]))
marks.append(("load weights", time.time()))
if sys.argv[3] == "text":
    model.tokenizer
    marks.append(("load tokenizer", time.time()))
    prompt = model.prepare([{"role": "user", "content": "Why is the sky blue?"}], thinking=False)
else:
    prompt = model.prepare(list(range(1000, 1020)))
marks.append(("prepare prompt", time.time()))
stream = model.stream(prompt, max_new_tokens=65, speculate="off")
marks.append(("start stream", time.time()))
next(stream)
marks.append(("first token", time.time()))
from deltaic.machine import resident_bytes
resident = (resident_bytes() or {}).get("now")
start, tokens = time.perf_counter(), 0
for piece in stream:
    tokens += piece.token_id is not None
speed = tokens / (time.perf_counter() - start)
huge, inside = 0, False
try:
    for line in open("/proc/self/smaps"):
        first, *rest = line.split()
        if not first.endswith(":"):
            inside = line.rstrip().endswith(".safetensors")
        elif inside and first == "FilePmdMapped:":
            huge += 1024 * int(rest[0])
except OSError:  # not Linux
    huge = None
facts = {"prompt tokens": len(prompt), "resident": resident, "huge pages": huge, "tokens/s": speed}
print(json.dumps({"marks": marks, "facts": facts}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory", nargs="+", default=["map", "copy"], choices=["map", "copy"])
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--ids", action="store_true", help="a prompt of token ids: without tokeniser and template")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = {"verify": not args.no_verify, **({"threads": args.threads} if args.threads else {})}
    runs: dict[str, list[dict[str, float]]] = {memory: [] for memory in args.memory}
    for _ in range(args.repeat + 1):  # the first round warms the file cache
        for memory, past in runs.items():
            child = [args.model, json.dumps({**options, "memory": memory}), "ids" if args.ids else "text"]
            past.append(run([sys.executable, "-c", CHILD, *child]))
    result = {
        memory: {key: median(figures[key] for figures in past[1:]) for key in past[0]} for memory, past in runs.items()
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{'':14}" + "".join(f"{memory:>10}" for memory in result))
    for key in result[args.memory[0]]:
        print(f"{key:14}" + "".join(f"{show(key, figures[key]):>10}" for figures in result.values()))


def run(command: list[str]) -> dict[str, float]:
    """Seconds of each part of one start, and what the child tells besides."""
    start = time.time()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
    if child.returncode:
        sys.exit(child.returncode)
    report = json.loads(line)
    marks = [("", start), *report["marks"]]
    parts = {name: now - before for (_, before), (name, now) in pairwise(marks)}
    return {**parts, "total": marks[-1][1] - start, **report["facts"]}


def show(key: str, value: float) -> str:
    """A figure with its unit."""
    if key in ("resident", "huge pages"):
        return f"{value / 1e6:.0f} MB"
    return f"{value:.1f}" if key == "tokens/s" else f"{value:.0f}" if key == "prompt tokens" else f"{value:.3f} s"


if __name__ == "__main__":
    main()
