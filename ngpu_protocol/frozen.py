"""`dataclass`, but ``frozen=True`` is the type checker's business alone: at run time nothing guards the fields.

The guard makes `__init__` set each field through ``object.__setattr__``: 2.0 us instead of 0.4 for the 19 fields of a
receipt. A request makes some thirty records on its way, which was 4 % of a bootstrap's processor time. mypy checks the
same rule, in every package and without cost.

What else ``frozen`` means stays: records are hashable by their fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    import dataclasses

    def dataclass(*, frozen=False, eq=True, **options):
        return dataclasses.dataclass(eq=eq, unsafe_hash=frozen and eq, **options)
