"""Measures the bundled miniature with transformers on questions it never saw: `python bench/miniature/evaluate.py`.

Layouts of evaluation pictures never occur in training. Half of the questions, where the kind allows, use a combination
of kind, phrasing, colour and shape that is withheld from training as well. An answer is right when every token of it,
the end token included, is the model's first choice given the tokens before: the same as exact greedy generation.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import data
import network
import package
import scenes
import texts
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SIZES = (*scenes.SIZES, (112, 112), (150, 100), (300, 400), (640, 480), (100, 150))
END = "<|im_end|>"
UNCOUNTED = "two in one message"  # measured, but beyond what the miniature is made for: not part of `all`


@dataclass
class Example:
    """A conversation with its pictures in order, the right last answer, and the groups it counts for."""

    messages: list[dict]
    pictures: list[Image.Image]
    answer: str
    groups: tuple[str, ...]


def user(text: str, pictures: int = 0) -> dict:
    """A user message with pictures before its text."""
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def draw(rng: random.Random, count: int | None = None) -> tuple[scenes.Scene, Image.Image]:
    """A held-out scene and its picture, of a size the training knows or of another one."""
    size = rng.choice(SIZES)
    factor = max(1.0, min(size) / 128)
    drawn = (round(size[0] / factor), round(size[1] / factor))
    scene = scenes.make_scene(rng, drawn, count or rng.randint(1, 3), True)
    return scene, scenes.render(scene) if factor == 1 else scenes.render_large(scene, factor, scale=3)


def picture_examples(rng: random.Random, per_kind: int) -> list[Example]:
    """One picture, one question; then two pictures at once; then two turns."""
    examples = []
    for kind in scenes.ASKERS:
        found = 0
        while found < per_kind:
            scene, picture = draw(rng)
            question = scenes.ASKERS[kind](scene, rng)
            if question is None or (question.combination and question.held_out != (found % 2 == 0)):
                continue
            found += 1
            groups = (kind, "new combinations") if question.held_out else (kind,)
            examples.append(Example([user(question.text, 1)], [picture], question.answer, (*groups, "pictures")))
    for _ in range(per_kind):
        (first, a), (second, b) = draw(rng), draw(rng)
        question = scenes.make_pair_question((first, second), rng)
        examples.append(Example([user(question.text, 2)], [a, b], question.answer, (UNCOUNTED,)))
    for i in range(per_kind):
        scene, picture = draw(rng)
        earlier = scenes.make_question(scene, rng, tuple(scenes.ASKERS), None)
        messages = [user(earlier.text, 1), {"role": "assistant", "content": earlier.answer}]
        pictures = [picture]
        if i % 2:
            scene, picture = draw(rng)
            pictures.append(picture)
        question = scenes.make_question(scene, rng, tuple(scenes.ASKERS), None)
        messages.append(user(question.text, i % 2))
        examples.append(Example(messages, pictures, question.answer, ("second turn", "pictures")))
    return examples


def text_examples(rng: random.Random, count: int) -> list[Example]:
    """Questions without a picture."""
    chats = [texts.make_chat(rng, True) for _ in range(count)]
    return [Example([user(c.text)], [], c.answer, (f"text: {c.kind}", "texts")) for c in chats]


class Evaluator:
    """Runs examples through transformers' model, tokenizer and image processor."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def prompt(self, example: Example) -> tuple[str, dict[str, Tensor]]:
        """The prompt with expanded placeholders, and the pictures' tensors."""
        text = self.tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)
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
        answers = [self.tokenizer(e.answer + END)["input_ids"] for e in examples]
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
    parser.add_argument("--generate", type=int, default=40, help="answers also generated token by token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mistakes", action="store_true", help="print wrong answers of the generated ones")
    args = parser.parse_args()
    rng = random.Random(f"evaluation {args.seed}")
    evaluator = Evaluator(args.folder)
    examples = picture_examples(rng, args.per_kind) + text_examples(rng, args.texts)
    results: dict[str, list[bool]] = {}
    verdicts: list[bool] = []
    for start in range(0, len(examples), 15):
        part = examples[start : start + 15]
        verdicts += evaluator.right(part)
    for example, ok in zip(examples, verdicts, strict=True):
        for group in (*example.groups, *([] if UNCOUNTED in example.groups else ["all"])):
            results.setdefault(group, []).append(ok)
    for group, oks in results.items():
        print(f"{group:20s} {sum(oks):5d} of {len(oks):5d}  {100 * sum(oks) / len(oks):6.2f} %")
    chosen = rng.sample(range(len(examples)), min(args.generate, len(examples)))
    agree = 0
    for i in chosen:
        text = evaluator.generated(examples[i])
        agree += (text == examples[i].answer) == verdicts[i]
        if args.mistakes and text != examples[i].answer:
            print(f"  {examples[i].messages[-1]['content'][-1]['text']} -> {text!r}, right: {examples[i].answer!r}")
    print(f"greedy generation gives the same verdict for {agree} of {len(chosen)}")
    print(f"long texts: {100 * continuation(evaluator, rng, 20):.2f} % of the tokens after the 60th")
    for name, share in draft_agreement(args.folder, evaluator, 12).items():
        print(f"draft layer, {name}: {100 * share:.2f} % of its first drafts are the trunk's greedy token")


if __name__ == "__main__":
    main()
