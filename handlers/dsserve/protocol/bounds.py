"""Every bound of a request's body in one place: what is counted, the most there may be, and the status above it.

A `Bound` is a number that holds on every server. A `Rule` depends on the model or on a setting. `docs/limits.md` is
made from them and from the ranges of the bodies' numbers. Checks nothing: the bodies' types, `json_bounds`, `prompt`
and `reply_size` do.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """At most so many of something.

    Attributes:
        what: what is counted, and of what.
        most: what is still taken.
        status: of the answer to more.
        setting: what sets it lower; empty where nothing does.
    """

    what: str
    most: int
    status: int = 400
    setting: str = ""


@dataclass(frozen=True)
class Rule:
    """A bound that the model or a setting decides; `most` says how."""

    what: str
    most: str
    status: int = 400
    setting: str = ""


# JSON, wherever it stands: the body, tools' parameters, schemas, arguments of earlier calls.
DEPTH = Bound("levels of arrays and objects within each other, also in a past call's `arguments`", 100)
VALUES = Bound("values and members of a body (or twice the context, where that is more)", 262_144)
FIELDS = Bound("members of an object whose members are known", 128)
LARGEST_INT = 2**64 - 1
SMALLEST_INT = -(2**63)
INTEGERS = Rule("whole numbers within arrays and objects", f"{SMALLEST_INT} to {LARGEST_INT}")
FLOATS = Rule("other numbers", "finite 64-bit floats; `NaN`, `Infinity` and `1e400` are none")
STRINGS = Rule("strings and members' names", "Unicode without lone surrogates")
# Counts of tokens: what no context reaches is refused before it is repeated in a message.
COUNT = Bound("`max_tokens` and its other names, `min_tokens`", 2**31 - 1)

# Texts.
N = Bound("`n`", 128, setting="handler.max_n")
LOGPROBS = Bound("`logprobs` of completions, `top_logprobs`", 20)
# The logits of a whole prompt are kept at once for its log probabilities: 400 MB for 49,152 tokens in fp32.
ECHOED_LOGPROBS = Bound("tokens of a prompt with `echo` and `logprobs`", 2048)
TEXTS = Rule(
    "texts of a request (prompts x `n`)", "`max_running` + `max_waiting`", 400, "handler.max_running, max_waiting"
)
PLACES = Rule("texts of all requests", "`max_running` + `max_waiting`", 429, "handler.max_running, max_waiting")
REPLY_BYTES = Bound("bytes of a reply that is not streamed, reckoned before it is made", 32 * 2**20)
# TorchServe takes 6,553,500 bytes of a worker at a time where nobody sets `max_response_size`.
FRAME_BYTES = Bound("bytes of a reply that leave in one call; longer ones leave in pieces", 4 * 2**20, status=200)
# The frontend holds the whole of a call in its heap of 1 GiB; short frames never wait for long ones.
CALL_BYTES = Bound("bytes of all replies that leave in one call, beside 64 KiB of each", 16 * 2**20, status=200)
SHARE_BYTES = 64 * 2**10

# Stop conditions.
STOPS = Bound("stop strings", 64, setting="handler.max_stops")
STOP_CHARACTERS = Bound("characters of a stop string", 1024)
STOP_TOKENS = Bound("`stop_token_ids`", 64)
BIASED_TOKENS = Bound("members of `logit_bias`", 1024)

# Prompts.
CONTEXT = Rule("tokens of prompt and output", "the context", 413, "handler.max_model_len")
OUTPUT = Rule("new tokens", "`max_new_tokens_limit`", 400, "handler.max_new_tokens_limit")
PROMPT_CHARACTERS = Bound("characters of a prompt (or 12 a token of the context, where that is more)", 65_536, 413)
CHARACTERS_A_TOKEN = 12
PROMPT_TOKENS = Bound("tokens of all prompts of a request (or the context, where that is more)", 65_536)
TOKENIZED = Rule("tokens of `v1/tokenize`", "twice the context", 413)
DETOKENIZED = Rule("`tokens` of `v1/detokenize`", "the context")
IDS = Rule("token ids", "those of the model's vocabulary, also where a tokenizer has more")
MESSAGES = Bound("`messages`", 2048)
PARTS = Bound("parts of the `content` of all messages", 2048)
CALLS = Bound("`tool_calls` of all messages", 2048)
TOOLS = Bound("`tools`", 128)

# Names and notes.
NAME_CHARACTERS = Bound("characters of `model`, of a message's `name`, of a called function's name", 256)
ID_CHARACTERS = Bound("characters of a call's `id` and of `tool_call_id`", 1024)
USER_CHARACTERS = Bound("characters of `user`", 1024)
SALT_CHARACTERS = Bound("characters of `cache_salt`", 1024)
DESCRIPTION_CHARACTERS = Bound("characters of a `description` of a tool or schema", 65_536)
FUNCTION_NAME = r"^[A-Za-z0-9_-]{1,64}$"
FUNCTION_NAMES = Rule("names of tools and of schemas", f"`{FUNCTION_NAME[1:-1]}`")

TIMEOUT = Rule("`timeout`", "`request_timeout`", 400, "handler.request_timeout")
# The least factor: dividing by less leaves the range of fp32.
LEAST_REPETITION_PENALTY = 0.01

BODY = Rule(
    "bytes of a body", "128 a token of the context, at least 1 MiB", 413, "max_request_size (config.properties)"
)

LIMITS: tuple[Bound | Rule, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Bound | Rule))
