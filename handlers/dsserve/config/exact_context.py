"""How long a text the engine serves exactly: what of a model's config changes its attention or positions with length.

Reads config members by what they mean, whatever the model's name. Lengths that a setting asks for are compared in
`limits`; what no config names is left to the self-check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dsserve.config.handler import YAML_FILE
from dsserve.core.errors import LoadError

# The same frequencies for every length. transformers computes those of "dynamic" and "longrope" anew for each pass, by
# its largest position: one long text changes its neighbours, and keys of an earlier pass no longer fit.
_FIXED_ROPE = frozenset({"default", "linear", "llama3", "proportional", "yarn"})
_LONG_ROPE = frozenset({"longrope", "su"})


@dataclass(frozen=True)
class ContextBound:
    """The length up to which texts are exact.

    Attributes:
        tokens: of a text, prompt and output.
        member: of config.json, which says so.
        reason: what the model does beyond it.
    """

    tokens: int
    member: str
    reason: str


@dataclass(frozen=True)
class _Member:
    """A member of a text config whose number bounds the exact length where `counts` holds."""

    name: str
    counts: Callable[[Any], bool]
    reason: str


def _slides(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any("sliding" in kind for kind in kinds):
        return False
    return getattr(config, "use_sliding_window", True) is not False


def _has_chunks(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return kinds is None or any("chunked" in kind for kind in kinds)


def _tunes_temperature(config: Any) -> bool:
    """Layers without rotary positions scale their queries, where any are."""
    layers = getattr(config, "no_rope_layers", None)
    return bool(getattr(config, "attn_temperature_tuning", True)) and (layers is None or not all(layers))


def _changes_with_length(config: Any) -> bool:
    return bool(getattr(config, "use_dynamic_ntk", False) or getattr(config, "use_logn_attn", False))


_FLOOR_SCALE = _Member("floor_scale", _tunes_temperature, "beyond, layers scale their queries by the place in a pass")
_MEMBERS = (
    _Member("sliding_window", _slides, "some layers attend to the last tokens alone"),
    _Member("attention_chunk_size", _has_chunks, "some layers attend within chunks alone"),
    _Member("keep_window_size", lambda _: True, "beyond, layers drop the keys that they rate lowest"),
    _Member("seq_length", _changes_with_length, "use_dynamic_ntk and use_logn_attn change attention beyond"),
    _FLOOR_SCALE,
)


def exact_context(model_config: Any) -> ContextBound | None:
    """The least bound of a model's config; None where every length is exact.

    Raises:
        LoadError: rotary positions of a kind whose dependence on the length is not known.
    """
    config = model_config.get_text_config()
    bounds = [*_rope_bounds(config), *_member_bounds(config)]
    return min(bounds, key=lambda bound: bound.tokens, default=None)


def check_pass_tokens(model_config: Any, tokens: int) -> None:
    """Refuses passes of so many tokens that a model mistakes a token's place in the pass for one beyond its bound.

    Args:
        tokens: of all texts in a pass at most.

    Raises:
        LoadError: a pass could reach `floor_scale`.
    """
    config = model_config.get_text_config()
    most = _number(config, _FLOOR_SCALE.name)
    if most is not None and _FLOOR_SCALE.counts(config) and tokens >= most:
        raise LoadError(
            f"{YAML_FILE}: passes of up to {tokens} tokens of several texts are wrong from {most} on (floor_scale in "
            "config.json: layers scale their queries by the place in a pass); lower "
            "handler.max_num_batched_tokens"
        )


def _member_bounds(config: Any) -> Iterator[ContextBound]:
    for member in _MEMBERS:
        tokens = _number(config, member.name)
        if tokens is not None and member.counts(config):
            yield ContextBound(tokens, member.name, member.reason)


def _rope_bounds(config: Any) -> Iterator[ContextBound]:
    for rope in _rope_settings(config):
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        if kind in _FIXED_ROPE:
            continue
        original = "original_max_position_embeddings"
        if "dynamic" in kind:  # transformers' own condition; it scales beyond the model's context, never before
            original, tokens = "max_position_embeddings", _number(config, "max_position_embeddings")
        elif kind in _LONG_ROPE:
            tokens = rope.get(original) or _number(config, original) or _number(config, "max_position_embeddings")
        else:
            tokens = None
        if not isinstance(tokens, int):
            raise LoadError(
                f"config.json: rope_parameters of the kind {kind!r:.40} are not known to be exact at every length; "
                f"served are {', '.join(sorted(_FIXED_ROPE))}, and dynamic and longrope up to the original length"
            )
        yield ContextBound(tokens, original, f"the rotary positions of {kind} change for the whole pass beyond")


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    """One dict, or one for each kind of layer where they differ."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(settings, dict):
        return []
    return [value for value in settings.values() if isinstance(value, dict)] or [settings]


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None
