"""What requests may ask of the served model: context and output limits, from the settings, the model and the engine.

Does not plan memory (`runner.kv_memory`) and does not look at requests (`protocol`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dsserve.config.exact_context import exact_context
from dsserve.config.handler import AUTO_WAITING, YAML_FILE, HandlerConfig
from dsserve.core.errors import LoadError
from dsserve.core.request import Limits


def read_context(
    config: HandlerConfig, max_position: int | None, model_config: Any, max_out_tokens: int | None = None
) -> int:
    """The longest text, prompt and output, in tokens, from the settings and the model.

    Args:
        max_position: the model's context, if its config names one.
        max_out_tokens: what the kernels' workspace was taken for; None without kernel injection.

    Raises:
        LoadError: a context that the model or the kernels' workspace does not have, or one that is not exact to its end
            (`exact_context`).
    """
    most = [length for length in (max_position, max_out_tokens) if length is not None]
    length = config.max_model_len or min(most, default=None)
    if length is None:
        raise LoadError(f"{YAML_FILE}: the model's config names no context length; set handler.max_model_len")
    bound = exact_context(model_config)
    if bound is not None and length > bound.tokens:
        asked = "handler.max_model_len" if config.max_model_len else "the model's context"
        raise LoadError(
            f"{YAML_FILE}: texts of up to {bound.tokens} tokens are served exactly ({bound.member} in config.json: "
            f"{bound.reason}), {asked} is {length}; set handler.max_model_len: {bound.tokens}"
        )
    if max_position is not None and length > max_position:
        raise LoadError(
            f"{YAML_FILE}: handler.max_model_len {length} is above the model's context of {max_position}; lower it"
            + describe_scaling(model_config)
        )
    if max_out_tokens is not None and length > max_out_tokens:
        raise LoadError(
            f"{YAML_FILE}: handler.max_model_len {length} is above deepspeed.max_out_tokens {max_out_tokens}, for "
            "which the kernels' workspace is taken; raise the one, or lower the other"
        )
    return length


def make_limits(config: HandlerConfig, length: int, rows: int) -> Limits:
    """What requests may ask for.

    Args:
        length: of a text, see `read_context`.
        rows: texts that run at a time at most, as memory allows it.
    """
    limit = min(config.max_new_tokens_limit or length - 1, length - 1)
    waiting = AUTO_WAITING if config.max_waiting == "auto" else config.max_waiting
    return Limits(
        length, min(config.max_new_tokens, limit), limit, rows, waiting, config.request_timeout,
        config.max_n, config.max_stops,
    )  # fmt: skip


def fit_waiting(limits: Limits, config: HandlerConfig, batch_size: int) -> Limits:
    """The limits of a server that hands over so many requests at a time: the handler sees one more than it holds, to
    refuse it."""
    if config.max_waiting != "auto":
        return limits
    return replace(limits, max_waiting=max(0, batch_size - 1 - limits.max_running))


def describe_scaling(model_config: Any) -> str:
    """How a context beyond `max_position_embeddings` is had, where yarn scaling has one; else nothing.

    yarn's positions depend on the factor and the original length alone, so the number in config.json may be raised.
    """
    rope = getattr(model_config.get_text_config(), "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if (rope.get("rope_type") or rope.get("type")) != "yarn" or not original or not factor:
        return ""
    reach = int(original * factor)
    return (
        f", or set max_position_embeddings: {reach} in config.json, which its rope scaling reaches (yarn, factor "
        f"{factor:g} of {original})"
    )
