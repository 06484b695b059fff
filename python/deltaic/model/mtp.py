"""What will the token after the next one be? The multi-token-prediction (MTP) layer guesses it from the hidden vector
of a token and from the token that follows it: one more attention layer, with K/V of its own. Embedding table and head
are the decoder's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ops.layout import row_bounds
from .choice import Choosing
from .replay import Arrays, Replay
from .state import State
from .text import Array, Batch, Ints, TextModel
from .weights import MtpWeights

DRAFT_VOCABULARY = 32768  # rows of the head that drafts are chosen from, see `MtpModel.__init__`


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
        self.replay: Replay = text.replay

    def read(self, hidden: Array, x: Array, positions: Ints, state: State, first: int) -> None:
        """The entries of tokens first .. first + T - 1 of a prompt. Where these do not continue those of the state,
        these are dropped. Raises StateError if memory runs out.

        hidden [T, H]: rows of these tokens before the final norm; x [T, H]: embeddings of the tokens after each (what
        the vision tower saw, for placeholders); positions int64 [T, 3] of the tokens.
        """
        state.reserve_mtp(first, len(x))
        angles, starts = self.text.rope(positions), np.array([state.mtp_length], np.int64)
        batch = Batch([], [], [state.mtp], row_bounds(len(x)), starts, *angles, prefill=True)
        self._layer(self._final_norm(hidden), x, batch, 0)
        state.mtp_length += len(x)

    def extend(
        self,
        hidden: Array,
        tokens: Sequence[Sequence[int]],
        states: Sequence[State],
        first: Sequence[int],
        wanted: int | None = None,
    ) -> Array:
        """The same for B sequences of text one after another, a few rows each: hidden [T, H]; tokens: per sequence the
        ids after its rows; first: per sequence which token its first row is.

        Returns m [T, H]: what follows each of these ids, as a vector for `draft` and for `logits`; of the last `wanted`
        of all rows only, where that is given.
        """
        counts = [len(ids) for ids in tokens]
        spans = []
        for state, token, n in zip(states, first, counts, strict=True):
            state.reserve_mtp(token, n)
            spans.append((token + state.rope_delta, n))
        ids = np.array([token for sequence in tokens for token in sequence], np.int64)
        starts = np.array([state.mtp_length for state in states], np.int64)
        inputs = [hidden, ids, *self.text.rope.text(spans), row_bounds(*counts), starts, [s.mtp for s in states]]

        def run(
            hidden: Array, ids: Ints, cos: Array, sin: Array, bounds: Ints, starts: Ints, tables: list[Any]
        ) -> Arrays:
            batch = Batch([], [], tables, bounds, starts, cos, sin)
            return (self._layer(self._final_norm(hidden), self.text.embed(ids), batch, wanted),)

        (m,) = self.replay(("extend", len(ids), len(states), wanted), len(ids), inputs, run)
        for state, n in zip(states, counts, strict=True):
            state.mtp_length += n
        return m

    def draft(self, m: Array, states: Sequence[State], choosing: Choosing, depth: int) -> tuple[list[list[int]], Array]:
        """`depth` drafts for each of B sequences, in one replay where the op set can; their entries do not last.

        m [B, H]: what the last entry of each became. choosing: for depth * B rows, those of the first drafts first.
        What a draft means to the penalties of those after it does not count here.
        Returns the drafts of each, and m of the last entries. Raises StateError if memory runs out.
        """
        text, B = self.text, len(states)
        firsts = [state.mtp_first + state.mtp_length for state in states]
        for state, first in zip(states, firsts, strict=True):
            state.reserve_mtp(first, depth - 1)
        passes = range(depth - 1)
        spans = [(first + i + s.rope_delta, 1) for i in passes for s, first in zip(states, firsts, strict=True)]
        cos, sin = text.rope.text(spans or [(0, 0)])
        choice, (said, seen) = choosing.choice, choosing.take()
        last, bounds = depth * B, row_bounds(*(1,) * B)
        # room for the drafts; where each pass starts
        numbers = np.array([*(0,) * last, *(s.mtp_length + i for i in passes for s in states)], np.int64)

        def run(
            m: Array, numbers: Ints, cos: Array, sin: Array, draws: Ints, said: Ints, seen: list[Any], mtp: list[Any]
        ) -> Arrays:
            if seen:
                text.ops.count_tokens(said, seen)
            for i in range(depth):
                row, before = slice(i * B, i * B + B), slice(i * B - B, i * B)
                if i:
                    batch = Batch([], [], mtp, bounds, numbers[last:][before], cos[before], sin[before])
                    m = self._layer(m, text.embed(numbers[before]), batch)
                choice.choose(text.ops, self.logits(m), draws[row], numbers[row], seen, bounds, bounds[:B])
            return numbers[:last], m

        inputs = [m, numbers, cos, sin, choosing.draws, said, seen, [state.mtp for state in states]]
        ids, m = self.replay(("draft", B, depth, choice, said.shape), B, inputs, run)
        return ids.reshape(depth, B).T.tolist(), m

    def draft_at_once(
        self,
        hidden: Array,
        tokens: Sequence[int],
        state: State,
        first: int,
        choosing: Choosing,
        depth: int,
        trace: Array | None = None,
        owed: tuple[Ints, Ints, Array] | None = None,
        *,
        chooses: bool = False,
    ) -> tuple[list[int], Array | None, Array | None, list[int] | None]:
        """`extend` for one sequence, and then `draft`, in one replay where the op set can; here a draft counts for the
        penalties of those after it. choosing: for 1 + depth rows, which is how many a step has.

        trace [L_delta, 1 + depth, config.delta_trace_width]: where given, `TextModel.step` follows in the same replay,
        with this trace and with the last of `tokens`, which comes next, and the drafts. owed: then also what
        `TextModel.write` has to do before, for a state whose rows have been counted.
        Returns the drafts, and what the step gives: hidden rows [1 + depth, H], and logits [1 + depth, vocab] or, where
        it `chooses`, the token after each row; None without a trace. Raises what the step does.
        """
        text, n = self.text, len(tokens)
        state.reserve_mtp(first, n + depth - 1)
        if chooses and text.screen_wanted:
            text.screen_head()
        if trace is not None:
            if owed is None:
                state.check_intact("forward")
            state.reserve(state.length + 1 + depth)
            state.intact = owed is None
        # Rows 0 .. n - 1 belong to the entries that last, the n-th to the token that comes next, the others to drafts.
        cos, sin = text.rope.text([(first + state.rope_delta, n + 1 + depth)])
        entries, end = state.mtp_length, state.mtp_length + n
        # The tokens, room for the drafts and for what is chosen after each row; where the step and each pass start.
        choice, (said, seen) = choosing.choice, choosing.take()
        last, places = n + depth, n + 2 * depth + 1
        starts = (state.length, entries, *range(end, end + depth - 1))
        numbers = np.array([*tokens, *(0,) * (places - n), *starts], np.int64)

        def run(
            hidden: Array, numbers: Ints, cos: Array, sin: Array, draws: Ints, said: Ints, seen: list[Any],
            mtp: list[Any], traces: list[Any], conv: list[Any], delta: list[Any], tables: list[Any],
            counts: Ints | None, owed_trace: list[Any],
        ) -> Arrays:  # fmt: skip
            ids, starts = numbers[:last], numbers[places:]
            fed = ids[n - 1 :]  # in the step

            def batch(first: int, rows: int, draft: int) -> Batch:
                at, start = slice(first, first + rows), slice(1 + draft, 2 + draft)
                return Batch([], [], mtp, row_bounds(rows), starts[start], cos[at], sin[at])

            if owed_bounds is not None:
                assert counts is not None
                text.write_arrays(conv, delta, owed_bounds, counts, owed_trace[0])
            if seen:
                text.ops.count_tokens(said, seen)
            m = self._layer(self._final_norm(hidden), text.embed(ids[:n]), batch(0, n, 0), 1)
            for i in range(depth):
                if i:
                    m = self._layer(m, text.embed(ids[n + i - 1 : n + i]), batch(n + i - 1, 1, i))
                rows, draft = row_bounds(1 + i), ids[n + i : n + i + 1]
                choice.choose(text.ops, self.logits(m), draws[i : i + 1], draft, seen, rows, fed[: 1 + i])
            if not traces:
                return (ids[n:],)
            step = Batch(conv, delta, tables, row_bounds(1 + depth), starts[:1], cos[n:], sin[n:], False, traces[0])
            x = text.run_layers(text.embed(fed), step)
            if not chooses:
                return ids[n:], x, text.logits(x)
            text.choose(x, choice, draws, numbers[last:places], seen, row_bounds(1 + depth), fed)
            return numbers[n:places], x

        inputs: list[Any] = [hidden, numbers, cos, sin, choosing.draws, said, seen, [state.mtp]]
        inputs += ([], [], [], []) if trace is None else ([trace], [state.conv], [state.delta], [state.kv])
        owed_bounds, owed_rows = None, 0
        if owed is None:
            inputs += (None, [])
        else:
            owed_bounds, owed_rows = owed[0], owed[2].shape[1]
            inputs += (owed[1], [owed[2]])
        key = ("at once", n, depth, choice, said.shape, chooses, trace is None, owed_rows)
        found = self.replay(key, last, inputs, run)
        made: list[int] = found[0].tolist()
        state.mtp_length = end
        if trace is None:
            return made, None, None, None
        state.intact = True
        if chooses:
            return made[:depth], found[1], None, made[depth:]
        return made, found[1], found[2], None

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
