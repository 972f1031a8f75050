"""TorchServe's rows to requests, tokens to replies; beside the entry the only place that knows its contract."""
