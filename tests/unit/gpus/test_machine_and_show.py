"""What the owner sees."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ngpu_node.gpus.driver import FaultKind, MigInstance, PcieLink, Vitals
from ngpu_node.gpus.health import ConditionKind, DeviceHealth
from ngpu_node.gpus.inventory import InventoryState, Withheld, of_fault, of_survey
from ngpu_node.gpus.machine import look_around
from ngpu_node.gpus.show import describe, print_gpus
from tests.support.scripted_driver import GIB, fault, reading, survey


def shown(found: dict[str, object], width: int = 200) -> str:
    text = io.StringIO()
    print_gpus(found, Console(file=text, width=width))
    return text.getvalue()


def test_the_machine_is_described() -> None:
    here = look_around(Path("/"))
    assert here.cores >= 1
    assert here.memory_bytes is not None
    assert here.memory_bytes > GIB / 4
    assert here.disk_bytes is not None
    assert here.kernel


def test_what_cannot_be_found_out_is_none(tmp_path: Path) -> None:
    here = look_around(tmp_path / "missing", root=tmp_path)
    assert (here.cpu_model, here.memory_bytes, here.disk_bytes, here.system) == (None, None, None, None)


def test_every_device_has_a_row_with_what_speaks_against_it() -> None:
    whole = reading(2, mig_enabled=True)
    instance = reading(2, uuid="MIG-9", model="NVIDIA H200 MIG 1g.18gb", mig=MigInstance(whole.uuid, 9, 0, "1g.18gb"))
    found = of_survey(
        survey(reading(0, pcie=PcieLink(5, 16, 5, 16), power_limit_w=700.0), reading(1), whole, instance),
        Withheld(devices=("GPU-00000001",)),
    )
    health = {"GPU-00000000": DeviceHealth("GPU-00000000"), "GPU-gone": DeviceHealth("GPU-gone")}
    health["GPU-gone"].observe(fault(FaultKind.GONE, "the driver does not know this GPU any more"), 1.0)
    described = describe(
        found,
        health,
        {"GPU-00000000": Vitals(memory_used_bytes=3 * GIB, temperature_celsius=61)},
        {"GPU-00000000": ("nvml-process", 10, 1, "why")},
        look_around(Path("/")),
        held={"GPU-00000000"},
        stuck_for_s=None,
        reason_against=lambda uuid: "",
    )
    assert json.loads(json.dumps(described)) == described
    assert [gpu["offered"] for gpu in described["gpus"]] == [True, False, False, True]
    text = shown(described)
    for words in (
        "in use",
        "withheld by the owner",
        "MIG",
        "2/9",
        "5 x16",
        "700",
        "61",
        "nvml-process",
        "not listed now: GPU-gone: the driver does not know this GPU any more",
    ):
        assert words in text, words


def test_eighty_columns_hold_all_that_is_known_of_a_device_and_cut_nothing() -> None:
    uuid = "GPU-b778b9a9-3c0f-11ee-be56-0242ac120002"
    card = reading(
        0, uuid=uuid, model="NVIDIA GeForce RTX 4090", memory_total_bytes=24 * GIB, memory_free_bytes=20 * GIB,
        compute_capability="8.9", power_limit_w=450.0, sm_clock_mhz=210, max_sm_clock_mhz=3120, nvlinks=None,
        pcie=PcieLink(4, 16, 4, 16), mig_enabled=False, ecc=False, persistence=True, display_attached=True,
    )  # fmt: skip
    found = of_survey(survey(card), Withheld(("RTX 5090",), 2 * GIB))
    vitals = {uuid: Vitals(memory_used_bytes=4 * GIB, memory_free_bytes=19 * GIB, temperature_celsius=61)}
    described = describe(
        found, {}, vitals, {uuid: ("nvml-process", 10, 0, "")}, look_around(Path("/")),
        held=(), stuck_for_s=None, reason_against=lambda _: "its clocks are held down by the power supply (61 °C)",
    )  # fmt: skip
    described["engine"] = {"name": "docker", "version": "28.1.1", "problem": ""}
    lines = shown(described, 80).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for words in (
        "driver 580.1, CUDA 13.0, NVML 13.580.1", "gpus.withhold names what is not here: RTX 5090", uuid,
        "NVIDIA GeForce RTX 4090", "4.0 19.0 22 of 24 GiB 61 nvml-process its clocks are held down",
        "0000:00:00.0 8.9 4 x16 none off off on attached 450 210 3120", "container engine docker 28.1.1",
    ):  # fmt: skip
        assert words in text, words
    assert "…" not in text


def test_a_machine_without_a_driver_says_why() -> None:
    described = describe(
        of_fault(fault(FaultKind.NO_DRIVER, "no NVIDIA driver on this machine")),
        {}, {}, {}, None, held=(), stuck_for_s=2.0, reason_against=lambda uuid: "",
    )  # fmt: skip
    assert described["state"] == "no_driver"
    assert described["driver_stuck_for_s"] == 2.0
    assert "no NVIDIA driver" in shown(described)


@pytest.mark.parametrize("word", [*ConditionKind, *InventoryState])
def test_every_word_is_explained_to_owners(word: str) -> None:
    assert f"`{word}`" in (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
