"""Tests of `dsserve.protocol`."""
