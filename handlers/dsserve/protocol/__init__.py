"""HTTP bodies to requests, tokens to replies; who calls it, and when, is the worker's affair."""
