"""What the protocol knows of the model that is served: names, limits, tokenizer. Made once, at load."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

from dsserve.core.request import Limits
from dsserve.loading.hf_model import LoadedModel
from dsserve.loading.sharded_model import ShardedModel
from dsserve.modeling.dtype import model_dtype
from dsserve.protocol.openai.token_text import TokenText
from dsserve.protocol.reply_size import TokenSizes
from dsserve.sampling.grammar import GrammarCompiler


@dataclass(frozen=True)
class ServedModel:
    """The model behind the endpoints.

    Attributes:
        name: TorchServe's name of it, what clients call `model`.
        vocabulary: width of the model's logits.
        engine: how it is served, for `v1/models`: engine, dtype, TP size.
        fallback: why `replace_with_kernel_inject: auto` chose AutoTP, None where it did not.
        fingerprint: OpenAI's `system_fingerprint`; changes with versions, dtype and TP size.
        created: when it was loaded, in seconds of Unix time.
    """

    name: str
    tokenizer: Any
    limits: Limits
    vocabulary: int
    grammars: GrammarCompiler
    engine: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    fallback: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def token_text(self) -> TokenText:
        """The text of single tokens."""
        return TokenText(self.tokenizer)

    @cached_property
    def token_sizes(self) -> TokenSizes:
        """How long the tokens of a reply may be."""
        return TokenSizes.of(self.token_text, self.vocabulary)


def describe_model(
    name: str, sharded: ShardedModel, loaded: LoadedModel, limits: Limits, grammars: GrammarCompiler, world_size: int
) -> ServedModel:
    """What is served, as clients see it.

    Args:
        sharded: what `shard_model` returned.
    """
    module = sharded.module
    engine = {
        "name": "autotp" if sharded.workspace is None else "kernel_injection",
        "architecture": type(module).__name__,
        "dtype": str(model_dtype(module)).removeprefix("torch."),
        "tensor_parallel_size": world_size,
        **{package: version(package) for package in ("torch", "transformers", "deepspeed")},
    }
    digest = hashlib.sha256(json.dumps(engine, sort_keys=True).encode()).hexdigest()
    vocabulary = module.config.get_text_config().vocab_size
    served = ServedModel(
        name, loaded.tokenizer, limits, vocabulary, grammars, engine, f"fp_{digest[:10]}", sharded.injection_refused
    )
    _ = served.token_sizes  # takes a second of a large vocabulary, for which no request should wait
    return served
