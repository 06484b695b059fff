"""What will the token after the next one be? The multi-token-prediction (MTP) layer guesses it from the hidden vector
of a token and from the token that follows it: one more attention layer, with K/V of its own. Embedding table and head
are the decoder's."""

from __future__ import annotations

from typing import Any

import numpy as np

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
        self._concatenate = getattr(text.ops, "concatenate", np.concatenate)

    def final_norm(self, hidden: Array) -> Array:
        """Hidden rows [n, H] as `TextModel.forward` returns them -> h [n, H], which `forward` takes."""
        return self.text.ops.rms_norm(hidden, self.text.weights.norm, self.text.config.rms_norm_eps)

    def forward(
        self,
        h: Array,
        x: Array,
        positions: Ints,
        states: list[State],
        cu_seqlens: Ints,
        *,
        first: Ints | None = None,
        ahead: int | None = None,
        prefill: bool = False,
    ) -> Array:
        """One row per entry, for B sequences one after another; row i of sequence b is entry t = first[b] + i.

        h [T, H]: vectors of tokens t, after the final norm, or m where token t itself is a draft; x [T, H]: embeddings
        of tokens t + 1 (what the vision tower saw, for placeholders); positions int64 [T, 3] of tokens t.
        first int64 [B]: where it does not continue a state's entries, they are dropped; None: it does.
        ahead: None for entries that last; for entries of drafts, which will be overwritten, how many others of these
        lie before.
        Returns m [T, H]: what follows token t + 1, as a vector for `logits` and as h of the next draft.
        """
        ops, w, eps = self.text.ops, self.weights, self.text.config.rms_norm_eps
        counts = np.diff(cu_seqlens)
        for b, state in enumerate(states):
            token = state.mtp_first + state.mtp_length if first is None else int(first[b])
            state.reserve_mtp(token, (ahead or 0) + int(counts[b]))
        starts = np.array([state.mtp_length + (ahead or 0) for state in states], np.int64)
        cos, sin = self.text.rope(positions)
        batch = _MtpBatch(states, cu_seqlens, counts.tolist(), starts, cos, sin, prefill)
        e = ops.rms_norm(x, w.embedding_norm, eps)
        r = ops.rms_norm(h, w.hidden_norm, eps)
        pairs = self._concatenate([e, r], axis=1)
        if self._replay is None or prefill or not len(states) <= len(x) <= MAX_ROWS:
            m = self._layer(pairs, batch)
        else:
            inputs = [pairs, cos, sin, cu_seqlens, starts, *batch.tables]
            m = self._replay((len(x), len(states)), inputs, lambda: self._layer(pairs, batch))
        if ahead is None:
            for state, n in zip(states, batch.counts, strict=True):
                state.mtp_length += n
        return m

    def _layer(self, pairs: Array, batch: Batch) -> Array:
        text, w = self.text, self.weights
        y = text.ops.linear(pairs, w.fc)
        y = text.attention(y, w.layer.mixer, w.layer.input_norm, 0, batch)  # type: ignore[arg-type]
        y = text.feed_forward(y, w.layer.ffn, w.layer.post_norm)
        return text.ops.rms_norm(y, w.norm, text.config.rms_norm_eps)

    def logits(self, m: Array) -> Array:
        """Draft logits of the first ids of the vocabulary, from rows m [n, H]."""
        return self.text.ops.linear(m, self.head)
