"""What one does with a checkpoint besides asking it: `deltaic quantize`, `deltaic bench` and `deltaic info`."""

from __future__ import annotations

import argparse
import json

from .arguments import dtype_rules, load_model
from .terminal import readable, say


def quantize(args: argparse.Namespace) -> int:
    """Pack a checkpoint into a folder."""
    from ..packing import quantize as pack

    folder = pack(
        args.model,
        args.output,
        dtype=dtype_rules(args.dtype),
        vision_dtype=args.vision_dtype,
        overwrite=args.overwrite,
        threads=args.threads,
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(f"{folder}: {readable('bytes', size)}")
    return 0


def bench(args: argparse.Namespace) -> int:
    """Measure a model."""
    from ..benchmark import as_table, check_lengths, measure

    check_lengths(args.prompt, args.new, args.repeat)
    facts = measure(lambda: load_model(args.model, args), prompt=args.prompt, new=args.new, repeat=args.repeat)
    print(json.dumps(facts, ensure_ascii=False) if args.json else as_table(facts))
    return 0


def info(args: argparse.Namespace) -> int:
    """Tell about the installation, and about a checkpoint."""
    from ..facts import checkpoint_facts, installation_facts

    facts = {"deltaic": installation_facts()}
    if args.model is not None:
        facts["model"] = checkpoint_facts(args.model)
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    for part in facts.values():
        width = max(len(name) for name in part)
        for name, value in part.items():
            print(f"{name.replace('_', ' '):{width}}  {readable(name, value)}")
    return 0
