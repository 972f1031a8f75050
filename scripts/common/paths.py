"""Where the repository lies, and the name of the model that every command takes if none is given."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

DEMO_MODEL = "smollm2"
