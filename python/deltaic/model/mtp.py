"""What will the token after the next one be? The multi-token-prediction (MTP) layer guesses it from the hidden vector
of a token and from the token that follows it: one more attention layer, with K/V of its own. Embedding table and head
are the decoder's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ops.layout import row_bounds
from .replay import MAX_ROWS, Replay
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
    """The MTP layer of one model, on the op set of its decoder."""

    def __init__(self, text: TextModel, weights: MtpWeights, vocabulary: int = DRAFT_VOCABULARY):
        """vocabulary: drafts are chosen among so many first ids. A draft that misses costs a little speed and nothing
        else, and the ids of a byte-level BPE vocabulary are ordered by frequency, so the rest is not worth reading."""
        self.text, self.weights = text, weights
        self.head = text.ops.first_rows(text.weights.head, vocabulary)
        self._replay = Replay(text.ops) if hasattr(text.ops, "Tape") else None

    def read(self, hidden: Array, x: Array, positions: Ints, state: State, first: int) -> None:
        """The entries of tokens first .. first + T - 1 of a prompt. Where these do not continue those of the state,
        these are dropped. Raises StateError if memory runs out.

        hidden [T, H]: rows of these tokens before the final norm; x [T, H]: embeddings of the tokens after each (what
        the vision tower saw, for placeholders); positions int64 [T, 3] of the tokens.
        """
        counts = [len(x)]
        state.reserve_mtp(first, len(x))
        batch = self._batch([state], counts, self.text.rope(positions), prefill=True)
        self._layer(self._final_norm(hidden), x, batch)
        state.mtp_length += len(x)

    def extend(
        self, hidden: Array, tokens: Sequence[Sequence[int]], states: Sequence[State], first: Sequence[int]
    ) -> Array:
        """The same for B sequences of text one after another, a few rows each: hidden [T, H]; tokens: per sequence the
        ids after its rows; first: per sequence which token its first row is.

        Returns m [T, H]: what follows each of these ids, as a vector for `logits` and for `draft`.
        """
        counts = [len(ids) for ids in tokens]
        spans = []
        for state, token, n in zip(states, first, counts, strict=True):
            state.reserve_mtp(token, n)
            spans.append((token + state.rope_delta, n))
        ids = [token for sequence in tokens for token in sequence]
        batch = self._batch(list(states), counts, self.text.rope.text(spans))
        m = self._replayed(hidden, ids, batch, drafts=False)
        for state, n in zip(states, counts, strict=True):
            state.mtp_length += n
        return m

    def draft(self, m: Array, tokens: Sequence[int], states: Sequence[State], ahead: int) -> Array:
        """One draft further for each of B sequences: the entries of drafts, which do not last.

        m [B, H]: what the last entry of each became; tokens: what was drafted from it; ahead: how many entries of
        drafts lie before.
        Returns m [B, H] of these entries.
        """
        spans = []
        for state in states:
            token = state.mtp_first + state.mtp_length
            state.reserve_mtp(token, ahead + 1)
            spans.append((token + ahead + state.rope_delta, 1))
        batch = self._batch(list(states), [1] * len(states), self.text.rope.text(spans), ahead=ahead)
        return self._replayed(m, tokens, batch, drafts=True)

    def draft_greedily(
        self, hidden: Array, tokens: Sequence[int], state: State, first: int, depth: int, limit: int
    ) -> list[int]:
        """`extend` for one sequence, and `depth` drafts, each the most probable of the first `limit` ids: what
        `extend`, `logits`, the choice, `draft`, `logits`, ... give one by one, in one replay where the op set can."""
        n, limit = len(tokens), min(limit, self.head.shape[0])
        state.reserve_mtp(first, n + depth - 1)
        cos, sin = self.text.rope.text([(first + state.rope_delta, n + depth - 1)])
        starts = np.arange(state.mtp_length + n - 1, state.mtp_length + n - 1 + depth)
        starts[0] = state.mtp_length
        ids, bounds, one = np.array(tokens, np.int64), row_bounds(n), row_bounds(1)

        def run() -> Ints:
            chosen = np.empty(depth, np.int64)
            batch = _MtpBatch([state], bounds, [n], starts[:1], cos[:n], sin[:n], False)
            m = self._layer(self._final_norm(hidden), self.text.embed(ids), batch)[n - 1 :]
            for i in range(depth):
                if i:
                    row = slice(n + i - 1, n + i)
                    batch = _MtpBatch([state], one, [1], starts[i : i + 1], cos[row], sin[row], False)
                    m = self._layer(m, self.text.embed(chosen[i - 1 : i]), batch)
                self.text.ops.argmax(self.logits(m), limit=limit, tokens=chosen[i : i + 1])
            return chosen

        if self._replay is None or n > MAX_ROWS:
            chosen = run()
        else:
            key = ("greedily", n, depth, limit)
            chosen = self._replay(key, [hidden, ids, cos, sin, starts, state.mtp], run)
        state.mtp_length += n
        return chosen.tolist()

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

    def _replayed(self, rows: Array, tokens: Sequence[int], batch: Batch, *, drafts: bool) -> Array:
        """The layer on rows [T, H] and the ids after them; drafts: the rows are m, not hidden rows."""
        ids = np.array(tokens, np.int64)

        def run() -> Array:
            h = rows if drafts else self._final_norm(rows)
            return self._layer(h, self.text.embed(ids), batch)

        if self._replay is None or len(ids) > MAX_ROWS:
            return run()
        inputs = [rows, ids, batch.cos, batch.sin, batch.cu_seqlens, batch.starts, *batch.tables]
        return self._replay((len(ids), len(batch.states), drafts), inputs, run)

    def _final_norm(self, hidden: Array) -> Array:
        return self.text.ops.rms_norm(hidden, self.text.weights.norm, self.text.config.rms_norm_eps)

    def _layer(self, h: Array, x: Array, batch: Batch) -> Array:
        """h [T, H]: vectors of tokens t after the final norm, or m where token t is a draft; x [T, H]: embeddings of
        tokens t + 1."""
        text, w = self.text, self.weights
        pairs = text.ops.rms_norm_pair(x, w.embedding_norm, h, w.hidden_norm, text.config.rms_norm_eps)
        y = text.ops.linear(pairs, w.fc)
        y = text.attention(y, w.layer.mixer, w.layer.input_norm, 0, batch)  # type: ignore[arg-type]
        y = text.feed_forward(y, w.layer.ffn, w.layer.post_norm)
        return text.ops.rms_norm(y, w.norm, text.config.rms_norm_eps)

    def logits(self, m: Array) -> Array:
        """Draft logits of the first ids of the vocabulary, from rows m [n, H]."""
        return self.text.ops.linear(m, self.head)
