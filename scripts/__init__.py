"""The command-line side of the project: prepare a model, pack it, serve it, ask it, measure it.

Run each one from the repository root as a module, e.g. `python -m scripts.pack --help`. Nothing here is imported by
the handlers, and nothing here travels in an archive.
"""
