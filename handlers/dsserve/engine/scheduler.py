"""Rank 0's book of sequences: who waits, who runs in which row, what the next step computes.

Every running text gets its next token in every step. What a step has left goes to prompts, in the order of arrival: any
number of them may be read in part (the field's chunked prefill). Where pages run out, the text that came last is put
back and computed again later (preemption by recomputation). Pure bookkeeping on numbers: no model, no collective, no
HTTP, so it is tested in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsserve.core.step_plan import Segment, StepPlan, Wanted
from dsserve.engine.sequence import Sequence
from dsserve.engine.token_budget import TokenBudget
from dsserve.engine.waiting_queue import WaitingQueue, place
from dsserve.kv.manager import KVManager

# Of a prompt whose every token's logits are wanted: each holds a number for every word of the vocabulary.
_ALL_LOGITS_AT_ONCE = 512


@dataclass(frozen=True)
class Step:
    """A plan, and the text of each of its segments."""

    plan: StepPlan
    texts: tuple[Sequence, ...]

    @property
    def rows(self) -> list[Sequence]:
        """The texts whose next token's logits the step gives, in order."""
        pairs = zip(self.texts, self.plan.segments, strict=True)
        return [text for text, segment in pairs if segment.wanted & Wanted.NEXT]

    @property
    def completes(self) -> bool:
        """Whether a prompt is read to its end, so that a first token comes."""
        return any(not text.generated for text in self.rows)

    @property
    def reading(self) -> list[tuple[Sequence, int]]:
        """The texts of which more is read than the newest token, and how many tokens."""
        pairs = zip(self.texts, (len(segment.tokens) for segment in self.plan.segments), strict=True)
        return [(text, count) for text, count in pairs if count > 1 or not text.generated]


class Scheduler:
    """Who runs, and what is computed next.

    Args:
        rows: most running texts.
        kv: the pages of all texts.
        budget: tokens of a step.
    """

    def __init__(self, rows: int, kv: KVManager, budget: TokenBudget) -> None:
        self.kv = kv
        self._budget = budget
        self._free_rows = list(range(rows - 1, -1, -1))
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # in the order of admission
        self._leaving: set[Sequence] = set()
        self._refused: tuple[Sequence, int] | None = None  # the first that waits found no pages, before this release
        self._admitted: list[Sequence] = []  # in the last plan
        self.preemptions = 0

    @property
    def running(self) -> int:
        """Sequences that hold a row and go on."""
        return len(self._running) - len(self._leaving)

    @property
    def waiting(self) -> int:
        """Sequences without a row."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self._waiting) or self.running > 0

    @property
    def live(self) -> list[Sequence]:
        """Those that hold a row and go on."""
        return [sequence for sequence in self._running if sequence not in self._leaving]

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence behind those of its priority."""
        self._waiting.add(sequence)

    def is_live(self, sequence: Sequence) -> bool:
        """Whether a sequence that had a row when a step began still goes on."""
        return sequence.row is not None and sequence not in self._leaving

    def cancel(self, request_id: str) -> list[Sequence]:
        """Forgets a request's sequences and returns those that had not ended; their rows are freed in the next step.
        Unknown ids are fine: it may have ended already."""
        waiting = self._waiting.take(request_id)
        running = [s for s in self._running if s.request.request_id == request_id and s not in self._leaving]
        self._leaving |= set(running)
        return running + waiting

    def end(self, sequence: Sequence) -> None:
        """Frees a sequence's row and pages in the next step."""
        self._leaving.add(sequence)

    def plan(self, last: bool = False) -> Step:
        """The next step, already entered in the book; no step is in flight. `last` ends the handler's call."""
        self._leave()
        step = self._build({}, may_preempt=True, last=last)
        assert step is not None, "a plan that may preempt has pages"
        return step

    def plan_ahead(self, sources: Mapping[Sequence, int], last: bool = False) -> Step | None:
        """The step after the one in flight; None where it has to wait for that one's tokens, or has nothing to do.

        A row whose text turns out to have ended is decoded once more, for nothing.

        Args:
            sources: the texts whose tokens are being chosen, and their places in the choice.
        """
        going = [text for text in sources if self.is_live(text)]
        if not all(text.is_chainable for text in going):
            return None
        self._leave()
        step = self._build(sources, may_preempt=False, last=last)
        return step if step is not None and step.texts else None

    def _build(self, sources: Mapping[Sequence, int], may_preempt: bool, last: bool) -> Step | None:
        """None where a running text finds no page and none may be preempted."""
        self._admitted, preempted = [], self.preemptions
        decoded: list[Sequence] = []
        parts: list[Sequence] = []
        for text in list(self._running):
            left = text.length - text.planned
            if text.row is None or (left == 0 and not _goes_on(text)):
                continue  # preempted in this plan, or its last token is being chosen
            if left > 1:
                parts.append(text)
            elif self._find_page(text, may_preempt):
                decoded.append(text)
            elif not may_preempt:
                return None
        joining = min(len(self._waiting), len(self._free_rows)) + len(parts)
        room = self._budget.prompts(len(decoded), joining)
        read: list[tuple[Sequence, int]] = []
        for text in parts:
            if room > 0 and text.row is not None and (count := self._next_part(text, room, may_preempt)):
                read.append((text, count))
                self._advance(text, count)
                room -= count
        chosen = [(text, 1) for text in decoded if text.row is not None]  # others were put back meanwhile
        for text, _ in chosen:
            self._advance(text, 1)
        chosen += [(text, count) for text, count in read if text.row is not None]
        if self.preemptions == preempted:  # whoever was put back should not come again at once
            chosen += self._admit(room)
        segments = tuple(self._segment(text, count, sources) for text, count in chosen)
        return Step(StepPlan(segments, last), tuple(text for text, _ in chosen))

    def _segment(self, text: Sequence, count: int, sources: Mapping[Sequence, int]) -> Segment:
        """The segment of the last `count` tokens that were planned of a text."""
        end = text.planned
        start, known = end - count, text.length
        first_block, blocks = self.kv.tell(text.pages)
        wanted = Wanted.NEXT if end >= known else Wanted.NOTHING
        if text.wants_all:
            wanted |= Wanted.ALL
        source = sources[text] if start >= known else -1
        tokens = (0,) if source >= 0 else tuple(text.ids(start, end))
        assert text.row is not None
        return Segment(text.row, start, tokens, first_block, blocks, wanted, source)

    def _advance(self, text: Sequence, count: int) -> None:
        """Enters that the next `count` tokens of a text are computed in this step."""
        text.planned += count
        known, size = min(text.planned, text.length), self.kv.page_tokens
        if known // size > text.pages.named:
            self.kv.name(text.pages, known)

    def _find_page(self, text: Sequence, may_preempt: bool) -> bool:
        """A place for a running text's next token; False where it has none, or was itself put back for it."""
        while not self.kv.grow(text.pages, text.planned + 1):
            if not may_preempt or self._preempt() is text:
                return False
        return True

    def _next_part(self, text: Sequence, room: int, may_preempt: bool) -> int:
        """How many tokens of a prompt that was read in part come next; 0 where it has to wait for pages."""
        count = _part(text, text.planned, room)
        while not self.kv.grow(text.pages, text.planned + count):
            if not may_preempt or self._youngest() is text:
                return 0
            self._preempt()
        return count

    def _admit(self, room: int) -> list[tuple[Sequence, int]]:
        """The texts that begin in this step, as long as there are rows, pages and tokens for them."""
        admitted: list[tuple[Sequence, int]] = []
        while room > 0 and self._waiting and self._free_rows:
            text = self._waiting.first
            if self._refused == (text, self.kv.releases):
                break
            found = [] if text.wants_all else self.kv.match(text.pages, text.length)
            # A page for each of the others, so that they go on for a while before somebody is put back.
            spare = len(self._running)
            if self._running and self.kv.free_pages < self.kv.new_pages(found, text.length) + spare:
                self._refused = (text, self.kv.releases)
                break
            shared = self.kv.begin(text.pages, found)
            count = _part(text, shared, room)
            if not self.kv.grow(text.pages, shared + count):
                self.kv.release(text.pages)
                break
            self._waiting.remove(text)
            text.row, text.planned = self._free_rows.pop(), shared
            text.cached_tokens = min(shared, len(text.request.prompt_ids)) if not text.generated else text.cached_tokens
            self._running.append(text)
            self._admitted.append(text)
            self._advance(text, count)
            admitted.append((text, count))
            room -= count
        return admitted

    def undo(self, step: Step) -> None:
        """Forgets the last plan, which did not fit into memory."""
        for text, segment in zip(step.texts, step.plan.segments, strict=True):
            text.planned = segment.start
            self.kv.unname(text.pages, segment.start)
        for text in reversed(self._admitted):
            self._put_back(text)

    def plan_less(self, step: Step) -> None:
        """After `undo`: from now on steps are smaller."""
        self._budget.halve(step.plan.total)

    def found_memory(self) -> None:
        """A step that read a prompt to its end fitted."""
        self._budget.recover()

    def give_up(self, step: Step) -> Sequence | None:
        """After `undo`: ends the text of the step that reads a prompt and came last, and returns it; None where all
        were decoded."""
        text = max((text for text, _ in step.reading), key=place, default=None)
        if text is None:
            return None
        if text.row is None:
            self._waiting.remove(text)
        else:
            self._leaving.add(text)
        return text

    def _youngest(self) -> Sequence:
        return max(self._running, key=place)

    def _preempt(self) -> Sequence:
        """Puts back the text that came last, of those of the highest `priority` number; returns it."""
        text = self._youngest()
        self._put_back(text)
        self.preemptions += 1
        return text

    def _put_back(self, text: Sequence) -> None:
        assert text.row is not None
        self._running.remove(text)
        self._free_rows.append(text.row)
        self.kv.release(text.pages)
        text.put_back()
        self._waiting.put_back(text)

    def _leave(self) -> None:
        """Frees what those hold that have ended. A step that is in flight may still write there: it does so before any
        other step reads or writes."""
        if not self._leaving:
            return
        for text in self._leaving:
            assert text.row is not None
            self.kv.name(text.pages, min(text.planned, text.length))
            self._free_rows.append(text.row)
            self.kv.release(text.pages)
            text.row = None
        self._running = [text for text in self._running if text not in self._leaving]
        self._leaving.clear()


def _part(text: Sequence, start: int, room: int) -> int:
    """How many tokens of a text are read from `start` on, where a step has room for so many."""
    return min(text.length - start, room, _ALL_LOGITS_AT_ONCE if text.wants_all else room)


def _goes_on(text: Sequence) -> bool:
    """Whether a text whose next token is being chosen wants another one."""
    return text.generated + 1 < text.request.max_new_tokens
