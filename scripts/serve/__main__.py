"""`python -m scripts.serve`: see `cli`."""

from scripts.serve.cli import app

app()
