"""Texts without pictures: small questions and long, predictable documents, drawn from a `random.Random`."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from scenes import COLOURS, LAYOUT_SPLIT, SHAPES, Question, checksum, join

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
PEOPLE = ("Anna", "Ben", "Clara", "David", "Eva", "Felix", "Greta", "Hugo")
ADJECTIVES = ("small", "big", "old", "new", "soft", "round", "quiet", "happy")
ANIMALS = ("cat", "dog", "bird", "horse", "fish", "mouse", "rabbit", "fox")
OBJECTS = ("ball", "book", "cup", "hat", "key", "lamp", "apple", "box")
PLACE_WORDS = ("tree", "house", "garden", "river", "bridge", "field", "boat", "road")
VERBS = ("sees", "finds", "likes", "carries", "follows", "paints")


def sentence(rng: random.Random) -> str:
    """A small random sentence."""
    subject = rng.choice((rng.choice(PEOPLE), f"The {rng.choice(ADJECTIVES)} {rng.choice(ANIMALS)}"))
    target = f"the {rng.choice(ADJECTIVES + tuple(COLOURS))} {rng.choice(OBJECTS + ANIMALS)}"
    tail = rng.choice(("", "", f" near the {rng.choice(PLACE_WORDS)}"))
    return f"{subject} {rng.choice(VERBS)} {target}{tail}."


def cycle(words: tuple[str, ...], start: int, count: int) -> list[str]:
    """`count` words of an endless cycle."""
    return [words[(start + i) % len(words)] for i in range(count)]


def _chat_count(rng: random.Random) -> tuple[str, str]:
    first = rng.randint(0, 20)
    last = first + rng.randint(2, 9)
    return f"Count from {first} to {last}.", ", ".join(map(str, range(first, last + 1))) + "."


def _chat_list(rng: random.Random) -> tuple[str, str]:
    request, words = rng.choice(
        (
            ("Name the days of the week.", DAYS),
            ("Name the months of the year.", MONTHS),
            ("Say the alphabet.", LETTERS),
            ("Name the colours you know.", tuple(COLOURS)),
            ("Name the shapes you know.", SHAPES),
        )
    )
    return request, ", ".join(words) + "."


def _chat_next(rng: random.Random) -> tuple[str, str]:
    words, verb = rng.choice(((DAYS, "comes"), (MONTHS, "comes"), (LETTERS, "comes"), (WORDS[:12], "comes")))
    i = rng.randrange(len(words) - 1)
    if rng.random() < 0.5:
        return f"What {verb} after {words[i]}?", f"After {words[i]} {verb} {words[i + 1]}."
    return f"What {verb} before {words[i + 1]}?", f"Before {words[i + 1]} {verb} {words[i]}."


def _chat_sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 5), rng.randint(0, 5)
    if rng.random() < 0.5:
        return f"What is {a} + {b}?", f"{a} + {b} = {a + b}."
    return f"What is {a + b} - {b}?", f"{a + b} - {b} = {a}."


def _chat_copy(rng: random.Random) -> tuple[str, str]:
    text = sentence(rng)
    form = rng.choice(("Repeat: {}", "Say this again: {}"))
    return form.format(text), text


def _chat_hello(rng: random.Random) -> tuple[str, str]:
    return rng.choice(
        (
            ("Hello!", "Hello! Show me a picture of coloured shapes and ask me about it."),
            ("Who are you?", "I am a very small model. I know coloured shapes, numbers and a few lists."),
            ("What can you do?", "I can look at pictures of coloured shapes and answer questions about them."),
            ("Thank you!", "You are welcome."),
        )
    )


CHATS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "counting": _chat_count,
    "lists": _chat_list,
    "next": _chat_next,
    "sums": _chat_sum,
    "copying": _chat_copy,
    "greeting": _chat_hello,
}


def make_chat(rng: random.Random, held_out: bool) -> Question:
    """A question without a picture. Counts and copied sentences are split by checksum; the others are facts."""
    kind = rng.choices(tuple(CHATS), (5, 1, 2, 3, 4, 1))[0]
    while True:
        text, answer = CHATS[kind](rng)
        if kind not in ("counting", "copying") or (checksum(text) % LAYOUT_SPLIT == 0) == held_out:
            return Question(kind, text, answer)


def _document_cycle(rng: random.Random, words: tuple[str, ...], count: int) -> str:
    return ", ".join(cycle(words, rng.randrange(len(words)), count)) + "."


def _document_numbers(rng: random.Random) -> str:
    first = rng.randint(0, 45)
    return ", ".join(str(first + i) for i in range(54)) + "."


def _document_birds(rng: random.Random) -> str:
    animal, place = rng.choice(ANIMALS[:4]) + "s", rng.choice(PLACE_WORDS)
    start = rng.randint(8, 12)
    lines = []
    for n in range(start, 0, -1):
        who = animal if n > 1 else animal[:-1]
        lines.append(f"{WORDS[n].capitalize()} {who} sat near the {place}. One went home.")
    return " ".join(lines) + f" Now the {place} is quiet."


def _document_ring(rng: random.Random) -> str:
    people = rng.sample(PEOPLE, rng.randint(3, 5))
    gift = f"{rng.choice(ADJECTIVES + tuple(COLOURS))} {rng.choice(OBJECTS)}"
    lines = [f"{join(people)} sit in a ring. {people[0]} has the {gift}."]
    for i in range(34):
        a, b = people[i % len(people)], people[(i + 1) % len(people)]
        lines.append(f"{a} gives the {gift} to {b}.")
    return " ".join(lines)


def _document_refrain(rng: random.Random) -> str:
    verse = f"{sentence(rng)} {sentence(rng)}"
    return " ".join([verse] * 16)


DOCUMENTS: tuple[Callable[[random.Random], str], ...] = (
    partial(_document_cycle, words=DAYS, count=190),
    partial(_document_cycle, words=MONTHS, count=190),
    partial(_document_cycle, words=LETTERS, count=190),
    partial(_document_cycle, words=tuple(COLOURS), count=190),
    _document_numbers,
    _document_numbers,
    _document_birds,
    _document_ring,
    _document_ring,
    _document_refrain,
    _document_refrain,
)


def make_document(rng: random.Random) -> str:
    """A long text whose first sentence or two decide the rest, so that greedy continuation is certain of itself."""
    return rng.choice(DOCUMENTS)(rng)
