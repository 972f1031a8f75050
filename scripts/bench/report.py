"""The benchmark's numbers as a table for people and as one JSON document for programs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.bench.client import Round

Rates = dict[int, list[float]]


@dataclass(frozen=True)
class Aim:
    """HTTP at `concurrent` requests should reach `ratio` times transformers' `generate` at `batch`."""

    concurrent: int
    batch: int
    ratio: float


AIMS = (Aim(1, 1, 1.1), Aim(8, 8, 1.2), Aim(16, 8, 1.6))
FIRST_TOKEN_AIM_MS = 60.0
# The most concurrent requests with every sampling parameter in use, against the same number of greedy ones.
SAMPLED = "16 sampled"
SAMPLED_AIM = 0.9


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile; nan for no values."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def http_numbers(rounds: dict[str, list[Round]]) -> dict[str, dict[str, float]]:
    """For each number of concurrent requests: median rate of the rounds, and times over all their requests."""
    numbers = {}
    for concurrent, group in rounds.items():
        first = [value for item in group for value in item.first_token_ms]
        token = [value for item in group for value in item.token_ms]
        gap = [value for item in group for value in item.gap_ms]
        numbers[concurrent] = {
            "tokens_per_s": round(statistics.median(item.tokens_per_s for item in group), 1),
            "tokens_per_s_min": round(min(item.tokens_per_s for item in group), 1),
            "tokens_per_s_max": round(max(item.tokens_per_s for item in group), 1),
            "first_token_ms_median": round(percentile(first, 50), 1),
            "first_token_ms_p95": round(percentile(first, 95), 1),
            "inter_token_ms_median": round(percentile(token, 50), 2),
            "inter_token_ms_p95": round(percentile(token, 95), 2),
            "inter_event_ms_median": round(percentile(gap, 50), 2),
            "inter_event_ms_p95": round(percentile(gap, 95), 2),
        }
    return numbers


def generate_numbers(before: Rates, after: Rates) -> dict[str, dict[str, float]]:
    """For each batch: the median of all runs, and of those before and after, where there are any."""
    numbers: dict[str, dict[str, float]] = {}
    for batch, rates in before.items():
        again = after.get(batch, [])
        found = {"tokens_per_s": rates + again, "before": rates, "after": again}
        numbers[str(batch)] = {name: round(statistics.median(group), 1) for name, group in found.items() if group}
    return numbers


def compare(http: dict[str, dict[str, float]], generate: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Each aim with what was reached."""
    reached: list[dict[str, Any]] = []
    for aim in AIMS:
        ratio = http[str(aim.concurrent)]["tokens_per_s"] / generate[str(aim.batch)]["tokens_per_s"]
        what = f"{aim.concurrent} concurrent / generate batch {aim.batch}"
        reached.append({"what": what, "value": round(ratio, 2), "aim": aim.ratio, "met": ratio >= aim.ratio})
    ratio = http[SAMPLED]["tokens_per_s"] / http["16"]["tokens_per_s"]
    sampled = {"what": "16 with all sampling / 16 greedy", "value": round(ratio, 2), "aim": SAMPLED_AIM}
    reached.append({**sampled, "met": ratio >= SAMPLED_AIM})
    first = http["1"]["first_token_ms_median"]
    idle = {"what": "first token when idle, ms", "value": first, "aim": FIRST_TOKEN_AIM_MS}
    return [*reached, {**idle, "met": first <= FIRST_TOKEN_AIM_MS}]


def table(report: dict[str, Any]) -> str:
    """The report as text. Times are medians with the 95th percentile behind the slash."""
    machine, setting = report["machine"], report["setting"]
    lines = [
        f"{setting['model']}, {setting['ranks']} ranks on {setting['device']}, {setting['dtype']}, "
        f"{setting['prompt_tokens']} prompt tokens, {setting['new_tokens']} new, greedy, "
        f"{setting['repeats']} rounds (medians)",
        f"{machine['cpu']}, {machine['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in machine["versions"].items()),
        "",
    ]
    lines += [*http_lines(report["http"]), "", *generate_lines(report["generate"]), ""]
    for item in report.get("aims", []):
        verdict = "met" if item["met"] else "MISSED"
        lines.append(f"{item['what']:>36} {item['value']:7.2f}   aim {item['aim']:g}: {verdict}")
    return "\n".join(lines)


def http_lines(http: dict[str, dict[str, float]]) -> list[str]:
    """One line for each number of concurrent requests, below a heading."""
    titles = "".join(f"{title:>18}" for title in ("first token ms", "inter-token ms", "between events ms"))
    lines = [f"{'through HTTP':>16} {'tokens/s':>9} {'(min-max)':>15}{titles}"]
    for concurrent, row in http.items():
        spread = f"({row['tokens_per_s_min']:.0f}-{row['tokens_per_s_max']:.0f})"
        times = ""
        for kind in ("first_token", "inter_token", "inter_event"):
            pair = f"{row[f'{kind}_ms_median']:.1f} / {row[f'{kind}_ms_p95']:.1f}"
            times += f"{pair:>18}"
        name = concurrent if concurrent == SAMPLED else f"{concurrent} concurrent"
        lines.append(f"{name:>16} {row['tokens_per_s']:9.1f} {spread:>15}{times}")
    return lines


def generate_lines(generate: dict[str, dict[str, float]]) -> list[str]:
    """One line for each batch of transformers' `generate`, below a heading."""
    lines = [f"{'generate':>16} {'tokens/s':>9} {'before':>9} {'after':>9}"]
    for batch, row in generate.items():
        after = f"{row['after']:9.1f}" if "after" in row else f"{'-':>9}"
        lines.append(f"{'batch ' + batch:>16} {row['tokens_per_s']:9.1f} {row['before']:9.1f} {after}")
    return lines
