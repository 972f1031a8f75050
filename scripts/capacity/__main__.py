"""`python -m scripts.capacity`: see `plan`."""

import typer

from scripts.capacity.plan import main

typer.run(main)
