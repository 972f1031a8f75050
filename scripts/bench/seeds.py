"""Measure how often a seed gives the same text under load as alone: it does wherever rounding moves no choice.

Asks a running server. In fp32 differences are rare accidents; in bf16 the shape of a matmul changes its last bit, and a
long text meets a choice that this bit decides sooner or later. The last line is one JSON document.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import typer

from scripts.common.console import fail

TEXTS, NEW_TOKENS, CONCURRENT = 48, 64, 16
TIMEOUT_S = 300.0


def ask(url: str, number: int, sampled: bool) -> list[str]:
    """The pieces of one stream, about one a token. Raises httpx.HTTPError."""
    body: dict[str, Any] = {"prompt": f"Story number {number}:", "max_new_tokens": NEW_TOKENS, "stream": True}
    if sampled:
        body |= {"temperature": 0.8, "top_p": 0.95, "seed": number}
    with httpx.stream("POST", url, json=body, timeout=TIMEOUT_S) as response:
        response.read()
        response.raise_for_status()
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(event)["text"] for event in events]


def compare(url: str, sampled: bool) -> dict[str, float]:
    """Texts that are equal alone and under load, and how many tokens go by until two differ."""
    alone = [ask(url, number, sampled) for number in range(TEXTS)]
    with ThreadPoolExecutor(CONCURRENT) as pool:
        loaded = list(pool.map(lambda number: ask(url, number, sampled), range(TEXTS)))
    equal = sum(one == other for one, other in zip(alone, loaded, strict=True))
    tokens, splits = 0, 0
    for one, other in zip(alone, loaded, strict=True):
        shared = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
        tokens, splits = tokens + shared, splits + (one != other)
    return {"texts": TEXTS, "equal": equal, "tokens_compared": tokens, "splits": splits}


def main(url: str = typer.Argument(help="e.g. http://127.0.0.1:8080/predictions/smollm2")) -> None:
    """Print both counts, then one JSON line."""
    try:
        report = {name: compare(url, name == "sampled") for name in ("greedy", "sampled")}
    except httpx.HTTPError as error:
        fail(f"{url}: {error}")
    for name, counts in report.items():
        typer.echo(
            f"{name:>8}: {counts['equal']} of {counts['texts']} texts of {NEW_TOKENS} tokens equal alone and at "
            f"{CONCURRENT} at once; {counts['splits']} splits in {counts['tokens_compared']} tokens"
        )
    typer.echo(json.dumps({**report, "new_tokens": NEW_TOKENS, "concurrent": CONCURRENT}))


if __name__ == "__main__":
    typer.run(main)
