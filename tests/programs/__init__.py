"""What ranks run for the tests, under torchrun; nothing here is a test."""
