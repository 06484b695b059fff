"""The evaluation's questions: conversations with pictures whose layouts never occur in training, and their answers.

Half of the questions, where the kind allows, use a combination of kind, phrasing, colour and shape that is withheld
from training as well. Needs neither torch nor transformers, so that deltaic itself can be measured with them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import scenes
import texts
from PIL import Image

SIZES = (*scenes.SIZES, (112, 112), (150, 100), (300, 400), (640, 480), (100, 150))
KINDS = tuple(scenes.ASKERS)


@dataclass
class Example:
    """A conversation with its pictures in order, the right last answer, and the groups it counts for besides `all`.

    `reasoning` is what the model shall think before the answer; None asks it not to think.
    """

    messages: list[dict]
    pictures: list[Image.Image]
    answer: str
    groups: tuple[str, ...]
    reasoning: str | None = None

    @property
    def expected(self) -> str:
        """What the model shall write after the prompt."""
        thought = "" if self.reasoning is None else f"{self.reasoning}\n</think>\n\n"
        return thought + self.answer


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
    """One picture, one question; two pictures in one message; two turns; one picture with thinking on."""
    examples = []
    for kind in KINDS:
        found = 0
        while found < per_kind:
            scene, picture = draw(rng)
            question = scenes.ASKERS[kind](scene, rng)
            if question is None or (question.combination and question.held_out != (found % 2 == 0)):
                continue
            found += 1
            groups = (kind, "new combinations") if question.held_out else (kind,)
            examples.append(Example([user(question.text, 1)], [picture], question.answer, (*groups, "pictures")))
    for group, both in (("both of two pictures", 1.0), ("one of two pictures", 0.0)):
        for _ in range(per_kind):
            (first, a), (second, b) = draw(rng), draw(rng)
            question = scenes.make_pair_question((first, second), rng, KINDS, None, both)
            examples.append(Example([user(question.text, 2)], [a, b], question.answer, (group, "pictures")))
    for i in range(per_kind):
        scene, picture = draw(rng)
        earlier = scenes.make_question(scene, rng, KINDS, None)
        messages = [user(earlier.text, 1), {"role": "assistant", "content": earlier.answer}]
        pictures = [picture]
        if i % 2:
            scene, picture = draw(rng)
            pictures.append(picture)
        question = scenes.make_question(scene, rng, KINDS, None)
        messages.append(user(question.text, i % 2))
        examples.append(Example(messages, pictures, question.answer, ("second turn", "pictures")))
    for _ in range(per_kind // 2):
        scene, picture = draw(rng)
        question = scenes.make_question(scene, rng, KINDS, None)
        groups, thought = ("thinking", "pictures"), scenes.describe(scene)
        examples.append(Example([user(question.text, 1)], [picture], question.answer, groups, thought))
    return examples


def text_examples(rng: random.Random, count: int) -> list[Example]:
    """Questions without a picture."""
    chats = [texts.make_chat(rng, True) for _ in range(count)]
    return [Example([user(c.text)], [], c.answer, (f"text: {c.kind}", "texts")) for c in chats]


def all_examples(seed: int, per_kind: int = 180, text_count: int = 300) -> list[Example]:
    """Everything that the total counts."""
    rng = random.Random(f"evaluation {seed}")
    return picture_examples(rng, per_kind) + text_examples(rng, text_count)


def table(examples: list[Example], verdicts: list[bool]) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each group, `all` first."""
    counts: dict[str, tuple[int, int]] = {"all": (0, 0)}
    for example, ok in zip(examples, verdicts, strict=True):
        for group in ("all", *example.groups):
            right, total = counts.get(group, (0, 0))
            counts[group] = (right + ok, total + 1)
    return counts
