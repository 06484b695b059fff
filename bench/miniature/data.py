"""Batches: conversations and texts as ids, labels, three-axis positions and pixels. A step's number fixes them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
import scenes
import texts
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

IGNORED = -100
ONE_THING_KINDS = ("colour", "shape", "place", "at", "describe", "describe", "describe")
HARDER_KINDS = (*scenes.ASKERS, "colour", "place", "relation", "relation", "describe", "describe")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


_known: dict[str, list[int]] = {}


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text; short ones come again and again and are remembered."""
    ids = _known.get(text)
    if ids is None:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(text) < 60:
            _known[text] = ids
    return ids


@dataclass
class Row:
    """One sequence under construction. `labels` repeat the ids that are learnt; others hold IGNORED."""

    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    next_position: int = 0

    def text(self, text: str, learnt: bool = False) -> None:
        """Appends text; special tokens in it are recognised."""
        ids = _encode(self.tokenizer, text)
        self.ids += ids
        self.labels += ids if learnt else [IGNORED] * len(ids)
        self.positions += [(self.next_position + i,) * 3 for i in range(len(ids))]
        self.next_position += len(ids)

    def picture(self, size: tuple[int, int]) -> None:
        """Appends the placeholders of a picture of `size` (width, height) with its start and end tokens."""
        self.text("<|vision_start|>")
        columns, rows = size[0] // 32, size[1] // 32
        pad = self.tokenizer.token_to_id("<|image_pad|>")
        self.ids += [pad] * (rows * columns)
        self.labels += [IGNORED] * (rows * columns)
        p = self.next_position
        self.positions += [(p, p + y, p + x) for y in range(rows) for x in range(columns)]
        self.next_position += max(rows, columns)
        self.text("<|vision_end|>")

    def ask(self, question: str, sizes: list[tuple[int, int]], text_first: bool = False) -> None:
        """Appends a user turn with pictures before (or after) its text."""
        self.text("<|im_start|>user\n")
        if text_first:
            self.text(question)
        for size in sizes:
            self.picture(size)
        if not text_first:
            self.text(question)
        self.text("<|im_end|>\n<|im_start|>assistant\n")

    def answer(self, answer: str, last: bool, reasoning: str | None = None) -> None:
        """Appends the answer; the last one carries a think block, as the chat template writes it."""
        if reasoning is not None:
            self.text("<think>\n")
            self.text(f"{reasoning}\n</think>\n\n{answer}<|im_end|>", learnt=True)
        else:
            self.text("<think>\n\n</think>\n\n" if last else "")
            self.text(f"{answer}<|im_end|>", learnt=True)
        self.text("\n")


@dataclass(frozen=True)
class Batch:
    """ids and labels [B, T], positions [3, B, T]; per picture slot (pixels [B, P, 768], grid); what the tokens show."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    pictures: list[tuple[Tensor, tuple[int, int]]]
    targets: Tensor | None = None


def patches(images: list[np.ndarray]) -> tuple[Tensor, tuple[int, int]]:
    """uint8 pictures [h, w, 3] of one size as normalised patches in merge order: ([B, P, 768], (rows, columns))."""
    x = torch.from_numpy(np.stack(images)).float() / 127.5 - 1
    batch, height, width, _ = x.shape
    x = x.permute(0, 3, 1, 2).reshape(batch, 3, height // 32, 2, 16, width // 32, 2, 16)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, -1, 768)
    return x, (height // 16, width // 16)


def collate(rows: list[Row], pictures: list[tuple[Tensor, tuple[int, int]]], multiple: int = 8) -> Batch:
    """Pads rows on the right to a multiple of 8."""
    length = -(-max(len(r.ids) for r in rows) // multiple) * multiple
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    positions = torch.zeros(3, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        labels[i, :n] = torch.tensor(row.labels)
        positions[:, i, :n] = torch.tensor(row.positions).T
    return Batch(ids, labels, positions, pictures)


def drawn_size(size: tuple[int, int], rng: random.Random) -> tuple[int, int]:
    """Size to draw at: usually the model's, else another aspect ratio, which is rounded to multiples of 32."""
    if rng.random() < 0.6:
        return size
    return round(size[0] * rng.uniform(0.85, 1.18)), round(size[1] * rng.uniform(0.85, 1.18))


def picture_pixels(scene: scenes.Scene, size: tuple[int, int], rng: random.Random) -> np.ndarray:
    """A scene's pixels [h, w, 3] at `size` (width, height); many are shrunk from a larger drawing, as in real use."""
    if (scene.width, scene.height) == size and rng.random() < 0.6:
        return np.asarray(scenes.render(scene))
    return np.asarray(scenes.draw(scene, rng.choice((1, 2, 2))).resize(size, Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Stage:
    """What a stage's pictures hold: weights of 1, 2, 3, 4 things, question kinds, picture sizes, turns, rows, tokens.

    One step in `text_every` is text (0: none); `naming` weighs the loss of the training-only naming heads.
    """

    things: tuple[int, int, int, int]
    kinds: tuple[str, ...] = tuple(scenes.ASKERS)
    sizes: tuple[tuple[int, int], ...] = scenes.SIZES
    one_turn: float = 0.12
    rows: int = 16
    length: int = 128
    pairs: float = 0.0
    thinking: float = 0.0
    text_every: int = 4
    naming: float = 0.05


STAGES = (
    (0, Stage((1, 0, 0, 0), ONE_THING_KINDS, one_turn=1.0, rows=32, text_every=0)),
    (150, Stage((4, 4, 0, 0))),
    (350, Stage((2, 4, 4, 0), HARDER_KINDS, pairs=0.15, naming=0.3)),
    (700, Stage((2, 4, 5, 0), HARDER_KINDS, pairs=0.35, thinking=0.1, text_every=3, naming=0.3)),
)


def stage_at(step: int) -> Stage:
    """The curriculum: the last stage that starts at `step` or before."""
    return [stage for start, stage in STAGES if start <= step][-1]


def picture_batch(tokenizer: Tokenizer, rng: random.Random, stage: Stage, count: int, held_out: bool = False) -> Batch:
    """Conversations of several turns about one picture or two."""
    pair = rng.random() < stage.pairs
    length = stage.length
    sizes = [rng.choice(stage.sizes) for _ in range(2 if pair else 1)]
    rows, images, targets = [], [[] for _ in sizes], [[] for _ in sizes]
    for _ in range(count):
        shown = [
            scenes.make_scene(rng, drawn_size(s, rng), rng.choices((1, 2, 3, 4), stage.things)[0], held_out)
            for s in sizes
        ]
        for i, (scene, size) in enumerate(zip(shown, sizes, strict=True)):
            images[i].append(picture_pixels(scene, size, rng))
            targets[i].append(scenes.cell_targets(scene, size))
        row = Row(tokenizer)
        if rng.random() < 0.08:
            row.text(SYSTEM)
        together = pair and rng.random() < 0.7
        pending = list(sizes)
        current: scenes.Scene | None = None
        single = rng.random() < stage.one_turn
        while True:
            now: list[tuple[int, int]] = []
            if pending and (together or len(row.ids) == 0 or current is None or len(row.ids) > length * 0.45):
                now = pending if together else pending[:1]
                current = shown[len(sizes) - len(pending)]
                pending = pending[len(now) :]
            assert current is not None
            if together:
                question = scenes.make_pair_question((shown[0], shown[1]), rng, stage.kinds, False)
            else:
                question = scenes.make_question(current, rng, stage.kinds, False)
            row.ask(question.text, now, text_first=rng.random() < 0.15)
            last = not pending and (single or len(row.ids) > length - 35)
            thinks = last and not together and rng.random() < stage.thinking
            row.answer(question.answer, last, scenes.describe(current) if thinks else None)
            if last:
                break
        rows.append(row)
    batch = collate(rows, [patches(slot) for slot in images])
    return replace(batch, targets=torch.from_numpy(np.concatenate([np.stack(t) for t in targets], axis=1)))


def lesson_batch(rng: random.Random, count: int) -> tuple[Tensor, tuple[int, int], Tensor]:
    """Pictures alone, for the vision tower's first lessons: pixels, grid, and targets [B, tokens, 3]."""
    size = rng.choice(scenes.SIZES)
    shown = [scenes.make_scene(rng, drawn_size(size, rng), rng.randint(1, 4), False) for _ in range(count)]
    pixels, grid = patches([picture_pixels(scene, size, rng) for scene in shown])
    return pixels, grid, torch.from_numpy(np.stack([scenes.cell_targets(scene, size) for scene in shown]))


def text_batch(tokenizer: Tokenizer, rng: random.Random, count: int, length: int) -> Batch:
    """Long texts (all tokens learnt) and conversations without pictures."""
    rows = []
    for i in range(count):
        row = Row(tokenizer)
        if i % 3 == 0:
            row.text(texts.make_document(rng) + "<|endoftext|>", learnt=True)
        else:
            single = rng.random() < 0.1
            while True:
                question = texts.make_chat(rng, False)
                row.ask(question.text, [])
                last = single or len(row.ids) > length - 50
                row.answer(question.answer, last, "This is simple." if last and rng.random() < 0.1 else None)
                if last:
                    break
        row.ids, row.labels, row.positions = row.ids[:length], row.labels[:length], row.positions[:length]
        rows.append(row)
    return collate(rows, [])


def training_batch(tokenizer: Tokenizer, seed: int, step: int) -> Batch:
    """A step's batch: one in the stage's `text_every` is text, the others are about pictures."""
    rng = random.Random(f"{seed}/{step}")
    stage = stage_at(step)
    if stage.text_every and step % stage.text_every == stage.text_every - 1:
        return text_batch(tokenizer, rng, count=8, length=384)
    return picture_batch(tokenizer, rng, stage, stage.rows)
