"""Reads what a metrics port serves, with prometheus_client's own parser."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Scrape:
    """One scrape: (series, its labels) -> value."""

    text: str
    values: dict[tuple[str, frozenset[tuple[str, str]]], float]

    @classmethod
    def of(cls, text: str) -> Scrape:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        values = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
        assert len(values) == len(samples), "a series came twice"
        return cls(text, values)

    @classmethod
    def at(cls, port: int, host: str = "127.0.0.1") -> Scrape:
        response = httpx.get(f"http://{host}:{port}/metrics", timeout=30)
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
        return cls.of(response.text)

    def sum(self, name: str, /, **labels: str) -> float:
        """Sum of the series of this name with these labels; 0 where there is none."""
        return sum(value for (found, has), value in self.values.items() if found == name and set(labels.items()) <= has)

    def names(self) -> set[str]:
        return {name for name, _ in self.values}
