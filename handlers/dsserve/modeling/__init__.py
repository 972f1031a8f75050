"""A torch module made faster, or smaller, and proven to compute the same."""
