"""Which tokens may come next, and how many of them are worth verifying? Drafts of one sequence, from the text so far or
from the MTP layer, and the choice of how many: by the measured cost of a step and the acceptance seen so far.

A draft is accepted where it is the token that the sampler chooses from the model's own row, with the random number it
would have used anyway. Tokens are therefore those of plain decoding, one by one, greedy or sampled, whatever is drafted
and whenever; a draft d is accepted with its probability p(d), as rejection sampling accepts a one-hot draft.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..model.state import State
    from .runner import Drafting, Runner
    from .sampling import Sampler

MODES = ("auto", "mtp", "lookup", "off")
MTP_DEPTH = 4
LOOKUP_DEPTH = 8
MATCHES = (4, 2)  # lengths of the n-grams that are looked up, the longest that is found counts
LOOKUP_PLACES = 1 << 17
PENDING_ROWS = 32  # hidden rows that wait for the MTP layer at most

CARRIED_TRIALS = 3.0  # what the experience of the sequence before is worth
PRIOR, PRIOR_TRIALS = 0.6, 1.0  # the acceptance that is assumed at first, and how many trials that is worth
PROOF = 0.5  # hits at a place after which places behind it are tried
FORGET_TRIED, FORGET_IDLE = 0.93, 0.9975  # what remains of the evidence after a trial, after a step without one
FADE_STEPS = 16  # how often the latter is applied
ROW_GUESS = 0.1  # cost of one more row, in plain steps, where nothing has been measured
DRAFT_GUESS = 0.1  # the same for a draft of the MTP layer
SURE_SAMPLES = 3  # measurements that count
REFRESH = 16  # measurements after which estimates are made anew
MOST_RESTS = 16  # steps after which "auto" thinks again whether the MTP layer's drafts would pay
PLAIN_SAMPLE = 8  # while it rests, one step of so many is recorded
PLAIN_EVERY = 200  # steps with drafts after which a plain one is measured again
WORTHWHILE = 1.03  # drafts have to promise so many times the speed of plain steps


class Lookup:
    """Drafts from the text itself: what followed the last few tokens when they were there before. Needs no weights."""

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = list(ids)  # the text; who has more of it appends
        # n-gram -> index after its last place. By hash, so that memory is bounded; of two with one hash the later stays
        self._after: list[dict[int, int]] = [{} for _ in MATCHES]
        self._noted = list(MATCHES)  # for each: indexes before this one are noted

    def _find(self, i: int) -> int | None:
        """Index of the token that followed the last MATCHES[i] tokens when they were there last."""
        ids, n, after = self.ids, MATCHES[i], self._after[i]
        for end in range(self._noted[i], len(ids)):  # the n-gram before `end` has a continuation now
            after[hash(tuple(ids[end - n : end])) % LOOKUP_PLACES] = end
        self._noted[i] = max(self._noted[i], len(ids))
        place = after.get(hash(tuple(ids[-n:])) % LOOKUP_PLACES)
        return place if place is not None and ids[place - n : place] == ids[-n:] else None

    def find(self) -> tuple[int, int] | None:
        """(which of MATCHES, index of the token that followed), or None."""
        short = self._find(len(MATCHES) - 1)
        if short is None:  # then none of the longer ones was there either
            return None
        for i in range(len(MATCHES) - 1):
            place = self._find(i)
            if place is not None:
                return i, place
        return len(MATCHES) - 1, short

    def drafts(self, place: int, count: int) -> list[int]:
        """`count` tokens from `place` on; where the text ends, it is taken to go on with what was drafted."""
        drafts = self.ids[place : place + count]
        while len(drafts) < count:
            drafts.append(drafts[len(drafts) - (len(self.ids) - place)])
        return drafts


class Acceptance:
    """How often the drafts of one source are right, by their place among the drafts of a step. Old evidence fades, so
    that what was given up is tried again now and then."""

    def __init__(self, depth: int, before: Acceptance | None = None) -> None:
        """before: of an earlier sequence, which this one is taken to be like until it tells more itself."""
        self._hits, self._trials = [0.0] * depth, [0.0] * depth
        if before is not None:
            for i, trials in enumerate(before._trials):
                weight = min(1.0, CARRIED_TRIALS / trials) if trials else 0.0
                self._hits[i], self._trials[i] = weight * before._hits[i], weight * trials
        self._faded = 0  # up to which step of the sequence the evidence has faded
        self._expected: list[float] | None = None

    def record(self, drafted: int, accepted: int, step: int) -> None:
        """Of `drafted` drafts in a step of this number the first `accepted` were right; those after the first wrong one
        were not tried."""
        fade = FORGET_IDLE ** (step - self._faded - 1)
        self._faded, self._expected = step, None
        tried = min(accepted + 1, drafted)
        hits, trials = self._hits, self._trials
        for i in range(tried):
            keep = FORGET_TRIED * fade
            hits[i] = keep * hits[i] + (i < accepted)
            trials[i] = keep * trials[i] + 1
        for i in range(tried, len(trials)):
            hits[i] *= FORGET_IDLE * fade
            trials[i] *= FORGET_IDLE * fade

    def expected(self, step: int) -> list[float]:
        """Tokens that a step of this number is expected to give with 1, 2, ... drafts; of more than one as far as some
        were right."""
        if step - self._faded >= FADE_STEPS:
            keep = FORGET_IDLE ** (step - self._faded)
            self._hits, self._trials = [keep * n for n in self._hits], [keep * n for n in self._trials]
            self._faded, self._expected = step, None
        if self._expected is None:
            tokens, run, rate, self._expected = 1.0, 1.0, PRIOR, []
            proved = sum(1 for _ in takewhile(lambda hits: hits > PROOF, self._hits))
            for hits, trials in zip(self._hits[: 1 + 2 * proved], self._trials, strict=False):
                # a place is taken to be like the one before
                rate = (hits + PRIOR_TRIALS * rate) / (trials + PRIOR_TRIALS)
                run *= rate
                tokens += run
                self._expected.append(tokens)
        return self._expected


class Costs:
    """Seconds that steps and drafts take on this machine, by the number of rows. One for all sequences of a model."""

    def __init__(self) -> None:
        plain = _Average()
        self._steps: dict[int, _Average] = {1: plain}
        self._drafts: dict[bool, dict[int, _Average]] = {False: {}, True: {}}
        self._since_plain = 0
        self._records = 0
        self._estimates: dict[tuple[str, int], float] = {}  # as of not many records ago

    def record_step(self, rows: int, seconds: float) -> None:
        """A forward pass of `rows` rows with logits and commit."""
        self._record(self._steps, rows, seconds)
        self._since_plain = 0 if rows == 1 else self._since_plain + 1

    def record_draft(self, depth: int, seconds: float, *, greedy: bool = False) -> None:
        """`depth` drafts of the MTP layer. greedy: in one replay (`Runner.draft`), which is a cost of its own."""
        self._record(self._drafts[greedy], depth, seconds)

    def _record(self, measured: dict[int, _Average], n: int, seconds: float) -> None:
        average = measured.get(n)
        if average is None:
            average = measured[n] = _Average()
        average.add(seconds)
        self._records += 1
        if self._records % REFRESH == 0 or not average.settled:
            self._estimates.clear()

    @property
    def known(self) -> bool:
        """Whether a plain step has been measured, and not too long ago: there is something to compare with."""
        return self._steps[1].sure and self._since_plain < PLAIN_EVERY

    def step(self, rows: int) -> float:
        """Seconds of a step with `rows` rows."""
        found = self._estimates.get(("step", rows))
        if found is None:
            plain = self._steps[1].value
            found = max(plain, self._estimate(self._steps, rows, ROW_GUESS * plain))
            self._estimates["step", rows] = found
        return found

    def draft(self, depth: int, *, greedy: bool = False) -> float:
        """Seconds of `depth` drafts."""
        key = ("greedy" if greedy else "draft", depth)
        found = self._estimates.get(key)
        if found is None:
            measured, guess = self._drafts[greedy], DRAFT_GUESS * self._steps[1].value
            if any(average.sure for average in measured.values()):
                slope = min(a.value / d for d, a in measured.items() if a.sure)
                found = self._estimate(measured, depth, slope)
            else:
                found = min([depth * guess, *(a.value for d, a in measured.items() if d == depth)])
            self._estimates[key] = found
        return found

    def can_pay(self, *, greedy: bool) -> bool:
        """Whether drafts of the MTP layer, if all of them were right, would be faster than plain steps: not so for a
        model whose steps are all arithmetic, as very small ones' are."""
        if not self._steps[1].sure or not any(average.sure for average in self._drafts[greedy].values()):
            return True
        plain = WORTHWHILE / self._steps[1].value
        depths = range(1, MTP_DEPTH + 1)
        return any((1 + d) / (self.step(1 + d) + self.draft(d, greedy=greedy)) > plain for d in depths)

    @staticmethod
    def _estimate(measured: dict[int, _Average], n: int, slope: float) -> float:
        """What was measured for `n`; as long as that is too little, no more than what follows from its neighbours, so
        that one slow run does not end the matter."""
        if n in measured and measured[n].sure:
            return measured[n].value
        nearest = min((m for m in measured if measured[m].sure), key=lambda m: (abs(m - n), m))
        guess = max(measured[nearest].value + (n - nearest) * slope, slope)
        return min(guess, measured[n].value) if n in measured else guess


class _Average:
    """A running average that one slow sample does not move far. The first samples also warm caches and are recorded on
    tapes: the least of them counts."""

    __slots__ = ("samples", "value")

    def __init__(self) -> None:
        self.value, self.samples = 0.0, 0

    def add(self, x: float) -> None:
        self.samples += 1
        if self.samples <= SURE_SAMPLES:
            self.value = x if self.samples == 1 else min(self.value, x)
        else:
            self.value += (min(x, 1.5 * self.value) - self.value) / 8

    @property
    def sure(self) -> bool:
        return self.samples >= SURE_SAMPLES

    @property
    def settled(self) -> bool:
        """Whether one more sample hardly changes it."""
        return self.samples > 4 * SURE_SAMPLES


class Speculator:
    """Drafts for one sequence.

    drafted, accepted  counts of drafts so far
    depth              a fixed number of drafts per step instead of the measured choice (for tests and benchmarks)
    may_rest           whether there may be steps without drafts though there are some
    """

    def __init__(self, runner: Runner, sampler: Sampler, prompt_ids: Iterable[int], mode: str) -> None:
        """mode: one of MODES; "mtp" and "auto" use the runner's MTP layer, "auto" only where there is one."""
        self._runner = runner
        self._sampler = sampler
        self._mtp = runner.mtp is not None and mode in ("auto", "mtp")
        self._lookup = Lookup(prompt_ids) if mode in ("auto", "lookup") else None
        self.may_rest = mode == "auto"
        self._costs = runner.costs
        before: Sequence[Acceptance | None] = runner.acceptances or [None] * (1 + len(MATCHES))
        depths = [MTP_DEPTH, *(LOOKUP_DEPTH for _ in MATCHES)]
        self._sources = [Acceptance(depth, of) for depth, of in zip(depths, before, strict=True)]
        self.greedy = sampler is not None and sampler.greedy_limit is not None
        self._chosen: int | None = None  # index into _sources
        self._step = 0  # how many have been recorded
        self._rest = self._rests = 0  # how many steps remain, and how many there were, in which nothing is chosen anew
        self._offered = 0
        self._match: tuple[int, int] | None = None
        self._pending: list[Any] = []  # hidden rows that the MTP layer has not seen
        self._tokens: list[int] = []  # the token after each of them
        self.depth: int | None = runner.fixed_depth
        self.drafted = 0
        self.accepted = 0

    @property
    def uses_mtp(self) -> bool:
        """Whether the MTP layer's entries have to be kept up to date."""
        if self._mtp and self.may_rest and self.depth is None and not self._costs.can_pay(greedy=self.greedy):
            self._mtp, self._pending, self._tokens = False, [], []
        return self._mtp

    def observe(self, hidden: Any, tokens: list[int]) -> None:
        """hidden [n, H] (before the final norm): rows of the last n tokens of the state; tokens: what follows each."""
        if self._lookup is not None:
            self._lookup.ids += tokens
        if self._mtp and tokens:
            self._pending.append(hidden)
            self._tokens += tokens

    def draft(self, state: State, room: int) -> list[int]:
        """At most `room` drafts for what follows the tokens that have been observed; [] for a plain step."""
        match = self._lookup.find() if self._lookup is not None else None
        if match is None and self._rest:
            self._rest -= 1
            source, depth = 0, 0
        else:
            source, depth = self._choose(match, room)
            self._rests = min(2 * self._rests + 1, MOST_RESTS) if self._costs.known and not depth else 0
            self._rest = self._rests if self.may_rest else 0
        self._chosen = source if depth else None
        if depth and source:
            assert self._lookup is not None
            assert match is not None
            drafts = self._lookup.drafts(match[1], depth)
        elif depth:
            return self._run_mtp(state, state.length, depth)
        else:
            drafts = []
        if len(self._tokens) >= PENDING_ROWS and self.uses_mtp:
            self._run_mtp(state, state.length, 0)
        return drafts

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        """What became of the drafts, and how long the step took with logits and commit."""
        if drafted or not self._rest or self._step % PLAIN_SAMPLE == 0:
            self._costs.record_step(drafted + 1, seconds)
        self.record(drafted, accepted)

    def record(self, drafted: int, accepted: int) -> None:
        """What became of the drafts."""
        self._step += 1
        if drafted and self._chosen is not None:
            self._sources[self._chosen].record(drafted, accepted, self._step)
            self.count(drafted, accepted)

    def count(self, drafted: int, accepted: int) -> None:
        """Drafts of a step that ended early, and how many of them had been accepted: nothing is learnt from it."""
        self.drafted += drafted
        self.accepted += accepted

    def close(self, state: State) -> None:
        """Bring the MTP layer's entries up to date: `state` may be kept, and gone on with later."""
        self._runner.acceptances = self._sources
        if self._tokens:
            self._run_mtp(state, state.length - 1, 0)

    def _run_mtp(self, state: State, end: int, depth: int) -> list[int]:
        """Make the entries that wait, the last for token end - 1, and `depth` drafts."""
        began = perf_counter()
        drafts = self._runner.draft([self._drafting(state, end, depth)])[0]
        if depth:
            self._costs.record_draft(depth, perf_counter() - began, greedy=self.greedy)
        return drafts

    def _drafting(self, state: State, end: int, depth: int) -> Drafting:
        """The same for `Runner.draft`; nothing waits any more."""
        from .runner import Drafting

        rows = self._pending[0] if len(self._pending) == 1 else self._runner.joined(self._pending)
        first, sampler = end - len(self._tokens), self._sampler
        wanted = Drafting(state, first, rows, self._tokens, depth, sampler.draft, sampler.greedy_limit)
        self._pending, self._tokens = [], []
        return wanted

    # ------------------------------------------------------------------------------- several sequences in one step

    def offers(self, room: int) -> list[float]:
        """Tokens that a step is expected to give with 1, 2, ... of the drafts that promise most, at most `room`; []
        without any. `prepare` then takes as many of these as are wanted."""
        self._match = self._lookup.find() if self._lookup is not None else None
        sources = ([0] if self._mtp else []) + ([] if self._match is None else [1 + self._match[0]])
        if room < 1 or not sources:
            return []
        if self.depth is not None:
            self._offered = sources[-1]
            return [1.0] * min(room, LOOKUP_DEPTH if self._offered else MTP_DEPTH)
        self._offered = max(sources, key=lambda source: (self._sources[source].expected(self._step)[0], source))
        return self._sources[self._offered].expected(self._step)[:room]

    def prepare(self, state: State, depth: int) -> list[int] | Drafting:
        """`depth` drafts of what was offered last, or what the MTP layer needs to make them."""
        self._chosen = self._offered if depth else None
        if depth and self._offered:
            assert self._lookup is not None
            assert self._match is not None
            drafts = self._lookup.drafts(self._match[1], depth)
            if len(self._tokens) >= PENDING_ROWS and self.uses_mtp:
                self._run_mtp(state, state.length, 0)
            return drafts
        if depth or (len(self._tokens) >= PENDING_ROWS and self.uses_mtp):
            return self._drafting(state, state.length, depth)
        return []

    def _choose(self, match: tuple[int, int] | None, room: int) -> tuple[int, int]:
        """(index of a source, number of drafts): the pair that promises the most tokens per second."""
        if room < 1:
            return 0, 0
        if self.depth is not None:
            if match is not None:
                return 1 + match[0], min(self.depth, room, LOOKUP_DEPTH)
            return 0, min(self.depth, room, MTP_DEPTH) if self._mtp else 0
        costs = self._costs
        if not costs.known:
            return 0, 0  # nothing can be compared with
        options = [0] if self._mtp else []
        if match is not None:
            options.append(1 + match[0])
        best, chosen = WORTHWHILE / costs.step(1) if self.may_rest else 0.0, (0, 0)
        for source in options:
            for depth, tokens in enumerate(islice(self._sources[source].expected(self._step), room), 1):
                seconds = costs.step(depth + 1)
                if source == 0:
                    seconds += costs.draft(depth, greedy=self.greedy)
                if tokens / seconds > best:
                    best, chosen = tokens / seconds, (source, depth)
        return chosen


MOST_ROWS = 32  # of all sequences in one step, drafts included


def share_rows(offers: Sequence[Sequence[float]], must: Sequence[bool], sequences: int, costs: Costs) -> list[int]:
    """How many drafts each sequence gets so that all together make the most tokens per second.

    offers: what each expects of 1, 2, ... drafts (see Speculator.offers); must: whether it has to take one; sequences:
    how many there are in the step, those without offers included; costs: of steps of so many sequences, by 1 + drafts.
    """
    gains = [
        (must[i] and depth == 0, tokens - (offer[depth - 1] if depth else 1.0), i)
        for i, offer in enumerate(offers)
        for depth, tokens in enumerate(offer)
    ]
    gains.sort(key=lambda gain: (-gain[0], -gain[1]))  # stable: of one sequence in the order of depth
    gains = gains[: max(0, MOST_ROWS - sequences)]
    forced = sum(gain[0] for gain in gains)
    if not costs.known:
        return [0] * len(offers)  # nothing can be compared with
    best, taken, tokens = 0.0, forced, float(sequences)
    depths = [0] * len(offers)
    for drafts in range(len(gains) + 1):
        if drafts:
            _, gain, i = gains[drafts - 1]
            tokens += gain
            depths[i] += 1
        if drafts >= forced:
            seconds = costs.step(1 + drafts) + (costs.draft(max(depths)) if drafts else 0.0)
            if tokens / seconds > best * (WORTHWHILE if taken == 0 and drafts else 1.0):
                best, taken = tokens / seconds, drafts
    depths = [0] * len(offers)
    for _, _, i in gains[:taken]:
        depths[i] += 1
    return depths


def draft_together(
    runner: Runner, wanted: Sequence[tuple[Speculator, State, int]], sequences: int, costs: Costs
) -> list[list[int]]:
    """Drafts of each speculator for what follows the tokens that it has observed, at most so many. sequences, costs:
    see share_rows."""
    offers = [speculator.offers(room) for speculator, _, room in wanted]
    if runner.fixed_depth is not None:
        depths = [min(runner.fixed_depth, len(offer)) for offer in offers]
    else:
        depths = share_rows(offers, [not speculator.may_rest for speculator, _, _ in wanted], sequences, costs)
    plans = [speculator.prepare(state, depth) for (speculator, state, _), depth in zip(wanted, depths, strict=True)]
    draftings = [plan for plan in plans if not isinstance(plan, list)]
    if not draftings:
        return [plan for plan in plans if isinstance(plan, list)]
    began = perf_counter()
    made = iter(runner.draft(draftings))
    depth = max(drafting.depth for drafting in draftings)
    if depth:
        costs.record_draft(depth, perf_counter() - began)
    return [plan if isinstance(plan, list) else next(made) for plan in plans]
