"""Ranks: their numbers, group, collectives and channel, and layers that AutoTP does not cut right."""
