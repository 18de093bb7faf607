"""Which nodes should run which workspaces."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpu_bootstrap.registry.assignment import Host, Lack, Wanted, assign
from ngpu_protocol.control import GpuOffer, HostOffer
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec

GIB = 2**30


def node(number: int) -> Address:
    return Address(f"0x{number:040x}")


def spec(number: int = 1, **changes: Any) -> WorkspaceSpec:
    document = {"id": str(number), "name": "w", "image": "i", "ports": [80], **changes}
    return WorkspaceSpec(**{key: value for key, value in document.items() if value is not None})


def wanted(number: int = 1, *held: int, **changes: Any) -> Wanted:
    about = {key: changes.pop(key) for key in ("waited_for", "image_bytes", "failed_on") if key in changes}
    return Wanted(spec(number, **changes), [node(one) for one in held], **about)


def gpus(*models: str, memory: int = 24 * GIB, shares: int = 1) -> list[GpuOffer]:
    return [GpuOffer(bytes([index]) * 32, model, memory, shares) for index, model in enumerate(models)]


def host(number: int, **changes: Any) -> Host:
    return Host(node(number), **changes)


def placed(workspaces: list[Wanted], hosts: list[Host]) -> dict[int, list[int]]:
    found = assign(workspaces, hosts).placed
    return {int(one.spec.id): sorted(int(where, 16) for where in found[one.spec.id]) for one in workspaces}


def test_an_image_without_a_number_goes_everywhere_it_can() -> None:
    hosts = [host(1), host(2, admitted=False), host(3, draining=True)]
    assert placed([wanted()], hosts) == {1: [1]}


def test_replicas_stay_where_they_are_and_else_go_where_least_runs() -> None:
    three = [wanted(1, replicas=1), wanted(2, 2, replicas=1), wanted(3, replicas=1)]
    assert placed(three, [host(1), host(2), host(3)]) == {1: [1], 2: [2], 3: [3]}
    assert placed([wanted(1, 3, replicas=2)], [host(1), host(2), host(3)]) == {1: [1, 3]}


def test_fewer_replicas_leave_the_preferred_nodes() -> None:
    better = [host(1, gpus=gpus("RTX 3090")), host(2, gpus=gpus("RTX 4090"))]
    assert placed([wanted(1, 1, 2, replicas=1, gpu_count=1, gpu_types=["RTX4090", "RTX3090"])], better) == {1: [2]}


def test_a_node_that_is_waited_for_keeps_its_place_and_one_that_is_not_is_replaced() -> None:
    here = [host(2), host(3)]
    assert placed([wanted(1, 1, 2, replicas=2, waited_for=[node(1)])], here) == {1: [1, 2]}
    assert placed([wanted(1, 1, 2, replicas=2)], here) == {1: [2, 3]}


def test_a_draining_node_keeps_what_it_runs_until_it_is_leaving() -> None:
    hosts = [host(1, draining=True), host(2)]
    assert placed([wanted(1, 1, replicas=1), wanted(2, replicas=1)], hosts) == {1: [1], 2: [2]}
    assert placed([wanted(1, 1, replicas=1)], [host(1, draining=True, leaving=True), host(2)]) == {1: [2]}
    assert placed([wanted(1, 1, replicas=1)], [host(1, draining=True, leaving=True)]) == {1: [1]}


def test_a_service_goes_where_it_is_offered() -> None:
    service = wanted(1, image=None, service="demo/chat")
    assert placed([service], [host(1, services={"demo/chat"}), host(2)]) == {1: [1]}


@pytest.mark.parametrize(
    ("asked", "models", "lacks"),
    [
        ({"gpu_count": 1}, ["NVIDIA GeForce RTX 4090"], None),
        ({"gpu_count": 2}, ["NVIDIA GeForce RTX 4090"], Lack.GPU_COUNT),
        ({"gpu_count": 1, "gpu_types": ["RTX4090"]}, ["NVIDIA GeForce RTX 4090"], None),
        ({"gpu_count": 1, "gpu_types": ["H200", "rtx 4090"]}, ["NVIDIA GeForce RTX 4090"], None),
        ({"gpu_count": 1, "gpu_types": ["H200"]}, ["NVIDIA GeForce RTX 4090"], Lack.GPU_TYPE),
        ({"gpu_count": 2, "gpu_types": ["H200", "RTX4090"]}, ["NVIDIA H200", "RTX 4090"], Lack.GPU_COUNT),
        ({"gpu_count": 1, "min_gpu_memory_bytes": 80 * GIB}, ["RTX 4090"], Lack.GPU_MEMORY),
        ({"gpu_count": 1}, [], Lack.GPU_COUNT),
        ({}, [], None),
    ],
)
def test_gpus_must_be_there(asked: dict[str, Any], models: list[str], lacks: Lack | None) -> None:
    found = assign([wanted(1, **asked)], [host(1, gpus=gpus(*models))])
    assert bool(found.placed["1"]) is (lacks is None)
    assert (found.short["1"].reason if lacks else found.short) == (lacks or {})


def test_the_first_type_that_is_free_somewhere_is_taken() -> None:
    hosts = [host(1, gpus=gpus("RTX 3090")), host(2, gpus=gpus("H200"))]
    types = ["H200", "RTX3090"]
    asked = [wanted(number, replicas=1, gpu_count=1, gpu_types=types) for number in (1, 2, 3)]
    assert placed(asked, hosts) == {1: [2], 2: [1], 3: []}
    assert assign(asked, hosts).short["3"].reason == Lack.GPUS_TAKEN


def test_a_gpu_is_given_as_often_as_its_owner_shares_it() -> None:
    asked = [wanted(number, gpu_count=1) for number in (1, 2, 3)]
    assert placed(asked, [host(1, gpus=gpus("T4", shares=2))]) == {1: [1], 2: [1], 3: []}


def test_what_is_there_is_counted_before_anything_new() -> None:
    hosts = [host(1, gpus=gpus("T4"))]
    assert placed([wanted(1, gpu_count=1), wanted(2, 1, gpu_count=1)], hosts) == {1: [], 2: [1]}


OFFER = {"cpus": 8.0, "memory_bytes": 16 * GIB, "disk_free_bytes": 100 * GIB}


@pytest.mark.parametrize(
    ("asked", "offer", "lacks", "says"),
    [
        ({"memory_bytes": 32 * GIB}, {}, Lack.MEMORY, "too little memory left (32768 MiB wanted)"),
        ({"cpus": 16}, {}, Lack.CPUS, "too few CPUs left (16 wanted)"),
        ({"image_bytes": 200 * GIB}, {}, Lack.DISK, "too little disk left for an image of 204800 MiB"),
        ({}, {"disk_free_bytes": 0}, Lack.DISK, "too little disk left"),
        ({"image_bytes": 9 * GIB}, {"max_image_bytes": 8 * GIB}, Lack.IMAGE_SIZE, "no image of 9216 MiB"),
        ({"area": "eu"}, {"area": "us"}, Lack.AREA, "outside the area eu"),
        ({"egress": True}, {"egress": False}, Lack.EGRESS, "reach the outside"),
        ({"image": None, "image_url": "https://x.example/i.tar"}, {"tar_images": False}, Lack.TAR_IMAGES, "from URLs"),
        ({"image": "evil.example/i"}, {"registries": ("docker.io",)}, Lack.REGISTRY, "that registry"),
        ({}, {"engine": False}, Lack.ENGINE, "container engine"),
        ({"failed_on": {node(1): "disk_full"}}, {}, Lack.FAILED_THERE, "fault of the node"),
    ],
)
def test_a_shortage_names_what_is_missing(asked: dict[str, Any], offer: dict[str, Any], lacks: Lack, says: str) -> None:
    one = host(1, offer=HostOffer(**{"engine": True, **OFFER, **offer}))
    short = assign([wanted(1, **asked)], [one]).short["1"]
    assert (short.reason, short.fitting, dict(short.lacks)) == (lacks, 0, {lacks: 1})
    assert says in short.detail


def test_gpus_without_a_runtime_are_named_as_such() -> None:
    one = host(1, gpus=gpus("T4"), offer=HostOffer(engine=True, gpu_runtime=False))
    assert assign([wanted(1, gpu_count=1)], [one]).short["1"].reason == Lack.GPU_RUNTIME


def test_more_replicas_than_nodes_fit_says_how_many_and_why() -> None:
    hosts = [
        host(1, gpus=gpus("RTX 4090")),
        host(2, gpus=gpus("RTX 3090")),
        host(3),
        host(4, gpus=gpus("RTX 4090"), offer=HostOffer(engine=True, memory_bytes=GIB)),
    ]
    short = assign([wanted(1, replicas=4, gpu_count=1, gpu_types=["RTX4090"], memory_bytes=2 * GIB)], hosts).short["1"]
    assert short.reason == Lack.GPU_TYPE
    assert short.detail == (
        "4 replicas wanted, 1 placed; 4 nodes are connected: 2 without a GPU of type RTX4090, "
        "1 with too little memory left (2048 MiB wanted)"
    )
    alone = assign([wanted(1, replicas=2)], [host(1)]).short["1"]
    assert (alone.reason, alone.detail) == ("nodes", "2 replicas wanted, 1 placed; 1 node is connected")


def test_memory_is_counted_down_over_workspaces() -> None:
    one = host(1, offer=HostOffer(engine=True, memory_bytes=10 * GIB))
    assert placed([wanted(number, memory_bytes=4 * GIB) for number in (1, 2, 3)], [one]) == {1: [1], 2: [1], 3: []}


def test_what_no_longer_fits_moves_when_there_is_a_better_place_and_stays_otherwise() -> None:
    sick = host(1, gpus=[])
    assert placed([wanted(1, 1, replicas=1, gpu_count=1)], [sick, host(2, gpus=gpus("T4"))]) == {1: [2]}
    assert placed([wanted(1, 1, replicas=1, gpu_count=1)], [sick]) == {1: [1]}
    assert placed([wanted(1, 1)], [host(1, admitted=False)]) == {1: []}


hosts_drawn = st.lists(
    st.builds(
        Host,
        st.integers(1, 12).map(node),
        admitted=st.booleans(),
        draining=st.booleans(),
        gpus=st.lists(st.sampled_from(["T4", "H200"]), max_size=3).map(lambda models: gpus(*models)),
    ),
    max_size=8,
    unique_by=lambda drawn: drawn.node,
)
wanted_drawn = st.lists(
    st.tuples(st.integers(0, 2), st.none() | st.integers(1, 5), st.sampled_from([[], ["T4"], ["H200", "T4"]])),
    max_size=5,
)


@given(hosts_drawn, wanted_drawn, st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_an_assignment_is_stable_sold_once_and_independent_of_order(
    hosts: list[Host], drawn: list[tuple[int, int | None, list[str]]], random: Any
) -> None:
    asked = [
        Wanted(spec(number, gpu_count=count, replicas=replicas, gpu_types=types))
        for number, (count, replicas, types) in enumerate(drawn, 1)
    ]
    first = assign(asked, hosts)
    random.shuffle(hosts)
    assert assign(asked, hosts) == first
    again = [Wanted(one.spec, first.placed[one.spec.id]) for one in asked]
    second = assign(again, hosts)
    assert {key: set(nodes) for key, nodes in second.placed.items()} == {
        key: set(nodes) for key, nodes in first.placed.items()
    }
    for one in hosts:
        held = sum(each.spec.gpu_count for each in asked if one.node in first.placed[each.spec.id])
        assert held <= len(one.gpus)
        assert one.admitted or not any(one.node in nodes for nodes in first.placed.values())
    for each in asked:
        if each.spec.replicas is not None:
            assert len(first.placed[each.spec.id]) <= each.spec.replicas


def test_many_workspaces_on_many_nodes_take_time_in_proportion() -> None:
    hosts = [host(number, gpus=gpus(*["H200"] * 8)) for number in range(1, 1001)]
    began_s = time.monotonic()
    found = assign([wanted(number) for number in range(1, 21)], hosts)
    assert sum(len(nodes) for nodes in found.placed.values()) == 20_000
    assert time.monotonic() - began_s < 20  # 0.1 s on an idle machine; three minutes when each place looks at all
