"""How long does one picture take in the vision tower, ours against transformers, on the same random checkpoint?

    python bench/bench_vision.py MODEL [--size 512] [--rounds 5] [--threads 2] [--json FILE]

MODEL: a folder of bench/make_checkpoint.py. Only towers are loaded: ours with bfloat16 and with int8 matrices, that of
transformers in bfloat16 on torch. They see the same picture in turns, in one process. Prints medians, the share of the
machine's peak (measured in the same run), how near int8 features are to those of bf16, and what the first picture took.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np


def picture(size: int) -> Any:
    pixels = np.random.default_rng(1).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return SimpleNamespace(pixels=pixels, grid=(1, size // 16, size // 16), mean=(0.5,) * 3, std=(0.5,) * 3)


def our_tower(folder: Path, dtype: str) -> Any:
    from deltaic.model.config_file import load_config
    from deltaic.model.vision import VisionModel
    from deltaic.ops import cpu
    from deltaic.weights.build import open_source, vision_weights
    from deltaic.weights.checkpoint import open_checkpoint
    from deltaic.weights.precision import Precision

    config = load_config(folder)
    with open_checkpoint(folder) as checkpoint:
        source = open_source(checkpoint, config, cpu, Precision.parse(vision_dtype=dtype))
        return VisionModel(config.vision, vision_weights(source, config, False), cpu)


def torch_tower(folder: Path, threads: int) -> tuple[Any, Callable[[Any], np.ndarray]]:
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

    torch.set_num_threads(threads)
    config = AutoConfig.from_pretrained(folder).vision_config
    tower = Qwen3_5VisionModel._from_config(config, dtype=torch.bfloat16).eval()
    prefix = "model.visual."
    with safe_open(folder / "model.safetensors", "pt") as file:
        tower.load_state_dict({k[len(prefix) :]: file.get_tensor(k) for k in file.keys() if k.startswith(prefix)})  # noqa: SIM118
    processor = Qwen2VLImageProcessorPil(
        do_resize=False, patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )

    def features(image: Any) -> np.ndarray:
        inputs = processor([image.pixels], return_tensors="pt", input_data_format="channels_last")
        with torch.no_grad():
            result = tower(inputs["pixel_values"].to(torch.bfloat16), grid_thw=inputs["image_grid_thw"])
        return np.asarray(result.pooler_output.float().numpy())

    return config, features


def operations(config: Any, patches: int) -> dict[str, float]:
    """Multiplications and additions of one picture: in the matrices, and in attention."""
    V, width, merged = config.hidden_size, config.intermediate_size, config.spatial_merge_size**2
    block = 2 * patches * (4 * V * V + 2 * V * width)
    rest = 2 * patches * V * 3 * config.patch_size**2
    rest += 2 * patches // merged * (V * merged) * (V * merged + config.out_hidden_size)
    return {"matrices": config.depth * block + rest, "attention": config.depth * 4.0 * patches * patches * V}


def peak(kind: str) -> float:
    from deltaic.ops import cpu

    done, best = 0, 0.0
    for _ in range(5):
        start = time.perf_counter()
        done = cpu.probe_peak(kind, 1 << 16)
        best = max(best, done / (time.perf_counter() - start))
    return best


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Smallest cosine between the vectors of two pictures' patches."""
    return float((np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from deltaic.ops import cpu

    cpu.set_num_threads(args.threads)
    image = picture(args.size)
    config, theirs = torch_tower(args.model, args.threads)
    engines: dict[str, Callable[[], np.ndarray]] = {"transformers bf16": lambda: theirs(image)}
    for dtype in ("bf16", "int8"):
        tower = our_tower(args.model, dtype)
        engines[f"deltaic {dtype}"] = lambda tower=tower: tower.encode(image)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    found: dict[str, np.ndarray] = {}
    for _ in range(args.rounds + 1):  # the first picture is told apart
        for name, run in engines.items():
            start = time.perf_counter()
            found[name] = run()
            seconds[name].append(time.perf_counter() - start)
    work = operations(config, (args.size // 16) ** 2)
    total, peaks = sum(work.values()), {kind: peak(kind) for kind in ("f32", "int8")}
    base = median(seconds["transformers bf16"][1:])
    summary: dict[str, Any] = {"isa": cpu.isa(), "threads": args.threads, "size": args.size, "operations": work}
    summary |= {"peaks": peaks, "first": {n: s[0] for n, s in seconds.items()}}
    summary["median"] = {name: median(s[1:]) for name, s in seconds.items()}
    summary["speed_against_transformers"] = {name: base / t for name, t in summary["median"].items()}
    ours = found["deltaic bf16"]
    summary["cosine"] = {name: cosine(y, ours) for name, y in found.items()}
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1))
    share = work["attention"] / total
    print(f"{args.size} x {args.size} pixels, {total / 1e9:.0f} Gop ({share:.0%} attention), ", end="")
    print(f"{cpu.isa()}, {args.threads} threads; peaks (Gop/s): f32 {peaks['f32'] / 1e9:.0f}, ", end="")
    print(f"int8 {peaks['int8'] / 1e9:.0f}; bf16 pairs, where the CPU has them, twice f32")
    print(f"{'tower':20s} {'first s':>8s} {'median s':>9s} {'Gop/s':>7s} {'x transformers':>15s} {'cosine':>9s}")
    for name, t in summary["median"].items():
        speed, near = summary["speed_against_transformers"][name], summary["cosine"][name]
        print(f"{name:20s} {seconds[name][0]:8.3f} {t:9.3f} {total / t / 1e9:7.0f} {speed:15.2f} {near:9.5f}")


if __name__ == "__main__":
    main()
