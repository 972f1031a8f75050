"""Plans survive the channel, whatever they hold; the channel needs no second rank to be tested."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsserve.core.step_plan import Segment, StepPlan
from dsserve.parallel.plan_channel import FRAME, PlanChannel

numbers = st.lists(st.integers(0, 2**24 - 1), max_size=40).map(tuple)
segments = st.builds(
    Segment,
    row=st.integers(0, 1023),
    start=st.integers(0, 2**20),
    tokens=numbers.filter(bool),
    first_block=st.integers(0, 2**16),
    blocks=numbers,
    wanted=st.integers(0, 3),
    source=st.integers(-1, 1023),
)
plans = st.builds(StepPlan, st.lists(segments, max_size=6).map(tuple), st.booleans())


@given(plans)
def test_a_plan_survives_encoding(plan: StepPlan) -> None:
    encoded = plan.encode()
    assert StepPlan.decode(encoded) == plan
    assert all(0 <= number < 2**24 for number in encoded), "fp32 holds them"


@given(plans)
def test_a_plan_says_what_it_holds(plan: StepPlan) -> None:
    assert plan.total == sum(segment.end - segment.start for segment in plan.segments)
    assert plan.is_ahead == any(segment.source != -1 for segment in plan.segments)


class Wire:
    """Two channels joined by a list instead of a process group: what rank 0 puts in, the other takes out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
        self.frames: list[torch.Tensor] = []
        self.leader, self.follower = PlanChannel(0, 2), PlanChannel(1, 2)
        for channel in (self.leader, self.follower):
            channel._shared = shared
        monkeypatch.setattr("dsserve.parallel.collectives.all_reduce", self.exchange)
        monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: self.exchange(tensor))

    def exchange(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.sending:
            self.frames.append(tensor.clone())
            return tensor
        sent = self.frames.pop(0)
        assert sent.shape == tensor.shape and sent.dtype == tensor.dtype
        return tensor.copy_(sent)

    def carry(self, plan: StepPlan) -> StepPlan:
        self.sending = True
        self.leader.send(plan)
        self.sending = False
        return self.follower.receive()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("length", [0, 1, *range(FRAME - 12, FRAME - 8), FRAME, 8192])
def test_the_channel_carries_plans_of_every_length(monkeypatch: pytest.MonkeyPatch, shared: bool, length: int) -> None:
    monkeypatch.setattr("dsserve.parallel.collectives.uses_shared_memory", lambda: shared)
    wire = Wire(monkeypatch, shared)
    plan = StepPlan((Segment(1, 0, tuple(range(length))),) if length else (), last=True)
    assert wire.carry(plan) == plan
    assert not wire.frames


def test_one_rank_alone_needs_no_group() -> None:
    PlanChannel(0, 1).send(StepPlan((Segment(0, 0, (1,)),)))
