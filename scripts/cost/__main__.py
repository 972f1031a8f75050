"""`python -m scripts.cost`: see `model`."""

from scripts.cost.model import app

app()
