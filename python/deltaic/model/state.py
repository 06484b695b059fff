"""What does one sequence remember? Convolution tails and matrices of the delta layers, K/V blocks of the attention
layers, and what it has consumed. A state is a value: it can be forked, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ContextLengthError, StateError
from ..ops import memory
from ..ops.devices import kv_dtypes
from ..ops.layout import KV_DTYPES, kv_head_dim, kv_width
from .config import TextConfig

BLOCK_TOKENS = 128


class State:
    """The memory of one sequence; all zero and empty at first.

    conv        float32 [L_delta, 3, C]: the last three inputs of each convolution, oldest first
    delta       float32 [L_delta, Hv, Dk, Dv]: the matrix of each delta head
    kv          the op set's BlockTable: blocks [L_attn, 2, Hkv, BLOCK_TOKENS, D] of kv_dtype, for all attention layers
    kv_dtype    "f32", "bf16" (uint16 bits), or "int8" (uint8, rows of `width` bytes: see ops.reference.BlockTable)
    mtp         the BlockTable of the MTP layer: blocks [1, 2, Hkv, BLOCK_TOKENS, D]; empty until it is used
    mtp_first, mtp_length  its entries belong to tokens mtp_first .. mtp_first + mtp_length - 1; entry t is made from
                the hidden vector of token t and the token after it. What lies behind them is left from drafts
    length      tokens consumed: the cache index of the next one
    rope_delta  added to `length` it is the rotary position of the next text token (<= 0; not 0 only after pictures)
    token_ids   the tokens consumed, kept by whoever feeds them
    images      the pictures consumed, kept by whoever feeds them: (index of its first token, tokens, digest)
    fingerprint of the model that it belongs to, "" where unknown
    intact      False while a forward pass is writing; if the pass is interrupted it stays False, the state unusable

    A fork shares everything with its origin: full K/V blocks for ever, the last block and the arrays until one of the
    two is written. Whoever writes calls `reserve` first, which makes the state's own copies. Shared `conv` and `delta`
    are read-only arrays, so that forgetting it is an error.
    """

    __slots__ = (
        "_block", "_max_tokens", "_mtp_block", "_ready", "_ready_mtp", "_shared", "_shared_blocks", "_shared_mtp",
        "_zeros", "conv", "delta", "fingerprint", "images", "intact", "kv", "kv_dtype", "length", "mtp", "mtp_first",
        "mtp_length", "rope_delta", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        config: TextConfig,
        ops: ModuleType,
        kv_dtype: str = "f32",
        *,
        context: int | None = None,
        fingerprint: str = "",
        mtp: bool = False,
    ):
        """context: tokens it may hold at most; None: the model's max_position_embeddings. mtp: whether the MTP layer is
        in use, which `bytes_for` then counts."""
        if kv_dtype not in kv_dtypes(ops):
            raise ArgumentError(f"State: kv_dtype is {kv_dtype!r}, expected one of {kv_dtypes(ops)}")
        c = config
        self.kv_dtype = kv_dtype
        self.fingerprint = fingerprint
        width = kv_width(KV_DTYPES[kv_dtype], c.head_dim)
        self._block = (c.num_attention_layers, 2, c.num_key_value_heads, BLOCK_TOKENS, width)
        self._mtp_block = (int(mtp), *self._block[1:])
        self._max_tokens = c.max_position_embeddings if context is None else context
        self._zeros = zeros = getattr(ops, "zeros", np.zeros)  # an op set makes its arrays where it computes
        conv = (c.num_delta_layers, c.linear_conv_kernel_dim - 1, c.conv_dim)
        matrices = (c.num_delta_layers, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
        self._start(zeros(conv, np.float32), zeros(matrices, np.float32), ops.BlockTable)

    def _start(self, conv: Any, delta: Any, table: type[Any]) -> None:
        """Nothing has been consumed yet. conv, delta: arrays of this state alone; table: the op set's BlockTable."""
        self.conv: npt.NDArray[np.float32] = conv
        self.delta: npt.NDArray[np.float32] = delta
        self.kv: Any = table()
        self.length = 0
        self.rope_delta = 0
        self.token_ids: list[int] = []
        self.images: list[tuple[int, int, str]] = []
        self.intact = True
        self.mtp: Any = table()
        self.mtp_first = 0
        self.mtp_length = 0
        self._shared = False  # conv and delta may belong to other states too
        self._shared_blocks = 0  # blocks before this one may belong to other states too
        self._shared_mtp = 0  # the same of `mtp`
        self._ready = 0  # up to so many tokens there is nothing left to do for `reserve`
        self._ready_mtp = 0  # up to so many entries there is nothing left to do for `reserve_mtp`

    def empty(self) -> State:
        """An empty state of the same model, with arrays where those of this one are."""
        made = object.__new__(State)
        for name in ("kv_dtype", "fingerprint", "_block", "_mtp_block", "_max_tokens", "_zeros"):
            setattr(made, name, getattr(self, name))
        conv, delta = (self._zeros(array.shape, np.float32) for array in (self.conv, self.delta))
        made._start(conv, delta, type(self.kv))
        return made

    def fits(self, other: State) -> bool:
        """Whether `other` is a state of an equally shaped model (op set, kv_dtype and contents may differ)."""
        return (
            self._kv_shape() == other._kv_shape()
            and self.conv.shape == other.conv.shape
            and self.delta.shape == other.delta.shape
        )

    def _kv_shape(self) -> tuple[int, ...]:
        return (*self._block[:4], kv_head_dim(KV_DTYPES[self.kv_dtype], self._block[4]))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, counted from the start of the sequence, and make everything that will
        be written this state's own. Never shrinks; copies only what is shared with a fork.

        Raises ContextLengthError beyond the model's context, StateError if memory runs out.
        """
        if tokens <= self._ready:
            return
        if tokens > self._max_tokens:
            raise ContextLengthError(
                f"the sequence would hold {tokens} tokens, the model's context holds {self._max_tokens}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        try:
            if tokens > self.length:
                self._own()
            self._grow(self.kv, self._block, tokens)
            if tokens > self.length:
                self._ready = min(len(self.kv) * BLOCK_TOKENS, self._max_tokens)
        except (MemoryError, ValueError):  # numpy raises the latter beyond the address space
            raise StateError(
                f"no memory for the K/V of {tokens} tokens: the sequence holds {self.nbytes / 2**20:.0f} MiB "
                f"for {len(self.kv) * BLOCK_TOKENS}; shorten the prompt or use kv_dtype 'int8'"
            ) from None

    def _own(self) -> None:
        """Copy what is shared and about to be written: the arrays, and blocks from that of the next token on."""
        if self._shared or not _writeable(self.delta):
            conv, delta = copy_array(self.conv), copy_array(self.delta)
            self.conv, self.delta, self._shared = conv, delta, False
        self._shared_blocks = _own_blocks(self.kv, self.length, self._shared_blocks)

    def _grow(self, table: Any, block: tuple[int, ...], entries: int) -> None:
        while len(table) * BLOCK_TOKENS < entries:
            table.append(self._zeros(block, KV_DTYPES[self.kv_dtype]))

    def reserve_mtp(self, token: int, entries: int) -> None:
        """Make room for `entries` more entries of the MTP layer, of which the first belongs to `token`; where that does
        not continue those that are there, they are dropped. Raises StateError if memory runs out."""
        if token != self.mtp_first + self.mtp_length:
            self.mtp, self.mtp_first, self.mtp_length = type(self.kv)(), token, 0
            self._shared_mtp = self._ready_mtp = 0
        if self.mtp_length + entries <= self._ready_mtp:
            return
        try:
            self._shared_mtp = _own_blocks(self.mtp, self.mtp_length, self._shared_mtp)
            self._grow(self.mtp, (1, *self._block[1:]), self.mtp_length + entries)
            self._ready_mtp = len(self.mtp) * BLOCK_TOKENS
        except (MemoryError, ValueError):
            raise StateError("no memory for the K/V of the MTP layer; use speculate='lookup' or 'off'") from None

    def fork(self) -> State:
        """A second state that goes on from here; either may be fed without any effect on the other.

        Takes microseconds and no memory: the first write of either copies `conv`, `delta` and the last K/V block.
        Raises StateError if the state is half-written.
        """
        self.check_intact("fork")
        self._shared, self._ready, self._ready_mtp = True, 0, 0
        if isinstance(self.delta, np.ndarray):
            self.conv.flags.writeable = self.delta.flags.writeable = False
        return self._twin(self.length, self.mtp_length)

    def earlier(self, length: int, conv: Any, delta: Any, rope_delta: int) -> State:
        """This state as it was when it held `length` tokens. conv, delta: what these arrays were then, which become
        those of the new state; K/V blocks are shared as with a fork. Raises StateError if the state is half-written."""
        self.check_intact("fork")
        self._ready = self._ready_mtp = 0
        twin = self._twin(length, max(0, min(self.mtp_length, length - 1 - self.mtp_first)))
        twin.conv, twin.delta, twin._shared, twin.rope_delta = conv, delta, False, rope_delta
        return twin

    def _twin(self, length: int, mtp_length: int) -> State:
        """Another state that holds the first `length` of these tokens and the first `mtp_length` entries."""
        twin = object.__new__(State)
        for name in State.__slots__:
            setattr(twin, name, getattr(self, name))
        twin.length, twin.mtp_length, twin._ready, twin._ready_mtp = length, mtp_length, 0, 0
        twin.token_ids = self.token_ids[:length]
        twin.images = [image for image in self.images if image[0] < length]
        used = -(-length // BLOCK_TOKENS)
        self._shared_blocks = max(self._shared_blocks, used)
        twin.kv, twin._shared_blocks = type(self.kv)(), used
        for block in self.kv.blocks[:used]:
            twin.kv.append(block)
        used = -(-mtp_length // BLOCK_TOKENS)
        self._shared_mtp = max(self._shared_mtp, used)
        twin.mtp, twin._shared_mtp = type(self.kv)(), used
        for block in self.mtp.blocks[:used]:
            twin.mtp.append(block)
        return twin

    def on(self, ops: ModuleType) -> State:
        """This state, with its arrays where the op set `ops` computes; they are copied only from device to device.
        Raises StateError if the device has no memory for it, or no kernels for its kv_dtype (CUDA: int8); the state is
        then as it was."""
        if type(self.kv) is ops.BlockTable:
            return self
        check_kv_dtype(self.kv_dtype, ops)
        home = getattr(ops, "from_host", None)
        tables, moved = [], home is not None or not isinstance(self.delta, np.ndarray)
        try:
            for blocks in (self.kv.blocks, self.mtp.blocks):
                tables.append(ops.BlockTable())
                for block in blocks:
                    tables[-1].append(_moved(block, home))
            conv, delta = _moved(self.conv, home), _moved(self.delta, home)
        except MemoryError:
            raise StateError(f"no memory on the device for a state of {self.nbytes / 2**20:.0f} MiB") from None
        self.conv, self.delta, (self.kv, self.mtp) = conv, delta, tables
        self._ready = self._ready_mtp = 0
        if moved:
            self._shared, self._shared_blocks, self._shared_mtp = False, 0, 0
        self._zeros = getattr(ops, "zeros", np.zeros)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file (safetensors format, see `state_file`). A file that is there is replaced only when
        the new one is complete. Raises StateError if the state is half-written or the file cannot be written."""
        from .state_file import save_state

        save_state(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], ops: ModuleType | None = None) -> State:
        """Read a state from a file of `save`. It is bound to its model when it is first used with one, which refuses
        it if it belongs to another. ops: the op set for its K/V table; None: the CPU's where it is built.

        Raises StateError if the file is missing, truncated, altered, or not a file of `save`.
        """
        from .state_file import load_state

        return load_state(path, ops)[0]

    def bytes_for(self, tokens: int) -> int:
        """Bytes that a state like this one, not shared with any, takes with `tokens` tokens."""
        block = int(np.prod(self._block) + np.prod(self._mtp_block)) * np.dtype(KV_DTYPES[self.kv_dtype]).itemsize
        return self.conv.nbytes + self.delta.nbytes + -(-tokens // BLOCK_TOKENS) * block

    def tokens_within(self, nbytes: int) -> int:
        """Tokens that a state like this one can hold in `nbytes` bytes; negative if not even an empty one fits."""
        block = self.bytes_for(1) - self.bytes_for(0)
        return (nbytes - self.bytes_for(0)) // block * BLOCK_TOKENS

    @property
    def with_mtp(self) -> bool:
        """Whether the MTP layer is in use."""
        return self._mtp_block[0] > 0

    @property
    def context(self) -> int:
        """Tokens that it may hold at most."""
        return self._max_tokens

    def buffers(self) -> Iterator[npt.NDArray[Any]]:
        """The arrays that hold the memory: conv, delta and the K/V blocks. Shared ones are the same objects."""
        yield self.conv
        yield self.delta
        yield from self.kv.blocks
        yield from self.mtp.blocks

    @property
    def nbytes(self) -> int:
        """Bytes held, reserved blocks and what is shared with forks included; see `total_nbytes` for several states."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def check_intact(self, action: str) -> None:
        """Raise StateError, naming the action, if an interrupted call has left the state half-written."""
        if not self.intact:
            raise StateError(f"{action}: the state was left half-written by an interrupted call; start a new one")


def total_nbytes(states: Iterable[State]) -> int:
    """Bytes held by several states together; what they share counts once."""
    return sum({id(buffer): buffer.nbytes for state in states for buffer in state.buffers()}.values())


def _own_blocks(table: Any, entries: int, shared: int) -> int:
    """Copy the blocks of `table` that are shared (those before `shared`) and not full with `entries` entries. Returns
    how many are shared then."""
    first = entries // BLOCK_TOKENS
    if first >= shared:
        return shared
    blocks = table.blocks
    for i in range(first, shared):
        table.replace(i, copy_array(blocks[i]))
    return first


# Arrays of an op set on a device are its own kind, which copies under another name and has no read-only flag.


def copy_array(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return memory.copy(array)
    from ..ops.cuda_memory import copy

    return copy(array)


def _writeable(array: Any) -> bool:
    return bool(array.flags.writeable) if isinstance(array, np.ndarray) else True


def host_array(array: Any) -> npt.NDArray[Any]:
    """An array of a state in the host's memory: as it is if it is there, else a copy."""
    if isinstance(array, np.ndarray):
        return array
    from ..ops.cuda_memory import to_host

    return to_host(array)


def check_kv_dtype(kv_dtype: str, ops: ModuleType) -> None:
    """Raise StateError where the op set has no kernels for a state's keys and values."""
    if kv_dtype not in kv_dtypes(ops):
        raise StateError(
            f"state: its keys and values are {kv_dtype!r}, which this device does not read; expected a state of a "
            f"model loaded with kv_dtype {' or '.join(map(repr, kv_dtypes(ops)))}"
        )


def _moved(array: Any, home: Any) -> Any:
    """`array` where an op set computes; home: its `from_host`, None where that is the host."""
    return host_array(array) if home is None else home(host_array(array))
