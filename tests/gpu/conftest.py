"""Failures are told when they happen: a run that is cut off has no summary."""

from __future__ import annotations

from collections.abc import Generator

import pytest

_SHOWN = 6000  # characters of a failure, its end


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.config.get_terminal_writer().line(f"\n{report.nodeid}: {report.longreprtext[-_SHOWN:]}")
    return report
