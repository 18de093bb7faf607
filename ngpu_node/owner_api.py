"""What the owner's commands about workspaces and model servers ask on the admin socket.

GET  /workspaces               what is here and how it stands
GET  /models                   the registered model servers
GET  /workspaces/{id}/logs     see `container_logs`; of any service
GET  /images                   the images kept here
GET  /doctor                   what could be better about this machine
POST /pause, /drain, /resume   see `owner`; answer with how the machine is lent and what still runs
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from ngpu_daemon.outbound import without_query
from ngpu_node.container_logs import ContainerLogs
from ngpu_node.deployments import Deployment, Deployments
from ngpu_node.engine.outlook import Finding
from ngpu_node.errors import StateUnavailable
from ngpu_node.owner import Lending, Owner
from ngpu_protocol.http1 import Exchange

_LOGS = re.compile(r"/workspaces/([1-9][0-9]{0,18})/logs")
_WORDS = {"/pause": Lending.PAUSED, "/drain": Lending.DRAINED, "/resume": Lending.OPEN}


class OwnerApi:
    """The handler of these requests."""

    def __init__(
        self,
        deployments: Deployments,
        owner: Owner,
        logs: ContainerLogs,
        findings: Callable[[], Iterable[Finding]],
        gpu_names: Callable[[Deployment], Iterable[str]],
        models: Callable[[], list[dict[str, Any]]],
        images: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self._deployments = deployments
        self._owner = owner
        self._logs = logs
        self._findings = findings
        self._gpu_names = gpu_names
        self._models = models
        self._images = images

    async def handle(self, exchange: Exchange) -> bool:
        """Answer one request; False where it is not one of these."""
        method, path = exchange.request.method, exchange.request.path
        if method == "GET" and path == "/workspaces":
            await exchange.respond_json(200, self.workspaces())
        elif method == "GET" and path == "/models":
            await exchange.respond_json(200, {"models": self._models()})
        elif method == "GET" and path == "/images":
            await exchange.respond_json(200, {"images": self._images()})
        elif method == "GET" and path == "/doctor":
            found = [{"subject": f.subject, "text": f.text, "advice": f.advice} for f in self._findings()]
            await exchange.respond_json(200, {"findings": found})
        elif method == "POST" and path in _WORDS:
            try:
                await self._owner.say(_WORDS[path])
            except StateUnavailable as error:
                await exchange.respond_json(503, {"reason": "not_written", "message": str(error)})
            else:
                await exchange.respond_json(200, self.lending())
        elif method == "GET" and (match := _LOGS.fullmatch(path)) is not None:
            here = [d for d in self._deployments if d.spec.id == match[1]]
            await self._logs.answer(exchange, here, match[1], is_owner=True)
        else:
            return False
        return True

    def lending(self) -> dict[str, Any]:
        """Return how the machine is lent."""
        here = list(self._deployments)
        return {
            "lending": str(self._owner.lending),
            "detail": self._owner.detail,
            "running": sum(d.running for d in here),
            "on_machine": sum(1 for d in here if d.spec.is_image and d.upstream(d.spec.ports[0]) is not None),
        }

    def workspaces(self) -> dict[str, Any]:
        """Return every deployment, in plain values."""
        here = sorted(self._deployments, key=lambda d: (d.service, int(d.spec.id), d.spec.revision))
        return {**self.lending(), "workspaces": [self._described(deployment) for deployment in here]}

    def _described(self, deployment: Deployment) -> dict[str, Any]:
        spec, progress = deployment.spec, deployment.progress
        return {
            "service": deployment.service,
            "workspace": spec.id,
            "revision": spec.revision,
            "name": spec.name,
            "image": spec.image or without_query(spec.image_url or ""),
            "model_server": spec.service or "",
            "image_digest": deployment.image_digest.hex() if any(deployment.image_digest) else "",
            "state": str(deployment.phase),
            "detail": deployment.detail,
            "reason": deployment.reason,
            "progress": progress.percent,
            "bytes_done": progress.bytes_done,
            "bytes_total": progress.bytes_total,
            "seconds_left": progress.seconds_left,
            "running": deployment.running,
            "concurrency": deployment.concurrency,
            "gpus": list(self._gpu_names(deployment)),
            "memory_bytes": spec.memory_bytes,
            "cpus": spec.cpus,
            "egress": spec.egress,
            "volumes": [volume.name for volume in spec.volumes],
            "wished": deployment.is_wished,
        }
