"""Checks of the arguments of public calls: each returns the plain Python value or raises `ArgumentError` with one
sentence that names the argument, what is allowed and what was found."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

from .errors import ArgumentError


def describe(value: object, limit: int = 60) -> str:
    """`value` as it appears in an error message: its repr, cut to `limit` characters, with the type where that
    helps."""
    text = repr(value)
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return text if isinstance(value, (int, float, str)) else f"{text} ({type(value).__name__})"


def number(name: str, value: Any, low: float, high: float, *, above_low: bool = False) -> float:
    """A finite real number with low <= value <= high (low < value where `above_low`). Booleans are not numbers here."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        found = float(value)
        if math.isfinite(found) and found <= high and (found > low if above_low else found >= low):
            return found
    allowed = f"{low:g} < {name} <= {high:g}" if above_low else f"{low:g} <= {name} <= {high:g}"
    raise ArgumentError(f"{name}: expected a number with {allowed}, found {describe(value)}")


def integer(name: str, value: Any, low: int, high: int) -> int:
    """An integer with low <= value <= high. Booleans and floats are not integers here."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    raise ArgumentError(f"{name}: expected an integer from {low} to {high}, found {describe(value)}")


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """One of the strings in `allowed`."""
    options = tuple(allowed)
    if isinstance(value, str) and value in options:
        return value
    raise ArgumentError(f"{name}: expected one of {', '.join(map(repr, options))}, found {describe(value)}")
