"""How many replicas a load needs, from a benchmark and a simulation."""
