"""The KV cache: where keys and values of texts and of kept beginnings lie."""
