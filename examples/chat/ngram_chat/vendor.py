"""The model as a vendor's chat interface: ``{"code", "msg", "data"}`` around every answer, events of the same form.

Owns the fields of its requests and the shapes of its answers. Defaults and ranges are the vendor's document's: a
temperature in (0, 2] with 0.8, `top_p` in (0, 1] with 0.7, `max_new_tokens` with 2048, `repetition_penalty` with 1. The
model here has no use for `top_p` and `repetition_penalty`: they are checked and left out.
"""

import secrets
from typing import Any

MAX_NEW_TOKENS = 2048


class InvalidField(ValueError):
    """A field of a request that cannot be used; the message names it."""


class ChatCall:
    """The fields of a request, checked.

    Raises:
        InvalidField: one is missing or out of range.
    """

    def __init__(self, document: Any) -> None:
        if not isinstance(document, dict):
            raise InvalidField("the body must be a JSON object")
        messages = document.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
            raise InvalidField("messages must be a list of at least one object with role and content")
        texts = [one.get("content") for one in messages]
        if not all(isinstance(text, str) for text in texts):
            raise InvalidField("messages: each content must be a string")
        self.prompt = str(texts[-1])
        self.prompt_tokens = sum(len(str(text).split()) for text in texts)
        self.temperature = _number(document, "temperature", 0.8, 2)
        _number(document, "top_p", 0.7, 1)
        _number(document, "repetition_penalty", 1, 10)
        wanted = document.get("max_new_tokens")
        self.max_pieces = MAX_NEW_TOKENS if wanted is None else wanted
        if isinstance(self.max_pieces, bool) or not isinstance(self.max_pieces, int) or self.max_pieces < 1:
            raise InvalidField("max_new_tokens must be a whole number of at least 1")
        self.max_pieces = min(self.max_pieces, MAX_NEW_TOKENS)
        for name in ("user", "user_id"):
            if not isinstance(document.get(name, ""), str | None):
                raise InvalidField(f"{name} must be a string")
        stream = document.get("stream", False)
        if not isinstance(stream, bool | None):
            raise InvalidField("stream must be true or false")
        self.stream = bool(stream)
        self.answer_id = secrets.token_hex(8)

    def answer(self, pieces: list[str]) -> dict[str, Any]:
        """Return the whole answer."""
        choice = {"content": "".join(pieces), "finish_reason": self._finish(pieces)}
        return self._enveloped([choice], self._usage(pieces))

    def event(self, piece: str) -> dict[str, Any]:
        """Return the event for one piece of a streamed answer."""
        return self._enveloped([{"delta": piece, "content": piece, "finish_reason": ""}], self._usage([piece]))

    def last_event(self, pieces: list[str]) -> dict[str, Any]:
        """Return the event that ends a streamed answer, before ``[DONE]``."""
        choice = {"delta": "", "content": "", "finish_reason": self._finish(pieces)}
        return self._enveloped([choice], self._usage(pieces))

    def _finish(self, pieces: list[str]) -> str:
        return "length" if len(pieces) >= self.max_pieces else "stop"

    def _usage(self, pieces: list[str]) -> dict[str, int]:
        total = self.prompt_tokens + len(pieces)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": len(pieces), "total_tokens": total}

    def _enveloped(self, choices: list[dict[str, str]], usage: dict[str, int]) -> dict[str, Any]:
        data = {"id": self.answer_id, "choices": choices, "usage": usage, "status": 0}
        return {"code": 200, "msg": "ok", "data": data}


def refusal(code: int, message: str) -> dict[str, Any]:
    """Return the envelope of a request that is refused."""
    return {"code": code, "msg": message, "data": {}}


def _number(document: dict[str, Any], name: str, default: float, most: float) -> float:
    value = document.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise InvalidField(f"{name} must be a number above 0, and at most {most}")
    return float(value)
