"""Random weights of a large shape on GPUs: the engine alone, over HTTP, and transformers."""
