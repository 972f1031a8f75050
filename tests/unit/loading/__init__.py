"""Tests of `dsserve.loading`."""
