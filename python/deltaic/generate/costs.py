"""How many drafts are worth verifying? What steps cost on this machine, and how often drafts were right so far."""

from __future__ import annotations

CARRIED_TRIALS = 3.0  # what the experience of the sequence before is worth
PRIOR, PRIOR_TRIALS = 0.6, 1.0  # the acceptance that is assumed at first, and how many trials that is worth
PROOF = 0.5  # hits at a place after which places behind it are tried
FORGET_TRIED, FORGET_IDLE = 0.93, 0.9975  # what remains of the evidence after a trial, after a step without one
FADE_STEPS = 16  # how often the latter is applied
ROW_GUESS = 0.1  # cost of one more row, in plain steps, where nothing has been measured
DRAFT_GUESS = 0.1  # the same for a draft of the MTP layer
SURE_SAMPLES = 3  # measurements that count
REFRESH = 16  # measurements after which estimates are made anew
PLAIN_EVERY = 200  # steps with drafts after which a plain one is measured again
WORTHWHILE = 1.05  # drafts have to promise so many times the speed of plain steps


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
        idle = step - self._faded - 1
        fade = FORGET_IDLE**idle if idle else 1.0
        self._faded, self._expected = step, None
        tried = accepted + 1 if accepted < drafted else drafted
        hits, trials = self._hits, self._trials
        for i in range(tried):
            hits[i] = FORGET_TRIED * fade * hits[i] + (i < accepted)
            trials[i] = FORGET_TRIED * fade * trials[i] + 1
        fade *= FORGET_IDLE
        for i in range(tried, len(trials)):
            hits[i] *= fade
            trials[i] *= fade

    def expected(self, step: int) -> list[float]:
        """Tokens that a step of this number is expected to give with 1, 2, ... drafts; of more than one as far as some
        were right."""
        if step - self._faded >= FADE_STEPS:
            keep = FORGET_IDLE ** (step - self._faded)
            self._hits, self._trials = [keep * n for n in self._hits], [keep * n for n in self._trials]
            self._faded, self._expected = step, None
        if self._expected is None:
            expected, tokens, run, rate = [], 1.0, 1.0, PRIOR
            last, proved = 0, True  # of the places that may be tried: two for each that has proved worth it, and one
            for i, hits in enumerate(self._hits):
                proved = proved and hits > PROOF
                if proved:
                    last += 2
                elif i > last:
                    break
                # a place is taken to be like the one before
                rate = (hits + PRIOR_TRIALS * rate) / (self._trials[i] + PRIOR_TRIALS)
                run *= rate
                tokens += run
                expected.append(tokens)
            self._expected = expected
        return self._expected


class Costs:
    """Seconds that steps take on this machine. One for all sequences of a model (and of a scheduler, for each number of
    sequences).

    step    a forward pass of so many rows, with logits and commit
    draft   so many drafts of the MTP layer
    round   both, for so many drafts of one sequence in one replay, which is a cost of its own
    """

    def __init__(self) -> None:
        # All but plain steps count in plain steps of their time: a machine that slows down slows all of them.
        self._plain = _Average()
        self._steps: dict[int, _Average] = {}
        self._drafts: dict[int, _Average] = {}
        self._rounds: dict[int, _Average] = {}
        self._since_plain = 0
        self._records = 0
        self.settled = False  # what was recorded last hardly changes
        self._estimates: dict[tuple[str, int], float] = {}  # as of not many records ago
        self._lists: dict[str, list[float]] = {}  # likewise

    def record_step(self, rows: int, seconds: float) -> None:
        """A forward pass of `rows` rows with logits and commit."""
        if rows > 1:
            self._since_plain += 1
            return self._record(self._steps, rows, seconds)
        self._since_plain = 0
        self._plain.add(seconds)
        if self._plain.samples == SURE_SAMPLES:  # before, the others were in seconds
            for measured in (self._steps, self._drafts, self._rounds):
                for average in measured.values():
                    average.value /= self._plain.value
        self._refresh(self._plain)

    def record_draft(self, depth: int, seconds: float) -> None:
        """`depth` drafts of the MTP layer."""
        self._record(self._drafts, depth, seconds)

    def record_round(self, depth: int, seconds: float) -> None:
        """`depth` drafts of the MTP layer for one sequence, and the step that verified them."""
        self._record(self._rounds, depth, seconds)
        self._since_plain += 1

    def _record(self, measured: dict[int, _Average], n: int, seconds: float) -> None:
        average = measured.get(n)
        if average is None:
            average = measured[n] = _Average()
        average.add(seconds / self._plain.value if self._plain.sure else seconds)
        self._refresh(average)

    def _refresh(self, average: _Average) -> None:
        self._records += 1
        self.settled = average.settled
        if self._records % REFRESH == 0 or not average.settled:
            self._estimates.clear()
            self._lists.clear()

    @property
    def known(self) -> bool:
        """Whether a plain step has been measured, and not too long ago: there is something to compare with."""
        return self._plain.sure and self._since_plain < PLAIN_EVERY

    def step(self, rows: int) -> float:
        """Seconds of a step with `rows` rows."""
        found = self._estimates.get(("step", rows))
        if found is None:
            found = self._plain.value * (1.0 if rows == 1 else max(1.0, _estimate(self._steps, rows, ROW_GUESS, 1)))
            self._estimates["step", rows] = found
        return found

    def draft(self, depth: int) -> float:
        """Seconds of `depth` drafts."""
        found = self._estimates.get(("draft", depth))
        if found is None:
            sure = [average.value / d for d, average in self._drafts.items() if average.sure]
            slope = min(sure, default=DRAFT_GUESS)
            found = self._plain.value * _estimate(self._drafts, depth, slope, None if sure else 0)
            self._estimates["draft", depth] = found
        return found

    def steps(self, most: int) -> list[float]:
        """`step` of 0 (not a number of rows) to at least `most` rows, not to be written."""
        found = self._lists.get("steps")
        if found is None or len(found) <= most:
            found = self._lists["steps"] = [0.0, *(self.step(rows) for rows in range(1, most + 1))]
        return found

    def rounds(self, most: int) -> list[float]:
        """Seconds of a round of 0 (a plain step) to at least `most` drafts, not to be written."""
        found = self._lists.get("rounds")
        if found is None or len(found) <= most:
            found = self._lists["rounds"] = [self.step(1), *(self._round(d) for d in range(1, most + 1))]
        return found

    def _round(self, depth: int) -> float:
        measured, plain = self._rounds, self._plain.value
        if any(average.sure for average in measured.values()):
            return plain * max(1.0, _estimate(measured, depth, ROW_GUESS + DRAFT_GUESS, None))
        guess = self.step(1 + depth) + self.draft(depth)
        return min([guess, *(plain * average.value for d, average in measured.items() if d == depth)])

    def can_pay(self, most: int) -> bool:
        """Whether rounds of up to `most` drafts, if all of these were right, would be faster than plain steps."""
        if not self._plain.sure or not any(average.sure for average in self._rounds.values()):
            return True
        plain = WORTHWHILE / self._plain.value
        return any((1 + d) / s > plain for d, s in enumerate(self.rounds(most)) if d)


def _estimate(measured: dict[int, _Average], n: int, slope: float, plain: int | None) -> float:
    """What was measured for `n`, in plain steps; as long as that is too little, no more than what follows from its
    neighbours, so that one slow run does not end the matter. plain: an n that takes one plain step, or 0: none."""
    if n in measured and measured[n].sure:
        return measured[n].value
    known = {m: average.value for m, average in measured.items() if average.sure}
    if plain is not None:
        known[plain] = float(plain)
    nearest = min(known, key=lambda m: (abs(m - n), m))
    guess = max(known[nearest] + (n - nearest) * slope, slope)
    return min(guess, measured[n].value) if n in measured else guess


class _Average:
    """A running average that one slow sample does not move far. The first samples find cold caches: the least of them
    counts."""

    __slots__ = ("samples", "value")

    def __init__(self) -> None:
        self.value, self.samples = 0.0, 0

    def add(self, x: float) -> None:
        self.samples += 1
        value = self.value
        if self.samples <= 2 * SURE_SAMPLES:
            self.value = x if self.samples == 1 else min(value, x)
        else:
            self.value = value + (min(x, 1.5 * value) - value) / 8

    @property
    def sure(self) -> bool:
        return self.samples >= SURE_SAMPLES

    @property
    def settled(self) -> bool:
        """Whether one more sample hardly changes it."""
        return self.samples > 4 * SURE_SAMPLES
