"""How long a GPU of a model may take over a puzzle.

A table of what models can do, from their datasheets: matrix products of 32-bit floating point (TF32 on tensor cores,
dense, where a model has it) and memory bandwidth. What a prover in PyTorch reaches of that was measured on an H200
(docs/gpu-check.md). A limit leaves room for slower memory clocks, a warm card and a colder start, and none for the next
slower model of its kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ngpu_protocol.challenge.puzzle import Puzzle


@dataclass(frozen=True, slots=True)
class Speed:
    """What a model can do at best.

    Attributes:
        products_per_s: multiplications and additions, each counted, in products of matrices.
        bytes_per_s: from and to its own memory.
        memory_gib: the most that a card of this model is sold with; 0 when that is not known.
        source: whose word these figures are.
    """

    products_per_s: float
    bytes_per_s: float
    memory_gib: int = 0
    source: str = ""


_T = 1e12
SPEEDS: dict[str, Speed] = {
    "B200": Speed(1100 * _T, 8.0 * _T, 192, "NVIDIA HGX B200 datasheet (2.2 PFLOPS TF32 sparse, halved)"),
    "H200": Speed(494 * _T, 4.8 * _T, 141, "NVIDIA H200 datasheet (989 TFLOPS TF32 sparse, halved)"),
    "H100 SXM": Speed(494 * _T, 3.35 * _T, 80, "NVIDIA H100 datasheet, SXM (989 TFLOPS TF32 sparse, halved)"),
    "H100 NVL": Speed(417 * _T, 3.9 * _T, 94, "NVIDIA H100 datasheet, NVL (835 TFLOPS TF32 sparse, halved)"),
    "H100 PCIe": Speed(378 * _T, 2.0 * _T, 80, "NVIDIA H100 PCIe product brief (756 TFLOPS TF32 sparse, halved)"),
    "A100": Speed(156 * _T, 1.55 * _T, 80, "NVIDIA A100 datasheet (TF32 dense; bandwidth of the 40 GB card)"),
    "A40": Speed(74.8 * _T, 0.696 * _T, 48, "NVIDIA A40 datasheet (TF32 dense)"),
    "A10": Speed(62.5 * _T, 0.6 * _T, 24, "NVIDIA A10 datasheet (TF32 dense)"),
    "L40S": Speed(183 * _T, 0.864 * _T, 48, "NVIDIA L40S datasheet (366 TFLOPS TF32 sparse, halved)"),
    "L4": Speed(60 * _T, 0.3 * _T, 24, "NVIDIA L4 datasheet (120 TFLOPS TF32 sparse, halved)"),
    "RTX 5090": Speed(104 * _T, 1.79 * _T, 32, "NVIDIA RTX Blackwell architecture paper (TF32 dense)"),
    "RTX 4090": Speed(82.6 * _T, 1.0 * _T, 24, "NVIDIA Ada architecture paper (TF32 dense)"),
    "RTX 4080": Speed(48.7 * _T, 0.717 * _T, 16, "NVIDIA Ada architecture paper (TF32 dense)"),
    "RTX 3090": Speed(35.6 * _T, 0.936 * _T, 24, "NVIDIA GA102 architecture paper (TF32 dense)"),
    "RTX 3080": Speed(29.8 * _T, 0.76 * _T, 12, "NVIDIA GA102 architecture paper (TF32 dense)"),
    "V100": Speed(15.7 * _T, 0.9 * _T, 32, "NVIDIA V100 datasheet, SXM2 (FP32: it has no TF32)"),
    "T4": Speed(8.1 * _T, 0.32 * _T, 16, "NVIDIA T4 datasheet (FP32: it has no TF32)"),
}

#: Of the datasheet's figure, what the product must reach at least (measured: 0.72 to 0.79).
PRODUCT_PART = 0.6
#: What digesting one entry of the product moves.
DIGEST_BYTES = 104
#: What adding one entry of a part of the product (`DEPTH_AT_ONCE` deep) to what is kept moves.
KEPT_BYTES = 16
DEPTH_AT_ONCE = 8192
#: What making one entry of a factor moves: it is unpacked from a word of eight.
ENTRY_BYTES_MOVED = 160
#: What reading one entry counts as, with the arithmetic of the step around it. A read at random waits for memory's page
#: tables more than for its bandwidth: an H200 made 2.7 to 3.1 thousand million a second of 107 GiB, an H100 3.2 to 3.7
#: of 59. This leaves an H200 1.4 times the most it took.
CHAIN_BYTES = 1000
MEMORY_PART = 0.5
#: Starting the framework's kernels, and the network.
FIXED_S = 1.0
CHAINS_FIXED_S = 0.75
HASHED_BYTES_PER_S = 1.0e9
#: How much deeper the product of a claim of little memory is at most, and what part of a card says too little.
DEEPER = 4
LEAST_OF_CARD = 16


@dataclass(frozen=True, slots=True)
class Allowed:
    """Seconds, each from question to answer: for the root of the product, and for the root of the chains' ends."""

    product_s: float
    chains_s: float


def speed_of(model: str, more: Mapping[str, Speed] = {}) -> Speed | None:
    """Return the speed of *model* as NVML or people spell it; None for one that is not in the table.

    A row speaks of a model with words that begin with it, no digit following: `A100` of `A100-SXM4-80GB`, and not of
    `RTX A1000`. Of several, one that another's name contains gives way (`A100` to an operator's `A100 40GB`), and of
    the rest the fastest counts: a name that holds a second, slower model gains nothing.

    Args:
        more: rows that an operator adds; they replace the table's of the same name.
    """
    words = _words(model)
    rows = {_plain(name): speed for name, speed in {**SPEEDS, **more}.items()}
    named = {name for name in rows if any(_begins(words[at:], name) for at in range(len(words)))}
    if any(_begins([word], "h100") for word in words) and not any(name.startswith("h100") for name in named):
        named.add("h100pcie" if "pcie" in words else "h100sxm")
    found = [name for name in named if not any(name != other and name in other for other in named)]
    return rows[max(found, key=lambda name: rows[name].products_per_s)] if found else None


def _begins(words: list[str], name: str) -> bool:
    """Return whether *words*, written together, begin with *name*, and no digit goes on where it ends within a word."""
    text = ""
    for word in words:
        text += word
        if len(text) >= len(name):
            return text.startswith(name) and not text[len(name) : len(name) + 1].isdigit()
        if not name.startswith(text):
            return False
    return False


def _words(name: str) -> list[str]:
    return "".join(character if character.isalnum() else " " for character in name.lower()).split()


def _plain(name: str) -> str:
    return "".join(_words(name))


def too_large(memory_bytes: int, speed: Speed) -> bool:
    """Return whether no card of that model has so much memory: then there is nothing to be measured. Less is fine: an
    owner may withhold some."""
    return bool(speed.memory_gib) and memory_bytes > speed.memory_gib * 1.02 * (1 << 30)


def depth_for(depth: int, memory_bytes: int, speed: Speed) -> int:
    """Return how deep the product of a claim is, where that of a whole card is *depth*.

    A claim of half the card's memory has half the product. Were that all, the second for everything else would be most
    of its time, and a slower card would fit into it: so it is twice as deep, and costs as much. Four times at most,
    since checking it costs as much more.
    """
    times = 1
    while times < DEEPER and memory_bytes * 2 * times <= speed.memory_gib * (1 << 30) * 1.02:
        times *= 2
    return depth * times


def too_small(memory_bytes: int, speed: Speed) -> bool:
    """Return whether so little of a card is offered that its time would say nothing."""
    return memory_bytes * LEAST_OF_CARD < speed.memory_gib * (1 << 30)


def allowed(puzzle: Puzzle, speed: Speed) -> Allowed:
    """Return what a GPU of that speed may take."""
    memory = speed.bytes_per_s * MEMORY_PART
    product_s = puzzle.operations / (speed.products_per_s * PRODUCT_PART)
    factors_s = (puzzle.rows + puzzle.columns) * puzzle.depth * ENTRY_BYTES_MOVED / memory
    moved = DIGEST_BYTES + KEPT_BYTES * -(-puzzle.depth // DEPTH_AT_ONCE)
    digest_s = puzzle.entries * moved / memory + puzzle.entries / 256 / HASHED_BYTES_PER_S
    chains_s = puzzle.walkers * puzzle.steps * CHAIN_BYTES / memory + puzzle.walkers * 4 / HASHED_BYTES_PER_S
    return Allowed(FIXED_S + product_s + factors_s + digest_s, CHAINS_FIXED_S + chains_s)
