"""The documentation page: the OpenAPI document as one HTML page that needs nothing from anywhere.

The usual viewers load megabytes of script from a CDN, which a machine without internet does not get and a careful
operator does not want beside tokens. This is rendered here, without script.
"""

from __future__ import annotations

import html
import json
import re
from typing import Any

_CODE = re.compile(r"`([^`]+)`")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
h2{border-top:1px solid #d0d7de;padding-top:1.2rem;margin-top:2rem}
code,pre{font:13px/1.45 ui-monospace,monospace;background:#f3f5f7;border-radius:4px}
code{padding:.1rem .3rem}pre{padding:.7rem;overflow:auto}
.method{display:inline-block;min-width:4rem;font-weight:600}
table{border-collapse:collapse;width:100%}td,th{border:1px solid #d0d7de;padding:.3rem .5rem;text-align:left}
""".strip()


def render(document: dict[str, Any]) -> str:
    """Return the page for an OpenAPI document."""
    info = document["info"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{_text(info['title'])}</title><style>{_STYLE}</style>",
        f"<h1>{_text(info['title'])} {_text(info['version'])}</h1>",
        *(f"<p>{_words(paragraph)}</p>" for paragraph in info.get("description", "").split("\n\n")),
        "<p>The same as a machine-readable document: <a href=openapi.json>openapi.json</a></p>",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation(path, method, operation))
    schemas = document.get("components", {}).get("schemas", {})
    parts.append("<h1>Shapes</h1>")
    parts += [_schema(name, schema) for name, schema in sorted(schemas.items())]
    return "\n".join(parts)


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    lines = [
        f"<h2><span class=method>{method.upper()}</span> <code>{_text(path)}</code></h2>",
        f"<p>{_words(operation.get('description') or operation.get('summary', ''))}</p>",
    ]
    if parameters := operation.get("parameters"):
        rows = "".join(
            f"<tr><td><code>{_text(one['name'])}</code></td><td>{_text(one['in'])}</td>"
            f"<td>{_words(one.get('description', ''))}</td></tr>"
            for one in parameters
        )
        lines.append(f"<table><tr><th>parameter</th><th>in</th><th></th></tr>{rows}</table>")
    if body := operation.get("requestBody"):
        lines.append(f"<p>Body: {_contents(body.get('content', {}))}</p>{_examples(body.get('content', {}))}")
    rows = "".join(
        f"<tr><td>{_text(status)}</td><td>{_words(answer.get('description', ''))}</td>"
        f"<td>{_contents(content := answer.get('content', {}))}{_examples(content) if status < '3' else ''}</td></tr>"
        for status, answer in operation.get("responses", {}).items()
    )
    lines.append(f"<table><tr><th>status</th><th>meaning</th><th>body</th></tr>{rows}</table>")
    return "\n".join(lines)


def _contents(content: dict[str, Any]) -> str:
    shown = []
    for media, entry in content.items():
        reference = entry.get("schema", {}).get("$ref", "")
        name = reference.rpartition("/")[2]
        shown.append(f"<a href='#{_text(name)}'>{_text(name)}</a>" if name else f"<code>{_text(media)}</code>")
    return ", ".join(shown)


def _examples(content: dict[str, Any]) -> str:
    return "".join(
        f"<pre>{_text(json.dumps(entry['example'], indent=1, ensure_ascii=False))}</pre>"
        for entry in content.values()
        if "example" in entry
    )


def _schema(name: str, schema: dict[str, Any]) -> str:
    return (
        f"<h2 id='{_text(name)}'>{_text(name)}</h2><p>{_text(schema.get('description', ''))}</p>"
        f"<pre>{_text(json.dumps(schema.get('properties', schema), indent=1))}</pre>"
    )


def _words(value: object) -> str:
    """Return a description, with what stands in backticks shown as code."""
    return _CODE.sub(r"<code>\1</code>", _text(value))


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
