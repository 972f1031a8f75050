"""The soak's clients: they ask all the time, in several ways, and compare every reply with the reference.

A reply is right (equal to transformers' text), wrong, a clean error (a status and a JSON body, or an error event in a
stream), or cut (the connection broke). What came of a cut or ended stream before its end must be the reference's start.
"""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

OK = 200
TIMEOUT_S = 180.0
BAD_BODIES: list[dict[str, Any]] = [{"prompt": ""}, {"prompt": "x", "temperature": 9}, {}, {"unknown": 1}]


@dataclass(frozen=True)
class Reference:
    """One prompt and transformers' greedy text for it."""

    prompt: str
    tokens: int
    text: str


@dataclass
class Tally:
    """Counts of outcomes, from all clients."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, outcome: str, detail: str = "") -> None:
        with self._lock:
            self.outcomes[outcome] += 1
            if outcome == "wrong":
                self.wrong.append(detail)


class Client(threading.Thread):
    """Asks one request after the other until `over` is set.

    Args:
        url: the model's prediction URL.
        seed: the client's own random sequence.
    """

    def __init__(self, url: str, references: list[Reference], tally: Tally, over: threading.Event, seed: int) -> None:
        super().__init__(name=f"soak-client-{seed}", daemon=True)
        self._url = url
        self._references = references
        self._tally = tally
        self._over = over
        self._dice = random.Random(seed)

    def run(self) -> None:
        while not self._over.is_set():
            reference = self._dice.choice(self._references)
            ask = self._dice.choices([self._json, self._stream, self._leave, self._bad], [4, 4, 1, 1])[0]
            try:
                self._tally.add(*ask(reference))
            except httpx.HTTPError:
                self._tally.add("cut")
                self._over.wait(0.5)  # as a client does that tries again

    def _json(self, reference: Reference) -> tuple[str, str]:
        reply = httpx.post(self._url, json=body(reference), timeout=TIMEOUT_S)
        if reply.status_code != OK:
            return self._judge_error(reply)
        answer = reply.json()
        if "error" in answer:
            return "clean error", ""
        return ("right", "") if answer["text"] == reference.text else ("wrong", f"{reference.prompt!r}: {answer}")

    def _stream(self, reference: Reference, most_events: int | None = None) -> tuple[str, str]:
        text, events, done, failed = "", 0, False, False
        try:
            with httpx.stream("POST", self._url, json=body(reference) | {"stream": True}, timeout=TIMEOUT_S) as reply:
                if reply.status_code != OK:
                    reply.read()
                    return self._judge_error(reply)
                for line in reply.iter_lines():
                    if not line:
                        continue
                    events += 1
                    done = line == "data: [DONE]"
                    if not done:
                        event = json.loads(line.removeprefix("data: "))
                        failed = failed or "error" in event
                        text += event.get("text", "")
                    if events == most_events:
                        break
        except httpx.HTTPError:
            return ("cut", "") if reference.text.startswith(text) else ("wrong", f"cut {reference.prompt!r}: {text}")
        if most_events is None and not failed:
            right = done and text == reference.text
        else:
            right = reference.text.startswith(text)
        if not right:
            return "wrong", f"{reference.prompt!r}: {text}"
        return ("clean error" if failed else "left" if most_events else "right"), ""

    def _leave(self, reference: Reference) -> tuple[str, str]:
        return self._stream(reference, most_events=self._dice.randint(1, 3))

    def _bad(self, reference: Reference) -> tuple[str, str]:
        reply = httpx.post(self._url, json=self._dice.choice(BAD_BODIES), timeout=TIMEOUT_S)
        if reply.status_code == OK:
            return "wrong", "a bad request was served"
        return ("refused", "") if reply.status_code < 500 else self._judge_error(reply)

    def _judge_error(self, reply: httpx.Response) -> tuple[str, str]:
        """Ours is `{"error": ...}`, TorchServe's `{"code": ..., "type": ..., "message": ...}`."""
        try:
            answer = reply.json()
            is_clean = reply.status_code >= 500 and ("error" in answer or "message" in answer)
        except ValueError:
            is_clean = False
        if not is_clean:
            return "wrong", f"status {reply.status_code}: {reply.text[:200]}"
        self._over.wait(0.5)
        return "clean error", ""


def body(reference: Reference) -> dict[str, Any]:
    """The JSON body that asks for the reference's text."""
    return {"prompt": reference.prompt, "max_new_tokens": reference.tokens}
