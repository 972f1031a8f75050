"""A folder in, a sharded and proven module out: files, shards, DeepSpeed's engine."""
