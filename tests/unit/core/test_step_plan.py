"""Plans survive the channel, whatever they hold; the channel needs no second rank to be tested."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsserve.core.step_plan import Admission, Plan
from dsserve.parallel.plan_channel import FRAME, PlanChannel

numbers = st.lists(st.integers(0, 2**24 - 1), max_size=80).map(tuple)
plans = st.builds(
    Plan,
    evict=st.lists(st.integers(0, 255), max_size=16).map(tuple),
    tokens=numbers,
    keep=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=4).map(tuple),
    admit=st.lists(
        st.builds(Admission, numbers.filter(bool), st.integers(0, 255), st.integers(0, 2**20), st.booleans()),
        max_size=4,
    ).map(tuple),
    last=st.booleans(),
    ahead=st.booleans(),
    rewind=st.booleans(),
)


@given(plans)
def test_a_plan_survives_encoding(plan: Plan) -> None:
    assert Plan.decode(plan.encode()) == plan


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

    def carry(self, plan: Plan) -> Plan:
        self.sending = True
        self.leader.send(plan)
        self.sending = False
        return self.follower.receive()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("length", [0, 1, FRAME - 8, FRAME - 6, FRAME - 5, FRAME - 4, FRAME, 8192])
def test_the_channel_carries_plans_of_every_length(monkeypatch: pytest.MonkeyPatch, shared: bool, length: int) -> None:
    monkeypatch.setattr("dsserve.parallel.collectives.uses_shared_memory", lambda: shared)
    wire = Wire(monkeypatch, shared)
    plan = Plan(evict=(1,), tokens=tuple(range(length)), last=True)
    assert wire.carry(plan) == plan
    assert not wire.frames


def test_one_rank_alone_needs_no_group() -> None:
    PlanChannel(0, 1).send(Plan(tokens=(1,)))
