"""Two real servers behind HAProxy in fp32, where every text is known: one is killed under load and added back."""

from __future__ import annotations

import pytest

from scripts.reliability import balancer, failover_report
from scripts.reliability.failover import BURST, failover


@pytest.mark.long  # three loads of the model, one of them under load: about two minutes
@pytest.mark.timeout(600)
def test_only_streams_in_flight_are_lost_with_a_server() -> None:
    try:
        balancer.find_haproxy()
    except balancer.BalancerError as error:
        pytest.skip(str(error))
    report = failover("smollm2", "fp32", 1.5, 20.0, 16)
    print(failover_report.table(report))
    assert failover_report.failures(report) == {}
    killed = report["failover"]
    assert killed["outcomes"]["wrong"] == 0 and killed["outcomes"]["whole"] > BURST
    assert killed["cut_while_in_flight"] <= killed["open_requests_at_kill"] + BURST
    # The burst came just before the kill: half of it had gone to the server that died.
    assert killed["sent_elsewhere"] > 0
    assert killed["taken_out_after_s"] < 5 and killed["served_after_return"] > 0
