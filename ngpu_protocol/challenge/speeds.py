"""How long a GPU of a model may take over a puzzle.

A table of what models can do, from their datasheets: matrix products of 32-bit floating point (TF32 on tensor cores,
dense, where a model has it) and memory bandwidth. What a prover in PyTorch reaches of that was measured on an H200
(docs/gpu-check.md). A limit leaves room for slower memory clocks, a warm card and a colder start, and none for the next
slower model of its kind.
"""

from __future__ import annotations

from dataclasses import dataclass

from ngpu_protocol.challenge.puzzle import Puzzle


@dataclass(frozen=True, slots=True)
class Speed:
    """What a model can do at best.

    Attributes:
        products_per_s: multiplications and additions, each counted, in products of matrices.
        bytes_per_s: from and to its own memory.
    """

    products_per_s: float
    bytes_per_s: float


_T = 1e12
SPEEDS: dict[str, Speed] = {
    "B200": Speed(1100 * _T, 8.0 * _T),
    "H200": Speed(494 * _T, 4.8 * _T),
    "H100 SXM": Speed(494 * _T, 3.35 * _T),
    "H100 NVL": Speed(417 * _T, 3.9 * _T),
    "H100 PCIe": Speed(378 * _T, 2.0 * _T),
    "A100": Speed(156 * _T, 1.55 * _T),
    "A40": Speed(74.8 * _T, 0.696 * _T),
    "A10": Speed(62.5 * _T, 0.6 * _T),
    "L40S": Speed(183 * _T, 0.864 * _T),
    "L4": Speed(60 * _T, 0.3 * _T),
    "RTX 5090": Speed(104 * _T, 1.79 * _T),
    "RTX 4090": Speed(82.6 * _T, 1.0 * _T),
    "RTX 4080": Speed(48.7 * _T, 0.717 * _T),
    "RTX 3090": Speed(35.6 * _T, 0.936 * _T),
    "RTX 3080": Speed(29.8 * _T, 0.76 * _T),
    "V100": Speed(15.7 * _T, 0.9 * _T),
    "T4": Speed(8.1 * _T, 0.32 * _T),
}

#: Of the datasheet's figure, what the product must reach at least (measured: 0.72 to 0.79).
PRODUCT_PART = 0.6
#: How often the product passes through memory while it is digested, and what of the bandwidth that reaches.
DIGEST_PASSES = 26
#: What making one entry of a factor moves: it is unpacked from a word of eight.
ENTRY_BYTES_MOVED = 160
#: What reading one entry moves, with the arithmetic of the step around it.
CHAIN_BYTES = 640
MEMORY_PART = 0.5
#: Starting the framework's kernels, and the network.
FIXED_S = 1.0
CHAINS_FIXED_S = 0.75
HASHED_BYTES_PER_S = 1.0e9


@dataclass(frozen=True, slots=True)
class Allowed:
    """Seconds, each from question to answer: for the root of the product, and for the root of the chains' ends."""

    product_s: float
    chains_s: float


def speed_of(model: str) -> Speed | None:
    """Return the speed of *model* as NVML or people spell it; None for one that is not in the table."""
    plain = "".join(character for character in model.lower() if character.isalnum())
    found = [name for name in SPEEDS if "".join(name.lower().split()) in plain]
    if not found and "h100" in plain:
        found = ["H100 PCIe" if "pcie" in plain else "H100 SXM"]
    return SPEEDS[max(found, key=len)] if found else None


def allowed(puzzle: Puzzle, speed: Speed) -> Allowed:
    """Return what a GPU of that speed may take."""
    memory = speed.bytes_per_s * MEMORY_PART
    product_s = puzzle.operations / (speed.products_per_s * PRODUCT_PART)
    factors_s = (puzzle.rows + puzzle.columns) * puzzle.depth * ENTRY_BYTES_MOVED / memory
    digest_s = puzzle.product_bytes * DIGEST_PASSES / memory + puzzle.product_bytes / 256 / HASHED_BYTES_PER_S / 4
    chains_s = puzzle.walkers * puzzle.steps * CHAIN_BYTES / memory + puzzle.walkers * 4 / HASHED_BYTES_PER_S
    return Allowed(FIXED_S + product_s + factors_s + digest_s, CHAINS_FIXED_S + chains_s)
