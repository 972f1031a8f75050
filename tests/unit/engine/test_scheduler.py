"""Rank 0's book: who runs, what is read, who is put back; texts keep their pages, and every text ends once."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsserve.core.request import GenerationRequest, SamplingParams, TokenEvent
from dsserve.core.step_plan import Segment, StepPlan, Wanted
from dsserve.engine.scheduler import Scheduler, Step
from dsserve.engine.sequence import Sequence
from dsserve.engine.token_budget import SURE_TOKENS, TokenBudget
from dsserve.kv.manager import KVManager
from dsserve.sampling.sampler import SamplingState

EOS, PAGE = 0, 4


class Letters:
    """A detokenizer for tests: token n is one letter, `!` (token 33) is a stop string."""

    def __init__(self) -> None:
        self.stopped = False

    def push(self, token: int, may_stop: bool = True) -> str:
        self.stopped = token == 33
        return "" if self.stopped else chr(token)

    def extend(self, tokens: list[int]) -> str:
        return "".join(map(self.push, tokens))

    def flush(self) -> str:
        return ""


class Book(Scheduler):
    """A scheduler that takes requests, and tokens in the engine's place."""

    def put(self, name: str, prompt: int | Iterable[int] = 3, new: int = 5, **more: Any) -> Sequence:
        """A number of a prompt's tokens stands for such a prompt, in common with no other text."""
        own = range(1000 * (1 + zlib.crc32(name.encode()) % 10**6), 10**10)
        ids = tuple(own[:prompt]) if isinstance(prompt, int) else tuple(prompt)
        request = GenerationRequest(name, ids, new, **more)
        text = Sequence(request, Letters(), SamplingState(request), frozenset({EOS}))  # type: ignore[arg-type]
        self.add(text)
        return text

    def enter(self, text: Sequence, token: int = 65) -> TokenEvent:
        event = text.accept(token, None)
        assert event is not None
        if event.is_last:
            self.end(text)
        return event


def make_book(
    rows: int = 4, pages: int = 1000, step: int = 4096, chunk: int | None = None, ratio: float = math.inf,
    reuse: bool = True, page: int = PAGE,
) -> Book:  # fmt: skip
    return Book(rows, KVManager(pages, page, reuse), TokenBudget(step, chunk or step, ratio))


def answer(book: Book, step: Step, token: int = 65) -> list[TokenEvent]:
    return [book.enter(text, token) for text in step.rows]


def play(book: Book, steps: int = 1) -> list[dict[str, int]]:
    """So many steps with their tokens: what each computes of whom."""
    found = []
    for _ in range(steps):
        step = book.plan()
        found.append(sizes(step))
        answer(book, step)
    return found


def sizes(step: Step) -> dict[str, int]:
    pairs = zip(step.texts, step.plan.segments, strict=True)
    return {name(text): len(segment.tokens) for text, segment in pairs}


def name(text: Sequence) -> str:
    return text.request.request_id


def names(texts: Iterable[Sequence]) -> list[str]:
    return [name(text) for text in texts]


def waiting(book: Book) -> list[str]:
    return names(book._waiting)


# How texts end


def test_a_request_ends_by_length_with_its_counts() -> None:
    book = make_book()
    book.put("a", prompt=3, new=2)
    first, second = answer(book, book.plan())[0], answer(book, book.plan())[0]
    assert (first.text, first.finish_reason) == ("A", None)
    assert (second.text, second.finish_reason) == ("A", "length")
    assert (second.prompt_tokens, second.completion_tokens, second.cached_tokens) == (3, 2, 0)
    assert not book.has_work and book.plan().plan == StepPlan()
    assert book.kv.usage == 0


def test_end_of_text_and_stop_strings_end_with_stop() -> None:
    for token in (EOS, 33):
        book = make_book()
        book.put("a")
        play(book)
        event = answer(book, book.plan(), token)[0]
        assert (event.text, event.finish_reason) == ("", "stop")


def test_text_that_can_wait_is_told_with_the_texts_end_or_when_it_is_asked_for() -> None:
    text = make_book().put("a", prompt=3, new=5)
    assert text.accept(65, None, may_wait=True) is None and text.accept(66, None, may_wait=True) is None
    told = text.speak()
    assert told is not None and (told.text, told.completion_tokens, told.finish_reason) == ("AB", 2, None)
    assert text.speak() is None
    text.accept(67, None, may_wait=True)
    text.accept(68, None, may_wait=True)
    last = text.accept(69, None, may_wait=True)
    assert last is not None and (last.text, last.finish_reason) == ("CDE", "length") and text.speak() is None


def test_tokens_of_a_text_are_those_of_prompt_and_output() -> None:
    text = make_book().put("a", prompt=(1, 2, 3))
    for token in (65, 66):
        text.accept(token, None)
    whole = [1, 2, 3, 65, 66]
    assert all(list(text.ids(begin, end)) == whole[begin:end] for begin in range(5) for end in range(begin, 6))


# What a step computes


def test_segments_say_what_is_computed_where() -> None:
    book = make_book(step=16, chunk=10)
    book.put("runs", prompt=(1, 2, 3))
    play(book)
    book.put("long", prompt=range(100, 120))
    step = book.plan()
    assert step.plan.segments == (
        Segment(0, 3, (65,), 1, ()),
        Segment(1, 0, tuple(range(100, 109)), 0, (2, 3, 4), wanted=Wanted.NOTHING),
    )
    assert names(step.rows) == ["runs"] and not step.plan.last
    answer(book, step)
    assert book.plan(last=True).plan == StepPlan(
        (
            Segment(0, 4, (65,), 1, (5,)),
            Segment(1, 9, tuple(range(109, 118)), 3, (6, 7), wanted=Wanted.NOTHING),
        ),
        last=True,
    )


def test_a_long_prompt_is_read_in_parts_while_others_get_a_token_in_each_step() -> None:
    book = make_book(step=11)
    book.put("runs", new=20)
    play(book)
    book.put("long", prompt=25)
    book.put("next", prompt=4)
    book.put("last", prompt=6)
    assert play(book, 4) == [
        {"runs": 1, "long": 10},
        {"runs": 1, "long": 10},
        {"runs": 1, "long": 5, "next": 4, "last": 1},  # whatever is left of a step goes to the next one
        {"runs": 1, "long": 1, "next": 1, "last": 5},
    ]


def test_several_prompts_are_read_in_part_at_once() -> None:
    """One that wants all logits leaves the rest of a step to those behind it."""
    book = make_book(step=1000)
    book.put("all", prompt=1300, prompt_logprobs=True, sampling=SamplingParams(logprobs=1))
    book.put("other", prompt=1200)
    assert [sizes(step) for step in (book.plan(), book.plan())] == [{"all": 512, "other": 488}] * 2
    assert sizes(book.plan()) == {"all": 276, "other": 224}


def test_a_burst_of_long_prompts_is_spread_over_steps() -> None:
    book = make_book(step=100)
    for one in "abc":
        book.put(one, prompt=40)
    assert play(book, 2) == [{"a": 40, "b": 40, "c": 20}, {"a": 1, "b": 1, "c": 20}]


def test_a_text_that_wants_no_more_is_not_planned() -> None:
    book = make_book()
    book.put("a", new=1)
    step = book.plan()
    assert book.plan_ahead({text: place for place, text in enumerate(step.rows)}) is None


@pytest.mark.parametrize(
    ("step", "chunk", "ratio", "decoded", "joining", "expected"),
    [
        (100, 32, math.inf, 0, 1, 100),  # nobody waits for the step
        (100, 32, math.inf, 2, 9, 30),
        (100, 32, math.inf, 30, 1, 16),  # half are the prompts' however many run
        (100, 32, math.inf, 300, 1, 16),
        (100, 32, 0.3, 1, 1, 31),  # a single prompt stops nobody
        (100, 32, 0.3, 1, 2, 99),
        (100, 32, 0.3, 6, 2, 94),
        (100, 32, 0.3, 7, 2, 25),
        (100, 100, 0.3, 200, 90, 1),
        (1, 1, 0.3, 0, 1, 1),
    ],
)
def test_the_budget(step: int, chunk: int, ratio: float, decoded: int, joining: int, expected: int) -> None:
    assert TokenBudget(step, chunk, ratio).prompts(decoded, joining) == expected


def test_a_step_that_nobody_waits_for_reads_more() -> None:
    book = make_book(step=100, chunk=32)
    for one in "abc":
        book.put(one, prompt=40, new=9)
    assert play(book, 2) == [{"a": 40, "b": 40, "c": 20}, {"a": 1, "b": 1, "c": 20}]
    book.put("d", prompt=90)
    assert play(book) == [{"a": 1, "b": 1, "c": 1, "d": 29}]


def test_a_burst_that_outnumbers_what_runs_is_read_as_if_nobody_waited() -> None:
    book = make_book(rows=12, step=100, chunk=32, ratio=1.5)
    for one in "ab":
        book.put(one, prompt=5, new=9)
    play(book)
    for one in "cde":
        book.put(one, prompt=30, new=9)
    assert play(book) == [{"a": 1, "b": 1, "c": 30, "d": 30, "e": 30}]
    for one in "fgh":
        book.put(one, prompt=30, new=9)  # fewer than run
    assert play(book)[0]["f"] == 27 and book.waiting == 2


def test_those_who_wait_for_a_row_do_not_make_a_step_larger() -> None:
    book = make_book(rows=4, step=100, chunk=32, ratio=1.2)
    for number in range(4):
        book.put(str(number), prompt=5, new=2 + number)
    play(book)
    for number in range(9):
        book.put(f"late{number}", prompt=90, new=9)
    play(book)  # the first ends
    assert sizes(book.plan()) == {"1": 1, "2": 1, "3": 1, "late0": 29}


# Rows, order, priority


def test_rows_are_as_many_as_may_run_and_are_used_again() -> None:
    book = make_book(rows=2)
    texts = [book.put(str(number), new=2) for number in range(3)]
    play(book)
    assert (book.running, book.waiting) == (2, 1) and texts[2].row is None
    play(book)
    assert (book.running, book.waiting) == (0, 1)
    step = book.plan()
    assert names(step.texts) == ["2"] and texts[2].row in (0, 1) and texts[0].row is None


def test_the_order_is_priority_then_arrival() -> None:
    book = make_book(rows=1)
    for priority, one in ((0, "a"), (5, "b"), (0, "c"), (-1, "d")):
        book.put(one, new=1, priority=priority)
    assert [next(iter(step)) for step in play(book, 4)] == ["d", "a", "c", "b"]


def test_a_prompt_that_finds_no_pages_is_not_overtaken() -> None:
    """Else a large one would never come in."""
    book = make_book(pages=6, reuse=False)
    book.put("runs", prompt=8, new=8)
    play(book)
    book.put("large", prompt=14)
    book.put("small", prompt=2)
    assert play(book, 2) == [{"runs": 1}] * 2 and waiting(book) == ["large", "small"]
    book.cancel("large")
    assert "small" in play(book)[0]


def test_a_prompt_that_found_no_pages_is_not_looked_up_until_some_came_free(monkeypatch: pytest.MonkeyPatch) -> None:
    book, looked = make_book(pages=6), []
    match = book.kv.match
    monkeypatch.setattr(book.kv, "match", lambda *args: looked.append(args) or match(*args))
    book.put("runs", prompt=8, new=8)
    play(book)
    book.put("large", prompt=14)
    play(book, 3)
    assert len(looked) == 2
    book.cancel("runs")
    assert "large" in play(book)[0]


# Preemption


def test_the_youngest_is_put_back_and_comes_again_before_those_that_wait() -> None:
    book = make_book(pages=6, reuse=False)
    old, young = book.put("old", prompt=7, new=16), book.put("young", prompt=7, new=16)
    play(book)
    book.put("late", prompt=1)
    play(book, 4)
    assert play(book, 2) == [{"old": 1, "young": 1}, {"old": 1}]
    assert book.preemptions == 1 and young.row is None and young.planned == 0 and young.pages.pages == []
    assert waiting(book) == ["young", "late"] and young.generated == 6
    while old.row is not None:
        play(book)
    assert (young.generated, young.row is not None) == (7, True)
    while book.has_work:
        play(book)
    assert young.generated == 16 and book.preemptions == 2, "the late one for it"


def test_less_important_texts_are_put_back_first() -> None:
    book = make_book(pages=6, reuse=False)
    book.put("first", prompt=7, new=16, priority=1)
    book.put("second", prompt=7, new=16)
    while not book.preemptions:
        play(book)
    assert names(book.live) == ["second"] and waiting(book) == ["first"]


def test_a_text_alone_has_all_pages() -> None:
    """The longest text needs as many as there are; beside another it is put back until that one is over."""
    book = make_book(pages=4, reuse=False)
    one = book.put("one", prompt=8, new=8)
    other = book.put("other", prompt=4, new=12)
    for _ in range(60):
        if not book.has_work:
            break
        play(book)
    assert (one.generated, other.generated) == (8, 12) and book.preemptions > 0


def test_a_half_read_prompt_is_put_back_for_a_text_that_decodes() -> None:
    book = make_book(pages=12, step=6, reuse=False)
    old = [book.put(str(number), prompt=2, new=20) for number in range(3)]
    play(book)
    young = book.put("young", prompt=24, new=2)
    planned = []
    while not book.preemptions:
        planned.append(young.planned)
        play(book)
    assert planned[-1] > 0 and young.generated == 0 and young.row is None
    assert all(text.row is not None for text in old)
    while book.has_work:
        play(book)
    assert [text.generated for text in (*old, young)] == [20, 20, 20, 2]


def test_what_a_put_back_text_has_computed_is_found_again() -> None:
    book = make_book(pages=6)
    book.put("old", prompt=7, new=9)
    young = book.put("young", prompt=7, new=16)
    while not book.preemptions:
        play(book)
    book.cancel("old")
    step = book.plan()
    assert sizes(step)["young"] < young.length and young.cached_tokens == 0, "the prompt was computed for it"


def test_no_step_ahead_puts_anybody_back() -> None:
    book = make_book(pages=5, reuse=False)
    for one in "ab":
        book.put(one, prompt=7, new=16)
    step = book.plan()
    answer(book, step)
    step = book.plan()
    assert book.plan_ahead({text: place for place, text in enumerate(step.rows)}) is None
    assert book.preemptions == 0 and book.running == 2
    answer(book, step)
    assert sizes(book.plan()) == {"a": 1} and book.preemptions == 1


# Shared pages


def test_equal_prompts_of_one_step_share_pages() -> None:
    """The first one writes them before the others read them, in each layer."""
    book = make_book(rows=8)
    texts = [book.put("n", prompt=range(11), index=index) for index in range(4)]
    step = book.plan()
    assert [len(segment.tokens) for segment in step.plan.segments] == [11, 3, 3, 3]
    assert {tuple(text.pages.pages[:2]) for text in texts} == {tuple(texts[0].pages.pages[:2])}
    assert len({text.pages.pages[2] for text in texts}) == 4
    assert [text.cached_tokens for text in texts] == [0, 8, 8, 8]
    assert book.kv.free_pages == 1000 - 2 - 4
    answer(book, step)
    play(book, 5)
    assert book.plan().texts == () and book.kv.free_pages == 1000


def test_a_text_that_ended_is_continued_by_the_next_turn() -> None:
    book = make_book()
    book.put("turn", prompt=range(100, 110), new=7)
    play(book, 7)
    book.plan()
    again = book.put("again", prompt=(*range(100, 110), *[65] * 7, 1, 2, 3))
    play(book)
    assert again.cached_tokens == 16, "of 16 computed tokens; the last one was never an input"


def test_salts_and_the_setting_keep_texts_apart() -> None:
    for reuse in (True, False):
        book = make_book(rows=8, reuse=reuse)
        texts = [book.put(str(salt), prompt=range(50), cache_salt=salt) for salt in (None, "x", "y", "x", None)]
        book.plan()
        assert [text.cached_tokens for text in texts] == ([0, 0, 0, 48, 48] if reuse else [0] * 5)


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_whole() -> None:
    book = make_book()
    book.put("first", prompt=range(20))
    wants = book.put("wants", prompt=range(20), prompt_logprobs=True, sampling=SamplingParams(logprobs=0))
    step = book.plan()
    assert sizes(step) == {"first": 20, "wants": 20} and wants.cached_tokens == 0
    assert [segment.wanted for segment in step.plan.segments] == [Wanted.NEXT, Wanted.NEXT | Wanted.ALL]
    answer(book, step)
    assert {segment.wanted for segment in book.plan().plan.segments} == {Wanted.NEXT}


def test_a_prompt_whose_pages_are_found_needs_few_of_its_own() -> None:
    book = make_book(pages=12)
    book.put("first", prompt=range(33), new=3)
    play(book)
    second = book.put("second", prompt=range(33), new=3)  # nine pages beside nine would not fit
    play(book)
    assert second.cached_tokens == 32 and second.generated == 1


# Clients that leave


def test_a_waiting_request_can_be_cancelled_before_it_costs_anything() -> None:
    book = make_book()
    text = book.put("a")
    assert book.cancel("a") == [text] and not book.has_work and book.plan().texts == () and book.cancel("a") == []


def test_one_that_decodes_frees_row_and_pages_in_the_next_step() -> None:
    book = make_book(rows=2, pages=4)
    first = book.put("a", prompt=8)
    book.put("b", prompt=2)
    play(book)
    assert book.cancel("a") == [first] and book.cancel("a") == []
    assert (book.running, book.waiting) == (1, 0) and not book.is_live(first)
    book.put("c", prompt=8)
    assert sizes(book.plan()) == {"b": 1, "c": 8}


def test_one_whose_prompt_is_read_leaves_what_was_read() -> None:
    book, prompt = make_book(step=20), range(100, 150)
    gone = book.put("gone", prompt=prompt)
    book.plan()
    assert book.cancel("gone") == [gone]
    again = book.put("again", prompt=prompt)
    assert sizes(book.plan()) == {"again": 20} and again.cached_tokens == 20


def test_one_that_was_put_back() -> None:
    book = make_book(pages=6, reuse=False)
    book.put("old", prompt=7, new=16)
    young = book.put("young", prompt=7, new=16)
    while not book.preemptions:
        play(book)
    assert book.cancel("young") == [young] and book.waiting == 0
    while book.has_work:
        assert list(play(book)[0]) == ["old"]


def test_one_of_several_texts_of_a_request_takes_all_with_it() -> None:
    book = make_book(rows=2)
    texts = [book.put("n", index=index) for index in range(3)]
    play(book)
    assert set(book.cancel("n")) == set(texts) and not book.has_work


def test_one_that_left_while_a_step_was_in_flight_is_not_followed() -> None:
    book = make_book()
    for one in "ab":
        book.put(one)
    answer(book, book.plan())
    step = book.plan()
    book.cancel("a")
    ahead = book.plan_ahead({text: place for place, text in enumerate(step.rows)})
    assert ahead is not None and names(ahead.texts) == ["b"] and ahead.plan.segments[0].source == 1


# Steps ahead


def test_a_step_ahead_takes_its_tokens_from_the_device_and_reads_prompts() -> None:
    book = make_book(step=8)
    for one in "ab":
        book.put(one, prompt=3)
    step = book.plan()
    book.put("long", prompt=20)
    ahead = book.plan_ahead({text: place for place, text in enumerate(step.rows)}, last=True)
    assert ahead is not None and ahead.plan.last and ahead.plan.is_ahead
    assert [segment[:3] for segment in ahead.plan.segments[:2]] == [(0, 3, (0,)), (1, 3, (0,))]
    assert [segment.source for segment in ahead.plan.segments] == [0, 1, -1]
    assert sizes(ahead) == {"a": 1, "b": 1, "long": 6} and names(ahead.rows) == ["a", "b"]


def test_no_step_is_ahead_of_a_text_that_needs_the_host() -> None:
    book = make_book()
    book.put("a", sampling=SamplingParams(logprobs=1))
    step = book.plan()
    assert book.plan_ahead({text: place for place, text in enumerate(step.rows)}) is None


def test_an_unread_token_is_in_no_index() -> None:
    """A page that it completes has a hash only when the host knows the token."""
    book = make_book()
    text = book.put("a", prompt=3, new=9)
    step = book.plan()
    assert book.plan_ahead({text: 0}) is not None
    assert text.planned == 4 and text.pages.named == 0
    answer(book, step)
    answer(book, Step(step.plan, step.texts))
    book.plan()
    assert text.pages.named == 1


# Steps without memory


def test_a_step_without_memory_is_forgotten_and_the_next_ones_are_half_as_large() -> None:
    """Until a prompt finds memory: then they are as large again as those that had it at load."""
    book = make_book(rows=8, pages=2000, step=4096)
    for number in range(8):
        book.put(str(number), prompt=600)
    found = []
    for _ in range(6):
        step = book.plan()
        found.append(sum(sizes(step).values()))
        book.undo(step)
        book.plan_less(step)
        assert (book.running, book.waiting, book.kv.usage) == (0, 8, 0)
    assert found == [4096, 2048, 1024, 512, 256, 128]
    book.found_memory()
    step = book.plan()
    assert sum(sizes(step).values()) == SURE_TOKENS
    book.undo(step)
    assert waiting(book) == [str(number) for number in range(8)]


def test_parts_without_memory_are_planned_again_with_all_their_pages() -> None:
    book = make_book(step=16)
    book.put("runs", prompt=2, new=9)
    play(book)
    long = book.put("long", prompt=range(100, 140))
    play(book)
    step = book.plan()
    assert sizes(step) == {"runs": 1, "long": 15}
    book.undo(step)
    assert long.planned == 15 and book.running == 2
    assert len(book.kv.match(book.put("other", prompt=range(100, 140)).pages, 40)) == 3, (
        "what was undone is in no index"
    )
    book.cancel("other")
    again = book.plan()
    assert sizes(again) == {"runs": 1, "long": 15}
    part = again.plan.segments[1]
    assert part.start == 15 and (part.first_block, len(part.blocks)) == (0, len(long.pages.pages))
    other = book.put("other", prompt=range(100, 140))
    answer(book, again)
    book.plan()
    assert other.cached_tokens == 36, "all of it, the last part in this very step"


def test_the_last_prompt_of_a_step_is_given_up() -> None:
    book = make_book(rows=4, step=64)
    runs = book.put("runs", new=9)
    play(book)
    book.put("first", prompt=20)
    second = book.put("second", prompt=20)
    step = book.plan()
    book.undo(step)
    assert book.give_up(step) is second and waiting(book) == ["first"]
    assert play(book) == [{"runs": 1, "first": 20}]
    step = book.plan()
    book.undo(step)
    assert book.give_up(step) is None, "all were decoded"
    assert runs.row is not None


def test_a_half_read_prompt_that_is_given_up_frees_its_row() -> None:
    book = make_book(step=16)
    long = book.put("long", prompt=40)
    book.plan()
    step = book.plan()
    book.undo(step)
    assert book.give_up(step) is long and not book.has_work
    book.plan()
    assert book.kv.usage == 0 and long.row is None


# Everything at once


class Cells:
    """What every rank does with its pages, on tokens in the place of keys and values."""

    def __init__(self, rows: int) -> None:
        self._tables: list[dict[int, int]] = [{} for _ in range(rows)]
        self._cells: dict[tuple[int, int], int] = {}

    def execute(self, plan: StepPlan, tokens: list[tuple[int, ...]]) -> None:
        """Tokens are those of the segments, what the device chose among them."""
        for segment in plan.segments:
            for place, page in enumerate(segment.blocks):
                self._tables[segment.row][segment.first_block + place] = page
        written = [
            (self._at(segment.row, segment.start + place), token)
            for segment, own in zip(plan.segments, tokens, strict=True)
            for place, token in enumerate(own)
        ]
        assert len({at for at, _ in written}) == len(written), "two tokens in one cell"
        self._cells.update(written)

    def _at(self, row: int, position: int) -> tuple[int, int]:
        page = self._tables[row][position // PAGE]
        assert page > 0
        return page, position % PAGE

    def row(self, row: int, length: int) -> list[int]:
        return [self._cells[self._at(row, position)] for position in range(length)]


class Game:
    """A book and its ranks; steps may be launched ahead. Each text's tokens are known beforehand."""

    def __init__(self, book: Book, rows: int, step: int, chunk: int, ratio: float, ahead: bool) -> None:
        self.book, self.cells = book, Cells(rows)
        self.limits = TokenBudget(step, chunk, ratio)
        self.ahead = ahead
        self.flights: list[Step] = []
        self.ends: dict[str, int] = {}  # the place of the end of text
        self.ended: list[str] = []

    def token(self, text: Sequence, position: int) -> int:
        place = position - len(text.request.prompt_ids)
        if place < 0:
            return text.request.prompt_ids[position]
        return EOS if place == self.ends.get(name(text)) else 50 + (zlib.crc32(name(text).encode()) + place) % 7

    def step(self) -> None:
        book = self.book
        if not self.flights:
            self._launch(None, book.plan())
        if self.ahead and self.flights:
            before = self.flights[-1]
            step = book.plan_ahead({text: place for place, text in enumerate(before.rows)})
            if step is not None:
                self._launch(before, step)
        if self.flights:
            for text in self.flights.pop(0).rows:
                if book.is_live(text) and book.enter(text, self.token(text, text.length)).is_last:
                    self.ended.append(name(text))

    def _launch(self, before: Step | None, step: Step) -> None:
        if not step.texts:
            return
        chosen = [self.token(text, text.length) for text in before.rows] if before else []
        segments = step.plan.segments
        tokens = [(chosen[segment.source],) if segment.source >= 0 else segment.tokens for segment in segments]
        self.cells.execute(step.plan, tokens)
        self._check(step)
        self.flights.append(step)

    def _check(self, step: Step) -> None:
        segments, running = step.plan.segments, self.book._running
        assert len({segment.row for segment in segments}) == len(segments)
        lengths = [len(segment.tokens) for segment in segments]
        for text in self.book.live:
            expected = [self.token(text, position) for position in range(text.planned)]
            assert self.cells.row(text.row, text.planned) == expected, "another text's tokens"  # type: ignore[arg-type]
        before = [text for text in step.texts if text not in self.book._admitted]
        decoded = sum(segment.start > 0 and len(segment.tokens) == 1 and text in before
                      for text, segment in zip(step.texts, segments, strict=True))  # fmt: skip
        assert sum(lengths) - decoded <= max(self.limits.step - decoded, self.limits.chunk // 2, 1)
        assert lengths[:decoded] == [1] * decoded
        # Whoever has a token to compute gets it, unless prompts are read.
        assert all(text in step.texts for text in running if text.length - text.planned == 1 and text.generated)
        ranks = [text.place for text in self.book._admitted if text.row is not None]
        assert ranks == sorted(ranks) and all(rank < text.place for rank in ranks for text in self.book._waiting)


actions = st.lists(
    st.tuples(st.sampled_from(["add", "add", "cancel", "step", "step"]), st.integers(0, 200)), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(
    actions, st.integers(0, 20), st.sampled_from([(1, 1), (7, 5), (20, 20), (60, 16)]),
    st.sampled_from([0.3, 1.2, math.inf]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_pages_hold_their_own_tokens_and_every_text_ends_once_or_was_cancelled(
    script: list[tuple[str, int]], spare: int, tokens: tuple[int, int], ratio: float, reuse: bool, ahead: bool
) -> None:
    """Prompts of up to 40 tokens, whose first 20 are the same for two of three. The longest text needs 12 pages."""
    book = make_book(4, 12 + spare, *tokens, ratio=ratio, reuse=reuse)
    game = Game(book, 4, *tokens, ratio=ratio, ahead=ahead)
    added, cancelled = [], set()
    for action, number in script:
        if action == "add":
            added.append(f"r{len(added)}")
            own = 1000 * len(added)
            common = own if number % 3 == 0 else 0
            prompt = [token + (common if token < 20 else own) for token in range(100, 101 + number % 40)]
            prompt = [token if token - common < 120 else token + own for token in prompt]
            if number % 5 == 0:
                game.ends[added[-1]] = number % 4
            book.put(added[-1], prompt, new=1 + number % 7, priority=number % 11 == 0)
        elif action == "cancel" and added:
            cancelled.add(added[number % len(added)])
            book.cancel(added[number % len(added)])
        else:
            game.step()
    for _ in range(20_000):
        if not book.has_work and not game.flights:
            break
        game.step()
    assert not book.has_work
    book.plan()
    assert book.kv.usage == 0 and sorted(book._free_rows) == [0, 1, 2, 3]
    assert len(game.ended) == len(set(game.ended)) and set(added) == set(game.ended) | cancelled
