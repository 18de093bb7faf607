"""The table `[routes.job]` of a profile: a call that submits a job, or one by which clients ask for theirs.

A submitting route says how its jobs are asked for, read, fetched and ended (`ngpu_protocol.job_terms.JobTerms`), and
what they are called. A route by which clients ask for themselves names those jobs and where the request has the id.
Whoever asks, it is the same job.

Pure; `jobs` decides by these, `dispatch.jobs` acts.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, StringConstraints, Tag

from ngpu_bootstrap.profiles.places import Declared, Place
from ngpu_protocol.job_terms import JobTerms

JobName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]


class SubmittedJob(JobTerms):
    """Of a route that submits.

    Attributes:
        name: what routes that ask for such jobs call them; unique within its profile.
    """

    name: JobName = "job"

    submits: ClassVar[bool] = True
    # nothing in the request: the id comes with the answer
    key: ClassVar[None] = None


class AskedJob(Declared):
    """Of a route by which clients ask for a job themselves; what they ask goes to the node that took it.

    Attributes:
        of: the job's name.
        key: where the request has the job's id.
        ends: whether such a call ends the job.
    """

    of: JobName
    key: Place
    ends: bool = False

    submits: ClassVar[bool] = False
    repeats_request: ClassVar[bool] = False


def _kind(value: Any) -> str:
    asks = "of" in value if isinstance(value, dict) else isinstance(value, AskedJob)
    return "asked" if asks else "submitted"


JobDeclaration = Annotated[
    Annotated[SubmittedJob, Tag("submitted")] | Annotated[AskedJob, Tag("asked")],
    Discriminator(_kind),
    Field(description="how a workspace's own jobs are submitted, or asked for by clients"),
]
