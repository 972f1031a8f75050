"""Tests of `dsserve.engine`."""
