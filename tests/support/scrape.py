"""Reads what a metrics port serves, with prometheus_client's own parser."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

# What Prometheus asks for, as it sends it.
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


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
    def at(cls, port: int, host: str = "127.0.0.1", accept: str = PROMETHEUS_2) -> Scrape:
        response = httpx.get(f"http://{host}:{port}/metrics", headers={"Accept": accept}, timeout=30)
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
        return cls.of(response.text)

    def sum(self, name: str, /, **labels: str) -> float:
        """Sum of the series of this name with these labels; 0 where there is none."""
        return sum(value for (found, has), value in self.values.items() if found == name and set(labels.items()) <= has)

    def names(self) -> set[str]:
        return {name for name, _ in self.values}
