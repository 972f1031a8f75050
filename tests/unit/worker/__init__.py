"""Tests of `dsserve.worker`."""
