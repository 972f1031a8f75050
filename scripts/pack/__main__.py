"""`python -m scripts.pack`: see `archive`."""

import typer

from scripts.pack.archive import main

typer.run(main)
