"""Why a candidate is passed over: the words, and the one function that finds the first that holds.

The order of `Exclusion` is the order of the checks, most basic first. Reasons up to `SET_ASIDE` change only when
somebody says something (the node, the operator, a verdict), so the index keeps them; the last three are looked at in
the moment of choosing.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.gpu_models import canonical_gpu_model, gpu_model_names

SILENCE_LIMIT_MS = 5_000
"""A node not heard of for this long gets nothing."""

_VERSION = re.compile(r"/(\d{1,6}(?:\.\d{1,6}){0,3})")


class Exclusion(enum.StrEnum):
    """Why a candidate is passed over, most basic first."""

    NOT_ADMITTED = "not_admitted"
    """The operator has not approved the node."""
    VERSION_TOO_OLD = "version_too_old"
    """Its software is older than the operator wants."""
    DISTRUSTED = "distrusted"
    """Its standing is too low: too many of its receipts were disputed."""
    DRAINING = "draining"
    """It takes no new orders: it is about to stop."""
    TOO_FAR = "too_far"
    """Its round trip is beyond the operator's limit."""
    CHALLENGED = "challenged"
    """It is being challenged, and gets no tasks until that is over."""
    NOT_DEPLOYED = "not_deployed"
    """The workspace is not deployed there."""
    WRONG_REVISION = "wrong_revision"
    """Another revision runs there than those that may serve."""
    OUTVOTED = "outvoted"
    """Two other nodes contradicted its answer to a task of the workspace, of late."""
    UNHEALTHY = "unhealthy"
    """The deployment, or a GPU it holds, is not healthy."""
    NOT_READY = "not_ready"
    """The deployment does not serve (yet)."""
    WRONG_GPU = "wrong_gpu"
    """It has none of the GPU models the workspace runs on."""
    SET_ASIDE = "set_aside"
    """It failed too often lately and is tried again later."""
    SILENT = "silent"
    """Nothing was heard of it for a while."""
    TRIED = "tried"
    """It refused or failed this very task before."""
    NO_FREE_SLOT = "no_free_slot"
    """It is full."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator wants of nodes.

    Attributes:
        minimum_version: of the node's software; empty for any.
        max_round_trip_s: None for any.
    """

    minimum_version: tuple[int, ...] = ()
    max_round_trip_s: float | None = None


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What is known of a node whatever the workspace. *round_trip_s* None: not measured; *challenged*: right now."""

    admitted: bool
    software: str
    is_trusted: bool
    draining: bool
    round_trip_s: float | None = None
    challenged: bool = False


@dataclass(frozen=True, slots=True)
class DeploymentFacts:
    """What is known of a workspace on a node.

    Attributes:
        revision: None when it is not deployed there.
        state: a `DeploymentPhase`, or a later version's word.
        rank: place of its GPUs in the workspace's order of preference, None when they are none of those.
        gpus_healthy: whether every GPU it holds is still offered.
        outvoted: whether two other nodes contradicted an answer of the workspace from there, of late.
        may_serve: whether its revision takes the workspace's tasks there; two do while one replaces the other.
    """

    revision: int | None
    state: str = ""
    rank: int | None = 0
    gpus_healthy: bool = True
    may_serve: bool = True
    outvoted: bool = False


NOTHING = DeploymentFacts(None)


def node_exclusion(facts: NodeFacts, policy: Policy) -> Exclusion | None:
    """Return why the node gets no task of any workspace, None when nothing speaks against it."""
    if not facts.admitted:
        return Exclusion.NOT_ADMITTED
    if policy.minimum_version and version_of(facts.software) < policy.minimum_version:
        return Exclusion.VERSION_TOO_OLD
    if not facts.is_trusted:
        return Exclusion.DISTRUSTED
    if facts.draining:
        return Exclusion.DRAINING
    limit_s = policy.max_round_trip_s
    if limit_s is not None and facts.round_trip_s is not None and facts.round_trip_s > limit_s:
        return Exclusion.TOO_FAR
    return Exclusion.CHALLENGED if facts.challenged else None


def deployment_exclusion(facts: DeploymentFacts) -> Exclusion | None:
    """Return why the deployment gets no task, None when nothing speaks against it."""
    if facts.revision is None:
        return Exclusion.NOT_DEPLOYED
    if not facts.may_serve:
        return Exclusion.WRONG_REVISION
    if facts.outvoted:
        return Exclusion.OUTVOTED
    if facts.state == DeploymentPhase.UNHEALTHY or not facts.gpus_healthy:
        return Exclusion.UNHEALTHY
    if facts.state != DeploymentPhase.READY:
        return Exclusion.NOT_READY
    if facts.rank is None:
        return Exclusion.WRONG_GPU
    return None


def gpu_rank(wanted: Sequence[str], models: Sequence[tuple[str, int]]) -> int | None:
    """Return the place in *wanted* of the first model found in *models*; 0 when anything goes, None for no match.

    Args:
        wanted: models in any spelling, preferred first; empty: any, or none at all.
        models: NVML's spelling and the memory in bytes of each GPU.
    """
    if not wanted:
        return 0
    present = {name for model, memory_bytes in models for name in gpu_model_names(model, memory_bytes)}
    for place, spelling in enumerate(wanted):
        if canonical_gpu_model(spelling) in present:
            return place
    return None


def version_of(software: str) -> tuple[int, ...]:
    """Return the numbers in `name/1.2.3`; () when there are none."""
    match = _VERSION.search(software[:256])
    return tuple(int(part) for part in match[1].split(".")) if match is not None else ()
