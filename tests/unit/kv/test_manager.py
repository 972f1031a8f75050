"""Which text holds which pages: nobody's page is given away, nothing is lost, what is found are the text's own
tokens."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from dsserve.kv.manager import KVManager, TextPages

PAGE, PAGES = 4, 9


def text(tokens: list[int], salt: bytes = b"") -> TextPages:
    return TextPages(lambda begin, end: tokens[begin:end], salt)


def begin(kv: KVManager, tokens: list[int], salt: bytes = b"") -> tuple[TextPages, int]:
    """A text that has all of its pages, and how many tokens it found."""
    own = text(tokens, salt)
    found = kv.begin(own, kv.match(own, len(tokens)))
    assert kv.grow(own, len(tokens))
    kv.name(own, len(tokens))
    return own, found


def test_a_text_that_begins_alike_holds_the_same_pages_while_the_first_runs_and_afterwards() -> None:
    kv = KVManager(PAGES, PAGE)
    first, found = begin(kv, list(range(10)))
    assert found == 0 and len(first.pages) == 3
    second, found = begin(kv, [*range(8), 77, 78])
    assert found == 8 and second.pages[:2] == first.pages[:2] and second.pages[2] != first.pages[2]
    assert kv.free_pages == PAGES - 4 and kv.usage == pytest.approx(4 / PAGES)
    kv.release(first)
    kv.release(second)
    assert kv.free_pages == PAGES and kv.usage == 0 and first.pages == []
    assert begin(kv, list(range(20)))[1] == 8


def test_the_last_token_is_always_computed() -> None:
    kv = KVManager(PAGES, PAGE)
    begin(kv, list(range(8)))
    assert begin(kv, list(range(8)))[1] == 4
    assert begin(kv, list(range(9)))[1] == 8


def test_a_page_is_found_only_behind_the_same_beginning() -> None:
    kv = KVManager(PAGES, PAGE)
    begin(kv, [1, 2, 3, 4, 5, 6, 7, 8])
    assert begin(kv, [9, 9, 9, 9, 5, 6, 7, 8, 1])[1] == 0


def test_salts_and_the_setting_keep_texts_apart() -> None:
    kv = KVManager(PAGES, PAGE)
    tokens = list(range(9))
    assert [begin(kv, tokens, salt)[1] for salt in (b"", b"mine", b"mine")] == [0, 0, 8]
    without = KVManager(PAGES, PAGE, reuse=False)
    assert [begin(without, tokens)[1] for _ in range(2)] == [0, 0]


def test_least_recently_used_beginnings_go_first_and_from_their_end() -> None:
    kv = KVManager(4, PAGE)
    for tokens in ([1] * 8, [2] * 8):
        kv.release(begin(kv, tokens)[0])
    kv.release(begin(kv, [1] * 9)[0])  # used again; its third page takes the end of the other one
    assert kv.match(text([2] * 9), 9) == kv.match(text([2] * 5), 5) != []
    assert len(kv.match(text([1] * 9), 9)) == 2


def test_the_ranks_are_told_each_page_once() -> None:
    kv = KVManager(PAGES, PAGE)
    own, _ = begin(kv, list(range(6)))
    assert kv.tell(own) == (0, tuple(own.pages))
    assert kv.tell(own) == (2, ())
    kv.grow(own, 9)
    assert kv.tell(own) == (2, (own.pages[2],))


def test_what_was_not_computed_is_not_found_and_told_again() -> None:
    kv = KVManager(PAGES, PAGE)
    tokens = list(range(12))
    own, _ = begin(kv, tokens)
    kv.tell(own)
    kv.unname(own, 5)
    assert len(kv.match(text(tokens), 12)) == 1
    assert kv.tell(own) == (0, tuple(own.pages))
    kv.name(own, 12)
    assert len(kv.match(text([*tokens, 1]), 13)) == 3


def test_too_few_pages_are_kept_for_the_next_try() -> None:
    kv = KVManager(3, PAGE)
    first, second = text(list(range(8))), text(list(range(8)))
    assert kv.grow(first, 8) and not kv.grow(second, 8) and len(second.pages) == 1
    kv.release(first)
    assert kv.grow(second, 8) and kv.releases == 1
    assert kv.pages_for(8) == 2 and kv.pages_for(9) == 3 and kv.tokens == 12


def test_new_pages_counts_what_must_be_free() -> None:
    """A found page that nobody holds is taken from the free ones, too."""
    kv = KVManager(PAGES, PAGE)
    tokens = list(range(12))
    first, _ = begin(kv, tokens)
    found = kv.match(text([*tokens, 1]), 13)
    assert kv.new_pages(found, 13) == 1
    kv.release(first)
    assert kv.new_pages(found, 13) == 4


class Texts(RuleBasedStateMachine):
    """Texts come, grow and go in any order, beside a model of what every page holds."""

    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVManager(PAGES, PAGE)
        self.held: dict[int, tuple[TextPages, list[int], bytes, list[int]]] = {}
        self.cells: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # page -> salt and tokens up to its end
        self.count = 0

    @rule(target=running, kind=st.integers(0, 2), length=st.integers(1, 20), salt=st.sampled_from([b"", b"x"]))
    def begin(self, kind: int, length: int, salt: bytes) -> int:
        """Three families of texts, so that beginnings are common."""
        self.count += 1
        tokens = [kind] * length
        own = text(tokens, salt)
        found = self.kv.match(own, length)
        for number, page in enumerate(found):
            assert self.cells[page] == (salt, tuple(tokens[: (number + 1) * PAGE])), "other tokens lie there"
        before, needed = self.kv.free_pages, self.kv.new_pages(found, length)
        shared = self.kv.begin(own, found)
        grown = self.kv.grow(own, length)
        assert grown == (needed <= before) and shared < length
        if not grown:
            self.kv.release(own)
            return -1
        assert before - self.kv.free_pages == needed
        self.held[self.count] = (own, tokens, salt, [length])
        self._compute(self.count)
        return self.count

    def _compute(self, number: int) -> None:
        own, tokens, salt, known = self.held[number]
        for place, page in enumerate(own.pages):
            if (place + 1) * PAGE <= known[0]:
                self.cells[page] = salt, tuple(tokens[: (place + 1) * PAGE])
            else:
                self.cells.pop(page, None)
        self.kv.name(own, known[0])

    @rule(number=running, more=st.integers(1, 6), token=st.integers(0, 3))
    def grow(self, number: int, more: int, token: int) -> None:
        if number not in self.held:
            return
        own, tokens, _, known = self.held[number]
        if self.kv.grow(own, known[0] + more):
            tokens += [token] * more
            known[0] += more
            self._compute(number)
        else:
            assert self.kv.free_pages == 0, "pages are free, and it got none"
            for page in own.pages[-(-known[0] // PAGE) :]:
                self.cells.pop(page, None)

    @rule(number=running, back=st.integers(1, 9))
    def undo(self, number: int, back: int) -> None:
        """The last tokens were not computed after all. They may have been shared: then they lie there still."""
        if number not in self.held:
            return
        own, _, _, known = self.held[number]
        length = max(0, known[0] - back)
        own_pages = own.pages[length // PAGE :]
        if any(page in other[0].pages for key, other in self.held.items() if key != number for page in own_pages):
            return
        self.kv.unname(own, length)
        self._compute(number)

    @rule(number=consumes(running))
    def release(self, number: int) -> None:
        if number in self.held:
            self.kv.release(self.held.pop(number)[0])

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        holders = Counter(page for own, *_ in self.held.values() for page in own.pages)
        assert 0 not in holders and all(1 <= page <= PAGES for page in holders)
        assert len(holders) + self.kv.free_pages == PAGES
        assert all(len(set(own.pages)) == len(own.pages) for own, *_ in self.held.values())
        for own, tokens, salt, known in self.held.values():
            for place in range(known[0] // PAGE):
                assert self.cells[own.pages[place]] == (salt, tuple(tokens[: (place + 1) * PAGE]))


Texts.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTexts = Texts.TestCase
