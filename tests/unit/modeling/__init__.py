"""Tests of `dsserve.modeling`."""
