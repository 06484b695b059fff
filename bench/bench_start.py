"""How long from starting the process to the first token? Cold processes, warm file cache.

    python bench/bench_start.py PACKED_FOLDER --repeat 5

Each repetition starts an interpreter that imports deltaic, loads the model, prepares a prompt of about 20 tokens and
streams until the first token is there. Printed are medians of the whole (as the parent sees it) and of its parts (as
the child sees them)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from statistics import median

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
stream = model.stream(prompt)
marks.append(("start stream", time.time()))
next(stream)
marks.append(("first token", time.time()))
from deltaic.machine import resident_bytes
print(json.dumps({"marks": marks, "tokens": len(prompt), "resident": (resident_bytes() or {}).get("now")}), flush=True)
"""


def environment() -> dict[str, str]:
    """This process's, but Python may keep its bytecode, as that of an installed package is kept."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory", default="map", choices=["map", "copy"])
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--ids", action="store_true", help="a prompt of token ids: without tokeniser and template")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = {"memory": args.memory, "verify": not args.no_verify}
    if args.threads:
        options["threads"] = args.threads
    command = [sys.executable, "-c", CHILD, args.model, json.dumps(options), "ids" if args.ids else "text"]
    runs = []
    for _ in range(args.repeat + 1):  # the first one warms the file cache
        start = time.time()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as child:
            assert child.stdout is not None
            line = child.stdout.readline()
        if child.returncode:
            sys.exit(child.returncode)
        report = json.loads(line)
        marks = [("", start), *report["marks"]]
        run = {name: now - before for (_, before), (name, now) in pairwise(marks)}
        tokens, resident = report["tokens"], report["resident"]
        runs.append({**run, "total": marks[-1][1] - start, "prompt tokens": tokens, "resident": resident})
    result = {key: median(run[key] for run in runs[1:]) for key in runs[0]}
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        units = {"resident": f"{value / 1e6:.0f} MB", "prompt tokens": str(value)}
        print(f"{key:14} {units.get(key, f'{value:.3f} s')}")


if __name__ == "__main__":
    main()
