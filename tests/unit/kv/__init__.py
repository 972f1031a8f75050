"""Tests of `dsserve.kv`."""
