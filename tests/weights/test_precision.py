"""Which format does each tensor get? One name, mappings of patterns, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from deltaic.errors import ArgumentError
from deltaic.weights.names import TensorSpec
from deltaic.weights.precision import FORMATS, Precision, format_of

ROLES = {
    "embed_tokens.weight": "embedding",
    "layers.0.linear_attn.in_proj_qkv.weight": "projection",
    "layers.0.linear_attn.in_proj_b.weight": "small",
    "layers.0.linear_attn.A_log": "vector",
    "layers.0.mlp.experts.gate_up_proj": "expert",
    "layers.0.mlp.gate.weight": "small",
    "layers.1.mlp.down_proj.weight": "projection",
    "norm.weight": "vector",
    "lm_head.weight": "head",
    "visual.patch_embed.proj.weight": "patch",
    "visual.blocks.0.attn.qkv.weight": "vision",
    "mtp.fc.weight": "projection",
}
SPECS = {name: TensorSpec(name, (2, 2), role) for name, role in ROLES.items()}
TIED = {name: spec for name, spec in SPECS.items() if name != "lm_head.weight"}
LARGE = {name for name, role in ROLES.items() if role in ("embedding", "projection", "expert", "head")}


@pytest.mark.parametrize("dtype", FORMATS)
def test_one_name_is_for_every_large_matrix_of_the_decoder(dtype: str) -> None:
    precision = Precision.parse(dtype)
    formats = precision.formats(SPECS, tied=False)
    assert {formats[name] for name in LARGE} == {dtype}
    small = "f32" if dtype == "f32" else "bf16"
    assert formats["layers.0.mlp.gate.weight"] == formats["layers.0.linear_attn.in_proj_b.weight"] == small
    assert formats["norm.weight"] == formats["visual.patch_embed.proj.weight"] == "f32"
    assert formats["visual.blocks.0.attn.qkv.weight"] == small
    assert str(precision) == dtype


def test_the_vision_tower_on_request() -> None:
    formats = Precision.parse("int4", "int8").formats(SPECS, tied=False)
    assert formats["visual.blocks.0.attn.qkv.weight"] == "int8"
    assert formats["visual.patch_embed.proj.weight"] == "f32"
    assert formats["mtp.fc.weight"] == "int4"


def test_patterns_and_which_one_wins() -> None:
    dtype = {"default": "int4", "lm_head": "int8", "layers.0.*": "f32", "*.mlp.*": "int8", "visual.*": "int4"}
    precision = Precision.parse(dtype)
    formats = precision.formats(SPECS, tied=False)
    assert formats["lm_head.weight"] == "int8"
    assert formats["embed_tokens.weight"] == "int4"
    assert formats["layers.0.linear_attn.in_proj_qkv.weight"] == "f32"
    assert formats["layers.0.linear_attn.in_proj_b.weight"] == "f32"
    assert formats["layers.0.mlp.experts.gate_up_proj"] == "int8"  # the later pattern
    assert formats["layers.0.mlp.gate.weight"] == "bf16"
    assert formats["visual.blocks.0.attn.qkv.weight"] == "int4"
    assert str(precision).startswith("int4 (lm_head int8, ")
    assert Precision.parse({"lm_head": "int8"}).default == "bf16"


def test_a_tied_head_is_the_embedding() -> None:
    for pattern in ("lm_head", "lm_head.weight", "embed_tokens"):
        formats = Precision.parse({"default": "int4", pattern: "int8"}).formats(TIED, tied=True)
        assert formats["embed_tokens.weight"] == "int8"
    with pytest.raises(ArgumentError, match="'lm_head' matches no tensor"):
        Precision.parse({"lm_head": "int8"}).formats(TIED, tied=False)


@pytest.mark.parametrize("pattern", ["layers.9.*", "Norm", "lm_head.weigh", "model.layers.0.mlp.gate"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ArgumentError, match="matches no tensor"):
        Precision.parse({pattern: "int8"}).formats(SPECS, tied=False)


@pytest.mark.parametrize(
    ("pattern", "dtype", "kept"),
    [("layers.0.mlp.gate", "int4", "bf16"), ("norm", "bf16", "f32"), ("*.A_log", "int8", "f32")],
)
def test_a_pattern_without_effect_is_refused(pattern: str, dtype: str, kept: str) -> None:
    with pytest.raises(ArgumentError, match=f"is kept as {kept}"):
        Precision.parse({pattern: dtype}).formats(SPECS, tied=False)


WRONG: list[Any] = ["fp8", "INT4", "", None, 3, b"int4", ["int4"], {"default": "fp8"}, {"": "int4"}, {3: "int4"}]


@pytest.mark.parametrize("dtype", [*WRONG, {"a": None}])
def test_wrong_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ArgumentError, match="dtype"):
        Precision.parse(dtype)


def test_wrong_vision_dtypes_and_activations_are_refused() -> None:
    with pytest.raises(ArgumentError, match="vision_dtype"):
        Precision.parse("int4", {"default": "int8"})
    with pytest.raises(ArgumentError, match="activations"):
        Precision.parse("int4", activations="int4")
    with pytest.raises(ArgumentError, match="patterns"):
        Precision.parse({f"layers.{i}.*": "int8" for i in range(2000)})


def test_json_round_trip() -> None:
    precision = Precision.parse({"default": "int4", "b*": "int8", "a*": "f32"}, "int8", "float32")
    again = Precision.from_json(precision.to_json())
    assert again.same_formats(precision)
    assert again.rules == (("b*", "int8"), ("a*", "f32"))
    assert again.activations == "int8"  # not a property of what is stored
    for text in ("3", "{}", json.dumps({"dtype": "int4"}), "{"):
        with pytest.raises(ValueError):  # noqa: PT011  (ArgumentError is one, and so is a JSON error)
            Precision.from_json(text)


def test_formats_by_role() -> None:
    for dtype in FORMATS:
        assert {format_of(role, dtype) for role in ("embedding", "head", "projection", "expert", "vision")} == {dtype}
        assert format_of("small", dtype) == ("f32" if dtype == "f32" else "bf16")
        assert format_of("patch", dtype) == format_of("vector", dtype) == "f32"
    for wrong in ("fp8", "float32", "", None, 3):
        with pytest.raises(ArgumentError, match="'f32', 'bf16', 'int8', 'int4'"):
            format_of("projection", wrong)  # type: ignore[arg-type]
