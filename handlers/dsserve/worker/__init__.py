"""TorchServe's worker process: the handler's base, its calls, its watch over itself, its end."""
