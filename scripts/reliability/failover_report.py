"""Numbers and tables of a fail-over run, from the answers that its clients got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.bench.open_load import CUT, WHOLE, Answer, count
from scripts.bench.report import percentile


def phase(answers: Sequence[Answer]) -> dict[str, Any]:
    """Times (ms) and outcomes of one load."""
    first = [answer.first_token_ms for answer in answers if answer.first_token_ms is not None]
    whole = [
        (answer.end_s - answer.due_s) * 1e3
        for answer in answers
        if answer.outcome == WHOLE and answer.end_s is not None
    ]
    return {
        "requests": len(answers),
        "outcomes": count(answers),
        "first_token_ms_median": round(percentile(first, 50), 1),
        "first_token_ms_p95": round(percentile(first, 95), 1),
        "whole_ms_median": round(percentile(whole, 50), 1),
        "whole_ms_p95": round(percentile(whole, 95), 1),
        "details": sorted({answer.detail for answer in answers if answer.detail}),
    }


def kill(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the run in which a server was killed: of its requests, those that were begun may be cut."""
    answers: list[Answer] = found.pop("answers")
    cut = [answer for answer in answers if answer.outcome == CUT]
    in_flight = [a for a in cut if a.first_s is not None and a.first_s <= found["killed_at_s"] + 1.0]
    return found | phase(answers) | {"cut_while_in_flight": len(in_flight)}


def failures(report: dict[str, Any]) -> dict[str, int]:
    """Requests that failed although no answer had begun, or broke off with no server killed; empty if all is well."""
    found: dict[str, int] = {}
    parts = {**report["phases"], "failover": report["failover"]}
    for name, part in parts.items():
        failed = sum(part["outcomes"].values()) - part["outcomes"][WHOLE] - part.get("cut_while_in_flight", 0)
        if failed:
            found[name] = failed
    return found


def table(report: dict[str, Any]) -> str:
    """Lines for people, in Markdown."""
    setting, killed = report["setting"], report["failover"]
    lines = [
        f"{setting['model']} {setting['dtype']}, {setting['rate_per_s']} requests/s of {setting['new_tokens']} tokens",
        "",
        "| servers | requests | whole | failed | first token, median / p95 | whole answer, median / p95 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = [(name, part) for name, part in sorted(report["phases"].items())]
    for name, part in [*rows, ("2, one killed and added back", killed)]:
        failed = part["requests"] - part["outcomes"][WHOLE]
        lines.append(
            f"| {name} | {part['requests']} | {part['outcomes'][WHOLE]} | {failed} | "
            f"{part['first_token_ms_median']:.0f} / {part['first_token_ms_p95']:.0f} ms | "
            f"{part['whole_ms_median']:.0f} / {part['whole_ms_p95']:.0f} ms |"
        )
    lines += [
        "",
        f"killed: {killed['processes_killed']} processes with {killed['open_requests_at_kill']} open requests; "
        f"{killed['cut_while_in_flight']} were cut after their first token, "
        f"{killed['sent_elsewhere']} sent to the other server",
        f"taken out after {killed['taken_out_after_s']} s; back {killed['back_after_start_s']} s after its start "
        f"(load {killed['load_s']} s), {killed['served_after_return']} requests since",
    ]
    return "\n".join(lines)
