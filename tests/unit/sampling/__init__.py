"""Tests of `dsserve.sampling`."""
