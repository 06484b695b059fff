"""How long from starting the process to the first token? Cold processes, warm file cache.

    python bench/bench_start.py PACKED_FOLDER --repeat 5

Each repetition starts an interpreter that imports deltaic, loads the model, prepares a prompt of 20 tokens and
generates one token. Printed are medians of the whole (as the parent sees it) and of its parts (as the child sees
them)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median

CHILD = """
import json, sys, time
start = time.perf_counter()
import deltaic
options = json.loads(sys.argv[2])
imported = time.perf_counter()
model = deltaic.load(sys.argv[1], progress=False, **options)
loaded = time.perf_counter()
if sys.argv[3] == "text":
    tokenizer, template = model.tokenizer, model.template
    prompt = model.prepare([{"role": "user", "content": "Why is the sky blue?"}])
else:
    prompt = model.prepare(list(range(1000, 1020)))
prepared = time.perf_counter()
logits = model._runner.prefill(prompt, model.new_state())
int(logits.argmax())
done = time.perf_counter()
from deltaic.machine import resident_bytes
print(json.dumps({"import": imported - start, "load": loaded - imported, "prepare": prepared - loaded,
                  "first token": done - prepared, "prompt tokens": len(prompt.token_ids),
                  "resident": (resident_bytes() or {}).get("now")}), flush=True)
"""


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
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as child:
            assert child.stdout is not None
            line = child.stdout.readline()
            total = time.perf_counter() - start
        if child.returncode:
            sys.exit(child.returncode)
        runs.append({"total": total, **json.loads(line)})
    result = {key: median(run[key] for run in runs[1:]) for key in runs[0]}
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        units = {"resident": f"{value / 1e6:.0f} MB", "prompt tokens": str(value)}
        print(f"{key:14} {units.get(key, f'{value:.3f} s')}")


if __name__ == "__main__":
    main()
