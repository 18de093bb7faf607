"""What a client confides to the nodes that run its workspace: how to get its image, and secret environment values.

Owns the document that `sealing` seals. It exists in clear only in memory, of the bootstrap while it seals and of the
node while it runs the workspace; it never prints.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.workspaces import EnvironmentMap, describe_errors

_WHAT = "workspace secrets"


def _header_safe(text: str) -> str:
    # both end in an Authorization header, where a line break would begin another header
    if not text.isprintable():
        raise ValueError("must not contain control characters")
    return text


class RegistryCredentials(BaseModel):
    """A login at the image's registry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    username: Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_header_safe)] = Field(repr=False)
    password: Annotated[str, Field(max_length=16 * 1024), AfterValidator(_header_safe)] = Field(repr=False)


class WorkspaceSecrets(BaseModel):
    """Everything confided for one revision of a workspace.

    Attributes:
        registry: how to log in where the image is; None where anyone may pull it.
        env: environment variables whose values are secret.
        image_query: what comes after the `?` of the URL its image is at: often a signature that opens the file. A
            specification holds such a URL without it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    registry: RegistryCredentials | None = Field(default=None, repr=False)
    env: EnvironmentMap = Field(default_factory=dict, max_length=1024, repr=False)
    image_query: Annotated[str, StringConstraints(pattern=r"^[!-~]*$", max_length=4096)] = Field(default="", repr=False)

    @property
    def is_empty(self) -> bool:
        return self.registry is None and not self.env and not self.image_query

    def encode(self) -> bytes:
        """Return the JSON that `decode` reads, for `sealing.seal`."""
        return self.model_dump_json(exclude_defaults=True).encode()

    @classmethod
    def decode(cls, document: bytes) -> WorkspaceSecrets:
        """Return the secrets in *document*; unknown keys are a later version's and ignored.

        Raises:
            MalformedError: it is not such a document. The message names fields, never values.
        """
        try:
            return cls.model_validate_json(document, extra="ignore")
        except ValidationError as error:
            raise MalformedError(_WHAT, describe_errors(error)) from None


NO_SECRETS = WorkspaceSecrets()


def with_query(url: str, confided: WorkspaceSecrets) -> str:
    """Return *url* of an image as it is asked for."""
    return f"{url}?{confided.image_query}" if confided.image_query else url
