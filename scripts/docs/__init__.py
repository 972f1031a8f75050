"""Pages that are made from the models that check, and a hook of mkdocs."""
