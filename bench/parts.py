"""What benches with several parts share: choosing parts, loading the model, and showing what was found."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import deltaic
from common import new_figure, save_figure

RESULTS = Path(__file__).parent / "results"

Figures = dict[str, Any]
Bench = Callable[[Any, argparse.Namespace], Figures]


def parser(description: str, parts: Mapping[str, Bench], *, needs_model: bool = True) -> argparse.ArgumentParser:
    """An argument parser for MODEL and names of parts. needs_model: MODEL comes first; else it may be left out."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(parts)
    if needs_model:
        made.add_argument("model")
        made.add_argument("parts", nargs="*", help=f"some of {names}; default: all")
    else:
        made.add_argument("parts", nargs="*", metavar="MODEL or PART", help=f"a folder, and any of {names}")
    made.add_argument("--dtype", help="how weights are stored; default: bf16, or as they are packed")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int)
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--no-plots", action="store_true")
    return made


def run(
    parser: argparse.ArgumentParser,
    parts: Mapping[str, Bench],
    *,
    describe: Callable[[str, Figures], str],
    plot: Callable[[str, Figures, Any, Any], None] | None = None,
    plots: str = "",
    with_model: Collection[str] = (),
    **options: Any,
) -> None:
    """Run the parts that were asked for, and print their figures or one JSON object.

    describe  (part, figures) -> text
    plot      draws (part, figures, figure, axis) of matplotlib; saved as results/<plots>_<part>.png
    with_model  parts that cannot do without MODEL
    options   of deltaic.load
    """
    args = parser.parse_args()
    folder = getattr(args, "model", None)
    chosen = list(args.parts)
    if folder is None:  # what names no part is the model
        folder = next((name for name in chosen if name not in parts), None)
        chosen.remove(folder) if folder is not None else None
    for name in chosen:
        if name not in parts:
            parser.error(f"unknown part {name}; there are {', '.join(parts)}")
        if name in with_model and folder is None:
            parser.error(f"{name}: needs a MODEL")
    model = None
    if folder is not None:
        model = deltaic.load(folder, dtype=args.dtype, device=args.device, threads=args.threads, **options)
    found: Figures = {}
    for part in chosen or [part for part in parts if folder is not None or part not in with_model]:
        found[part] = parts[part](model, args)
        if not args.json:
            print(describe(part, found[part]), flush=True)
        if plot is not None and not args.no_plots:
            figure, axis = new_figure()
            plot(part, found[part], figure, axis)
            save_figure(figure, RESULTS / f"{plots}_{part}.png")
    if args.json:
        facts: Figures = {}
        if model is not None:
            facts = {"model": folder, "isa": model.info()["isa"], "threads": model.threads, "dtype": model.dtype}
        json.dump({**facts, **found}, sys.stdout)
        print()
