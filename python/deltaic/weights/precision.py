"""In which number format is each tensor packed? The user's choice (one name, or a mapping of name patterns) turned into
one format per tensor, with every pattern that does nothing refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..arguments import choice, describe
from ..errors import ArgumentError
from .names import PATCH, SMALL, VECTOR, TensorSpec

FORMATS = ("f32", "bf16", "int8", "int4")
QUANTISED = ("int8", "int4")
ROUNDED = (*QUANTISED, "bf16")  # formats whose products may round the activations that they meet
ACTIVATIONS = ("int8", "float32")
DEFAULT_KEY = "default"

_MAX_RULES = 1000


def format_of(role: str, dtype: str) -> str:
    """The format in which a tensor of `role` (weights/names.py) is packed where `dtype` is asked for.

    Routers, gates and decays decide more than they weigh: they are never below bf16. Patch embedding and vectors are
    tiny: always f32. Raises ArgumentError if `dtype` is not one of FORMATS.
    """
    choice("dtype", dtype, FORMATS)
    if role in (PATCH, VECTOR):
        return "f32"
    if role == SMALL:
        return "f32" if dtype == "f32" else "bf16"
    return dtype


@dataclass(frozen=True, slots=True)
class Precision:
    """How a model is stored and multiplied.

    default      format of every large matrix of the decoder and the multi-token-prediction layer
    vision       format of the matrices of the vision tower
    rules        (pattern, format) pairs; the last one that matches a tensor's name decides
    activations  "int8": int8 and int4 matrices are multiplied with activations rounded to int8 (per token and run of
                 128 columns), in integer arithmetic, and bf16 matrices with activations rounded to bfloat16 where the
                 CPU has products of bfloat16 pairs; "float32": with unrounded activations, slower
    """

    default: str = "bf16"
    vision: str = "bf16"
    rules: tuple[tuple[str, str], ...] = ()
    activations: str = "int8"

    @classmethod
    def parse(cls, dtype: Any = "bf16", vision_dtype: Any = None, activations: Any = "int8") -> Precision:
        """Check what the user gave.

        dtype         one of FORMATS, or a mapping of name patterns to formats: {"default": "int4", "lm_head": "int8",
                      "layers.0.*": "bf16"}. Patterns (shell style: * ? [..]) are compared with checkpoint names without
                      the prefix of the language or vision model, with or without ".weight": "layers.3.mlp.down_proj",
                      "visual.blocks.*.attn.qkv". "default" (bf16 if absent) is for all that no pattern names.
        vision_dtype  one of FORMATS; None: `dtype`'s default where that is f32 or bf16, else bf16
        activations   one of ACTIVATIONS

        Raises ArgumentError.
        """
        rules: tuple[tuple[str, str], ...] = ()
        if isinstance(dtype, Mapping):
            if len(dtype) > _MAX_RULES:
                raise ArgumentError(f"dtype: {len(dtype)} patterns, expected at most {_MAX_RULES}")
            for pattern, name in dtype.items():
                if not isinstance(pattern, str) or not pattern:
                    raise ArgumentError(f"dtype: expected patterns of tensor names as keys, found {describe(pattern)}")
                choice(f"dtype[{pattern!r}]", name, FORMATS)
            rules = tuple((pattern, name) for pattern, name in dtype.items() if pattern != DEFAULT_KEY)
            default = dtype.get(DEFAULT_KEY, "bf16")
        elif isinstance(dtype, str):
            default = choice("dtype", dtype, FORMATS)
        else:
            raise ArgumentError(
                f"dtype: expected one of {', '.join(map(repr, FORMATS))}, or a mapping of name patterns to them, "
                f"found {describe(dtype)}"
            )
        if vision_dtype is None:
            vision = "bf16" if default in QUANTISED else default
        else:
            vision = choice("vision_dtype", vision_dtype, FORMATS)
        return cls(default, vision, rules, choice("activations", activations, ACTIVATIONS))

    @classmethod
    def from_json(cls, text: str, activations: str = "int8") -> Precision:
        """The inverse of `to_json`. Raises ArgumentError or ValueError if `text` is something else."""
        stored = json.loads(text)
        if not isinstance(stored, dict) or set(stored) != {"dtype", "vision_dtype"}:
            raise ArgumentError(f"expected an object with dtype and vision_dtype, found {describe(stored)}")
        return cls.parse(stored["dtype"], stored["vision_dtype"], activations)

    def to_json(self) -> str:
        """The formats (not the activations, which are chosen when a model is loaded) as JSON."""
        dtype = {DEFAULT_KEY: self.default, **dict(self.rules)}
        return json.dumps({"dtype": dtype, "vision_dtype": self.vision})

    def same_formats(self, other: Precision) -> bool:
        """Whether both store every tensor alike."""
        return (self.default, self.vision, self.rules) == (other.default, other.vision, other.rules)

    def __str__(self) -> str:
        exceptions = [f"{pattern} {name}" for pattern, name in self.rules]
        return f"{self.default} ({', '.join(exceptions)})" if exceptions else self.default

    def formats(self, specs: Mapping[str, TensorSpec], *, tied: bool) -> dict[str, str]:
        """Tensor name -> format for all of `specs`. With `tied` embeddings "lm_head" is a second name of the table.

        Raises ArgumentError for a pattern that matches nothing, or only tensors that its format does not apply to.
        """
        result = {name: format_of(spec.role, self._base(name)) for name, spec in specs.items()}
        for pattern, dtype in self.rules:
            matched = [name for name in specs if any(fnmatchcase(alias, pattern) for alias in _aliases(name, tied))]
            if not matched:
                raise ArgumentError(
                    f"dtype: the pattern {pattern!r} matches no tensor; names look like embed_tokens, "
                    f"layers.0.mlp.down_proj, layers.*.linear_attn.*, visual.blocks.0.attn.qkv"
                )
            fixed = [name for name in matched if format_of(specs[name].role, dtype) != dtype]
            if len(fixed) == len(matched):
                raise ArgumentError(
                    f"dtype: {pattern!r} asks for {dtype}, but {matched[0]} is kept as "
                    f"{format_of(specs[matched[0]].role, dtype)} (routers, gates and decays are never below bf16; "
                    f"vectors and the patch embedding are f32)"
                )
            result.update((name, format_of(specs[name].role, dtype)) for name in matched)
        return result

    def _base(self, name: str) -> str:
        return self.vision if name.startswith("visual.") else self.default


def _aliases(name: str, tied: bool) -> list[str]:
    names = [name, name.removesuffix(".weight")]
    if tied and name == "embed_tokens.weight":
        names += ["lm_head.weight", "lm_head"]
    return names
