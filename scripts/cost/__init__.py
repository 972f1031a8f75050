"""A cost model of a decode step: fitted to measurements, and what it predicts."""
