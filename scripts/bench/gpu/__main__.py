"""`python -m scripts.bench.gpu`: see `run`."""

import typer

from scripts.bench.gpu.run import main

typer.run(main)
