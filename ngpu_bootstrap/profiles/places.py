"""Where one value stands in a request: written alike for a credential, an affinity key and a job's id.

Owns the form of such a place and what every table of a declaration is. Reading the value is for whoever reads that
part of the request.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ngpu_protocol.job_answers import Pointer


class Declared(BaseModel):
    """What every table of a declaration is: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Place(Declared):
    """Where one value stands in a request.

    Attributes:
        where: written `in`: `header`, `cookie`, `query`, `json` (a member of the body), `form` (a field of a form,
            or a part of a multipart form, sent as a file or not) or `path` (a parameter of the route's path).
        name: of the header, cookie, parameter or field; not for `json`.
        pointer: for `json` only.
    """

    where: Literal["header", "cookie", "query", "json", "form", "path"] = Field(alias="in")
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\[\]-]{1,128}$")] | None = None
    pointer: Pointer | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.where == "json":
            if self.pointer is None or self.name is not None:
                raise ValueError('in = "json" needs a pointer, and no name')
        elif self.name is None or self.pointer is not None:
            raise ValueError(f'in = "{self.where}" needs a name, and no pointer')
        return self

    @property
    def field(self) -> str:
        """What the value is called there: the same name in a form and in JSON means the same thing."""
        return str(self.name) if self.pointer is None else self.pointer.rpartition("/")[2]

    def is_same_as(self, other: Place) -> bool:
        """Whether *other* is this place, whatever else is said of it there."""
        return (self.where, self.name, self.pointer) == (other.where, other.name, other.pointer)

    def __str__(self) -> str:
        return f"{self.where} {self.pointer if self.where == 'json' else self.name}"
