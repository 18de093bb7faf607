"""One name for each GPU model, however NVML, people and other tools spell it.

NVML says ``NVIDIA GeForce RTX 4090``, a client asks for ``RTX4090``, a price list has ``V100-32Gi``. All records,
capability keys and filters use the canonical name, which is what people write: upper case, hyphens between parts, the
memory appended only where one name was sold with several sizes (``A100-40G`` and ``A100-80G``).

`_FAMILIES` is the one table: a pattern over the words that tell models apart, joined, and the name it stands for. A
model that is not in it keeps its own spelling, reduced the same way, so that two nodes with the same unknown card
still meet. Pure.
"""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["canonical_gpu_model", "gpu_model_names"]

MAX_MODEL_CHARS = 64

_GIB = 1 << 30
_WORD = re.compile(r"[A-Z0-9]+")
_SIZE = re.compile(r"(\d{1,3})(?:GIB|GB|GI|G)")
_SILENT = re.compile(
    r"NVIDIA|TESLA|GEFORCE|QUADRO|GRAPHICS|GPU|PCIE|SXM\d?|NVL|HBM\w*|DGXS|FHHL|MIG|\dG|\dC|GENERATION|EDITION|BLACKWELL"
)
"""Words that name a brand, a form or a generation and tell no two models apart."""

_SIZED = {"V100": (16, 32), "A100": (40, 80), "H100": (64, 80, 94, 96), "P100": (12, 16), "GH200": (96, 144)}
"""Names sold with several sizes of memory, in GB as marketed."""

_FAMILIES: tuple[tuple[str, str], ...] = (
    # workstation
    (r"RTXPRO(\d{4})(MAXQ|SERVER|WORKSTATION)?\w*", "RTX-PRO-{0}"),
    (r"RTXA(\d{4})", "RTX-A{0}"),
    (r"RTX(\d{4})ADA", "RTX-{0}-ADA"),
    # consumer, and older workstation cards
    (r"RTX(\d{4})(TI)?(SUPER)?(D)?(LAPTOP)?", "RTX{0}{1}{2}{3}{4}"),
    (r"GTX(\d{3,4})(TI)?(SUPER)?(LAPTOP)?", "GTX{0}{1}{2}{3}"),
    (r"TITAN(RTX|V|XP|X)", "TITAN-{0}"),
    # data centre
    (r"(GH200|GB200|GB300|B300|B200|B100|H200|H800|H100|H20|A800|A100|V100S|V100|P100|P40|P4|T4G|T4)", "{0}"),
    (r"(L40S|L40|L20|L4|L2|A40|A30|A16|A10G|A10|A2|M60|M40|K80)", "{0}"),
)
_COMPILED = [(re.compile(pattern), name) for pattern, name in _FAMILIES]


@lru_cache(maxsize=1024)
def canonical_gpu_model(spelling: str, memory_bytes: int = 0) -> str:
    """Return the one name of a model: 1 to 64 of ``A-Z0-9-``, or empty when *spelling* has no letter or digit.

    Args:
        spelling: NVML's, a client's, or a canonical name, which stays what it is.
        memory_bytes: the device's total memory, which tells ``A100-40G`` from ``A100-80G`` where the spelling does
            not; 0 when unknown.
    """
    words = _WORD.findall(spelling[:256].upper())
    sizes = [match for match in map(_SIZE.fullmatch, words) if match is not None]
    telling = "".join(word for word in words if not _SILENT.fullmatch(word) and not _SIZE.fullmatch(word))
    for pattern, name in _COMPILED:
        match = pattern.fullmatch(telling)
        if match is not None:
            canonical = name.format(*(group or "" for group in match.groups()))
            if "MIG" in words:  # a slice is not the card: it is found under a name of its own
                return canonical + _size_suffix(canonical, int(sizes[0][1]) if sizes else 0, 0) + "-MIG"
            return canonical + _size_suffix(canonical, int(sizes[0][1]) if sizes else 0, memory_bytes)
    return "".join(words)[:MAX_MODEL_CHARS]


def _size_suffix(canonical: str, stated_gb: int, memory_bytes: int) -> str:
    sizes = _SIZED.get(canonical)
    if sizes is None:
        return ""
    if stated_gb in sizes:
        return f"-{stated_gb}G"
    if memory_bytes > 0:
        # NVML counts what is left after ECC and the driver, so the nearest size is meant.
        gib = memory_bytes / _GIB
        return f"-{min(sizes, key=lambda size: abs(size - gib))}G"
    return ""


def gpu_model_names(spelling: str, memory_bytes: int = 0) -> tuple[str, ...]:
    """Return every name under which a device can be asked for: with its memory, and without where that differs."""
    canonical = canonical_gpu_model(spelling, memory_bytes)
    family, _, size = canonical.rpartition("-")
    sized = family in _SIZED and size.endswith("G") and size[:-1].isdigit()  # `MIG` is no size: a slice is not the card
    return (canonical, family) if sized else (canonical,) if canonical else ()
