"""What do int8 and int4 cost in accuracy? `python bench/bench_quality.py [--markdown bench/results/quality.md]`.

1. Held-out accuracy of the bundled miniature, answered by deltaic itself in bf16, int8 and int4 (greedy, exact texts;
   the questions are those of bench/miniature/evaluate.py).
2. Mean squared error of int4 and of Q4_0 (`gguf` package) on the same matrices, with the bits per weight of both.
3. The cosine of the miniature's logits to those of float32 weights.
4. With --checkpoint FOLDER: the same of this checkpoint, over random token ids.

Needs the gguf package, and deltaic with its kernels.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import deltaic
import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "miniature"))

import questions
from deltaic.cli import MINIATURE
from deltaic.model.config_file import load_config

DTYPES = ("bf16", "int8", "int4")
ROWS, COLUMNS = 1024, 2048
Q4_0_BITS = 18 * 8 / 32  # 16 bytes of codes and a float16 per 32 weights


def is_right(model: deltaic.Model, example: questions.Example) -> bool:
    """Whether greedy generation gives the right answer, and the right thoughts if it shall think, to the letter."""
    pictures = iter(example.pictures)
    messages = [
        {
            **message,
            "content": [
                {**part, "image": next(pictures)} if part["type"] == "image" else part for part in message["content"]
            ]
            if isinstance(message["content"], list)
            else message["content"],
        }
        for message in example.messages
    ]
    prompt = model.prepare(messages, thinking=example.reasoning is not None)
    result = model.generate(prompt, temperature=0, max_new_tokens=120)
    return result.text == example.answer and (result.reasoning or "").strip() == (example.reasoning or "")


def accuracy(dtype: str, examples: list[questions.Example], folder: Path = MINIATURE) -> list[bool]:
    """Whether each answer is exact, with weights in `dtype` (the vision tower in bf16, deltaic's default)."""
    model = deltaic.load(folder, dtype=dtype, threads=1)
    return [is_right(model, example) for example in examples]


def matrices(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights [ROWS, COLUMNS], from light to heavy tails."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, COLUMNS)
    outliers = rng.standard_normal(shape)
    outliers[:, rng.choice(COLUMNS, COLUMNS // 100, replace=False)] *= 10
    found = {
        "uniform": rng.uniform(-1, 1, shape),
        "normal": rng.standard_normal(shape),
        "Laplace": rng.laplace(size=shape),
        "Student t, 5 degrees": rng.standard_t(5, shape),
        "Student t, 3 degrees": rng.standard_t(3, shape),
        "normal, 1 % of the columns 10 times larger": outliers,
    }
    return {name: (0.02 * matrix).astype(np.float32) for name, matrix in found.items()}


def int4_error(matrix: np.ndarray) -> tuple[float, float]:
    """Mean squared error and bits per weight of deltaic's int4, through the packer of the package."""
    from deltaic.ops import cpu, quantise

    ((_, rows, packed),) = cpu.packed_parts(cpu.pack([matrix], "int4"))
    numbers = quantise.unpack(packed, "int4", 1, rows, matrix.shape[1])[0]
    return mean_square(numbers - matrix), 8 * packed.nbytes / matrix.size


def q4_0_error(matrix: np.ndarray) -> float:
    """Mean squared error of Q4_0."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_0
    return mean_square(gguf.dequantize(gguf.quantize(matrix, kind), kind) - matrix)


def mean_square(x: np.ndarray) -> float:
    """In float64."""
    return float(np.square(x, dtype=np.float64).mean())


def logits(folder: Path, ids: list[int], **precision: str) -> np.ndarray:
    """Logits [T, vocab] of a checkpoint in one precision."""
    return deltaic.load(folder, progress=False, cache_bytes=0, **precision).forward(ids)


def cosine_row(name: str, found: np.ndarray, exact: np.ndarray) -> str:
    """Mean and smallest cosine over the tokens, as a row of a table."""
    products = (found * exact).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)
    return f"| {name} | {products.mean():.5f} | {products.min():.5f} |"


def requantised(folder: Path, kind: str, target: Path) -> Path:
    """A copy of a one-file checkpoint in `target` whose text matrices went through a format of the gguf package."""
    import gguf
    import torch
    from safetensors.torch import load_file, save_file

    form, tensors = getattr(gguf.GGMLQuantizationType, kind), load_file(folder / "model.safetensors")
    for name, x in tensors.items():
        is_matrix = x.ndim == 2 and min(x.shape) > 64 and x.shape[1] % 32 == 0
        if is_matrix and not name.startswith(("model.visual", "mtp")):
            tensors[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(x.float().numpy(), form), form))
    save_file(tensors, target / "model.safetensors")
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
    return target


def cosines(folder: Path, tokens: int = 64) -> list[str]:
    """Rows of a table: cosine of each token's logits to those of float32 weights and float32 K/V."""
    ids = np.random.default_rng(1).integers(100, load_config(folder).text.vocab_size // 2, tokens).tolist()
    exact = logits(folder, ids, dtype="f32")
    rows = []
    for dtype in DTYPES:
        for activations in ("int8", "float32"):
            found = logits(folder, ids, dtype=dtype, activations=activations)
            rows.append(cosine_row(f"{dtype} | {activations}", found, exact))
    for kind in ("Q8_0", "Q4_0"):
        with tempfile.TemporaryDirectory() as target:
            found = logits(requantised(folder, kind, Path(target)), ids, dtype="f32")
        rows.append(cosine_row(f"{kind} | float32", found, exact))
    return rows


def trained_cosines(examples: list[questions.Example], conversations: int = 60) -> list[str]:
    """The same of the miniature, a trained network: over all tokens of questions without pictures and their answers."""
    texts = [x for x in examples if not x.pictures][:conversations]

    def all_logits(**precision: str) -> np.ndarray:
        model = deltaic.load(MINIATURE, cache_bytes=0, **precision)
        prompts = (model.prepare(x.messages, thinking=x.reasoning is not None) for x in texts)
        said = (
            [*p.token_ids.tolist(), *model.tokenizer.encode(x.expected)] for p, x in zip(prompts, texts, strict=True)
        )
        return np.concatenate([model.forward(ids) for ids in said])

    exact = all_logits(dtype="f32")
    return [
        cosine_row(f"{dtype} | {activations}", all_logits(dtype=dtype, activations=activations), exact)
        for dtype in DTYPES
        for activations in ("int8", "float32")
    ]


def main() -> None:
    """Prints, and writes if asked, the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-kind", type=int, default=180, help="questions of each kind about pictures")
    parser.add_argument("--texts", type=int, default=300, help="questions without a picture")
    parser.add_argument(
        "--checkpoint", type=Path, help="also compare the logits of this checkpoint, such as a random 0.8B"
    )
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too")
    args = parser.parse_args()

    examples = questions.all_examples(0, args.per_kind, args.texts)
    tables, started = {}, time.perf_counter()
    for dtype in DTYPES:
        tables[dtype] = questions.table(examples, accuracy(dtype, examples))
        right, total = tables[dtype]["all"]
        print(f"{dtype}: {right} of {total}, after {time.perf_counter() - started:.0f} s", file=sys.stderr)
    lines = [
        "# Quality of the number formats",
        "",
        "Written by `python bench/bench_quality.py --markdown bench/results/quality.md`. No figure depends on the",
        "machine's speed; the last digits may depend on its instruction set.",
        "",
        "## The miniature's held-out questions, answered by deltaic",
        "",
        "Greedy answers, right when the whole text is. int8 and int4 with int8 activations, as by default.",
        "",
        "| | questions | " + " | ".join(f"{dtype}, %" for dtype in DTYPES) + " |",
        "|---|---:" + "|---:" * len(DTYPES) + "|",
    ]
    for group, (_, total) in tables["bf16"].items():
        cells = [f"{100 * tables[dtype][group][0] / total:.2f}" for dtype in DTYPES]
        lines.append(f"| {group} | {total} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"## Mean squared error of int4 against Q4_0, matrices of {ROWS} x {COLUMNS}",
        "",
        "| weights | int4 | Q4_0 | int4 / Q4_0 |",
        "|---|---:|---:|---:|",
    ]
    bits = 0.0
    for name, matrix in matrices().items():
        ours, bits = int4_error(matrix)
        theirs = q4_0_error(matrix)
        lines.append(f"| {name} | {ours:.3e} | {theirs:.3e} | {ours / theirs:.3f} |")
    head = ["| weights | activations | mean cosine | smallest |", "|---|---|---:|---:|"]
    lines += ["", f"Bits per weight: int4 {bits:.3f}, Q4_0 {Q4_0_BITS:.3f}."]
    lines += ["", "## Logits of the miniature against float32 weights, held-out questions without pictures", ""]
    lines += [*head, *trained_cosines(examples)]
    if args.checkpoint:
        lines += [
            "",
            f"## Logits of {args.checkpoint.name} against float32 weights, 64 random tokens",
            "",
            *head,
            *cosines(args.checkpoint),
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
