"""How much memory does a process that answers need, beyond the packed file?

    python bench/bench_memory.py PACKED_FOLDER [--context 4096] [--new 64]

A child process loads the folder, answers once at the context asked for, and reports what is resident after each step:
pages of the mapped file, and memory of its own. The vision tower's pages are counted apart; nobody shows it a
picture."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

CHILD = """
import json, sys
import numpy as np
from deltaic.machine import resident_bytes
folder, context, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rows = []
def mark(name):
    rows.append((name, resident_bytes()))
mark("interpreter")
import deltaic.loading, deltaic.ops.cpu
mark("import deltaic")
model = deltaic.load(folder, context=context, progress=False)
mark("load weights")
model.tokenizer, model.template
mark("load tokenizer")
ids = np.random.default_rng(1).integers(0, model.tokenizer.vocab_size, context - new)
for special in (model.config.image_token_id, model.config.video_token_id):
    ids[ids == special] = 0
stream = model.stream(ids.tolist(), max_new_tokens=new, temperature=1.0, top_k=20)
next(stream)
mark("read the prompt")
for _ in stream:
    pass
mark("answer")
model.cache.clear()
mark("clear the prefix cache")
state = model.new_state()
mapped = {}
with open("/proc/self/smaps") as maps:
    path = ""
    for line in maps:
        if "-" in line.split()[0] and not line.startswith(("Rss", "Pss")) and ":" not in line.split()[0]:
            path = line.split(maxsplit=5)[5].strip() if len(line.split()) > 5 else "anonymous"
        elif line.startswith("Rss:"):
            mapped[path] = mapped.get(path, 0) + 1024 * int(line.split()[1])
largest = sorted(mapped.items(), key=lambda item: -item[1])[:8]
print(json.dumps({"rows": rows, "largest": largest, "state": state.bytes_for(context)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\\n")[0])
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--limit", type=float, help="fail if more MB than the file and this are resident")
    args = parser.parse_args()
    command = [sys.executable, "-c", CHILD, args.model, str(args.context), str(args.new)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(done.stdout)
    size = (Path(args.model) / "deltaic.safetensors").stat().st_size
    print(f"{'MB resident after':24} {'all':>8} {'own':>8} {'files':>8} {'peak':>8}")
    for name, memory in report["rows"]:
        files = memory["now"] - memory["private"]
        columns = (memory["now"], memory["private"], files, memory["peak"])
        print(f"{name:24}" + "".join(f" {n / 1e6:8.1f}" for n in columns))
    for path, nbytes in report["largest"]:
        print(f"  {nbytes / 1e6:8.1f} MB {path}")
    over = max(memory["now"] for _, memory in report["rows"]) - size
    print(f"packed file {size / 1e6:.1f} MB, state at {args.context} tokens {report['state'] / 1e6:.1f} MB")
    print(f"resident beyond the size of the file: {over / 1e6:.1f} MB")
    if args.limit is not None and over > 1e6 * args.limit:
        sys.exit(f"more than {args.limit:.0f} MB")


if __name__ == "__main__":
    main()
