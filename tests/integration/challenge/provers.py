"""Model servers that answer challenges: an honest one with NumPy at small size, and cheats made of it."""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
if str(ROOT / "examples" / "challenge") not in sys.path:
    sys.path.insert(0, str(ROOT / "examples" / "challenge"))

from gpu_challenge.arrays import NumpyArrays, choose, mix, signed  # noqa: E402
from gpu_challenge.http_server import VERSION, Prover, Provers, Refused, serve  # noqa: E402
from gpu_challenge.prover import Proof  # noqa: E402


def honest(owner: str = "") -> Provers:
    """What the workspace of `examples/challenge` does without a GPU."""
    return Provers([choose("numpy")], owner)


class _Cheat(Provers):
    """Provers whose proofs are made by *proof*."""

    def __init__(self, proof: Callable[..., Proof]) -> None:
        super().__init__([choose("numpy")])
        self._one = threading.Lock()
        self._proof = proof
        self.proofs: dict[str, Proof] = {}

    def begin(self, puzzle: Any) -> dict[str, Any]:
        with self._one:
            proof = self._proof(choose("numpy"), puzzle)
            proof.compute()
            name = f"{len(self.proofs)}"
            self.proofs[name] = proof
            return {"proof": name, "root": proof.root.hex(), "version": VERSION}

    def named(self, name: str) -> Any:
        return _Named(self.proofs[name])


class _Named:
    """One proof, as the server asks it."""

    def __init__(self, proof: Proof) -> None:
        self._proof = proof

    def walk(self, name: str, salt: bytes) -> dict[str, Any]:
        self._proof.walk(salt)
        return {"ends": self._proof.ends.hex()}

    def open(self, name: str, spots: Any) -> dict[str, Any]:
        return self._proof.open(spots["tiles"], spots["walkers"])

    def close(self, name: str) -> None:
        pass


class _SlowProof(Proof):
    """A card that needs *needs_s* for the product."""

    needs_s = 0.0

    def compute(self) -> None:
        began = time.monotonic()
        super().compute()
        time.sleep(max(0.0, self.needs_s - (time.monotonic() - began)))


def a_card(needs_s: float) -> Provers:
    """One card that needs *needs_s* for the product, and answers whoever asks, one after the other."""
    return _Cheat(type("CardProof", (_SlowProof,), {"needs_s": needs_s}))


class _SmallProof(Proof):
    """A card whose memory holds half of the product: the other half was computed, digested and thrown away.

    What is asked of it later is computed again, entry by entry: each is a scalar product. On a card as slow as the one
    that is claimed that takes *needs_s* at least, whatever it takes here: a fast processor is no such card.
    """

    needs_s = 0.0

    def walk(self, salt: bytes = b"") -> None:
        began = time.monotonic()
        self._product = _HalfProduct(self)
        super().walk(salt)
        time.sleep(max(0.0, self.needs_s - (time.monotonic() - began)))


class _HalfProduct:
    def __init__(self, proof: Proof) -> None:
        self._proof = proof
        self._held = proof._product[: proof._rows // 2].copy()

    def __getitem__(self, where: Any) -> Any:
        import numpy

        rows, columns = where
        if isinstance(rows, slice):  # a tile that is opened
            row_numbers = numpy.arange(rows.start, rows.stop)
            column_numbers = numpy.arange(columns.start, columns.stop)
            left, right = self._lines(0, row_numbers), self._lines(2, column_numbers)
            return (left @ right.T).astype(numpy.int16)
        found = numpy.empty(rows.shape, dtype=numpy.int16)
        held = rows < len(self._held)
        found[held] = self._held[rows[held], columns[held]]
        left, right = self._lines(0, rows[~held]), self._lines(2, columns[~held])
        found[~held] = numpy.einsum("ij,ij->i", left, right)
        return found

    def _lines(self, key: int, numbers: Any) -> Any:
        import numpy

        proof = self._proof
        arrays, keys, depth = proof._arrays, proof._keys, proof._depth
        assert isinstance(arrays, NumpyArrays)
        starts = mix(numbers.astype(numpy.int32) + numpy.int32(keys[key]))
        words = arrays.words(depth // 8)
        words *= signed(0x9E3779B1)
        words = mix((starts[:, None] + words[None, :]) + numpy.int32(keys[key + 1]))
        entries = numpy.empty((len(numbers), depth // 8, 8), dtype=numpy.float32)
        for place in range(8):
            entries[:, :, place] = ((words >> (4 * place)) & 15) - 8
        return entries.reshape(len(numbers), depth)


def less_memory(needs_s: float) -> Provers:
    """See `_SmallProof`."""
    return _Cheat(type("SmallProof", (_SmallProof,), {"needs_s": needs_s}))


class _EarlyProof(Proof):
    """Follows chains while it still has the whole product, before it is asked for them, and throws the product away."""

    def compute(self) -> None:
        super().compute()
        super().walk()

    def walk(self, salt: bytes = b"") -> None:
        pass


def walked_before() -> Provers:
    """See `_EarlyProof`."""
    return _Cheat(_EarlyProof)


class _LazyProof(Proof):
    """Multiplies the first half of the rows and says that the rest is zero."""

    def _digest(self) -> None:
        self._product[self._rows // 2 :] = 0
        super()._digest()


def half_the_work() -> Provers:
    """See `_LazyProof`."""
    return _Cheat(_LazyProof)


class _Replay(Provers):
    """Answers every puzzle with what an honest prover made of the first."""

    def __init__(self) -> None:
        super().__init__([choose("numpy")])
        self._proof: Proof | None = None

    def begin(self, puzzle: Any) -> dict[str, Any]:
        if self._proof is None:
            self._proof = Proof(choose("numpy"), puzzle)
            self._proof.compute()
        return {"proof": "first", "root": self._proof.root.hex(), "version": VERSION}

    def named(self, name: str) -> Any:
        assert self._proof is not None
        return _Named(self._proof)


def replay() -> Provers:
    """See `_Replay`."""
    return _Replay()


class _Relay(Provers):
    """Has no card: passes everything on to another prover, which a puzzle reaches *away_s* later each way."""

    def __init__(self, url: str, away_s: float) -> None:
        super().__init__([choose("numpy")])
        self._url, self._away_s = url, away_s

    def begin(self, puzzle: Any) -> dict[str, Any]:
        time.sleep(self._away_s)
        began = self._pass_on("/proof", puzzle)
        time.sleep(self._away_s)
        return began

    def named(self, name: str) -> Any:
        relay = self

        class There:
            def walk(self, name: str, salt: bytes) -> dict[str, Any]:
                return relay._pass_on(f"/proof/{name}/walk", {"salt": salt.hex()})

            def open(self, name: str, spots: Any) -> dict[str, Any]:
                return relay._pass_on(f"/proof/{name}/open", spots)

            def close(self, name: str) -> None:
                relay._pass_on(f"/proof/{name}", None, "DELETE")

        return There()

    def _pass_on(self, path: str, value: Any, method: str = "POST") -> dict[str, Any]:
        data = None if value is None else json.dumps(value).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self._url + path, data, method=method), timeout=60
            ) as got:
                answer: dict[str, Any] = json.loads(got.read())
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode()) from None
        return answer


def relay(url: str, away_s: float = 0.0) -> Provers:
    """See `_Relay`."""
    return _Relay(url, away_s)


class _Broken(Provers):
    """Says that there is not enough memory, whatever is asked."""

    def begin(self, puzzle: Any) -> dict[str, Any]:
        raise MemoryError("out of memory")


def out_of_memory() -> Provers:
    """See `_Broken`."""
    return _Broken([choose("numpy")])


class Standin:
    """A model server whose prover can be changed while it runs.

    Attributes:
        provers: who answers now.
    """

    def __init__(self) -> None:
        self.provers: Provers = honest()
        self.server: ThreadingHTTPServer = serve("127.0.0.1", 0, self)  # type: ignore[arg-type]

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def arrays(self) -> str:
        return self.provers.arrays

    def begin(self, puzzle: Any) -> dict[str, Any]:
        return self.provers.begin(puzzle)

    def named(self, name: str) -> Prover:
        return self.provers.named(name)


@contextmanager
def standins(count: int) -> Iterator[list[Standin]]:
    """Run *count* of them."""
    made = [Standin() for _ in range(count)]
    threads = [threading.Thread(target=one.server.serve_forever, daemon=True) for one in made]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        for one in made:
            one.server.shutdown()
            one.server.server_close()
        for thread in threads:
            thread.join(10)
