"""One name for a GPU model, whoever spells it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.gpu_models import canonical_gpu_model, gpu_model_names
from ngpu_protocol.prices import Prices

GIB = 1 << 30


@pytest.mark.parametrize(
    ("spellings", "canonical"),
    [
        (["RTX4090", "rtx 4090", "NVIDIA GeForce RTX 4090", "GeForce RTX 4090", "RTX-4090 24GB"], "RTX4090"),
        (["NVIDIA GeForce RTX 4090 D", "RTX4090D"], "RTX4090D"),
        (["NVIDIA GeForce RTX 4070 Ti SUPER", "RTX4070TiSuper"], "RTX4070TISUPER"),
        (["V100-32Gi", "Tesla V100-SXM2-32GB", "V100 32GB"], "V100-32G"),
        (["NVIDIA A100-SXM4-80GB", "A100 80G", "A100-80G", "NVIDIA A100 80GB PCIe"], "A100-80G"),
        (["NVIDIA A100 80GB PCIe MIG 1g.10gb", "A100-80G-MIG"], "A100-80G-MIG"),
        (["NVIDIA H100 80GB HBM3", "H100-80G"], "H100-80G"),
        (["NVIDIA H200", "H200", "H200 NVL"], "H200"),
        (["NVIDIA L40S", "l40s"], "L40S"),
        (["NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"], "RTX-6000-ADA"),
        (["NVIDIA RTX A6000", "A6000 RTX", "RTX-A6000"][:1], "RTX-A6000"),
        (["Quadro RTX 8000"], "RTX8000"),
        (["Tesla T4", "T4"], "T4"),
        (["Foo Card 12", "foo-card 12"], "FOOCARD12"),
        (["", "---", "\u212a"], ""),
    ],
)
def test_spellings_meet_in_one_name(spellings: list[str], canonical: str) -> None:
    assert {canonical_gpu_model(spelling) for spelling in spellings} == {canonical}


def test_memory_tells_sizes_apart_where_the_name_does_not() -> None:
    assert canonical_gpu_model("NVIDIA A100-PCIE", 40 * GIB - 1) == "A100-40G"
    assert canonical_gpu_model("NVIDIA H100 PCIe", 85_520_809_984) == "H100-80G"
    assert canonical_gpu_model("NVIDIA GeForce RTX 4090", 24 * GIB) == "RTX4090"


def test_a_sized_card_is_found_with_and_without_its_size() -> None:
    assert gpu_model_names("V100-32Gi") == ("V100-32G", "V100")
    assert gpu_model_names("RTX4090") == ("RTX4090",)
    assert gpu_model_names("A100-80G-MIG") == ("A100-80G-MIG",)
    assert gpu_model_names("") == ()


def test_a_slice_of_a_sized_card_is_not_found_as_the_card() -> None:
    assert gpu_model_names("NVIDIA H100 PCIe MIG 1g.10gb", 10 * GIB) == ("H100-MIG",)
    assert gpu_model_names("NVIDIA GH200 480GB MIG 1g.12gb") == ("GH200-MIG",)
    assert Prices.of_models("USD", {"H100": "1"}).of("H100-MIG") is None


@given(st.text(max_size=300), st.integers(0, 1 << 45))
def test_any_text_has_a_name_that_is_its_own(spelling: str, memory_bytes: int) -> None:
    name = canonical_gpu_model(spelling, memory_bytes)
    assert re.fullmatch(r"[A-Z0-9-]{0,64}", name)
    assert canonical_gpu_model(name) == name
