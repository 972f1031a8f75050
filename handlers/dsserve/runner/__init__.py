"""A plan in, logits out, on every rank: passes, captured graphs, the memory that they need."""
