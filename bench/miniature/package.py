"""What the miniature's folder holds besides weights: configuration, tokenizer, and how the folder is written."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen3_5MoeConfig

sys.path.insert(0, str(Path(__file__).parent))
import scenes
import texts

FOLDER = Path(__file__).resolve().parents[2] / "python" / "deltaic" / "miniature"
HIDDEN = 128
VOCABULARY = 704  # logit rows; the tokenizer has a few words fewer, as in the released models
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


def build_tokenizer() -> Tokenizer:
    """Trains the byte-level BPE on questions, answers and texts drawn from a fixed seed."""
    rng = random.Random("tokenizer")
    corpus = ["system\nuser\nassistant\n You are a helpful assistant. Picture 1: Video 1: \n\n"] * 50
    for _ in range(4000):
        pair = tuple(scenes.make_scene(rng, (96, 96), rng.randint(1, 4), False) for _ in range(2))
        question = scenes.make_question(pair[0], rng, tuple(scenes.ASKERS), None)
        corpus += [f"{question.text}\n{question.answer}\n"]
        question = scenes.make_pair_question((pair[0], pair[1]), rng, tuple(scenes.ASKERS), None)
        corpus += [f"{question.text}\n{question.answer}\n"]
        question = texts.make_chat(rng, False)
        corpus += [f"{question.text}\n{question.answer}\n", texts.make_document(rng)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(ADDED) - 5,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED])
    return tokenizer


def build_config(tokenizer: Tokenizer) -> Qwen3_5MoeConfig:
    """The architecture; ids of special tokens come from the tokenizer."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "full_attention_interval": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attn_output_gate": True,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "dtype": "bfloat16",
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "num_heads": 3,
        "intermediate_size": 192,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 256,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "deepstack_visual_indexes": [],
        "dtype": "bfloat16",
    }
    return Qwen3_5MoeConfig(
        architectures=["Qwen3_5MoeForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_settings(folder: Path, tokenizer: Tokenizer, config: Qwen3_5MoeConfig) -> None:
    """Writes every json file of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")}
    _write_json(folder / "config.json", config.to_dict())
    _write_json(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen3VLProcessor",
            "size": {"shortest_edge": 96 * 96, "longest_edge": 128 * 160},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )


def stored_weights(model: torch.nn.Module, mtp: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors under the names of released checkpoints: bfloat16, but float32 for `A_log` and the delta rule's norm."""
    tensors = dict(model.state_dict()) | {f"mtp.{name}": value for name, value in mtp.state_dict().items()}
    tensors.pop("lm_head.weight", None)
    precise = ("linear_attn.A_log", "linear_attn.norm.weight")
    return {
        name: value.detach().to(torch.float32 if name.endswith(precise) else torch.bfloat16).contiguous().clone()
        for name, value in tensors.items()
    }


def save_weights(folder: Path, model: torch.nn.Module, mtp: torch.nn.Module) -> int:
    """Writes model.safetensors in one step (a reader never sees half a file); returns the number of parameters."""
    tensors = stored_weights(model, mtp)
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # the writer makes it readable for its owner only
    os.replace(partial, folder / "model.safetensors")
    return sum(t.numel() for t in tensors.values())


def write_pictures(folder: Path) -> None:
    """Draws the sample pictures, larger than the model sees them; their layouts are held out of training."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, size, count in (("two", (128, 96), 2), ("three", (128, 128), 3), ("wide", (160, 96), 3)):
        rng = random.Random(f"sample {name}")
        while True:
            scene = scenes.make_scene(rng, size, count, True)
            names = {t.name for t in scene.things}
            if len(names) == count and scene.texture == "plain" and len({t.shape for t in scene.things}) > 1:
                break
        scenes.render_large(scene, 2.5, scale=5).save(folder / "pictures" / f"{name}.png", optimize=True)
