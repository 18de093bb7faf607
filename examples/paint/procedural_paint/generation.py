"""The calls of AkashGen, by which a picture is asked for, waited for and fetched: `/api/generate`, `/api/status`.

They are a second face of the same jobs: what is asked for here is painted by the same painters.
"""

import base64
import json
import re
from typing import Any
from urllib.parse import parse_qs

from .jobs import Jobs
from .requests import BadRequest, Job, read_job

PICTURES = "/api/images/"
MAX_ASKED = 32

_STATUS = {"queued": "pending", "running": "processing", "done": "succeeded", "failed": "failed"}
_ID = re.compile(r"[0-9a-f]{32}")
# Samplers of few steps paint fast and rough.
_STEPS = {"lcm": 8, "dpm_fast": 10}


def read_generation(body: bytes) -> Job:
    """Return the job that `/api/generate` asks for.

    Raises:
        BadRequest: naming the field.
    """
    try:
        document = json.loads(body or b"{}")
    except ValueError:
        raise BadRequest("the body is not JSON") from None
    if not isinstance(document, dict):
        raise BadRequest("the body is not a JSON object")
    for name in ("prompt", "sampler", "scheduler"):
        if not isinstance(document.get(name), str) or not document[name]:
            raise BadRequest(f"{name} is required")
    wanted = {name: document[name] for name in ("width", "height", "seed") if name in document}
    wanted |= {"prompt": document["prompt"], "negative_prompt": document.get("negative", "")}
    wanted["steps"] = _STEPS.get(document["sampler"], 20)
    return read_job(json.dumps(wanted).encode(), from_image=False)


def statuses(jobs: Jobs, query: str) -> list[dict[str, Any]]:
    """Return how the jobs of `?ids=a,b` stand; those that are not known (any more) are left out."""
    asked = [one for text in parse_qs(query).get("ids", []) for one in text.split(",")]
    found = []
    for job_id in asked[:MAX_ASKED]:
        state = jobs.status(job_id)
        if state is None:
            continue
        shown = {"job_id": job_id, "status": _STATUS[state["status"]], "progress": state["progress"]}
        if state["status"] == "done":
            shown["result"] = f"{PICTURES}{job_id}.png"
        elif state["status"] == "failed":
            shown["error"] = state.get("error", "")
        found.append(shown)
    return found


def picture(jobs: Jobs, path: str) -> bytes | None:
    """Return the file that `/api/images/<job id>.png` names; None when there is none."""
    job_id = path.removeprefix(PICTURES).removesuffix(".png")
    state = jobs.status(job_id) if _ID.fullmatch(job_id) else None
    if state is None or state["status"] != "done":
        return None
    return base64.b64decode(state["images"][0])
