"""`python -m scripts.bench`: see `http`."""

import typer

from scripts.bench.http import main

typer.run(main)
