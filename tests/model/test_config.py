"""Reading config.json: what transformers writes and what releases look like loads; the absurd is refused by name."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from deltaic.errors import ConfigError
from deltaic.model.config import FULL_ATTENTION, LINEAR_ATTENTION
from deltaic.model.config_file import load_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# As the 4B release has it, as far as it is known.
RELEASE: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": "qwen3_5",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 248320,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        },
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 248057,
    "vision_config": {
        "deepstack_visual_indexes": [],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_5",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
}
GENERATION = {"do_sample": True, "eos_token_id": [248046, 248044], "top_k": 20}
SPARSE = {
    "intermediate_size": None,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
REMOVED = object()


def changed(path: str, value: Any, base: dict[str, Any] = RELEASE) -> dict[str, Any]:
    """`base` with the key at `path` (dots between keys) set, or taken away."""
    content = copy.deepcopy(base)
    *parents, key = path.split(".")
    section = content
    for parent in parents:
        section = section[parent]
    if value is REMOVED:
        del section[key]
    else:
        section[key] = value
    return content


def flat(**changes: Any) -> dict[str, Any]:
    """A text-only config."""
    content = copy.deepcopy(RELEASE["text_config"])
    return {**content, "architectures": ["Qwen3_5ForCausalLM"], **changes}


def sparse() -> dict[str, Any]:
    content = copy.deepcopy(RELEASE)
    content.update({"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"})
    content["text_config"].update(SPARSE)
    return content


def load(folder: Path, content: Any, generation: Any = None) -> Any:
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_config(folder)


def test_release(tmp_path: Path) -> None:
    config = load(tmp_path, RELEASE, GENERATION)
    text, vision = config.text, config.vision
    assert config.architecture == "Qwen3_5ForConditionalGeneration"
    assert config.eos_token_ids == (248044, 248046)
    ids = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
    assert ids == (248056, 248057, 248053, 248054)
    assert (text.num_delta_layers, text.num_attention_layers, text.conv_dim) == (24, 8, 8192)
    assert not text.is_moe
    assert text.num_experts == text.num_experts_per_tok == text.moe_intermediate_size == 0
    assert text.intermediate_size == 9216
    assert text.tie_word_embeddings is True
    assert text.mtp_num_hidden_layers == 1
    assert text.rms_norm_eps == 1e-6
    rope = text.rope
    assert (rope.theta, rope.rotary_dim, rope.mrope_section, rope.rope_type) == (1e7, 64, (11, 11, 10), "default")
    assert (vision.depth, vision.hidden_size, vision.num_heads, vision.intermediate_size) == (24, 1024, 16, 4096)
    assert (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size) == (16, 2, 2)
    assert (vision.num_position_embeddings, vision.out_hidden_size, vision.in_channels) == (2304, 2560, 3)
    assert hash(config) == hash(load(tmp_path, RELEASE, GENERATION))


def test_sparse(tmp_path: Path) -> None:
    text = load(tmp_path, sparse()).text
    assert text.is_moe
    assert text.intermediate_size == 0
    sizes = (text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size)
    assert (*sizes, text.shared_expert_intermediate_size) == (256, 8, 512, 512)


def test_text_only(tmp_path: Path) -> None:
    config = load(tmp_path, flat())
    assert config.vision is None
    assert config.image_token_id is None
    assert config.text == load(tmp_path, RELEASE).text
    for content in (
        changed("language_model_only", True),
        changed("vision_config", REMOVED),
        changed("vision_config", None),
        changed("architectures", ["Qwen3_5ForCausalLM"]),
    ):
        assert load(tmp_path, content).vision is None
    assert load(tmp_path, changed("language_model_only", False)).vision is not None


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("multimodal", [False, True])
def test_what_transformers_writes(tmp_path: Path, moe: bool, multimodal: bool) -> None:
    from transformers.models.qwen3_5 import configuration_qwen3_5
    from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe

    module, stem = (configuration_qwen3_5_moe, "Qwen3_5Moe") if moe else (configuration_qwen3_5, "Qwen3_5")
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
    text = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 5, "head_dim": 32, "rope_parameters": rope}
    if multimodal:
        reference = getattr(module, stem + "Config")(text_config=text, vision_config={"out_hidden_size": 64})
    else:
        reference = getattr(module, stem + "TextConfig")(**text)
    reference.architectures = [stem + ("ForConditionalGeneration" if multimodal else "ForCausalLM")]
    reference.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    for name in ("vocab_size", "hidden_size", "head_dim", "num_key_value_heads", "linear_num_value_heads"):
        assert getattr(config.text, name) == getattr(reference.get_text_config(), name)
    assert config.text.layer_types == (*[LINEAR_ATTENTION] * 3, FULL_ATTENTION, LINEAR_ATTENTION)
    assert config.text.rope.theta == 5e6
    assert config.text.rope.rotary_dim == 16  # although transformers writes partial_rotary_factor 0.25 outside
    assert config.text.is_moe == moe
    assert (config.vision is not None) == multimodal
    assert config.eos_token_ids == ()


def test_older_spellings_of_rope(tmp_path: Path) -> None:
    text = {key: value for key, value in RELEASE["text_config"].items() if key != "rope_parameters"}
    rope = {"mrope_section": [11, 11, 10], "type": "default"}
    content = {
        **RELEASE,
        "text_config": {**text, "rope_theta": 1e6, "partial_rotary_factor": 0.25, "rope_scaling": rope},
    }
    assert load(tmp_path, content).text.rope.theta == 1e6
    both = changed("text_config.rope_scaling", RELEASE["text_config"]["rope_parameters"])
    assert load(tmp_path, both).text.rope.theta == 1e7
    with pytest.raises(ConfigError, match="rope_scaling contradicts"):
        load(tmp_path, changed("text_config.rope_scaling", {"rope_type": "yarn", "factor": 4}))


def test_mrope_section_defaults_to_what_transformers_computes(tmp_path: Path) -> None:
    content = changed(ROPE + "mrope_section", REMOVED)
    assert load(tmp_path, content).text.rope.mrope_section == (11, 11, 10)
    # Few or many frequencies: the default of [11, 11, 10] selects f % 3 == 1 below 33 and f % 3 == 2 below 30.
    for head_dim in (8, 16, 40, 256, 512):
        n = head_dim // 8
        section = load(tmp_path, changed("text_config.head_dim", head_dim, content)).text.rope.mrope_section
        height = len([f for f in range(n) if f % 3 == 1 and f < 33])
        width = len([f for f in range(n) if f % 3 == 2 and f < 30])
        assert section == (n - height - width, height, width)


def test_yarn(tmp_path: Path) -> None:
    rope = {**RELEASE["text_config"]["rope_parameters"], **YARN}
    parsed = load(tmp_path, changed("text_config.rope_parameters", rope)).text.rope
    assert (parsed.rope_type, parsed.factor, parsed.attention_factor) == ("yarn", 4.0, None)
    assert parsed.original_max_position_embeddings == 262144
    rope["attention_factor"] = 1.25
    assert load(tmp_path, changed("text_config.rope_parameters", rope)).text.rope.attention_factor == 1.25
    for key, value in {
        "factor": 0.5,
        "original_max_position_embeddings": 0,
        "attention_factor": -1.0,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "truncate": False,
    }.items():
        with pytest.raises(ConfigError, match=f"rope_parameters.{key}"):
            load(tmp_path, changed("text_config.rope_parameters", {**rope, key: value}))
    for key in ("factor", "original_max_position_embeddings"):
        rest = {name: value for name, value in rope.items() if name != key}
        with pytest.raises(ConfigError, match=f"rope_parameters.{key} is missing"):
            load(tmp_path, changed("text_config.rope_parameters", rest))


def test_layer_types(tmp_path: Path) -> None:
    derived = load(tmp_path, changed("text_config.layer_types", REMOVED))
    assert derived == load(tmp_path, RELEASE)
    content = changed("text_config.layer_types", REMOVED)
    content["text_config"]["full_attention_interval"] = 8
    assert load(tmp_path, content).text.num_attention_layers == 4
    del content["text_config"]["full_attention_interval"]
    assert load(tmp_path, content).text.num_attention_layers == 8


def test_tying_is_decided_at_the_top(tmp_path: Path) -> None:
    assert load(tmp_path, changed("tie_word_embeddings", False)).text.tie_word_embeddings is False
    assert load(tmp_path, changed("tie_word_embeddings", REMOVED)).text.tie_word_embeddings is True
    content = changed("text_config.tie_word_embeddings", REMOVED)
    assert load(tmp_path, content).text.tie_word_embeddings is True
    del content["tie_word_embeddings"]
    assert load(tmp_path, content).text.tie_word_embeddings is False


def test_end_ids_are_the_union(tmp_path: Path) -> None:
    content = changed("eos_token_id", [5, 7])
    assert load(tmp_path, content, {"eos_token_id": 9}).eos_token_ids == (5, 7, 248044, 9)
    assert load(tmp_path, content, {"eos_token_id": None}).eos_token_ids == (5, 7, 248044)
    assert load(tmp_path, changed("text_config.eos_token_id", None)).eos_token_ids == ()
    for bad in (-1, 248320, 10**12, "2", 2.0, True, [1, None], {"a": 1}):
        for generation, file in ((None, "config.json"), ({"eos_token_id": bad}, "generation_config.json")):
            with pytest.raises(ConfigError, match=f"^{file}: eos_token_id"):
                load(tmp_path, RELEASE if generation else changed("eos_token_id", bad), generation)


COUNTS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "intermediate_size", "max_position_embeddings"),
)
EXPERT_COUNTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
VISION_COUNTS = (
    *("depth", "hidden_size", "num_heads", "intermediate_size", "patch_size", "temporal_patch_size"),
    *("spatial_merge_size", "num_position_embeddings", "out_hidden_size"),
)
ROPE = "text_config.rope_parameters."
ABSURD = (0, -1, -(10**12), 10**12, 10**30, 0.5, 4.0, "4", [], {}, True, float("nan"), float("inf"))
SIZES = (
    [("text_config." + name, RELEASE) for name in COUNTS]
    + [("text_config." + name, sparse()) for name in EXPERT_COUNTS]
    + [("vision_config." + name, RELEASE) for name in VISION_COUNTS]
)


@pytest.mark.parametrize(("path", "base"), SIZES, ids=[path for path, _ in SIZES])
def test_absurd_or_missing_sizes(tmp_path: Path, path: str, base: dict[str, Any]) -> None:
    for value in ABSURD:
        with pytest.raises(ConfigError, match=path):
            load(tmp_path, changed(path, value, base))
    for value in (None, REMOVED):
        with pytest.raises(ConfigError, match=f"config.json: {path} is missing"):
            load(tmp_path, changed(path, value, base))


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("text_config.rms_norm_eps", (0, -1e-6, 2, "1e-6", None, REMOVED, float("nan"), float("inf"), 10**12)),
        (ROPE + "rope_theta", (0, 1, -5, 1e30, "1e7", float("nan"), None)),
        (ROPE + "partial_rotary_factor", (0, -0.25, 1.5, 0.001, 0.0137, "0.25", float("nan"), None)),
        (ROPE + "mrope_section", ([11, 11], [11, 11, 11], [12, 10, 9], [-1, 22, 11], [11.0, 11, 10])),
        (ROPE + "mrope_section", ("11,11,10", {}, [True, 21, 10], [], 32)),
        (ROPE + "mrope_interleaved", (False, None, 1, "yes")),
        (ROPE + "rope_type", ("linear", "dynamic", "longrope", "llama3", "mrope", 3, ["yarn"], "")),
        ("text_config.rope_parameters", ([], 3, "default", None, REMOVED)),
        ("text_config.layer_types", ([], ["full_attention"] * 31, ["full_attention"] * 33, "full_attention", 32)),
        ("text_config.layer_types", (["full_attention"] * 31 + ["sliding_attention"], [None] * 32, [["x"]] * 32)),
        ("text_config.hidden_act", ("gelu", "relu", None, 1, ["silu"])),
        ("text_config.attention_bias", (True, None, 0)),
        ("text_config.attn_output_gate", (False, None)),
        ("text_config.output_gate_type", ("sigmoid",)),
        ("text_config.mamba_ssm_dtype", ("bfloat16",)),
        ("text_config.mtp_use_dedicated_embeddings", (True,)),
        ("text_config.mtp_num_hidden_layers", (2, -1, "1", True, 10**12)),
        ("text_config.mlp_only_layers", ([0], 3)),
        ("text_config.decoder_sparse_step", (2,)),
        ("text_config.num_experts", (8, "8")),
        ("text_config.model_type", ("qwen3_next", "llama")),
        ("text_config.num_attention_heads", (15, 6)),
        ("text_config.linear_num_value_heads", (17, 8)),
        ("text_config.quantization_config", ({"quant_method": "fp8"}, {}, "x")),
        ("text_config", (None, REMOVED, [], "text", 3)),
        ("tie_word_embeddings", ("true", 1, [], 0.0)),
        ("language_model_only", ("true", 1)),
        ("quantization_config", ({"quant_method": "gptq"}, {})),
        ("compression_config", ({"a": 1},)),
        ("model_type", ("qwen3_5_moe", "qwen3_next", "llama", None, 3)),
        ("architectures", (None, REMOVED, [], ["LlamaForCausalLM"], ["Qwen3_5Model"], "Qwen3_5ForCausalLM", [3])),
        ("architectures", (["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"], [["x"]], {"a": 1})),
        ("image_token_id", (-1, 10**12, "x", None, REMOVED, 248057, 248054, 1.0)),
        ("vision_start_token_id", (-1, None, REMOVED)),
        ("vision_config", ([], 3, "none")),
        ("vision_config.hidden_act", ("gelu", "quick_gelu", None)),
        ("vision_config.deepstack_visual_indexes", ([8, 16, 24],)),
        ("vision_config.in_channels", (1, 4, 0, "3")),
        ("vision_config.model_type", ("siglip", 3)),
        ("vision_config.patch_size", ([16, 8], [], ["16", "16"], [0, 0], 65)),
        ("vision_config.num_position_embeddings", (2303, 2)),
        ("vision_config.out_hidden_size", (2048,)),
        ("vision_config.hidden_size", (1000, 1040)),
        ("vision_config.temporal_patch_size", (1, 4)),
        ("vision_config.rope_parameters", ({"rope_type": "yarn"}, {"rope_theta": 1e6}, [])),
    ],
)
def test_bad_values(tmp_path: Path, path: str, values: tuple[Any, ...]) -> None:
    key = path.rsplit(".", 1)[-1]
    for value in values:
        with pytest.raises(ConfigError, match=rf"config\.json: [a-z_.]*{key}") as caught:
            load(tmp_path, changed(path, value))
        assert len(str(caught.value)) < 500, value


def test_values_that_are_absurd_together(tmp_path: Path) -> None:
    content = sparse()
    content["text_config"].update({"num_experts": 9, "num_experts_per_tok": 10})
    with pytest.raises(ConfigError, match=r"num_experts_per_tok is 10, more than num_experts = 9"):
        load(tmp_path, content)
    content["text_config"].update({"num_experts": 8192 + 1})
    with pytest.raises(ConfigError, match="num_experts"):
        load(tmp_path, content)
    content = sparse()
    content["text_config"].update({"num_experts": 8192, "num_hidden_layers": 1000, "layer_types": None})
    with pytest.raises(ConfigError, match="times num_hidden_layers"):
        load(tmp_path, content)
    content = changed("text_config.layer_types", None)
    content["text_config"].update({"num_hidden_layers": 1000, "linear_num_value_heads": 1024})
    content["text_config"].update({"linear_key_head_dim": 1024, "linear_value_head_dim": 1024})
    with pytest.raises(ConfigError, match="GiB of state"):
        load(tmp_path, content)
    content = changed("text_config.layer_types", None)
    content["text_config"].update({"num_hidden_layers": 1000, "hidden_size": 65536, "intermediate_size": 1 << 20})
    with pytest.raises(ConfigError, match="parameters"):
        load(tmp_path, content)


def test_unknown_keys_are_metadata(tmp_path: Path) -> None:
    content = changed("text_config.unsloth_fixed", True)
    assert load(tmp_path, {**content, "_name_or_path": "x", "nested": {"a": [1]}}) == load(tmp_path, RELEASE)


def test_patch_size_per_axis(tmp_path: Path) -> None:
    content = changed("vision_config.patch_size", [16, 16])
    assert load(tmp_path, changed("vision_config.temporal_patch_size", [2], content)) == load(tmp_path, RELEASE)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", '"x"', "{'a': 1}", '{"a": ' + "9" * 9999 + "}", "[" * 100_000, '{"a": ' * 2000, "\0"],
    ids=range(11),
)
def test_malformed_files(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        load(tmp_path, content)
    assert len(str(caught.value)) < 500
    (tmp_path / "generation_config.json").write_text(content)
    (tmp_path / "config.json").write_text(json.dumps(RELEASE))
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        load_config(tmp_path)


def test_absent_and_strange_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room on the disk
    with pytest.raises(ConfigError, match="bytes"):
        load_config(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**12, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
PATHS = (
    [key for key in RELEASE if key not in ("transformers_version",)]
    + ["text_config." + key for key in RELEASE["text_config"]]
    + ["vision_config." + key for key in RELEASE["vision_config"]]
    + [ROPE + key for key in RELEASE["text_config"]["rope_parameters"]]
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(PATHS), JSON, min_size=1, max_size=2))
def test_fuzz_values(tmp_path: Path, changes: dict[str, Any]) -> None:
    content = copy.deepcopy(RELEASE)
    for path, value in sorted(changes.items(), key=lambda item: -item[0].count(".")):
        content = changed(path, value, content)
    try:
        config = load(tmp_path, content)
    except ConfigError:
        return
    assert len(config.text.layer_types) == config.text.num_hidden_layers
    assert sum(config.text.rope.mrope_section) * 2 == config.text.rope.rotary_dim <= config.text.head_dim


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=JSON)
def test_fuzz_whole_file(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, content)
