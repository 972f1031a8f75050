"""Tests of `dsserve.config`."""
