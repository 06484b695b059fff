"""Write a random checkpoint in the shape of a released Qwen3.5 model, to measure loading and speed without its weights.

    python bench/make_checkpoint.py 0.8B /tmp/random-0.8B
    python bench/make_checkpoint.py 35B-A3B /tmp/random-moe --layers 4 --no-vision --no-mtp

Weights are bfloat16, normally distributed with a standard deviation of 1/sqrt(inputs); norms, decays and time steps lie
in realistic ranges; no tensor is left at 0 or 1. The files look like a release's: shards of 4 GB with an index,
config.json, generation_config.json, preprocessor_config.json, tokenizer and chat template. Needs little memory: one
tensor at a time, in pieces. The text that such a model writes is noise, only its cost is real."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path
from statistics import NormalDist
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from deltaic.model.config_file import load_config
from deltaic.weights.names import TensorSpec, expected_tensors

SHARD_BYTES = 4_000_000_000
PIECE_VALUES = 1 << 20
VOCAB_SIZE = 248320

# The special tokens of the family; the first has the id 248044, and so on.
FIRST_SPECIAL_ID = 248044
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
ADDED_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or part.type == 'image_url' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + render(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is true -%}{{- '<think>\\n' -}}
{%- else -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


def _dense(
    hidden: int, layers: int, ffn: int, heads: int, kv_heads: int, value_heads: int, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "linear_num_value_heads": value_heads,
        "tie_word_embeddings": tied,
    }


def _vision(depth: int, width: int, heads: int, ffn: int) -> dict[str, Any]:
    return {"depth": depth, "hidden_size": width, "num_heads": heads, "intermediate_size": ffn}


_MOE = {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 32,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
}
# name -> (text, vision). "tiny" is no release: it exists to try things out in a second.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "0.8B": (_dense(1024, 24, 3584, 8, 2, 16, True), _vision(12, 768, 12, 3072)),
    "2B": (_dense(2048, 24, 6144, 8, 2, 16, True), _vision(24, 1024, 16, 4096)),
    "4B": (_dense(2560, 32, 9216, 16, 4, 32, True), _vision(24, 1024, 16, 4096)),
    "9B": (_dense(4096, 32, 12288, 16, 4, 32, False), _vision(27, 1152, 16, 4304)),
    "27B": (_dense(5120, 64, 17408, 24, 4, 48, False), _vision(27, 1152, 16, 4304)),
    "35B-A3B": (_MOE, _vision(27, 1152, 16, 4304)),
    "tiny": (
        {
            **_dense(64, 4, 96, 4, 2, 4, True),
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 24,
            "mrope_section": [2, 1, 1],
        },
        {**_vision(2, 32, 2, 48), "num_position_embeddings": 64},
    ),
}


def make_config(shape: str, layers: int | None, vision: bool, mtp: bool, token_ids: dict[str, int]) -> dict[str, Any]:
    """config.json of the release called `shape`, with another number of layers or without parts if asked for."""
    text_shape, vision_shape = SHAPES[shape]
    moe = "num_experts" in text_shape
    kind = "qwen3_5_moe" if moe else "qwen3_5"
    text: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": token_ids["<|endoftext|>"],
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": kind + "_text",
        "mtp_num_hidden_layers": 1 if mtp else 0,
        "mtp_use_dedicated_embeddings": False,
        "rms_norm_eps": 1e-06,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
        **text_shape,
    }
    text["rope_parameters"] = {
        "mrope_interleaved": True,
        "mrope_section": text.pop("mrope_section", [11, 11, 10]),
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    }
    text["num_hidden_layers"] = layers or text["num_hidden_layers"]
    text["layer_types"] = [
        "linear_attention" if (i + 1) % 4 else "full_attention" for i in range(text["num_hidden_layers"])
    ]
    stem = "Qwen3_5MoeFor" if moe else "Qwen3_5For"
    if not vision:
        return {"architectures": [stem + "CausalLM"], **text}
    return {
        "architectures": [stem + "ConditionalGeneration"],
        "image_token_id": token_ids["<|image_pad|>"],
        "model_type": kind,
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "video_token_id": token_ids["<|video_pad|>"],
        "vision_config": {
            "deepstack_visual_indexes": [],
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "model_type": kind,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision_shape,
        },
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "vision_start_token_id": token_ids["<|vision_start|>"],
    }


class Generator:
    """Random bfloat16 tensors. A table of 65,536 normal quantiles turns 16 random bits into one value: one pass."""

    def __init__(self, seed: int):
        self._rng = np.random.Generator(np.random.SFC64(seed))
        normal = NormalDist()
        self._quantiles = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)

    def write(self, spec: TensorSpec, stored: str, out: BinaryIO) -> None:
        """Write the values of one tensor, in pieces."""
        count = math.prod(spec.shape)
        if count < 65536 or stored == "F32":
            out.write(self._small(spec).astype(np.float32 if stored == "F32" else ml_dtypes.bfloat16).tobytes())
            return
        fan_in = math.prod(spec.shape[1:]) if len(spec.shape) != 3 else spec.shape[2]
        table = (self._quantiles / math.sqrt(fan_in)).astype(ml_dtypes.bfloat16).view(np.uint16)
        for start in range(0, count, PIECE_VALUES):
            size = min(PIECE_VALUES, count - start)
            # Whole 64-bit draws and plain indexing: several times faster than rng.bytes and np.take.
            bits = self._rng.integers(0, 1 << 64, -(-size // 4), np.uint64).view(np.uint16)[:size]
            out.write(memoryview(table[bits]).cast("B"))

    def _small(self, spec: TensorSpec) -> np.ndarray[Any, Any]:
        name, shape = spec.name, spec.shape
        if name.endswith("A_log"):
            return np.log(self._rng.uniform(1.1, 16, shape))
        if name.endswith("dt_bias"):
            step = np.exp(self._rng.uniform(math.log(1e-3), math.log(0.1), shape))
            return step + np.log(-np.expm1(-step))  # softplus(dt_bias) = step
        normal = self._rng.standard_normal(shape)
        if len(shape) > 1:
            return normal / math.sqrt(math.prod(shape[1:]))
        noise = np.where(np.abs(normal) < 0.05, 0.05, normal)  # far enough from 0 to stay there in bfloat16
        plain_norm = "linear_attn.norm" in name or (name.startswith("visual.") and "norm" in name)
        return 1 + 0.2 * noise if plain_norm and name.endswith(".weight") else 0.2 * noise


def stored_dtype(spec: TensorSpec) -> str:
    """Releases are bfloat16, except for these two tensors of a delta layer."""
    return "F32" if spec.name.endswith(("A_log", "linear_attn.norm.weight")) else "BF16"


def tensor_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor as it is stored."""
    return math.prod(spec.shape) * (4 if stored_dtype(spec) == "F32" else 2)


def write_weights(folder: Path, table: dict[str, TensorSpec], seed: int) -> int:
    """Write all tensors into shards and an index. Returns the number of bytes of data."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in table.items():
        if shards[-1] and filled + tensor_bytes(spec) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor_bytes(spec)
    generator = Generator(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for i, names in enumerate(shards):
        file_name = "model.safetensors"
        if len(shards) > 1:
            file_name = f"model.safetensors-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        names.sort(key=lambda name: stored_dtype(table[name]) != "F32")  # wider types first keeps all aligned
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in names:
            size = tensor_bytes(table[name])
            header[name] = {
                "dtype": stored_dtype(table[name]),
                "shape": list(table[name].shape),
                "data_offsets": [position, position + size],
            }
            position += size
            weight_map[name] = file_name
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file_name).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            for name in names:
                generator.write(table[name], stored_dtype(table[name]), out)
        total += position
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return total


def make_tokenizer(path: Path) -> dict[str, int]:
    """A byte-level tokenizer of the family's size, with its special ids: bytes as ids 0..255, then made-up words, each
    merged from two earlier ones as byte-pair encoding makes them. Returns the ids of the special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    known, merges = set(words), []
    rng = np.random.default_rng(0)
    while len(words) < FIRST_SPECIAL_ID:
        # mostly of short (early) words, so that the mean length is that of real vocabularies, six to seven bytes
        for first, second in (rng.random((1 << 16, 2)) ** 6).tolist():
            pair = words[int(first * len(words))], words[int(second * len(words))]
            word = pair[0] + pair[1]
            if len(word) <= 16 and word not in known and len(words) < FIRST_SPECIAL_ID:
                known.add(word)
                words.append(word)
                merges.append(pair)
    vocab = {word: i for i, word in enumerate(words)}
    special = {token: FIRST_SPECIAL_ID + i for i, token in enumerate(SPECIAL_TOKENS + ADDED_TOKENS)}
    tokenizer = Tokenizer(models.BPE({**vocab, **special}, merges))
    tokenizer.normalizer = normalizers.NFC()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"), pretty=False)
    write_json(
        path / "tokenizer_config.json",
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"},
    )
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return special


def copy_tokenizer(source: Path, folder: Path) -> dict[str, int]:
    """Copy the tokenizer files of `source` (a folder, or a tokenizer.json). Returns the ids of the special tokens."""
    from tokenizers import Tokenizer

    if source.is_dir():
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt"):
            if (source / name).exists():
                shutil.copy(source / name, folder / name)
    else:
        shutil.copy(source, folder / "tokenizer.json")
    if not (folder / "chat_template.jinja").exists():
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    missing = [token for token, i in ids.items() if i is None]
    if missing:
        sys.exit(f"{source} lacks the special tokens {', '.join(missing)}")
    return ids


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_checkpoint(
    shape: str,
    folder: Path,
    *,
    layers: int | None = None,
    vision: bool = True,
    mtp: bool = True,
    tokenizer: Path | None = None,
    seed: int = 0,
) -> tuple[int, int]:
    """Write the whole folder. Returns the number of parameters and of bytes of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    ids = copy_tokenizer(tokenizer, folder) if tokenizer else make_tokenizer(folder)
    write_json(folder / "config.json", make_config(shape, layers, vision, mtp, ids))
    write_json(
        folder / "generation_config.json",
        {
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "temperature": 1.0,
            "top_k": 20,
            "top_p": 0.95,
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
    )
    table = expected_tensors(load_config(folder))
    return sum(math.prod(spec.shape) for spec in table.values()), write_weights(folder, table, seed)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="number of decoder layers (default: the release's)")
    parser.add_argument("--no-vision", action="store_true", help="text-only checkpoint")
    parser.add_argument("--no-mtp", action="store_true", help="without the multi-token-prediction layer")
    parser.add_argument("--tokenizer", type=Path, help="folder or tokenizer.json to copy (default: a byte-level one)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    parameters, size = make_checkpoint(
        args.shape,
        args.folder,
        layers=args.layers,
        vision=not args.no_vision,
        mtp=not args.no_mtp,
        tokenizer=args.tokenizer,
        seed=args.seed,
    )
    seconds = time.perf_counter() - start
    print(f"{args.folder}: {parameters:,} parameters, {size / 1e9:.2f} GB in {seconds:.1f} s")


if __name__ == "__main__":
    main()
