"""A model's folder: fetched, converted, made up, cut into shards."""
