"""Requests in, tokens out: rank 0 decides what each step computes, the other ranks follow."""
