"""Tests of `dsserve.protocol.openai`."""
