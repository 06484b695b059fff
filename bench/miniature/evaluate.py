"""Measures the bundled miniature with transformers on questions it never saw: `python bench/miniature/evaluate.py`.

The questions are those of questions.py. An answer is right when every token of it,
the end token included, is the model's first choice given the tokens before: the same as exact greedy generation.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import data
import network
import package
import questions
import texts
import torch
from questions import Example
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

END = "<|im_end|>"


class Evaluator:
    """Runs examples through transformers' model, tokenizer and image processor."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def prompt(self, example: Example) -> tuple[str, dict[str, Tensor]]:
        """The prompt with expanded placeholders, and the pictures' tensors."""
        text = self.tokenizer.apply_chat_template(
            example.messages, tokenize=False, add_generation_prompt=True, enable_thinking=example.reasoning is not None
        )
        if not example.pictures:
            return text, {}
        pixels = dict(self.processor(images=example.pictures, return_tensors="pt"))
        parts = text.split("<|image_pad|>")
        pads = ["<|image_pad|>" * (int(grid.prod()) // 4) for grid in pixels["image_grid_thw"]]
        return parts[0] + "".join(p + t for p, t in zip(pads, parts[1:], strict=True)), pixels

    @torch.no_grad()
    def right(self, examples: list[Example]) -> list[bool]:
        """Whether each answer is exact. One padded batch; padding stands on the right and changes nothing before it."""
        prompts = [self.prompt(e) for e in examples]
        ids = [self.tokenizer(p)["input_ids"] for p, _ in prompts]
        answers = [self.tokenizer(e.expected + END)["input_ids"] for e in examples]
        length = max(len(i) + len(a) for i, a in zip(ids, answers, strict=True))
        rows = torch.zeros(len(examples), length, dtype=torch.long)
        for row, i, a in zip(rows, ids, answers, strict=True):
            row[: len(i) + len(a)] = torch.tensor(i + a)
        tensors = [t for _, t in prompts if t]
        pictures = {k: torch.cat([t[k] for t in tensors]) for k in tensors[0]} if tensors else {}
        kinds = (rows == self.model.config.image_token_id).long()
        logits = self.model(
            input_ids=rows, attention_mask=torch.ones_like(rows), mm_token_type_ids=kinds, **pictures
        ).logits
        chosen = logits.argmax(-1)
        return [
            chosen[r, len(i) - 1 : len(i) + len(a) - 1].tolist() == a
            for r, (i, a) in enumerate(zip(ids, answers, strict=True))
        ]

    @torch.no_grad()
    def generated(self, example: Example) -> str:
        """Greedy generation, as a user would run it."""
        text, pictures = self.prompt(example)
        rows = torch.tensor([self.tokenizer(text)["input_ids"]])
        kinds = (rows == self.model.config.image_token_id).long()
        out = self.model.generate(input_ids=rows, mm_token_type_ids=kinds, max_new_tokens=100, **pictures)
        return self.tokenizer.decode(out[0, rows.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def continuation(evaluator: Evaluator, rng: random.Random, count: int, given: int = 60) -> float:
    """Share of tokens of long texts, from token `given` on, that are the model's first choice."""
    same = total = 0
    for _ in range(count):
        ids = torch.tensor([evaluator.tokenizer(texts.make_document(rng) + "<|endoftext|>")["input_ids"][:256]])
        chosen = evaluator.model(input_ids=ids).logits[0, given - 1 : -1].argmax(-1)
        same, total = same + int((chosen == ids[0, given:]).sum()), total + chosen.numel()
    return same / total


@torch.no_grad()
def draft_agreement(folder: Path, evaluator: Evaluator, batches: int) -> dict[str, float]:
    """Share of learnt positions where the draft layer's first choice for t+2 is the trunk's greedy token there."""
    model, mtp = network.build(package.build_config(evaluator.tokenizer.backend_tokenizer))
    with safe_open(folder / "model.safetensors", "pt") as f:
        stored = {name: f.get_tensor(name).float() for name in f.keys()}  # noqa: SIM118 (not a dict)
    mtp.load_state_dict({n.removeprefix("mtp."): t for n, t in stored.items() if n.startswith("mtp.")})
    model.load_state_dict({n: t for n, t in stored.items() if not n.startswith("mtp.")}, strict=False)
    shares = {}
    last = data.STAGES[-1][1]
    for name in ("pictures", "texts"):
        same = total = 0
        for i in range(batches):
            rng = random.Random(f"draft {name} {i}")
            tokenizer = evaluator.tokenizer.backend_tokenizer
            if name == "pictures":
                batch = data.picture_batch(tokenizer, rng, last, 16, held_out=True)
            else:
                batch = data.text_batch(tokenizer, rng, 12, 256)
            hidden, embeddings, _ = network.trunk_forward(model, batch.ids, batch.positions, batch.pictures)
            learnt = batch.labels[:, 2:] != data.IGNORED
            greedy = model.lm_head(hidden[:, 1:-1][learnt]).argmax(-1)
            drafts = network.draft_forward(model, mtp, hidden, embeddings, batch.positions)[:, :-1][learnt]
            same += int((model.lm_head(drafts).argmax(-1) == greedy).sum())
            total += greedy.numel()
        shares[name] = same / total
    return shares


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=package.FOLDER)
    parser.add_argument("--per-kind", type=int, default=180, help="questions of each kind about pictures")
    parser.add_argument("--texts", type=int, default=300, help="questions without a picture")
    parser.add_argument("--generate", type=int, default=60, help="answers also generated token by token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mistakes", action="store_true", help="print wrong answers of the generated ones")
    args = parser.parse_args()
    rng = random.Random(f"generated {args.seed}")
    evaluator = Evaluator(args.folder)
    examples = questions.all_examples(args.seed, args.per_kind, args.texts)
    verdicts: list[bool] = []
    for start in range(0, len(examples), 15):
        verdicts += evaluator.right(examples[start : start + 15])
    for group, (right, total) in questions.table(examples, verdicts).items():
        print(f"{group:20s} {right:5d} of {total:5d}  {100 * right / total:6.2f} %")
    chosen = rng.sample(range(len(examples)), min(args.generate, len(examples)))
    agree = 0
    for i in chosen:
        text = evaluator.generated(examples[i])
        agree += (text == examples[i].expected) == verdicts[i]
        if args.mistakes and text != examples[i].expected:
            print(f"  {examples[i].messages[-1]['content'][-1]['text']} -> {text!r}, right: {examples[i].expected!r}")
    print(f"greedy generation gives the same verdict for {agree} of {len(chosen)}")
    print(f"long texts: {100 * continuation(evaluator, rng, 20):.2f} % of the tokens after the 60th")
    for name, share in draft_agreement(args.folder, evaluator, 12).items():
        print(f"draft layer, {name}: {100 * share:.2f} % of its first drafts are the trunk's greedy token")


if __name__ == "__main__":
    main()
