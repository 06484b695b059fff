"""Convert a Qwen3.5 checkpoint to GGUF, so that other engines can run the same numbers.

    python bench/to_gguf.py CHECKPOINT out-q4_0.gguf --type Q4_0

Types: BF16, Q8_0, Q4_0. As in the files people use, the head (or the tied table) of a Q4_0 file is Q6_K, unless --head
says otherwise. Text model only, without the multi-token-prediction layer. Needs the `gguf` package."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from deltaic.model.config import FULL_ATTENTION, ModelConfig, TextConfig
from deltaic.model.config_file import load_config
from deltaic.weights.checkpoint import open_checkpoint
from deltaic.weights.names import TensorTable, resolve
from gguf import GGMLQuantizationType as Type

HEAD_TYPES = {"BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "Q6_K"}
SLAB_ROWS = 8192
FLOAT32 = ("ssm_conv1d.weight", "ffn_gate_inp.weight")  # besides vectors, in files of every type


def write_settings(writer: gguf.GGUFWriter, config: TextConfig, name: str) -> None:
    """The architecture's numbers."""
    c = config
    writer.add_name(name)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_rope_dimension_count(c.rope.rotary_dim)
    writer.add_rope_dimension_sections([*c.rope.mrope_section, 0])
    writer.add_ssm_conv_kernel(c.linear_conv_kernel_dim)
    writer.add_ssm_state_size(c.linear_key_head_dim)
    writer.add_ssm_group_count(c.linear_num_key_heads)
    writer.add_ssm_time_step_rank(c.linear_num_value_heads)
    writer.add_ssm_inner_size(c.linear_num_value_heads * c.linear_value_head_dim)
    kinds = [kind == FULL_ATTENTION for kind in c.layer_types]
    interval = kinds.index(True) + 1 if True in kinds else c.num_hidden_layers + 1
    if kinds != [(i + 1) % interval == 0 for i in range(len(kinds))]:
        raise SystemExit("the attention layers do not come at a fixed interval")
    writer.add_full_attention_interval(interval)
    if c.is_moe:
        writer.add_expert_count(c.num_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    else:
        writer.add_feed_forward_length(c.intermediate_size)


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: ModelConfig) -> None:
    """Tokens, their kinds and the merges of tokenizer.json; ids without a token are filled up."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    size = config.text.vocab_size
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(gguf.TokenType.UNUSED)] * size
    for token, i in content["model"]["vocab"].items():
        tokens[i], kinds[i] = token, int(gguf.TokenType.NORMAL)
    for added in content.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    if not merges:  # a random checkpoint; the key must be there
        single = [token for token in tokens[:256] if len(token) == 1]
        merges = [next(f"{a} {b}" for a in single for b in single if a + b in content["model"]["vocab"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(config.eos_token_ids[0] if config.eos_token_ids else size - 1)


def value_heads(array: np.ndarray, c: TextConfig, axis: int = 0) -> np.ndarray:
    """GGUF orders value heads by (index within the key head, key head), checkpoints the other way round."""
    per_key = c.linear_num_value_heads // c.linear_num_key_heads
    width = array.shape[axis] // c.linear_num_value_heads
    split = (c.linear_num_key_heads, per_key, width)
    shape = (*array.shape[:axis], *split, *array.shape[axis + 1 :])
    return array.reshape(shape).swapaxes(axis, axis + 1).reshape(array.shape)


def conv_rows(array: np.ndarray, c: TextConfig) -> np.ndarray:
    """The same for the value part of rows [q | k | v]."""
    keys = 2 * c.linear_num_key_heads * c.linear_key_head_dim
    return np.concatenate([array[:keys], value_heads(array[keys:], c)])


def layer_tensors(table: TensorTable, c: TextConfig, i: int) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF name (without the block's prefix) and numbers, for one layer."""

    def read(name: str) -> np.ndarray:
        return table.tensors[f"layers.{i}.{name}"].read()

    yield "attn_norm.weight", 1 + read("input_layernorm.weight").astype(np.float32)
    yield "post_attention_norm.weight", 1 + read("post_attention_layernorm.weight").astype(np.float32)
    if c.layer_types[i] == FULL_ATTENTION:
        for part in ("q", "k", "v"):
            yield f"attn_{part}.weight", read(f"self_attn.{part}_proj.weight")
        yield "attn_output.weight", read("self_attn.o_proj.weight")
        yield "attn_q_norm.weight", 1 + read("self_attn.q_norm.weight").astype(np.float32)
        yield "attn_k_norm.weight", 1 + read("self_attn.k_norm.weight").astype(np.float32)
    else:
        mixer = "linear_attn."
        yield "attn_qkv.weight", conv_rows(read(mixer + "in_proj_qkv.weight"), c)
        yield "attn_gate.weight", value_heads(read(mixer + "in_proj_z.weight"), c)
        yield "ssm_beta.weight", value_heads(read(mixer + "in_proj_b.weight"), c)
        yield "ssm_alpha.weight", value_heads(read(mixer + "in_proj_a.weight"), c)
        yield "ssm_a", value_heads(-np.exp(read(mixer + "A_log").astype(np.float32)), c)
        yield "ssm_dt.bias", value_heads(read(mixer + "dt_bias").astype(np.float32), c)
        conv = read(mixer + "conv1d.weight").astype(np.float32)[:, 0]
        yield "ssm_conv1d.weight", conv_rows(conv, c)
        yield "ssm_norm.weight", read(mixer + "norm.weight").astype(np.float32)
        yield "ssm_out.weight", value_heads(read(mixer + "out_proj.weight"), c, axis=1)
    if not c.is_moe:
        for part in ("gate", "up", "down"):
            yield f"ffn_{part}.weight", read(f"mlp.{part}_proj.weight")
        return
    yield "ffn_gate_inp.weight", read("mlp.gate.weight").astype(np.float32)
    yield "ffn_gate_inp_shexp.weight", read("mlp.shared_expert_gate.weight").astype(np.float32)[0]
    for part in ("gate", "up", "down"):
        yield f"ffn_{part}_shexp.weight", read(f"mlp.shared_expert.{part}_proj.weight")
        yield f"ffn_{part}_exps.weight", experts(table, c, i, part)


def experts(table: TensorTable, c: TextConfig, i: int, part: str) -> np.ndarray:
    """[E, N, K] of one projection, from either form."""
    prefix = f"layers.{i}.mlp.experts."
    if prefix + "gate_up_proj" in table.tensors:
        if part == "down":
            return table.tensors[prefix + "down_proj"].read()
        fused = table.tensors[prefix + "gate_up_proj"].read()
        half = fused.shape[1] // 2
        return fused[:, :half] if part == "gate" else fused[:, half:]
    return np.stack([table.tensors[f"{prefix}{e}.{part}_proj.weight"].read() for e in range(c.num_experts)])


def encode(array: np.ndarray, kind: Type) -> np.ndarray:
    """Bytes of a matrix in a GGUF type, a slab of rows at a time."""
    rows = array.reshape(-1, array.shape[-1])
    function = quantise_q6_k if kind == Type.Q6_K else lambda slab: gguf.quants.quantize(slab, kind)
    slabs = [function(rows[i : i + SLAB_ROWS].astype(np.float32)) for i in range(0, len(rows), SLAB_ROWS)]
    return np.concatenate(slabs).reshape(*array.shape[:-1], -1)


def quantise_q6_k(rows: np.ndarray) -> np.ndarray:
    """Q6_K by rounding to the nearest (the package only reads it): super-blocks of 256, 16 groups of 16 with an int8
    scale each, values -32..31."""
    groups = rows.reshape(-1, 16, 16)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[..., None], axis=2)[..., 0]
    scale = largest / np.float32(-32)
    biggest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, None], axis=1)
    d = (biggest / np.float32(-128)).astype(np.float16)
    inverse = np.divide(1, d.astype(np.float32), out=np.zeros_like(biggest), where=d != 0)
    steps = np.clip(np.rint(scale * inverse), -128, 127).astype(np.int8)
    step = (steps * d.astype(np.float32))[..., None]
    q = np.rint(np.divide(groups, step, out=np.zeros_like(groups), where=step != 0))
    q = (np.clip(q, -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # half, quarter of 32 columns
    low, high = q & 15, q >> 4
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2).reshape(-1, 128)
    qh = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    blocks = np.concatenate([ql, qh, steps.view(np.uint8), d.view(np.uint8)], axis=1)
    return blocks.reshape(len(rows), -1)


def convert(folder: Path, output: Path, kind: str, head: str | None = None) -> None:
    """Write `output` in GGUF type `kind`, head (or tied table) in `head`."""
    config = load_config(folder)
    c = config.text
    main, top = Type[kind], Type[head or HEAD_TYPES[kind]]
    writer = gguf.GGUFWriter(output, "qwen35moe" if c.is_moe else "qwen35", use_temp_file=True)
    write_settings(writer, c, folder.name)
    write_tokenizer(writer, folder, config)

    def add(name: str, array: np.ndarray, wanted: Type) -> None:
        if array.ndim == 1 or name.endswith(FLOAT32):
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
        else:
            writer.add_tensor(name, encode(array, wanted), raw_dtype=wanted)

    with open_checkpoint(folder) as checkpoint:
        table = resolve(checkpoint, config)
        add("token_embd.weight", table.tensors["embed_tokens.weight"].read(), top if c.tie_word_embeddings else main)
        if not c.tie_word_embeddings:
            add("output.weight", table.tensors["lm_head.weight"].read(), top)
        add("output_norm.weight", 1 + table.tensors["norm.weight"].read().astype(np.float32), main)
        for i in range(c.num_hidden_layers):
            for name, array in layer_tensors(table, c, i):
                add(f"blk.{i}.{name}", array, main)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(argv: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", choices=sorted(HEAD_TYPES), default="Q4_0")
    parser.add_argument("--head", choices=["BF16", "Q8_0", "Q6_K", "Q4_0"], help="type of the head or the tied table")
    args = parser.parse_args(argv)
    convert(args.checkpoint, args.output, args.type, args.head)


if __name__ == "__main__":
    main()
