"""A report's page taken apart, and the records that tests of the report render."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest

from sample_record import sample_record
from understudy.record import Record

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\u2028"
VOID = {"meta", "br", "img", "input", "link"}
NAN = float("nan")


class Page(HTMLParser):
    """A page taken apart: tags with attributes, text, the contents of scripts and styles; balance is checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": [], "title": [], "h2": []}
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]].append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def ten() -> Record:
    return sample_record()


def hostile_record() -> Record:
    """Put a hostile text wherever a record takes one."""
    whole = sample_record(classes=[HOSTILE, "a" * 300, HOSTILE + "2"], images=90, epochs=3)
    texts = json.loads(whole.model_dump_json())
    _poison(texts, keep=frozenset({"format", "kind", "status", "role", "outcome", "severity", "png", "created"}))
    texts["config"] = {HOSTILE: [HOSTILE]}
    texts["chosen"] = HOSTILE
    texts["examples"][0]["png"] = '"><img src=x onerror=alert(2)>'
    return Record.model_validate(texts)


def _poison(value: Any, keep: frozenset[str]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(items):
        if isinstance(child, dict | list):
            if key not in ("recall", "classes", "counts", "models", "per_seed", "summary"):
                _poison(child, keep)
            elif key == "models":
                for model in child.values():
                    _poison(model, keep)
        elif isinstance(child, str) and key not in keep:
            value[key] = HOSTILE
