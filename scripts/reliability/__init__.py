"""Faults under load: one of two servers killed, hours of mixed load with faults."""
