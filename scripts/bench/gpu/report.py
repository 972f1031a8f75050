"""The results of `run` as a table: each way beside the engine, and how near it comes to the bandwidth's floor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.common.console import extra

WAYS = {
    "engine": "this engine",
    "http": "this engine through HTTP",
    "kernels": "kernel injection, this engine's batches",
    "autotp": "AutoTP + generate (upstream's way)",
    "batching": "transformers' continuous batching, one device",
    "generate": "transformers' generate, one device",
}
QUOTED = Path(__file__).resolve().parents[3] / "configs" / "measurements" / "llama-6.7b.json"
COLUMNS = (
    "way", "prompt", "rows", "ms a step", "tokens/s", "first token, median / p95", "last first token",
    "inter-token p95", "of the floor", "GiB a rank",
)  # fmt: skip


def add_floor(part: dict[str, Any], ranks: list[dict[str, Any]], prompt: int, new_tokens: int) -> None:
    """Writes into each case the floor of a step, the slowest rank's bytes over its bandwidth, and the share reached."""
    for name, numbers in part["cases"].items():
        if not name.isdigit():
            continue
        floor = max(floor_ms(rank, int(name), prompt + new_tokens / 2) for rank in ranks)
        numbers["floor_ms"] = round(floor, 3)
        numbers["of_floor"] = round(floor / numbers["step_ms"], 3)


def floor_ms(rank: dict[str, Any], rows: int, context: float) -> float:
    """Milliseconds that this rank needs to read a step's weights, keys and values at the bandwidth it measured."""
    read = rank["bytes"]["weights"] + rows * context * rank["bytes"]["kv_a_token"]
    return read / rank["bandwidth"] * 1e3


def table(report: dict[str, Any]) -> str:
    """Headings and rows, Markdown; then what was left out, and the admission of a long prompt."""
    setting, machine = report["setting"], report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{setting['shape']}, random weights, {setting['dtype']}, {setting['tp']} rank(s), {setting['new_tokens']} new "
        f"tokens, greedy, {setting['repeats']} rounds",
        f"{machine['device']}; {versions}; read bandwidth {_bandwidths(report)}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
    ]
    for way, title in WAYS.items():
        for prompt, part in report["parts"].get(way, {}).items():
            rows = [(int(name), numbers) for name, numbers in part["cases"].items() if name.isdigit()]
            lines += [_line(title, prompt, rows_, numbers, part) for rows_, numbers in sorted(rows)]
            if way == "engine":
                with extra("a peer's quoted figures"):
                    lines += _quoted(setting, prompt)
    return "\n".join([*lines, "", *_admissions(report), *_starts(report), *_left_out(report)])


def _line(title: str, prompt: str, rows: int, numbers: dict[str, float], part: dict[str, Any]) -> str:
    def number(key: str, digits: int) -> str:
        return f"{numbers[key]:.{digits}f}" if key in numbers else ""

    first = " / ".join(filter(None, (number("first_token_ms_median", 1), number("first_token_ms_p95", 1))))
    peak = f"{part['peak_gib']:.1f}" if "peak_gib" in part else ""
    cells = [title, prompt, str(rows), number("step_ms", 2), number("tokens_per_s", 0), first]
    cells += [number("last_first_token_ms", 1), number("inter_token_ms_p95", 2), number("of_floor", 2), peak]
    return f"| {' | '.join(cells)} |"


def _quoted(setting: dict[str, Any], prompt: str) -> list[str]:
    """The peer's figures for this setting, where they are known; they were not measured in this run."""
    if (setting["shape"], setting["dtype"], setting["device"], prompt) != ("llama-6.7b", "bf16", "gpu", "128"):
        return []
    peer = json.loads(QUOTED.read_text(encoding="utf-8"))["engines"][0]
    points = [point for point in peer["points"] if point["ranks"] == setting["tp"]]
    return [
        _line(f"{peer['name']}, quoted ({point['gpu']})", prompt, int(rows), {"step_ms": ms}, {})
        for point in points
        for rows, ms in point["ms"].items()
    ]


def _starts(report: dict[str, Any]) -> list[str]:
    lines = []
    for prompt, part in report["parts"].get("engine", {}).items():
        if "load_s" in part:
            phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in part["load_s"].items())
            lines.append(f"load, prompt {prompt}: {sum(part['load_s'].values()):.1f} s ({phases})")
    for prompt, part in report["parts"].get("http", {}).items():
        if "ready_s" in part:
            lines.append(f"TorchServe, prompt {prompt}: ready {part['ready_s']:.1f} s after its start")
    return lines


def _bandwidths(report: dict[str, Any]) -> str:
    found = [value for way in report["parts"].values() for part in way.values() for value in part.get("bandwidth", [])]
    return f"{min(found) / 1e9:.0f} to {max(found) / 1e9:.0f} GB/s" if found else "not measured"


def _admissions(report: dict[str, Any]) -> list[str]:
    lines = []
    for prompt, part in report["parts"].get("engine", {}).items():
        found = part["cases"].get("admission")
        if found:
            lines.append(
                f"A stream while a prompt of {prompt} is admitted: {found['inter_token_ms_p95']:.1f} ms between tokens "
                f"(p95; idle {found['idle_step_ms']:.1f}), {found['tokens_in_between']:.0f} tokens until its first one "
                f"after {found['long_first_token_ms']:.0f} ms"
            )
    return lines


def _left_out(report: dict[str, Any]) -> list[str]:
    return [
        f"left out: {WAYS[way]}, prompt {prompt}, {'all' if name == 'all' else f'{name} rows'}: {why}"
        for way, parts in report["parts"].items()
        for prompt, part in parts.items()
        for name, why in part.get("skipped", {}).items()
    ]
