"""What will the token after the next one be? The multi-token-prediction (MTP) layer guesses it from the hidden vector
of a token and from the token that follows it: one more attention layer, with K/V of its own. Embedding table and head
are the decoder's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ops.layout import row_bounds
from .choice import Choice
from .replay import Arrays, Replay
from .state import State
from .text import Array, Batch, Ints, TextModel
from .weights import MtpWeights

DRAFT_VOCABULARY = 32768  # rows of the head that drafts are chosen from, see `MtpModel.__init__`


class _MtpBatch(Batch):
    __slots__ = ()

    @property
    def tables(self) -> list[Any]:
        return [state.mtp for state in self.states]


class MtpModel:
    """The MTP layer of one model, on the op set of its decoder.

    An entry is what the layer remembers of a token: a key and a value. Rows of which no more than the entry is wanted
    end there; what follows is computed for the others, which get the same bits on an op set that is SPLIT_INVARIANT.
    """

    def __init__(self, text: TextModel, weights: MtpWeights, vocabulary: int = DRAFT_VOCABULARY):
        """vocabulary: drafts are chosen among so many first ids. A draft that misses costs a little speed and nothing
        else, and the ids of a byte-level BPE vocabulary are ordered by frequency, so the rest is not worth reading."""
        self.text, self.weights = text, weights
        self.head = text.ops.first_rows(text.weights.head, vocabulary)
        self.replay = Replay(text.ops)

    def read(self, hidden: Array, x: Array, positions: Ints, state: State, first: int) -> None:
        """The entries of tokens first .. first + T - 1 of a prompt. Where these do not continue those of the state,
        these are dropped. Raises StateError if memory runs out.

        hidden [T, H]: rows of these tokens before the final norm; x [T, H]: embeddings of the tokens after each (what
        the vision tower saw, for placeholders); positions int64 [T, 3] of the tokens.
        """
        state.reserve_mtp(first, len(x))
        batch = self._batch([state], [len(x)], self.text.rope(positions), prefill=True)
        self._layer(self._final_norm(hidden), x, batch, 0)
        state.mtp_length += len(x)

    def extend(
        self,
        hidden: Array,
        tokens: Sequence[Sequence[int]],
        states: Sequence[State],
        first: Sequence[int],
        wanted: int | None = None,
        *,
        head: bool = False,
    ) -> tuple[Array, Array | None]:
        """The same for B sequences of text one after another, a few rows each: hidden [T, H]; tokens: per sequence the
        ids after its rows; first: per sequence which token its first row is.

        Returns m [T, H]: what follows each of these ids, as a vector for `draft`; and its `logits`, None without
        `head`. Both of the last `wanted` of all rows only, where that is given.
        """
        counts = [len(ids) for ids in tokens]
        spans = []
        for state, token, n in zip(states, first, counts, strict=True):
            state.reserve_mtp(token, n)
            spans.append((token + state.rope_delta, n))
        ids = np.array([token for sequence in tokens for token in sequence], np.int64)
        batch = self._batch(list(states), counts, self.text.rope.text(spans))

        def run() -> Arrays:
            m = self._layer(self._final_norm(hidden), self.text.embed(ids), batch, wanted)
            return (m, self.logits(m)) if head else (m,)

        key = ("extend", len(ids), len(states), wanted, head)
        found = self.replay(key, len(ids), _inputs(hidden, ids, batch), run)
        for state, n in zip(states, counts, strict=True):
            state.mtp_length += n
        return found[0], found[1] if head else None

    def draft(self, m: Array, tokens: Sequence[int], states: Sequence[State], ahead: int) -> tuple[Array, Array]:
        """One draft further for each of B sequences: the entries of drafts, which do not last.

        m [B, H]: what the last entry of each became; tokens: what was drafted from it; ahead: how many entries of
        drafts lie before.
        Returns m [B, H] of these entries, and their `logits`.
        """
        spans = []
        for state in states:
            token = state.mtp_first + state.mtp_length
            state.reserve_mtp(token, ahead + 1)
            spans.append((token + ahead + state.rope_delta, 1))
        batch = self._batch(list(states), [1] * len(states), self.text.rope.text(spans), ahead=ahead)
        ids = np.array(tokens, np.int64)

        def run() -> tuple[Array, Array]:
            further = self._layer(m, self.text.embed(ids), batch)
            return further, self.logits(further)

        further, logits = self.replay(("draft", len(ids)), len(ids), _inputs(m, ids, batch), run)
        return further, logits

    def draft_at_once(
        self,
        hidden: Array,
        tokens: Sequence[int],
        state: State,
        first: int,
        choice: Choice,
        draws: Ints,
        depth: int,
        trace: Array | None = None,
        owed: tuple[Ints, Ints, Array] | None = None,
        *,
        chooses: bool = False,
    ) -> tuple[list[int], Arrays]:
        """`extend` for one sequence, and `depth` drafts: what `extend`, `logits`, the choice, `draft`, `logits`, ...
        give one by one, in one replay where the op set can. draws: random numbers for them, and one more.

        trace [L_delta, 1 + depth, config.delta_trace_width]: where given, `TextModel.step` follows in the same replay,
        with this trace and with the last of `tokens`, which comes next, and the drafts. owed: then also what
        `TextModel.write` has to do before, for a state whose rows have been counted.
        Returns the drafts, and what the step gives: hidden rows [1 + depth, H] and logits [1 + depth, vocab], or where
        it `chooses` int64 [1 + depth], the token after each row; without a trace (). Raises what the step does.
        """
        text, n = self.text, len(tokens)
        state.reserve_mtp(first, n + depth - 1)
        if trace is not None:
            if owed is None:
                state.check_intact("forward")
            state.reserve(state.length + 1 + depth)
            state.intact = owed is None
        # Rows 0 .. n - 1 belong to the entries that last, the n-th to the token that comes next, the others to drafts.
        cos, sin = text.rope.text([(first + state.rope_delta, n + 1 + depth)])
        entries, end = state.mtp_length, state.mtp_length + n
        # The tokens and the drafts, which are written into it, then where the step starts and each pass of the layer.
        numbers = np.array([*tokens, *(0,) * depth, state.length, entries, *range(end, end + depth - 1)], np.int64)

        def run() -> Arrays:
            ids, starts = numbers[: n + depth], numbers[n + depth :]

            def batch(first: int, rows: int, draft: int) -> Batch:
                at, start = slice(first, first + rows), slice(1 + draft, 2 + draft)
                return _MtpBatch([state], row_bounds(rows), [rows], starts[start], cos[at], sin[at], False)

            if owed is not None:
                text.write([state], *owed)
            m = self._layer(self._final_norm(hidden), text.embed(ids[:n]), batch(0, n, 0), 1)
            for i in range(depth):
                if i:
                    m = self._layer(m, text.embed(ids[n + i - 1 : n + i]), batch(n + i - 1, 1, i))
                choice.choose(text.ops, self.logits(m), draws[i : i + 1], ids[n + i : n + i + 1])
            if trace is None:
                return ()
            step = Batch([state], row_bounds(1 + depth), [1 + depth], starts[:1], cos[n:], sin[n:], False, trace)
            x = text.run_layers(text.embed(ids[n - 1 :]), step)
            return text.outcome(x, True, (choice, draws) if chooses else None)

        inputs = [hidden, numbers, cos, sin, draws, state.mtp]
        if trace is not None:
            inputs += (trace, state.kv, state.conv, state.delta)
        if owed is not None:
            inputs += owed[1:]
        key = ("at once", n, depth, choice, chooses, trace is None, 0 if owed is None else owed[2].shape[1])
        verified = self.replay(key, n + depth, inputs, run)
        state.mtp_length = end
        if trace is not None:
            state.intact = True
        return numbers[n : n + depth].tolist(), verified

    def _batch(
        self,
        states: list[State],
        counts: list[int],
        angles: tuple[Array, Array],
        *,
        ahead: int = 0,
        prefill: bool = False,
    ) -> Batch:
        starts = np.array([state.mtp_length + ahead for state in states], np.int64)
        return _MtpBatch(states, row_bounds(*counts), counts, starts, *angles, prefill)

    def _final_norm(self, hidden: Array) -> Array:
        return self.text.ops.rms_norm(hidden, self.text.weights.norm, self.text.config.rms_norm_eps)

    def _layer(self, h: Array, x: Array, batch: Batch, wanted: int | None = None) -> Array:
        """The entries of T rows, and m of the last `wanted` of them, None: of all.

        h [T, H]: vectors of tokens t after the final norm, or m where token t is a draft; x [T, H]: embeddings of
        tokens t + 1."""
        text, w = self.text, self.weights
        pairs = text.ops.rms_norm_pair(x, w.embedding_norm, h, w.hidden_norm, text.config.rms_norm_eps)
        y = text.ops.linear(pairs, w.fc)
        mixer: Any = w.layer.mixer
        if wanted == 0:
            text.attend(y, mixer, w.layer.input_norm, 0, batch)
            return y[:0]
        rows = None if wanted is None or wanted == len(x) else slice(len(x) - wanted, None)
        y = text.attention(y, mixer, w.layer.input_norm, 0, batch, rows)
        y = text.feed_forward(y, w.layer.ffn, w.layer.post_norm)
        return text.ops.rms_norm(y, w.norm, text.config.rms_norm_eps)

    def logits(self, m: Array) -> Array:
        """Draft logits of the first ids of the vocabulary, from rows m [n, H]."""
        return self.text.ops.linear(m, self.head)


def _inputs(rows: Array, ids: Ints, batch: Batch) -> list[Any]:
    return [rows, ids, batch.cos, batch.sin, batch.cu_seqlens, batch.starts, *batch.tables]
