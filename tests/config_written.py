"""Configurations as a user writes them, and the sentence that a mistake is answered with; for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from understudy.errors import ConfigError

DATA = {"data": {"source": "digits"}}


def _refused(work: Callable[[], object]) -> str:
    """Return the sentence that a mistake is answered with."""
    with pytest.raises(ConfigError) as told:
        work()
    text = str(told.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        file = tmp_path / "run.yaml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    return write
