"""Tests of `dsserve.injection`."""
