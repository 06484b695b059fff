"""Scenes of coloured shapes and questions about them: the data of the bundled miniature (texts.py has the rest).

Everything is drawn from a `random.Random`, so a seed fixes the data. Two splits keep the evaluation honest:

- a *layout* (which shapes of which colours stand in which places) belongs to training or to evaluation, by a checksum;
- a *combination* of question kind, phrasing, colour and shape is withheld from training, again by a checksum.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 220),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 170),
    "orange": (245, 135, 25),
}
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the centre", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
SIZES = ((96, 96), (128, 128), (128, 96), (96, 128), (160, 96), (96, 160), (160, 128), (128, 160))  # (width, height)
NUMBERS = ("no", "one", "two", "three", "four")
LAYOUT_SPLIT = 16  # one layout in 16 is kept for the evaluation
COMBINATION_SPLIT = 12  # one combination in 12 is never trained on


def checksum(text: str) -> int:
    """Hash that is the same on every machine and in every run."""
    return zlib.crc32(text.encode())


@dataclass(frozen=True)
class Thing:
    """One object: place in the 3x3 grid, offset of its middle and radius in pixels, rotation in radians."""

    shape: str
    colour: str
    row: int
    column: int
    dx: float
    dy: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Colour and shape: `red circle`."""
        return f"{self.colour} {self.shape}"

    @property
    def article_name(self) -> str:
        """With its article: `an orange star`."""
        return article(self.name)

    @property
    def place(self) -> str:
        """Place in words: `at the top left`."""
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class Scene:
    """A picture's content. `things` are in reading order; sizes in pixels."""

    width: int
    height: int
    things: tuple[Thing, ...]
    light: bool
    background: tuple[int, int, int]
    texture: str
    noise_seed: int

    @property
    def layout(self) -> str:
        """What stands where, without sizes, offsets and backgrounds."""
        return " ".join(f"{t.colour}-{t.shape}@{t.row}{t.column}" for t in self.things)

    @property
    def held_out(self) -> bool:
        """Whether this layout is kept for the evaluation."""
        return checksum(self.layout) % LAYOUT_SPLIT == 0


@dataclass(frozen=True)
class Question:
    """A question, its only right answer, its kind, and the combination it exercises ('' if it has none)."""

    kind: str
    text: str
    answer: str
    combination: str = ""

    @property
    def held_out(self) -> bool:
        """Whether this combination is withheld from training."""
        return bool(self.combination) and checksum(self.combination) % COMBINATION_SPLIT == 0


def article(noun: str) -> str:
    """`a red star`, `an orange star`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def join(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


# ---------------------------------------------------------------------------------------------------------- scenes


def make_scene(rng: random.Random, size: tuple[int, int], count: int, held_out: bool) -> Scene:
    """A scene of `count` things on a picture of `size` (width, height), from the asked split."""
    while True:
        scene = _any_scene(rng, size, count)
        if scene.held_out == held_out:
            return scene


def _any_scene(rng: random.Random, size: tuple[int, int], count: int) -> Scene:
    width, height = size
    cell_w, cell_h = width / 3, height / 3
    room = min(cell_w, cell_h) / 2
    palette = rng.sample(list(COLOURS), rng.choice((2, 3, 6)))
    kinds = rng.sample(SHAPES, rng.choice((2, 3, 5)))
    things = []
    for cell in sorted(rng.sample(range(9), count)):
        radius = rng.uniform(0.75, 0.95) * room
        colour = rng.choice(palette)
        spread_x, spread_y = cell_w / 2 - radius, cell_h / 2 - radius
        things.append(
            Thing(
                shape=rng.choice(kinds),
                colour=colour,
                row=cell // 3,
                column=cell % 3,
                dx=rng.uniform(-1, 1) * max(0.0, min(spread_x, 10.0)),
                dy=rng.uniform(-1, 1) * max(0.0, min(spread_y, 10.0)),
                radius=radius,
                angle=rng.uniform(-0.2, 0.2),
                rgb=tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in COLOURS[colour]),
            )
        )
    light = rng.random() < 0.65
    level = rng.randint(200, 255) if light else rng.randint(5, 60)
    background = tuple(min(255, max(0, level + rng.randint(-8, 8))) for _ in range(3))
    texture = rng.choice(("plain", "plain", "noise", "gradient", "stripes"))
    return Scene(width, height, tuple(things), light, background, texture, rng.getrandbits(32))


def render(scene: Scene, scale: int = 2) -> Image.Image:
    """Draws a scene `scale` times larger than its size and averages down to its size (antialiasing)."""
    image = draw(scene, scale)
    return image.reduce(scale) if scale > 1 else image


def render_large(scene: Scene, factor: float, scale: int = 2) -> Image.Image:
    """Draws a scene at `factor` times its size, as a picture that preprocessing will shrink again."""
    image = draw(scene, scale)
    return image.resize((round(scene.width * factor), round(scene.height * factor)), Image.Resampling.BICUBIC)


def draw(scene: Scene, scale: int) -> Image.Image:
    """Draws a scene `scale` times larger than its size, with hard edges."""
    width, height = scene.width * scale, scene.height * scale
    noise = np.random.default_rng(scene.noise_seed)
    if scene.texture == "plain":
        image = Image.new("RGB", (width, height), scene.background)
    else:
        if scene.texture == "noise":
            delta = noise.normal(0, 6, (scene.height, scene.width, 1))
        elif scene.texture == "gradient":
            rise = noise.uniform(-14, 14, 2)
            down, across = np.linspace(-1, 1, scene.height), np.linspace(-1, 1, scene.width)
            delta = rise[0] * down[:, None, None] + rise[1] * across[:, None]
        else:
            period, slant = noise.integers(6, 16), noise.integers(-1, 2)
            lines = np.arange(scene.height)[:, None, None] + slant * np.arange(scene.width)[:, None]
            delta = ((lines // period) % 2) * 12.0 - 6.0
        pixels = np.clip(np.asarray(scene.background, np.float32) + delta, 0, 255)
        image = Image.fromarray(pixels.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        x = (scene.width / 3 * (thing.column + 0.5) + thing.dx) * scale
        y = (scene.height / 3 * (thing.row + 0.5) + thing.dy) * scale
        radius = thing.radius * scale
        if thing.shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=thing.rgb)
        else:
            draw.polygon(_outline(thing.shape, x, y, radius, thing.angle), fill=thing.rgb)
    return image


def _outline(shape: str, x: float, y: float, radius: float, angle: float) -> list[tuple[float, float]]:
    """Corners of a polygon that fits a circle of `radius` around (x, y)."""
    if shape == "square":
        corners = [(0.86, math.pi / 4 + i * math.pi / 2) for i in range(4)]
        corners = [(1.1 * r, a) for r, a in corners]
    elif shape == "triangle":
        corners = [(1.08, -math.pi / 2 + i * 2 * math.pi / 3) for i in range(3)]
    elif shape == "star":
        corners = [(1.08 if i % 2 == 0 else 0.45, -math.pi / 2 + i * math.pi / 5) for i in range(10)]
    else:
        arm = 0.3
        points = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
        points += [(-a, -b) for a, b in points]
        corners = [(math.hypot(a, b), math.atan2(b, a)) for a, b in points]
    return [(x + radius * r * math.cos(a + angle), y + radius * r * math.sin(a + angle)) for r, a in corners]


def cell_targets(scene: Scene, size: tuple[int, int], cell: int = 32) -> np.ndarray:
    """What each image token of the picture at `size` shows: int64 [tokens, 3] of colour, shape and place.

    0 means nothing; else 1 + the index in COLOURS, in SHAPES, and among the nine places. The nearest thing counts, if
    its circle reaches into the token's square.
    """
    columns, rows = size[0] // cell, size[1] // cell
    targets = np.zeros((rows * columns, 3), np.int64)
    nearest = np.full(rows * columns, np.inf)
    middle_x = (np.tile(np.arange(columns), rows) + 0.5) * cell
    middle_y = (np.repeat(np.arange(rows), columns) + 0.5) * cell
    for t in scene.things:
        x = (scene.width / 3 * (t.column + 0.5) + t.dx) * size[0] / scene.width
        y = (scene.height / 3 * (t.row + 0.5) + t.dy) * size[1] / scene.height
        gap_x = np.maximum(abs(middle_x - x) - cell / 2, 0)
        gap_y = np.maximum(abs(middle_y - y) - cell / 2, 0)
        distance = np.hypot(middle_x - x, middle_y - y)
        reached = (np.hypot(gap_x, gap_y) < 0.8 * t.radius) & (distance < nearest)
        nearest[reached] = distance[reached]
        targets[reached] = (
            1 + list(COLOURS).index(t.colour),
            1 + SHAPES.index(t.shape),
            1 + 3 * t.row + t.column,
        )
    return targets


# ------------------------------------------------------------------------------------------------------- questions


def _number(count: int, one: str, many: str) -> str:
    return f"There is one {one}." if count == 1 else f"There are {NUMBERS[count]} {many}."


def _pick(
    rng: random.Random, kind: str, phrasings: tuple[str, ...], answer: str, about: str = "", **names: str
) -> Question:
    index = rng.randrange(len(phrasings))
    return Question(kind, phrasings[index].format(**names), answer, f"{kind}/{index}/{about}" if about else "")


def _unique(scene: Scene, key: Callable[[Thing], str]) -> list[Thing]:
    keys = [key(t) for t in scene.things]
    return [t for t in scene.things if keys.count(key(t)) == 1]


def ask_colour(scene: Scene, rng: random.Random) -> Question:
    """Colour of the thing in a place."""
    t = rng.choice(scene.things)
    forms = ("What colour is the object {place}?", "Which colour does the object {place} have?")
    return _pick(rng, "colour", forms, f"The object {t.place} is {t.colour}.", t.name, place=t.place)


def ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    """Shape of the only thing of its colour."""
    things = _unique(scene, lambda t: t.colour)
    if not things:
        return None
    t = rng.choice(things)
    forms = ("What shape is {colour}?", "Which shape is the {colour} object?")
    return _pick(rng, "shape", forms, f"The {t.colour} object is a {t.shape}.", t.name, colour=t.colour)


def ask_count(scene: Scene, rng: random.Random) -> Question:
    """Number of things."""
    forms = ("How many objects are there?", "How many shapes does the picture show?")
    return _pick(rng, "count", forms, _number(len(scene.things), "object", "objects"))


def ask_place(scene: Scene, rng: random.Random) -> Question | None:
    """Place of the only thing of its colour."""
    things = _unique(scene, lambda t: t.colour)
    if not things:
        return None
    t = rng.choice(things)
    forms = ("Where is the {colour} object?", "In which place is the {colour} object?")
    return _pick(rng, "place", forms, f"The {t.colour} object is {t.place}.", t.name, colour=t.colour)


def ask_at(scene: Scene, rng: random.Random) -> Question:
    """What stands in a place that is not empty."""
    t = rng.choice(scene.things)
    forms = ("What is {place}?", "Which object is {place}?")
    return _pick(rng, "at", forms, f"{t.place.capitalize()} is {t.article_name}.", t.name, place=t.place)


SIDES: dict[str, tuple[str, Callable[[Thing], int]]] = {
    "to the left of": ("furthest left", lambda t: -t.column),
    "to the right of": ("furthest right", lambda t: t.column),
    "above": ("highest", lambda t: -t.row),
    "below": ("lowest", lambda t: t.row),
}


def ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    """The only thing on one side of a thing that has no twin."""
    options = []
    for side, (_, rank) in SIDES.items():
        for t in _unique(scene, lambda t: t.name):
            beyond = [u for u in scene.things if rank(u) > rank(t)]
            if len(beyond) == 1:
                options.append((side, t, beyond[0]))
    if not options:
        return None
    side, t, beyond = rng.choice(options)
    answer = f"{side.capitalize()} the {t.name} is {beyond.article_name}."
    forms = ("What is {side} the {name}?", "Which object is {side} the {name}?")
    return _pick(rng, "relation", forms, answer, f"{side} {t.name}", side=side, name=t.name)


def ask_extreme(scene: Scene, rng: random.Random) -> Question | None:
    """The one thing that is furthest in a direction."""
    options = []
    for word, rank in SIDES.values():
        best = max(map(rank, scene.things))
        first = [t for t in scene.things if rank(t) == best]
        if len(first) == 1:
            options.append((word, first[0]))
    if not options:
        return None
    word, t = rng.choice(options)
    forms = ("Which object is {word}?", "What is {word}?")
    return _pick(rng, "extreme", forms, f"{word.capitalize()} is the {t.name}.", f"{word} {t.name}", word=word)


def ask_background(scene: Scene, rng: random.Random) -> Question:
    """Light or dark."""
    forms = ("Is the background light or dark?", "How bright is the background?")
    return _pick(rng, "background", forms, f"The background is {'light' if scene.light else 'dark'}.")


def describe(scene: Scene) -> str:
    """All things in reading order."""
    return f"The picture shows {join([f'{t.article_name} {t.place}' for t in scene.things])}."


def ask_describe(scene: Scene, rng: random.Random) -> Question:
    """All things in reading order."""
    return _pick(rng, "describe", ("Describe the picture.", "What does the picture show?"), describe(scene))


ASKERS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "place": ask_place,
    "at": ask_at,
    "relation": ask_relation,
    "extreme": ask_extreme,
    "background": ask_background,
    "describe": ask_describe,
}


def make_question(scene: Scene, rng: random.Random, kinds: tuple[str, ...], held_out: bool | None) -> Question:
    """A question of one of `kinds`; `held_out` chooses the combination's split (None: either)."""
    while True:
        question = ASKERS[rng.choice(kinds)](scene, rng)
        if question is not None and (held_out is None or question.held_out == held_out):
            return question


ORDINALS = ("first", "second")


def make_pair_question(
    scenes: tuple[Scene, Scene], rng: random.Random, kinds: tuple[str, ...], held_out: bool | None, both: float = 0.4
) -> Question:
    """A question about two pictures shown together: with probability `both` about both, else about one of them."""
    shown = [describe(scene).removeprefix("The picture") for scene in scenes]
    if rng.random() < both:
        answer = " ".join(f"The {word} picture{rest}" for word, rest in zip(ORDINALS, shown, strict=True))
        return _pick(rng, "both", ("Describe both pictures.", "What do the two pictures show?"), answer)
    i = rng.randrange(2)
    word = ORDINALS[i]
    question = make_question(scenes[i], rng, kinds, held_out)
    if question.kind == "describe":
        forms = ("Describe the {word} picture.", "What does the {word} picture show?")
        return _pick(rng, "describe", forms, f"The {word} picture{shown[i]}", word=word)
    text = f"In the {word} picture, {question.text[0].lower()}{question.text[1:]}"
    return Question(question.kind, text, question.answer, question.combination)
