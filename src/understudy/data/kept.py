"""A folder of kept outputs: a card that says how rows are read, and one file of rows for each view.

Imported by `outputs.py` and by whoever looks after the cache. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy import storage
from understudy.data.packing import Packing
from understudy.data.rowfile import RowFile

FORMAT = "understudy-outputs/1"
CARD = "card.json"


@dataclass(frozen=True)
class Folder:
    """Where the outputs of one teacher for the views of one split lie, and how they are read."""

    path: Path
    packing: Packing
    rows: int
    """Images."""
    block: int
    """Images that are answered, checked and written together."""

    def view(self, number: int) -> RowFile:
        """Return the file of a view, whether or not anything is in it."""
        path = self.path / f"view-{number:05d}.rows"
        return RowFile(path, self.packing.row, self.rows, block=self.block, salt=f"{self.path.name}/{number}")

    def views(self) -> list[int]:
        """Return the numbers of the views that have a file."""
        names = [path.stem.removeprefix("view-") for path in self.path.glob("view-*.rows")]
        return sorted(int(name) for name in names if name.isdecimal() and name.isascii())


def write(folder: Folder, told: Mapping[str, Any]) -> None:
    """Write the card, which makes the outputs known.

    Args:
        folder: what it describes.
        told: JSON-able; what else a reader of the cache is told.

    Raises:
        OSError, UnderstudyError: it cannot be written.
    """
    form = _form(folder)
    storage.write_json(folder.path / CARD, {**told, "format": FORMAT, **form, "check": storage.fingerprint(form)})


def read(path: Path) -> Folder | None:
    """Return what a card describes; None where there is none or it is damaged."""
    try:
        card = storage.read_json(path / CARD)
        folder = Folder(path, Packing(**card["packing"]), card["rows"], card["block"])
        sound = card["format"] == FORMAT and card["check"] == storage.fingerprint(_form(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if sound else None


def _form(folder: Folder) -> dict[str, Any]:
    """Return what decides how rows are read: read by anything else, they would be nonsense."""
    return {"packing": folder.packing.describe(), "rows": folder.rows, "block": folder.block}
