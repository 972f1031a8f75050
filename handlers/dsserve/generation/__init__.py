"""Requests in, tokens out: plan (what all ranks do next), scheduler, KV slots, model runner, sampler, engine."""
