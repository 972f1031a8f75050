"""Tests of `dsserve.runner`."""
