"""A JSON object of a configuration file, with checked access: an error names the file, the key, what was found and what
was expected."""

from __future__ import annotations

import json
from typing import Any

from ..errors import ConfigError

MISSING: Any = object()  # the default of a key that must be there


class Section:
    """One JSON object of a configuration file. Every method that reads a key raises ConfigError."""

    def __init__(self, values: Any, file: str, path: str = ""):
        """file: its name, for messages; path: the keys that lead to the object, "" at the top level."""
        if not isinstance(values, dict):
            place = f"{file}: {path}" if path else file
            raise ConfigError(f"{place} is {show(values)}; expected a JSON object")
        self.values: dict[str, Any] = values
        self.file, self.path = file, path

    def error(self, key: str, found: str, advice: str = "") -> ConfigError:
        """What is to be raised about a key. found: "is ...", what is wrong; advice: "expected ..."."""
        return ConfigError(f"{self.file}: {self._path_to(key)} {found}" + (f"; {advice}" if advice else ""))

    def _path_to(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def section(self, key: str) -> Section:
        """The object under `key`."""
        if not self.has(key):
            raise self.error(key, "is missing", "expected a JSON object")
        return Section(self.values[key], self.file, self._path_to(key))

    def array(self, key: str) -> list[Any]:
        """The list under `key`, whatever is in it."""
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self.error(key, "is missing" if value is None else f"is {show(value)}", "expected a list")
        return value

    def integer(self, key: str, low: int, high: int, default: Any = MISSING) -> Any:
        """An int from low to high; `default`, if one is given, where the key is missing or null."""
        value = self.values.get(key)
        if value is None and default is not MISSING:
            return default
        expected = f"expected {low}" if low == high else f"expected a whole number from {low} to {high}"
        if value is None:
            raise self.error(key, "is missing", expected)
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"is {show(value)}", expected)
        return value

    def square(self, key: str, low: int, high: int) -> int:
        """A size that may also be written as a list of equal numbers, one per axis."""
        value = self.values.get(key)
        if isinstance(value, list) and value and all(type(n) is int and n == value[0] for n in value):
            return int(Section({key: value[0]}, self.file, self.path).integer(key, low, high))
        return int(self.integer(key, low, high))

    def number(self, key: str, low: float, high: float) -> float:
        """A finite number from low to high."""
        value = self.values.get(key)
        if value is None:
            raise self.error(key, "is missing", f"expected a number from {low:g} to {high:g}")
        if type(value) not in (int, float) or not low <= value <= high:  # NaN fails the comparison
            raise self.error(key, f"is {show(value)}", f"expected a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """true or false; `default` where the key is missing or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(key, f"is {show(value)}", "expected true or false")
        return value

    def accept(self, key: str, values: tuple[Any, ...]) -> None:
        """Refuse the key if it is present with a value other than `values` (true and 1 are told apart)."""
        if key not in self.values:
            return
        value = self.values[key]
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            expected = " or ".join(json.dumps(v) for v in values)
            raise self.error(key, f"is {show(value)}, which is not supported yet", f"expected {expected}")

    def token_ids(self, key: str, vocab_size: int) -> list[int]:
        """A token id, a list of them, or nothing."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise self.error(key, f"is {show(value)}", f"expected token ids below vocab_size = {vocab_size}")
        return ids


def show(value: Any) -> str:
    """A value from a file, short enough for a message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # an int of more digits than Python converts
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
