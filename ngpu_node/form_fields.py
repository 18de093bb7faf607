"""Small fields of a multipart form that is at hand, found without unpacking its files."""

from __future__ import annotations

from collections.abc import Collection

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

MAX_FIELD_BYTES = 1024
MAX_PARTS = 256


class FormBroken(ValueError):
    """Not a form; the message says what is wrong with it."""


def form_fields(content_type: str, body: bytes, names: Collection[str]) -> dict[str, str]:
    """Return those of the fields *names* that the form holds; of a repeated one the first.

    Raises:
        FormBroken: the boundary is missing, the form is cut off, a field is too long, or it has too many parts.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise FormBroken("its boundary is missing")
    found: dict[str, str] = {}
    heading, value = bytearray(), bytearray()
    field_name, part_name, parts, whole = b"", "", 0, False

    def part_begin() -> None:
        nonlocal parts, part_name
        parts, part_name = parts + 1, ""
        value.clear()
        if parts > MAX_PARTS:
            raise FormBroken(f"it has more than {MAX_PARTS} parts")

    def header_field(data: bytes, start: int, end: int) -> None:
        heading.extend(data[start:end])

    def header_value(data: bytes, start: int, end: int) -> None:
        nonlocal field_name
        if heading:
            field_name = bytes(heading).lower()
            heading.clear()
        value.extend(data[start:end])

    def header_end() -> None:
        nonlocal part_name
        if field_name == b"content-disposition":
            _, parameters = parse_options_header(bytes(value))
            part_name = parameters.get(b"name", b"").decode("utf-8", "replace")
        value.clear()

    def part_data(data: bytes, start: int, end: int) -> None:
        if part_name not in names:
            return
        value.extend(data[start:end])
        if len(value) > MAX_FIELD_BYTES:
            raise FormBroken(f"{part_name} is over {MAX_FIELD_BYTES} bytes")

    def part_end() -> None:
        if part_name in names:
            found.setdefault(part_name, value.decode("utf-8", "replace").strip())

    def end() -> None:
        nonlocal whole
        whole = True

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": part_begin,
            "on_header_field": header_field,
            "on_header_value": header_value,
            "on_header_end": header_end,
            "on_part_data": part_data,
            "on_part_end": part_end,
            "on_end": end,
        },
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise FormBroken(str(error)) from None
    if not whole:
        raise FormBroken("it is cut off")
    return found
