"""Stop strings and the thinking border, over every way of cutting the text into pieces."""

import random
from itertools import product

import pytest
from deltaic.errors import ArgumentError
from deltaic.generate.stop import ReasoningSplit, StopStrings, check_stop


def cuts(text):
    """Every way of cutting `text` into non-empty pieces."""
    for marks in product([False, True], repeat=len(text) - 1):
        pieces, begin = [], 0
        for i, cut in enumerate(marks, start=1):
            if cut:
                pieces.append(text[begin:i])
                begin = i
        yield [*pieces, text[begin:]]


def feed(stop, pieces):
    """(pieces returned, stop string found or None), with the held back text flushed at the end."""
    out = []
    for piece in pieces:
        out.append(stop.push(piece))
        if stop.found is not None:
            return out, stop.found
    return [*out, stop.flush()], None


@pytest.mark.parametrize(
    ("text", "strings", "expected", "found"),
    [
        ("one STOP two", ["STOP"], "one ", "STOP"),
        ("ST STO STOP", ["STOP"], "ST STO ", "STOP"),
        ("STO", ["STOP"], "STO", None),
        ("aaab", ["aab"], "a", "aab"),
        ("abababac", ["ababac"], "ab", "ababac"),
        ("héllo 🙂 end", ["🙂"], "héllo ", "🙂"),
        ("nothing", [], "nothing", None),
        ("x\n\ny", ["\n\n"], "x", "\n\n"),
    ],
)
def test_every_cut_gives_the_same_text(text, strings, expected, found):
    for pieces in cuts(text):
        out, hit = feed(StopStrings(strings), pieces)
        assert ("".join(out), hit) == (expected, found), pieces


def test_what_is_returned_is_never_taken_back():
    """After each push, the text returned so far is a prefix of what it is at the end, whatever follows."""
    rng = random.Random(0)
    for _ in range(300):
        strings = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        pieces = ["".join(rng.choices("ab", k=rng.randint(0, 3))) for _ in range(8)]
        text = "".join(pieces)
        out, hit = feed(StopStrings(strings), pieces)
        joined = "".join(out)
        assert text.startswith(joined)
        assert not any(s in joined for s in strings)
        if hit is None:
            assert joined == text
        else:
            assert text[len(joined) :].startswith(hit)


def test_text_that_cannot_become_a_stop_string_is_returned_at_once():
    stop = StopStrings(["<end>"])
    assert stop.push("hello <en") == "hello "
    assert stop.push("ough") == "<enough"
    assert stop.push("<") == ""
    assert stop.push("end") == ""
    assert stop.push(">tail") == ""
    assert (stop.found, stop.rest) == ("<end>", "tail")


def test_the_earliest_match_wins_then_the_longest():
    assert feed(StopStrings(["b", "ab"]), ["xab"]) == (["x"], "ab")
    assert feed(StopStrings(["<", "</s>"]), ["x</s>"]) == (["x"], "</s>")


@pytest.mark.parametrize("bad", [1, [1], ["a", None], [""], "", {"a"}, b"a", ["a", ""]])
def test_wrong_stop_argument(bad):
    with pytest.raises(ArgumentError, match="stop"):
        check_stop(bad)


def test_stop_argument_forms():
    assert check_stop(None) == ()
    assert check_stop("a") == ("a",)
    assert check_stop(["a", "b"]) == ("a", "b")


def split(pieces, thinking=True):
    parts = ReasoningSplit(thinking)
    pairs = [*(parts.push(piece) for piece in pieces), parts.flush()]
    return "".join(r for r, _ in pairs), "".join(a for _, a in pairs)


def test_thinking_is_split_at_its_tag_wherever_the_pieces_end():
    for pieces in cuts("a<b\n</think>\n\nc\n"):
        assert split(pieces) == ("a<b", "c\n"), pieces


def test_line_breaks_inside_thinking_stay():
    assert split(["one\n", "\ntwo\n\n", "</think>", "\n", "\nx\n\ny"]) == ("one\n\ntwo", "x\n\ny")


def test_unfinished_thinking_has_no_answer():
    assert split(["only thinking </thi"]) == ("only thinking </thi", "")


def test_without_thinking_everything_is_the_answer():
    assert split(["\na", "</think>", "b"], thinking=False) == ("", "\na</think>b")


def test_a_second_tag_belongs_to_the_answer():
    assert split(["a</think>b</think>c"]) == ("a", "b</think>c")
