"""Stop strings are found where a plain search finds them, at a price that grows with the text alone."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsserve.engine.stop_strings import StopStrings

letters = st.text("ab", max_size=12)
repeated = st.builds(lambda part, times, end: part * times + end, letters, st.integers(0, 6), letters)


class Plain:
    """The same by searching all that is held again with each piece."""

    def __init__(self, strings: list[str]) -> None:
        self.found = False
        self._strings, self._held = strings, ""

    def push(self, text: str) -> str:
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._strings if (at := held.find(stop)) >= 0]
        if found:
            self.found, self._held = True, ""
            return held[: min(found)[1]]
        cut = len(held) - max(self._overlap(held, stop) for stop in self._strings)
        self._held = held[cut:]
        return held[:cut]

    def flush(self) -> str:
        return self._held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        return max(length for length in range(len(stop)) if text.endswith(stop[:length]))


@settings(max_examples=500)
@given(st.lists(repeated.filter(bool), min_size=1, max_size=4), st.lists(repeated, max_size=12))
def test_each_piece_is_that_of_a_plain_search(strings: list[str], pieces: list[str]) -> None:
    ours, plain = StopStrings(strings), Plain(strings)
    for piece in pieces:
        assert (ours.push(piece), ours.found) == (plain.push(piece), plain.found)
        if plain.found:
            break
    assert ours.flush() == plain.flush()


@pytest.mark.parametrize(
    ("strings", "sent"),
    [(["abcd", "bc"], "xa"), (["bc", "abc"], "x"), (["cd", "abcd"], "x"), (["zz", "d"], "xabc"), (["abcd"], "x")],
)
@pytest.mark.parametrize("cut", range(6))
def test_the_first_one_that_is_complete_counts_and_of_two_the_longer(strings: list[str], sent: str, cut: int) -> None:
    stop = StopStrings(strings)
    assert stop.push("xabcde"[:cut]) + ("" if stop.found else stop.push("xabcde"[cut:])) == sent
    assert stop.found and stop.flush() == ""


def test_long_strings_cost_no_more_than_short_ones() -> None:
    """One that matches all the text, and three of 100,000 characters: 0.1 s, where a search in all took minutes."""
    strings = ["ab" * 50_000 + "x", *("a" * 100_000 + end for end in "xyz")]
    stop, begun = StopStrings(strings), time.process_time()
    sent = [stop.push(piece) for piece in ["abababab"] * 4000 + ["aaaaaaaa"] * 4000]
    assert time.process_time() - begun < 5
    assert "".join(sent) + stop.flush() == "ab" * 16_000 + "a" * 32_000


def test_what_is_held_is_not_copied_for_each_token() -> None:
    stop = StopStrings(["a" * 1_000_000])
    begun = time.process_time()
    assert not any(stop.push("aa") for _ in range(200_000))
    assert time.process_time() - begun < 5
    assert stop.push("b") == "a" * 400_000 + "b"
