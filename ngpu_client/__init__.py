"""The Python client of an NGPU bootstrap: submit, wait, stream, look back, and check receipts on one's own machine.

    from ngpu_client import Client

    with Client("http://127.0.0.1:8080", token) as ngpu:
        result = ngpu.run("sdapi/v1/txt2img", {"prompt": "a red bicycle"}, on_progress=print)
        image = result.json()["images"][0]
        assert ngpu.check(result).holds

`AsyncClient` is the same with `await`, under trio or asyncio. `calls` says what each method puts on the wire and how
its answer is read, without any I/O; `client` and `async_client` only carry it, so the two cannot differ.

Knows `ngpu_protocol` only: a program that uses it needs neither daemon.
"""

from ngpu_client.async_client import AsyncClient, AsyncStreamed
from ngpu_client.calls import Options
from ngpu_client.client import Client, Streamed
from ngpu_client.errors import (
    AnswerCut,
    ApiError,
    BootstrapUnreachable,
    NgpuError,
    NotFinished,
    TaskFailed,
    UnexpectedAnswer,
)
from ngpu_client.receipts import ReceiptCheck
from ngpu_client.records import Deployment, Progress, Result, TaskState

__all__ = [
    "AnswerCut",
    "ApiError",
    "AsyncClient",
    "AsyncStreamed",
    "BootstrapUnreachable",
    "Client",
    "Deployment",
    "NgpuError",
    "NotFinished",
    "Options",
    "Progress",
    "ReceiptCheck",
    "Result",
    "Streamed",
    "TaskFailed",
    "TaskState",
    "UnexpectedAnswer",
]
