"""What a model needs before and after DeepSpeed's split so that it is right on any number of ranks."""
