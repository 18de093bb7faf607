"""Which nodes should run which workspaces."""

from __future__ import annotations

from typing import Any

import pytest

from ngpu_bootstrap.registry.assignment import Host, assign, suits
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec


def spec(number: int = 1, **changes: Any) -> WorkspaceSpec:
    return WorkspaceSpec(**{"id": str(number), "name": "w", "image": "i", "ports": [80], **changes})


def host(number: int, **changes: Any) -> Host:
    return Host(Address(f"0x{number:040x}"), **changes)


def placed(wanted: list[WorkspaceSpec], hosts: list[Host]) -> list[list[str]]:
    desired = assign(wanted, hosts)
    return [[one.id for one in desired[each.node]] for each in hosts]


def test_an_image_without_a_number_goes_everywhere_it_can() -> None:
    hosts = [host(1), host(2, admitted=False), host(3, draining=True)]
    assert placed([spec()], hosts) == [["1"], [], []]


def test_replicas_stay_where_they_are_and_else_go_where_least_runs() -> None:
    hosts = [host(1), host(2, running={"2"}), host(3)]
    assert placed([spec(number, replicas=1) for number in (1, 2, 3)], hosts) == [["1"], ["2"], ["3"]]
    assert placed([spec(replicas=2)], [host(1), host(2), host(3, running={"1"})]) == [["1"], [], ["1"]]


def test_a_draining_node_keeps_what_it_runs() -> None:
    assert placed([spec(1), spec(2)], [host(1, draining=True, running={"2"})]) == [["2"]]


def test_a_service_goes_where_it_is_offered() -> None:
    service = spec(image=None, service="demo/chat")
    assert placed([service], [host(1, services={"demo/chat"}), host(2)]) == [["1"], []]


@pytest.mark.parametrize(
    ("wanted", "models", "fits"),
    [
        ({"gpu_count": 1}, ["NVIDIA GeForce RTX 4090"], True),
        ({"gpu_count": 2}, ["NVIDIA GeForce RTX 4090"], False),
        ({"gpu_count": 1, "gpu_types": ["RTX4090"]}, ["NVIDIA GeForce RTX 4090"], True),
        ({"gpu_count": 1, "gpu_types": ["H200", "rtx 4090"]}, ["NVIDIA GeForce RTX 4090"], True),
        ({"gpu_count": 1, "gpu_types": ["H200"]}, ["NVIDIA GeForce RTX 4090"], False),
        ({}, [], True),
    ],
)
def test_gpus_must_be_there(wanted: dict[str, Any], models: list[str], fits: bool) -> None:
    assert suits(spec(**wanted), host(1, gpu_models=models)) is fits
