"""What schemathesis checks of every answer beside the absence of 5xx: that a refusal says what is wrong."""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.check
def refusals_say_what_is_wrong(context: Any, response: Any, case: Any) -> None:
    """A refusal under the documented paths has `result_code` and `msg`, a profile's its own words, others `message`;
    and each has `reason`."""
    if response.status_code < 400 or case.method.upper() == "HEAD":
        return
    document = response.json()
    if case.path.startswith(("/user/", "/brc20/")):
        assert document["result_code"] == response.status_code, document
        words = document["msg"]
    elif case.path.startswith(("/nlp/", "/api/v1b/")):  # a profile's, in its dialect
        assert document["code"] == response.status_code, document
        words = document["msg"]
    elif case.path == "/api/generate":
        assert document["error"]
        words = document["details"]
    else:
        words = document["message"]
    assert document["reason"]
    assert len(words) > 8
