"""Texts over few pages are those over plenty: put back in every phase, begun on others' pages, launched ahead or not.
A real small model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from dsserve.core.request import GenerationRequest, SamplingParams, StopConditions, TokenEvent
from dsserve.engine.engine import Engine
from dsserve.engine.sequence import Sequence
from dsserve.runner.autotp import KVSize
from dsserve.sampling import gpu_sampler
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.pending import HostChoice
from tests.support.paged import ALONE, greedy, make_engine, make_runner, make_scheduler
from tests.support.schedules import (
    CONTEXT,
    EOS,
    SLOTS,
    VOCABULARY,
    Played,
    Schedule,
    differences,
    draw_less,
    make_llama,
    make_text,
    play,
)

PAGE = 4
PLENTY = SLOTS * CONTEXT // PAGE


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_llama()
    torch.set_num_threads(threads)


def make(
    model: LlamaForCausalLM, pages: int = PLENTY, part: int = 48, ahead: bool = False, reuse: bool = True
) -> Engine:
    """One whose texts lose their pages where `pages` are few; the longest text needs 12."""
    size = KVSize(SLOTS, CONTEXT, pages, PAGE)
    launch = DeviceSampler(SLOTS, VOCABULARY, torch.device("cpu")).launch if ahead else HostChoice
    scheduler = make_scheduler(size, 2 * part, part, reuse=reuse)
    runner = make_runner(model, size)
    return make_engine(runner, scheduler, make_text, eos=EOS, launch=launch, launch_ahead=ahead)


def count_phases(engine: Engine) -> Counter[str]:
    """In which phase texts are put back."""
    found: Counter[str] = Counter()
    put_back = engine._scheduler._put_back

    def note(text: Sequence) -> None:
        known = len(text.request.prompt_ids)
        found["half-read" if text.planned < known else "decoded" if text.generated else "read"] += 1
        put_back(text)

    engine._scheduler._put_back = note  # type: ignore[method-assign]
    return found


def prompt_reports(played: Played) -> dict[str, list[tuple[int, float | None]]]:
    """The log probabilities of prompts, each of which is told once."""
    found = {}
    for event in (event for call in played.events for event in call if event.prompt_logprobs):
        assert event.request_id not in found
        found[event.request_id] = [(one.token, one.logprob) for one in event.prompt_logprobs]
    return found


def lengthen(schedule: Schedule) -> Schedule:
    """Most texts as long as they may be, so that they get into each other's way."""
    longer = StopConditions(ignore_eos=True)
    for number, (name, request) in enumerate(schedule.requests.items()):
        if number % 4 and request.max_new_tokens:
            new = CONTEXT - len(request.prompt_ids)
            schedule.requests[name] = replace(request, max_new_tokens=new, stop=longer)
        schedule.arrivals[name] //= 3
    return schedule


def compare(model: LlamaForCausalLM, seeds: range) -> Counter[str]:
    """Plays schedules on engines with few pages; returns what happened."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        schedule = lengthen(Schedule.draw(seed))
        expected = play(make(model, reuse=False), ALONE, schedule, cancel=False)
        part = random.Random(seed).choice([3, 8, 20])
        for pages in (12, 20):
            for ahead in (False, True):
                engine = make(model, pages, part, ahead)
                phases = count_phases(engine)
                with pytest.MonkeyPatch.context() as patch:
                    if seed % 2:  # rows of steps that were launched ahead are void
                        patch.setattr(gpu_sampler, "draw", draw_less(0.3))
                    found = play(engine, ALONE, schedule)
                assert differences(schedule, expected, found) == [], (seed, pages, ahead)
                reports = prompt_reports(expected)
                for name, report in prompt_reports(found).items():
                    for (token, one), (known, other) in zip(report, reports[name], strict=True):
                        assert token == known and one == (None if other is None else pytest.approx(other, abs=1e-4))
                engine._scheduler.plan()
                assert engine._scheduler.kv.usage == 0
                counts += phases
                counts["texts"] += len(schedule.requests)
                counts["preemptions"] += engine._scheduler.preemptions
                counts["cached"] += sum(event.cached_tokens for call in found.events for event in call if event.is_last)
                counts["reports"] += len(prompt_reports(found))
    return counts


def test_texts_over_few_pages_are_those_over_plenty(model: LlamaForCausalLM) -> None:
    counts = compare(model, range(2))
    assert counts["preemptions"] > 20 and counts["cached"] > 200
    assert counts["half-read"] > 0 and counts["decoded"] > 0


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_thousands_of_texts_over_few_pages(model: LlamaForCausalLM, part: int) -> None:
    counts = compare(model, range(1000 + 50 * part, 1050 + 50 * part))
    print(dict(counts))
    assert counts["texts"] >= 2000 and counts["preemptions"] > 1000


def finish(engine: Engine) -> list[TokenEvent]:
    events = []
    while engine.running or engine.waiting:
        events += engine.run(1)
    return events


def of(events: list[TokenEvent], name: str) -> list[TokenEvent]:
    return [event for event in events if event.request_id == name]


@pytest.mark.parametrize(("prompt", "part"), [(40, 6), (20, 48)])
def test_log_probabilities_of_a_prompt_that_was_put_back_are_told_once(
    model: LlamaForCausalLM, prompt: int, part: int
) -> None:
    """While it is read: computed and reported again. After its first token: computed again alone."""
    stop, sampling = StopConditions(ignore_eos=True), SamplingParams(logprobs=2)
    ids = tuple(6 + 7 * place % 30 for place in range(prompt))

    def serve(pages: int) -> tuple[list[TokenEvent], Engine, Counter[str]]:
        engine = make(model, pages, part)
        phases = count_phases(engine)
        for name in "ab":
            engine.admit(greedy(name, (8, 9, int(name, 16)), 30, stop=stop))
        events = engine.run(1)
        engine.admit(greedy("wants", ids, 8, sampling=sampling, prompt_logprobs=True, stop=stop))
        return events + finish(engine), engine, phases

    (expected, *_), (found, engine, phases) = serve(PLENTY), serve(16 if prompt == 40 else 15)
    assert engine._scheduler.preemptions > 0 and phases["half-read" if prompt == 40 else "decoded"] > 0
    told = [event.prompt_logprobs for event in of(found, "wants") if event.prompt_logprobs]
    (known,) = [event.prompt_logprobs for event in of(expected, "wants") if event.prompt_logprobs]
    assert len(told) == 1 and [one.token for one in told[0]] == list(ids)
    assert [one.logprob for one in told[0][1:]] == pytest.approx([one.logprob for one in known[1:]], abs=1e-4)
    for name in ("a", "b", "wants"):
        assert "".join(event.text for event in of(found, name)) == "".join(event.text for event in of(expected, name))
        assert all(event.cached_tokens == 0 for event in of(found, name))


def test_several_texts_of_one_prompt_are_read_once(model: LlamaForCausalLM) -> None:
    engine = make(model)
    prompt, stop = tuple(range(6, 31)), StopConditions(ignore_eos=True)
    for index in range(SLOTS):
        engine.admit(GenerationRequest("n", prompt, 6, SamplingParams(1.0, seed=index), stop, index))
    events = finish(engine)
    cached = {event.index: event.cached_tokens for event in events}
    assert cached == {0: 0, 1: 24, 2: 24}
    texts = {"".join(event.text for event in events if event.index == index) for index in range(SLOTS)}
    assert len(texts) == SLOTS


def test_salted_texts_are_the_same_and_share_nothing(model: LlamaForCausalLM) -> None:
    engine = make(model)
    prompt, stop = tuple(range(6, 31)), StopConditions(ignore_eos=True)
    for name, salt in (("plain", None), ("salted", "x"), ("same", "x")):
        engine.admit(greedy(name, prompt, 6, cache_salt=salt, stop=stop))
    events = finish(engine)
    assert {event.request_id: event.cached_tokens for event in events} == {"plain": 0, "salted": 0, "same": 24}
    assert len({"".join(event.text for event in of(events, name)) for name in ("plain", "salted", "same")}) == 1
