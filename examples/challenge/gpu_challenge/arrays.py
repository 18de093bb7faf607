"""The few array operations that a proof takes, on NumPy, CuPy or PyTorch.

Words of 32 bits are kept in int32, because PyTorch has no unsigned ones: sums and products wrap, and shifts to the
right are followed by a mask, since they copy the sign.
"""

from __future__ import annotations

from typing import Any

GOLDEN = 0x9E3779B1
#: Beside the product stands what is being added to it, in 32 bits: so much of it.
PART_BYTES = 1 << 29


def part_height(columns: int) -> int:
    """Return how many rows of a product are made at a time: a multiple of what matrix units like."""
    return max(256, PART_BYTES // (4 * columns) // 256 * 256)


class NumpyArrays:
    """Arrays of NumPy, or of CuPy, which has the same operations."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.name = module.__name__
        if self.name == "numpy":
            import warnings

            warnings.filterwarnings("ignore", message="overflow encountered")

    def words(self, count: int, start: int = 0) -> Any:
        return self.module.arange(start, start + count, dtype=self.module.int64).astype(self.module.int32)

    def int32(self, values: Any) -> Any:
        return values.astype(self.module.int32)

    def float32(self, values: Any) -> Any:
        return values.astype(self.module.float32)

    def empty(self, rows: int, columns: int) -> Any:
        return self.module.empty((rows, columns), dtype=self.module.int16)

    def lines(self, count: int, depth: int) -> Any:
        return self.module.empty((count, depth), dtype=self.module.float32)

    def product(self, left: Any, right: Any, out: Any, *, add: bool) -> None:
        """Put left x right-transposed into *out*, or add it, modulo 2^16; each entry of it must have 16 bits."""
        height = part_height(out.shape[1])
        for first in range(0, out.shape[0], height):
            part = self.module.matmul(left[first : first + height], right.T).astype(self.module.int16)
            if add:
                out[first : first + height] += part
            else:
                out[first : first + height] = part

    def tile_sums(self, values: Any, tile: int) -> Any:
        rows, columns = values.shape
        parts = values.reshape(rows // tile, tile, columns // tile, tile)
        return parts.sum(axis=(1, 3), dtype=self.module.int64).astype(self.module.int32)

    def pick(self, matrix: Any, rows: Any, columns: Any) -> Any:
        return matrix[rows, columns].astype(self.module.int32)

    def modulo(self, values: Any, by: int) -> Any:
        """Return bits 1 to 31 of the words, as a number, modulo *by*."""
        return ((values >> 1) & 0x7FFFFFFF) % by

    def to_bytes(self, values: Any) -> bytes:
        """Return words as 4 bytes little-endian each."""
        host = values.get() if hasattr(values, "get") else values
        return bytes(host.astype("<i4").tobytes())

    def settle(self) -> None:
        """Wait until everything asked for is done."""
        if self.name == "cupy":
            self.module.cuda.Device().synchronize()

    def release(self) -> None:
        """Give memory that is not used any more back to the device."""
        if self.name == "cupy":
            self.module.get_default_memory_pool().free_all_blocks()


class TorchArrays:
    """Arrays of PyTorch, on a GPU or without one."""

    def __init__(self, module: Any, device: str) -> None:
        self.module = module
        self.device = module.device(device)
        self.name = f"torch on {device}"
        # Entries are small whole numbers: exact in TF32, and the sums in 32-bit floating point.
        module.backends.cuda.matmul.allow_tf32 = True

    def words(self, count: int, start: int = 0) -> Any:
        return self.module.arange(start, start + count, dtype=self.module.int64, device=self.device).to(
            self.module.int32
        )

    def int32(self, values: Any) -> Any:
        return values.to(self.module.int32)

    def float32(self, values: Any) -> Any:
        return values.to(self.module.float32)

    def empty(self, rows: int, columns: int) -> Any:
        return self.module.empty((rows, columns), dtype=self.module.int16, device=self.device)

    def lines(self, count: int, depth: int) -> Any:
        return self.module.empty((count, depth), dtype=self.module.float32, device=self.device)

    def product(self, left: Any, right: Any, out: Any, *, add: bool) -> None:
        """Put left x right-transposed into *out*, or add it, modulo 2^16; each entry of it must have 16 bits."""
        height = part_height(out.shape[1])
        for first in range(0, out.shape[0], height):
            part = self.module.mm(left[first : first + height], right.t()).to(self.module.int16)
            if add:
                out[first : first + height] += part
            else:
                out[first : first + height] = part

    def tile_sums(self, values: Any, tile: int) -> Any:
        rows, columns = values.shape
        parts = values.view(rows // tile, tile, columns // tile, tile)
        return parts.sum(dim=(1, 3), dtype=self.module.int64).to(self.module.int32)

    def pick(self, matrix: Any, rows: Any, columns: Any) -> Any:
        return matrix[rows, columns].to(self.module.int32)

    def modulo(self, values: Any, by: int) -> Any:
        """Return bits 1 to 31 of the words, as a number, modulo *by*."""
        return (((values >> 1) & 0x7FFFFFFF) % by).to(self.module.int64)

    def to_bytes(self, values: Any) -> bytes:
        """Return words as 4 bytes little-endian each."""
        return bytes(values.contiguous().cpu().numpy().astype("<i4").tobytes())

    def settle(self) -> None:
        """Wait until everything asked for is done."""
        if self.device.type == "cuda":
            self.module.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give memory that is not used any more back to the device."""
        if self.device.type == "cuda":
            self.module.cuda.empty_cache()


Arrays = NumpyArrays | TorchArrays


def signed(word: int) -> int:
    """Return a word of 32 bits as int32 has it."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def mix(x: Any) -> Any:
    """Mix an array of words in place and return it."""
    x ^= (x >> 16) & 0xFFFF
    x *= signed(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def choose_all(wanted: str = "auto") -> list[Arrays]:
    """Return what `choose` does, and where that is PyTorch the same for every further GPU.

    Raises:
        RuntimeError: what was wanted is not to be had.
    """
    first = choose(wanted)
    if not isinstance(first, TorchArrays) or first.device.type != "cuda":
        return [first]
    import torch

    return [first, *(TorchArrays(torch, f"cuda:{number}") for number in range(1, torch.cuda.device_count()))]


def choose(wanted: str = "auto") -> Arrays:
    """Return the arrays to work with: `torch`, `cupy`, `numpy`, or the first of them that has a GPU, else NumPy.

    Raises:
        RuntimeError: what was wanted is not to be had.
    """
    reasons: list[str] = []
    if wanted in ("auto", "torch"):
        try:
            import torch

            if torch.cuda.is_available():
                return TorchArrays(torch, "cuda:0")
            if wanted == "torch":
                return TorchArrays(torch, "cpu")
            reasons.append("PyTorch sees no GPU")
        except ImportError as error:
            reasons.append(str(error))
    if wanted in ("auto", "cupy"):
        try:
            import cupy

            cupy.cuda.runtime.getDeviceCount()
            return NumpyArrays(cupy)
        except Exception as error:  # cupy raises its own classes, which exist only where it is installed
            reasons.append(str(error))
    if wanted in ("auto", "numpy"):
        try:
            import numpy

            return NumpyArrays(numpy)
        except ImportError as error:
            reasons.append(str(error))
    raise RuntimeError("; ".join(reasons) or f"there is no way called {wanted!r}")
