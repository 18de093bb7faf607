"""`ngpu-node` with less patience: it dials a bootstrap that keeps dying again within half a second, not within 15."""

from __future__ import annotations

from ngpu_node.cli import app
from ngpu_protocol.p2p.reconnect import BackOff

LONGEST_S = 0.5

if __name__ == "__main__":
    names = BackOff.__init__.__code__.co_varnames[1 : BackOff.__init__.__code__.co_argcount]
    changed = {"max_s": LONGEST_S}
    defaults = BackOff.__init__.__defaults__
    assert defaults is not None
    BackOff.__init__.__defaults__ = tuple(  # type: ignore[misc]
        changed.get(name, value) for name, value in zip(names, defaults, strict=True)
    )
    assert BackOff().max_s == LONGEST_S
    app()
