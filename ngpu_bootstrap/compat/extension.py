"""The whole of this package as the front asks it (`front.extension`)."""

from __future__ import annotations

from ngpu_bootstrap.compat.cloud import BASE, Cloud, CloudRequest
from ngpu_bootstrap.compat.user_calls import SAD_TALKER, VIDEO_RE_TALKER, UserCalls, sad_talker
from ngpu_bootstrap.front.answers import Answer
from ngpu_bootstrap.front.extension import ReadBody, UserCall
from ngpu_protocol.http1 import Headers


class NgpuCloud:
    """Answers what clients of the NGPU cloud call.

    Args:
        body_bytes: the largest body taken.
    """

    prefix = BASE + "/"

    def __init__(self, cloud: Cloud, user_calls: UserCalls, *, body_bytes: int) -> None:
        self.cloud = cloud
        self._user_calls = user_calls
        self._body_bytes = body_bytes

    async def user_call(self, call: UserCall, read_body: ReadBody) -> Answer:
        return await self._user_calls.answer(call, read_body)

    async def call(
        self, method: str, path: str, query: str | None, headers: Headers, client: str, read_body: ReadBody
    ) -> Answer:
        return await self.cloud.answer(CloudRequest(method, path, query, headers, client), read_body, self._body_bytes)

    def poll(self, name: str, answer: Answer) -> Answer:
        return sad_talker(answer) if name in (SAD_TALKER, VIDEO_RE_TALKER) else answer

    async def port_of(self, workspace: str, port: str) -> str:
        return await self.cloud.port_of(workspace, port)
