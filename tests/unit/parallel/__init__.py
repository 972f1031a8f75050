"""Tests of `dsserve.parallel`."""
