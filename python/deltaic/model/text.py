"""How do token vectors become logits? The Qwen3.5 decoder: layers in order, each a token mixer and a feed-forward part
on a residual stream. All arithmetic is in the op set; a layer takes four or five calls, however many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, StateError
from ..ops.layout import row_bounds
from .choice import Choice, Choosing
from .config import TextConfig
from .replay import Arrays, Replay
from .rope import TextRope
from .state import State
from .weights import AttentionMixer, DeltaMixer, DenseFFN, SparseFFN, TextWeights

Array = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class Mark:
    """A place inside a forward pass of one sequence, after its first `rows` rows: conv and delta are filled with what
    those of its state were there."""

    rows: int
    conv: Any
    delta: Any


@dataclass(slots=True)
class Batch:
    """The rows of one forward pass: B sequences one after another, sequence b from row cu_seqlens[b] on."""

    conv: list[Any]  # arrays of the states [L_delta, 3, C], by sequence
    delta: list[Any]  # the same [L_delta, Hv, Dk, Dv]
    tables: list[Any]  # K/V of the attention layers, by sequence
    cu_seqlens: Ints  # [B+1]
    starts: Ints  # [B] tokens already consumed by each sequence
    cos: Array  # [T, R/2]
    sin: Array  # [T, R/2]
    prefill: bool = False
    trace: Array | None = None  # [L_delta, T, trace width]: where given, conv and delta of the states are not written
    marks: Sequence[Mark] = ()  # rising; only of a single sequence


class TextModel:
    """The decoder of one model on one op set (`ops`: deltaic.ops.reference, deltaic.ops.cpu, ...)."""

    def __init__(self, config: TextConfig, weights: TextWeights, ops: ModuleType):
        self.config, self.weights, self.ops = config, weights, ops
        self.rope = TextRope(config.rope)
        self.replay = Replay(ops)
        self.screen: Any = None
        self.screen_wanted = False  # it is made when a step first chooses: the first token does not wait for it

    def screen_head(self) -> None:
        """From now on `choose` reads only those rows of the head that may matter, where the op set can tell."""
        self.screen, self.screen_wanted = self.ops.screen(self.weights.head), False

    def embed(self, ids: Ints) -> Array:
        """Token ids int64 [T] -> vectors [T, H]; an id outside the vocabulary is an ArgumentError of the op set."""
        if isinstance(ids, np.ndarray):  # not where a graph is captured
            ids = np.ascontiguousarray(ids, np.int64)
        return self.ops.embed(ids, self.weights.embed)

    def forward(
        self,
        x: Array,
        positions: Ints,
        states: list[State],
        cu_seqlens: Ints,
        *,
        prefill: bool = False,
        marks: Sequence[Mark] = (),
    ) -> Array:
        """Consume T tokens of B sequences and advance their states.

        x [T, H]; positions int64 [T, 3] (temporal, height, width); states: B different ones; cu_seqlens int64 [B+1].
        prefill: the rows are read, not generated; on an op set that is SPLIT_INVARIANT, what they get then does not
        depend on where a prompt is cut. marks: rising places between the rows of a single sequence, see `Mark`.
        Returns the residual stream [T, H] after the last layer, before the final norm (`logits` applies it).
        Raises ArgumentError or StateError if these do not fit together, ContextLengthError if a sequence outgrows the
        context; the states are then as they were.
        """
        T, bounds = x.shape[0], cu_seqlens.tolist()
        counts: list[int] = [end - begin for begin, end in pairwise(bounds)]
        if x.shape != (T, self.config.hidden_size) or positions.shape != (T, 3):
            raise ArgumentError(
                f"forward: x is {x.shape} and positions are {positions.shape}, "
                f"expected [T, {self.config.hidden_size}] and [T, 3]"
            )
        if len(bounds) != len(states) + 1 or bounds[0] != 0 or bounds[-1] != T or min(counts, default=0) < 0:
            raise ArgumentError(
                f"forward: cu_seqlens is {_short(cu_seqlens)}, expected {len(states) + 1} numbers rising from 0 to {T}"
            )
        places = [0, *(mark.rows for mark in marks), T]
        if marks and (len(states) != 1 or any(b <= a for a, b in pairwise(places))):
            raise ArgumentError(
                f"forward: marks are at {places[1:-1]}, expected rising ones inside one sequence of {T}"
            )
        starts = self.reserve(states, counts)
        conv, delta, tables = arrays_of(states)
        batch = Batch(conv, delta, tables, cu_seqlens, starts, *self.rope(positions), prefill, marks=marks)
        begin_writing(states)
        x = self.run_layers(x, batch)
        advance(states, counts)
        return x

    def step(
        self,
        tokens: Sequence[Sequence[int]],
        states: Sequence[State],
        trace: Array | None = None,
        *,
        head: bool = False,
        choosing: Choosing | None = None,
    ) -> tuple[Array, Array | None, list[int] | None]:
        """Feed B sequences the text tokens that come next, one or a few ids each: `forward` of rows that are decoded,
        replayed where the op set can. On an op set that is SPLIT_INVARIANT a row gets the same bits in any company.

        trace [L_delta, T, config.delta_trace_width]: where given it is filled, and the states stay where they are until
        `count` and `write` tell how many rows count. Dropping it instead leaves the states as they were: of their K/V
        only what lies beyond `length` is written.
        Returns what `forward` does; the `logits` of all rows, None without `head`; and the token that is chosen from
        each of these, None without `choosing`, which takes the place of the logits. Raises what `forward` does.
        """
        counts = [len(ids) for ids in tokens]
        angles = self.rope.text([(s.length + s.rope_delta, n) for s, n in zip(states, counts, strict=True)])
        starts, bounds = self.reserve(states, counts), row_bounds(*counts)
        ids = np.array([token for sequence in tokens for token in sequence], np.int64)
        T, numbers, choice = len(ids), ids, None
        of_choice: tuple[Any, ...] = ()
        if choosing is not None:
            if self.screen_wanted:
                self.screen_head()
            choice, of_choice = choosing.choice, (choosing.draws, *choosing.take())
            numbers = np.concatenate([ids, ids])  # what is chosen comes in the place of the second
        inputs = [numbers, *angles, bounds, starts, *arrays_of(states), [] if trace is None else [trace], *of_choice]
        key = (T, len(states), trace is None, head, choice, of_choice[1].shape if of_choice else None)

        def run(
            numbers: Ints, cos: Array, sin: Array, bounds: Ints, starts: Ints, conv: list[Any], delta: list[Any],
            tables: list[Any], traces: list[Any], *of_choice: Any,
        ) -> Arrays:  # fmt: skip
            batch = Batch(conv, delta, tables, bounds, starts, cos, sin, False, traces[0] if traces else None)
            if choice is None:
                x = self.run_layers(self.embed(numbers), batch)
                return (x, self.logits(x)) if head else (x,)
            ids, chosen, (draws, said, seen) = numbers[:T], numbers[T:], of_choice
            if seen:
                self.ops.count_tokens(said, seen)
            x = self.run_layers(self.embed(ids), batch)
            self.choose(x, choice, draws, chosen, seen, bounds, ids)
            return x, chosen

        if trace is None:
            begin_writing(states)
        found = self.replay(key, T, inputs, run)
        if trace is None:
            advance(states, counts)
        if choice is not None:
            return found[0], None, found[1].tolist()
        return found[0], found[1] if head else None, None

    def count(self, states: Sequence[State], counts: Sequence[int]) -> None:
        """Each of the states that a `step` with a trace has seen has got its first counts[b] rows; it is half-written
        until `write`, with the same, has followed."""
        for state, n in zip(states, counts, strict=True):
            state.reserve(state.length + n)  # a fork may have come in between
        for state, n in zip(states, counts, strict=True):
            state.intact = False
            state.length += n

    def write(self, states: Sequence[State], cu_seqlens: Ints, counts: Ints, trace: Array) -> None:
        """What is left to do after `count`, an operator; who calls it marks the states as intact. counts int64 [B]."""
        conv, delta, _ = arrays_of(states)
        self.write_arrays(conv, delta, cu_seqlens, counts, trace)

    def write_arrays(self, conv: list[Any], delta: list[Any], cu_seqlens: Ints, counts: Ints, trace: Array) -> None:
        """`write` on the arrays of the states."""
        self.ops.gated_delta_net_commit(
            trace,
            num_k_heads=self.config.linear_num_key_heads,
            cu_seqlens=cu_seqlens,
            counts=counts,
            conv_states=conv,
            states=delta,
        )

    def run_layers(self, x: Array, batch: Batch) -> Array:
        """The arithmetic of `forward`: x [T, H] through all layers; the contents of the states change."""
        delta_layer = attention_layer = 0
        for layer in self.weights.layers:
            if isinstance(layer.mixer, DeltaMixer):
                x = self._delta(x, layer.mixer, layer.input_norm, delta_layer, batch)
                delta_layer += 1
            else:
                x = self.attention(x, layer.mixer, layer.input_norm, attention_layer, batch)
                attention_layer += 1
            x = self.feed_forward(x, layer.ffn, layer.post_norm)
        return x

    def logits(self, hidden: Array) -> Array:
        """[n, H] as returned by `forward` -> logits [n, vocab]."""
        w = self.weights
        return self.ops.linear(hidden, w.head, norm=w.norm, eps=self.config.rms_norm_eps)

    def choose(
        self, hidden: Array, choice: Choice, draws: Ints, tokens: Ints, seen: list[Any], cu_seqlens: Ints, fed: Ints
    ) -> None:
        """Fill tokens [n] with what is chosen from the `logits` of hidden rows; the rest: see `Choice.choose`."""
        if self.screen is None or not choice.reach:
            logits = self.logits(hidden)
        else:
            norm, eps = self.weights.norm, self.config.rms_norm_eps
            logits = choice.top_logits(self.ops, hidden, self.screen, norm, eps, seen, cu_seqlens, fed)
        choice.choose(self.ops, logits, draws, tokens, seen, cu_seqlens, fed)

    def _delta(self, x: Array, m: DeltaMixer, norm: Array, i: int, batch: Batch) -> Array:
        ops, c = self.ops, self.config
        proj = ops.linear(x, m.in_proj, norm=norm, eps=c.rms_norm_eps)
        conv_states, states = [conv[i] for conv in batch.conv], [delta[i] for delta in batch.delta]

        def mixed(rows: Array, cu_seqlens: Ints) -> Array:
            return ops.gated_delta_net(
                rows,
                m.conv_weight,
                m.A_log,
                m.dt_bias,
                m.norm,
                eps=c.rms_norm_eps,
                num_k_heads=c.linear_num_key_heads,
                head_k_dim=c.linear_key_head_dim,
                head_v_dim=c.linear_value_head_dim,
                cu_seqlens=cu_seqlens,
                conv_states=conv_states,
                states=states,
                **({} if batch.trace is None else {"trace": batch.trace[i]}),
            )

        if not batch.marks:
            return ops.linear(mixed(proj, batch.cu_seqlens), m.out_proj, residual=x)
        parts, first = [], 0
        for mark in batch.marks:
            parts.append(mixed(proj[first : mark.rows], row_bounds(mark.rows - first)))
            mark.conv[i], mark.delta[i] = conv_states[0], states[0]
            first = mark.rows
        y = np.concatenate([*parts, mixed(proj[first:], row_bounds(len(proj) - first))])
        return ops.linear(y, m.out_proj, residual=x)

    def attention(
        self, x: Array, m: AttentionMixer, norm: Array, i: int, batch: Batch, rows: slice | None = None
    ) -> Array:
        """An attention layer without its feed-forward part. rows: those that are wanted of the output; None: all."""
        y = self.attend(x, m, norm, i, batch)
        if rows is not None:
            x, y = x[rows], y[rows]
        return self.ops.linear(y, m.o_proj, residual=x)

    def attend(self, x: Array, m: AttentionMixer, norm: Array, i: int, batch: Batch) -> Array:
        """The same up to its output projection: [T, Hq*D], and the keys and values are in the tables."""
        ops, c = self.ops, self.config
        proj = ops.linear(x, m.qkv_proj, norm=norm, eps=c.rms_norm_eps)
        return ops.gated_attention(
            proj,
            m.q_norm,
            m.k_norm,
            batch.cos,
            batch.sin,
            eps=c.rms_norm_eps,
            num_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads,
            layer=i,
            cu_seqlens=batch.cu_seqlens,
            starts=batch.starts,
            tables=batch.tables,
            prefill=batch.prefill,
        )

    def feed_forward(self, x: Array, f: DenseFFN | SparseFFN, norm: Array) -> Array:
        """x [T, H] plus what the feed-forward part makes of it."""
        ops, eps = self.ops, self.config.rms_norm_eps
        if isinstance(f, DenseFFN):
            return ops.linear(ops.swiglu(x, f.gate_up, norm=norm, eps=eps), f.down, residual=x)
        return ops.moe(
            x,
            f.router,
            f.gate_up,
            f.down,
            f.shared_gate_up,
            f.shared_down,
            f.shared_gate,
            top_k=self.config.num_experts_per_tok,
            norm=norm,
            eps=eps,
            residual=x,
        )

    def reserve(self, states: Sequence[State], counts: Sequence[int]) -> Ints:
        """Make room for so many more rows in each of the states, and return how many they have, int64 [B]. Raises
        StateError, ContextLengthError: see `forward`."""
        if len(states) > 1 and len({id(state) for state in states}) != len(states):
            raise StateError("forward: a state appears twice in one batch; give each sequence its own")
        for state, n in zip(states, counts, strict=True):
            state.check_intact("forward")
            state.reserve(state.length + n)
        return np.array([state.length for state in states], np.int64)


def arrays_of(states: Sequence[State]) -> tuple[list[Any], list[Any], list[Any]]:
    """conv, delta and K/V of each."""
    if len(states) == 1:  # the common case
        (state,) = states
        return [state.conv], [state.delta], [state.kv]
    return [state.conv for state in states], [state.delta for state in states], [state.kv for state in states]


def begin_writing(states: Sequence[State]) -> None:
    """From here to `advance` the states are half-written."""
    for state in states:
        state.intact = False


def advance(states: Sequence[State], counts: Sequence[int]) -> None:
    """The states have so many more rows each."""
    for state, n in zip(states, counts, strict=True):
        state.length += n
        state.intact = True


def _short(values: Any) -> str:
    text = np.array2string(np.asarray(values), threshold=6)
    return text if len(text) < 80 else text[:77] + "..."
