"""What the chat tests share: a small tokenizer, the part of a configuration that prompts need, noisy pictures,
reference pixels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from deltaic.chat.tokenizer import Tokenizer
from tiny import SPECIAL

PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")
WORDS = ("the", "picture", " of", "née", "日本", "👍")


def small_backend() -> Any:
    """A byte-level BPE with the 256 bytes, a few words and the family's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    merges = []
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in WORDS:
        characters = splitter.pre_tokenize_str(word)[0][0]
        for end in range(2, len(characters) + 1):
            if characters[:end] not in vocab:
                merges.append((characters[: end - 1], characters[end - 1]))
                vocab[characters[:end]] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False) for token in (*PLAIN, "a b→c")])
    return backend


def make_config(tokenizer: Tokenizer, *, vision: bool = True) -> Any:
    """What prepare reads of a ModelConfig, for `tokenizer`."""
    tower = SimpleNamespace(patch_size=16, spatial_merge_size=2, temporal_patch_size=2)
    return SimpleNamespace(
        text=SimpleNamespace(vocab_size=tokenizer.vocab_size + 9),
        vision=tower if vision else None,
        image_token_id=tokenizer.id_of("<|image_pad|>") if vision else None,
        video_token_id=tokenizer.id_of("<|video_pad|>") if vision else None,
    )


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A noisy picture uint8 [height, width, 3] with full-range edges, where rounding and clamping show."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    edges = (rng.integers(0, 2, (height, width, 1)) * 255).astype(np.uint8)
    return np.where(rng.random((height, width, 1)) < 0.5, noise, edges).astype(np.uint8)


def make_reference_image_processor() -> Any:
    """transformers' Qwen2-VL processor with the family's parameters, whose resize and normalisation are torch's.

    The default processor needs torchvision; its resize is this very torch call and its normalisation this
    arithmetic."""
    import torch
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

    class TorchKernel(Qwen2VLImageProcessorPil):
        def resize(self, image: Any, size: Any, resample: Any, factor: int, **_: Any) -> Any:
            assert int(resample) == 3
            target = smart_resize(*image.shape[-2:], factor, size.shortest_edge, size.longest_edge)
            pixels = torch.from_numpy(np.array(image))[None]
            assert pixels.dtype == torch.uint8
            if target == image.shape[-2:]:
                return pixels[0].numpy()
            return torch.nn.functional.interpolate(pixels, target, mode="bicubic", antialias=True)[0].numpy()

        def rescale(self, image: Any, scale: float, **_: Any) -> Any:
            self.level = 1.0 / scale
            return image

        def normalize(self, image: Any, mean: Any, std: Any, **_: Any) -> Any:
            mean, std = (torch.tensor(values) * self.level for values in (mean, std))
            pixels = torch.from_numpy(np.array(image)).to(torch.float32)
            return pixels.sub_(mean[:, None, None]).div_(std[:, None, None]).numpy()

    return TorchKernel(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 65536, "longest_edge": 16777216},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
