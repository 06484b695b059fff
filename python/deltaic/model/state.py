"""What does one sequence remember? Convolution tails and matrices of the delta layers, K/V blocks of the attention
layers, and how many tokens it has consumed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ContextLengthError, StateError
from .config import TextConfig

BLOCK_TOKENS = 128
KV_DTYPES: dict[str, type[np.generic]] = {"f32": np.float32, "bf16": np.uint16}


class State:
    """The memory of one sequence; all zero and empty at first.

    conv        float32 [L_delta, 3, C]: the last three inputs of each convolution, oldest first
    delta       float32 [L_delta, Hv, Dk, Dv]: the matrix of each delta head
    kv          the op set's BlockTable: blocks [L_attn, 2, Hkv, BLOCK_TOKENS, D] of kv_dtype, for all attention layers
    kv_dtype    "f32", or "bf16" (uint16 bits)
    length      tokens consumed: the cache index of the next one
    rope_delta  added to `length` it is the rotary position of the next text token (<= 0; not 0 only after pictures)
    token_ids   the tokens consumed, kept by whoever feeds them
    intact      False while a forward pass is writing; if the pass is interrupted it stays False, the state unusable
    """

    __slots__ = (
        "_block", "_max_tokens", "conv", "delta", "intact", "kv", "kv_dtype", "length", "rope_delta", "token_ids",
    )  # fmt: skip

    def __init__(self, config: TextConfig, ops: ModuleType, kv_dtype: str = "f32"):
        if kv_dtype not in KV_DTYPES:
            raise ArgumentError(f"State: kv_dtype is {kv_dtype!r}, expected one of {sorted(KV_DTYPES)}")
        c = config
        taps = c.linear_conv_kernel_dim - 1
        matrix = (c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
        self.conv: npt.NDArray[np.float32] = np.zeros((c.num_delta_layers, taps, c.conv_dim), np.float32)
        self.delta: npt.NDArray[np.float32] = np.zeros((c.num_delta_layers, *matrix), np.float32)
        self.kv: Any = ops.BlockTable()
        self.kv_dtype = kv_dtype
        self.length = 0
        self.rope_delta = 0
        self.token_ids: list[int] = []
        self.intact = True
        self._block = (c.num_attention_layers, 2, c.num_key_value_heads, BLOCK_TOKENS, c.head_dim)
        self._max_tokens = c.max_position_embeddings

    def fits(self, other: State) -> bool:
        """Whether `other` is a state of an equally shaped model on the same op set (kv_dtype, contents may differ)."""
        return (
            type(self.kv) is type(other.kv)
            and self._block == other._block
            and self.conv.shape == other.conv.shape
            and self.delta.shape == other.delta.shape
        )

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, counted from the start of the sequence; never shrinks, never copies.

        Raises ContextLengthError beyond the model's max_position_embeddings, StateError if memory runs out.
        """
        if tokens > self._max_tokens:
            raise ContextLengthError(
                f"the sequence would hold {tokens} tokens, the model's context holds {self._max_tokens}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        while len(self.kv) * BLOCK_TOKENS < tokens:
            try:
                block = np.zeros(self._block, KV_DTYPES[self.kv_dtype])
            except (MemoryError, ValueError):  # numpy raises the latter beyond the address space
                raise StateError(
                    f"no memory for the K/V of {tokens} tokens: the sequence holds {self.nbytes / 2**20:.0f} MiB "
                    f"for {len(self.kv) * BLOCK_TOKENS}; shorten the prompt or use kv_dtype 'bf16'"
                ) from None
            self.kv.append(block)

    @property
    def nbytes(self) -> int:
        """Bytes held, reserved blocks included."""
        return self.conv.nbytes + self.delta.nbytes + sum(block.nbytes for block in self.kv.blocks)
