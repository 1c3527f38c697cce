"""HTML from values, escaped by default; only the report imports it.

`tag` builds an element. A child that is `Html` is markup already; every other text is escaped, so that a name
from a file can never become markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

VOID = frozenset({"br", "img", "input", "link", "meta"})


class Html(str):
    """Markup that is safe to insert as it stands."""

    __slots__ = ()


Child = str | None | Iterable["Child"]
Attributes = Mapping[str, str | float | bool | None]


def escape(text: str) -> Html:
    """Escape `text` for element content and for quoted attributes; what UTF-8 cannot hold becomes `?`."""
    return Html(html.escape(text.encode("utf-8", "replace").decode("utf-8"), quote=True))


def join(children: Iterable[Child]) -> Html:
    """Put children one after another, escaping all that is not markup."""
    return Html("".join(_markup(child) for child in children))


def tag(name: str, attributes: Attributes | None = None, *children: Child) -> Html:
    """Build `<name ...>children</name>`; an attribute that is None or False is left out, True stands alone."""
    opening = f"<{name}{''.join(_attribute(*pair) for pair in (attributes or {}).items())}>"
    return Html(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def data_block(identifier: str, value: Any) -> Html:
    """Embed JSON for the page's script; nothing in it can end the element or start another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{escape(identifier)}">{text}</script>')


def csp_hash(text: str) -> str:
    """Return the source expression that lets a Content-Security-Policy allow exactly this inline text."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def _markup(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    return escape(child) if isinstance(child, str) else join(child)


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return f" {name}"
    text = value if isinstance(value, str) else f"{round(value, 2):g}"
    return f' {name}="{escape(text)}"'
