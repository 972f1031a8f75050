"""Tests of `dsserve.observability`."""
