"""Tests of `dsserve.core`."""
