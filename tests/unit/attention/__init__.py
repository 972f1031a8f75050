"""Tests of `dsserve.attention`."""
