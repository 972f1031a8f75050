"""Run a module of ours with further options that are written in one text, as the Makefile's ARGS is.

The text is split into words as a shell would, quotes included; nothing in it is expanded or run.
"""

from __future__ import annotations

import runpy
import shlex
import sys

from scripts.common.console import say


def main() -> None:
    """`python -m scripts.common.words TEXT MODULE OPTIONS...`: MODULE with OPTIONS and then the words of TEXT."""
    text, module, *options = sys.argv[1:]
    try:
        sys.argv = [module, *options, *shlex.split(text)]
    except ValueError as error:
        say(f"error: ARGS={text!r}: {error}")
        raise SystemExit(1) from None
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
