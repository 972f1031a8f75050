"""One sequence on its way from prompt to end: its tokens, its text, how far it is computed, what was reported of it.

Does not know steps or other sequences (`scheduler`).
"""

from __future__ import annotations

from collections.abc import Sequence as Values

import torch

from dsserve.core.errors import RequestError
from dsserve.core.request import FinishReason, GenerationRequest, Origin, TokenEvent, TokenLogprob
from dsserve.core.timeline import Timeline
from dsserve.engine.detokenizer import TextStream
from dsserve.kv.manager import TextPages
from dsserve.sampling.sampler import SamplingState, report_logprobs

# Rows of a prompt's logits that are converted to fp32 together.
_REPORTED_AT_ONCE = 128


class Sequence:
    """A request with its sampling state and its text so far.

    Args:
        eos_ids: the model's end-of-text tokens.
        origin: of its request; default: it came just now.

    Attributes:
        place: in the queue of those that wait, see `waiting_queue`.
        row: of the block tables; None while it waits.
        pages: of the KV cache.
        planned: tokens whose keys and values are in the cache after the steps that were planned. One more than are
            known where the last of them is still being chosen.
        cached_tokens: of the prompt, which were not computed again.
    """

    def __init__(
        self,
        request: GenerationRequest,
        text: TextStream,
        state: SamplingState,
        eos_ids: frozenset[int],
        origin: Origin | None = None,
    ) -> None:
        self.request = request
        self.state = state
        self.origin = origin or Origin()
        self.timeline = Timeline(self.origin.arrived)
        self.place = (request.priority, 0)
        self.row: int | None = None
        self.pages = TextPages(self.ids, (request.cache_salt or "").encode())
        self.planned = 0
        self.cached_tokens = 0
        self._text = text
        self._generated: list[int] = []
        self._unsaid: list[int] = []  # the newest of them, whose text is still to be made
        # What comes out of a token's text cannot end such a sequence, and nobody asks for the token itself.
        self._can_wait = not (request.stop.strings or request.sampling.logprobs is not None or state.grammar)
        self._ending = ending_ids(request, eos_ids)
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def name(self) -> str:
        """What log lines call its request."""
        return self.origin.name(self.request.request_id)

    @property
    def generated(self) -> int:
        """New tokens so far."""
        return len(self._generated)

    @property
    def length(self) -> int:
        """Tokens that are known, of the prompt and new ones."""
        return len(self.request.prompt_ids) + len(self._generated)

    def ids(self, begin: int, end: int) -> Values[int]:
        """The tokens at these positions."""
        prompt = self.request.prompt_ids
        if end <= len(prompt):
            return prompt[begin:end]
        generated = self._generated[max(0, begin - len(prompt)) : end - len(prompt)]
        return [*prompt[begin:], *generated] if begin < len(prompt) else generated

    @property
    def wants_all(self) -> bool:
        """Whether the log probabilities of its prompt are still wanted."""
        return self.request.prompt_logprobs and not self._generated

    def put_back(self) -> None:
        """Nothing of it is computed any more: it has lost its pages (preempted), and waits again."""
        self.row, self.planned = None, 0
        if self.wants_all:
            self._prompt_logprobs = ()

    @property
    def is_chainable(self) -> bool:
        """Whether a step may decode it whose input token only the device knows: nobody asks for more than tokens, and
        the row has room for one more, should the text have ended."""
        request = self.request
        wants = request.prompt_logprobs or request.sampling.logprobs is not None
        return not wants and request.max_new_tokens > 0 and self.state.is_chainable

    def accept(self, token: int, logprob: TokenLogprob | None, may_wait: bool = False) -> TokenEvent | None:
        """Takes the next token and says what it means to the client.

        Args:
            may_wait: the text of a token that ends nothing may be made later, by `speak`, with that of others: None.
        """
        self._generated.append(token)
        self.state.accept(token)
        count = len(self._generated)
        if token in self._ending:
            return self._event(self._said() + self._text.flush(), "stop")
        if may_wait and self._can_wait and count < self.request.max_new_tokens:
            self._unsaid.append(token)
            return None
        logprobs = () if logprob is None else (logprob,)
        text = self._said() + self._text.push(token, may_stop=count >= self.request.sampling.min_tokens)
        if self._text.stopped:
            return self._event(text, "stop", logprobs)
        grammar = self.state.grammar
        if grammar is not None and grammar.is_complete:
            return self._event(text + self._text.flush(), "stop", logprobs)
        if count >= self.request.max_new_tokens:
            return self._event(text + self._text.flush(), "length", logprobs)
        return self._event(text, None, logprobs)

    def speak(self) -> TokenEvent | None:
        """The text of the tokens that waited, if there are some."""
        return self._event(self._said(), None) if self._unsaid else None

    def _said(self) -> str:
        tokens, self._unsaid = self._unsaid, []
        return self._text.extend(tokens) if tokens else ""

    def report_prompt(self, logits: torch.Tensor) -> None:
        """Takes the logits of the next part of the prompt, `[T, V]`; the next event holds the log probabilities of all
        parts."""
        prompt, count = self.request.prompt_ids, self.request.sampling.logprobs or 0
        reported = list(self._prompt_logprobs or (TokenLogprob(prompt[0], None),))
        wanted = prompt[len(reported) : len(reported) + len(logits)]  # each token's logits are those of the next one
        for at in range(0, len(wanted), _REPORTED_AT_ONCE):
            tokens = list(wanted[at : at + _REPORTED_AT_ONCE])
            reported += report_logprobs(logits[at : at + len(tokens)], tokens, [count] * len(tokens))
        self._prompt_logprobs = tuple(reported)

    def finish_empty(self) -> TokenEvent:
        """The only event of a request for no new tokens, whose prompt alone was of interest."""
        return self._event("", "length")

    def failure(self, error: RequestError | None = None) -> TokenEvent:
        """What the client gets when this sequence cannot go on."""
        return TokenEvent(self.request.request_id, "", self.request.index, failed=True, error=error)

    def out_of_memory(self) -> TokenEvent:
        """What the client gets when the device has not the memory for its prompt."""
        count = len(self.request.prompt_ids)
        what = "prompt with its log probabilities" if self.request.prompt_logprobs else "prompt"
        message = f"the device has no memory for a {what} of {count} tokens: send a shorter one, or try again later"
        return self.failure(RequestError(message, status=507, kind="server_error", code="out_of_memory"))

    def _event(self, text: str, reason: FinishReason | None, logprobs: tuple[TokenLogprob, ...] = ()) -> TokenEvent:
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, ()
        return TokenEvent(
            self.request.request_id,
            text,
            self.request.index,
            reason,
            len(self._generated),
            len(self.request.prompt_ids),
            self.cached_tokens,
            logprobs,
            prompt_logprobs,
        )


def ending_ids(request: GenerationRequest, eos_ids: frozenset[int]) -> frozenset[int]:
    """The tokens that end this request's text."""
    stop = request.stop
    return stop.token_ids if stop.ignore_eos else stop.token_ids | eos_ids
