"""Draws speed against model size from files that `peers.py --json` wrote, one for each size.

python bench/plot_sizes.py bench/results/sizes.png 0.8=peers-0.8B.json 2=peers-2B.json 4=peers-4B.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import new_figure, save_figure


def size_and_file(text: str) -> tuple[float, Path]:
    """BILLIONS=FILE."""
    size, _, path = text.partition("=")
    return float(size), Path(path)


def main() -> None:
    """Reads the files and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("sizes", type=size_and_file, nargs="+", metavar="BILLIONS=FILE")
    args = parser.parse_args()

    medians = {size: json.loads(path.read_text(encoding="utf-8"))["medians"] for size, path in sorted(args.sizes)}
    engines = list(dict.fromkeys(name for engines in medians.values() for name in engines))
    figure, axes = new_figure(2, (9, 3.8))
    for axis, what in zip(axes, ("decode", "prefill"), strict=True):
        for name in engines:
            points = [(size, engines[name][what]) for size, engines in medians.items() if name in engines]
            style = "o-" if name.startswith("deltaic") else "s--"
            axis.plot(*zip(*points, strict=True), style, label=name)
        axis.set(xscale="log", yscale="log", xlabel="parameters (billions, by name)", ylabel="tokens/s", title=what)
        axis.set_xticks(list(medians), [f"{size:g}B" for size in medians], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save_figure(figure, args.out)


if __name__ == "__main__":
    main()
