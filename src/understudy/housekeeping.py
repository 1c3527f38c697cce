"""The cache looked after: what lies in it, whether it is sound, and what may go. Imported by `cachecommands.py`.

Torch is imported only to ask a teacher again.
"""

from __future__ import annotations

import datetime
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy import cachefolder, storage
from understudy import record as records
from understudy.cachefolder import Entry
from understudy.data import kept
from understudy.errors import RunError, UnderstudyError
from understudy.progress import Progress, silent

if TYPE_CHECKING:
    from understudy.data.outputs import Outputs
    from understudy.pipeline.materials import Materials

_SAMPLED = 4  # blocks of each teacher's outputs that are computed again
_SLACK = {"fp32": 1e-3, "bf16": 2**-5}
"""Largest difference between two computations of one answer, as a share of its largest logit: another number of threads
adds up in another order. bf16 keeps 8 bits, so that a few layers may differ by some of the last ones."""


@dataclass(frozen=True)
class Line:
    """What a reader is told of one thing in the cache, or of all small ones of a kind."""

    kind: str
    what: str
    path: str
    images: int | None
    views: int | None
    nbytes: int
    used: str
    """ISO 8601, UTC, to the second."""

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-able object."""
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """Something in the cache that is not as it was written."""

    path: Path
    """What mends it by its removal."""
    text: str


@dataclass
class Checked:
    """What a look at the cache found."""

    entries: int = 0
    answers: int = 0
    """Of teachers, that were computed again and compared."""
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be computed again, and why."""


def lines(cache: Path | None = None) -> list[Line]:
    """Return what lies in the cache, the least recently used first; small files come as one line for each kind."""
    found = cachefolder.entries(cache)
    large = [_line(entry) for entry in found if entry.path.suffix != ".json"]
    small: dict[str, list[Entry]] = {}
    for entry in found:
        if entry.path.suffix == ".json":
            small.setdefault(entry.kind, []).append(entry)
    return [*large, *(_together(kind, some) for kind, some in small.items())]


def verify(cache: Path | None = None, *, progress: Progress = silent, chance: random.Random | None = None) -> Checked:
    """Check sizes and checksums of all that is kept, and let teachers that are still there answer a sample again.

    Args:
        cache: the folder; `storage.cache_dir()` by default.
        progress: told of the entries that are checked.
        chance: draws the sample; another one at each call by default.
    """
    checked = Checked()
    found = cachefolder.entries(cache)
    for done, entry in enumerate(found):
        progress("verify", done=done, total=len(found), note=entry.kind)
        checked.problems += _damage(entry)
        checked.entries += 1
    broken = {problem.path for problem in checked.problems}
    for entry in found:
        if entry.kind == "outputs" and entry.path not in broken:
            _ask_again(entry, checked, chance or random.Random())
    progress("verify", done=len(found), total=len(found))
    return checked


def verify_run(run: Path, *, progress: Progress = silent, chance: random.Random | None = None) -> Checked:
    """Check what the cache keeps for one run, its images and its teacher's outputs; nothing in the run changes.

    Args:
        run: the run folder; a model that it names as `module:function` is imported.
        progress: told of long work, such as decoding images that are not kept any more.
        chance: draws the sample.

    Raises:
        UnderstudyError: the folder holds no run, its teacher is not there yet, or its images cannot be used.
    """
    from understudy.data.frames import StoredFrames

    checked = Checked()
    with _gathered(run, progress) as (outputs, materials):
        frames = materials.store.frames
        folders = [frames.path.parent] if isinstance(frames, StoredFrames) else []
        folders += [outputs.kept.path] if outputs else []
        for entry in cachefolder.entries():
            if entry.path in folders:
                checked.problems += _damage(entry)
                checked.entries += 1
        if outputs is None:
            checked.notes.append(f"no outputs of the teacher of {run} are kept")
        else:
            _sample(outputs, materials, checked, chance or random.Random())
    return checked


def repair(checked: Checked) -> list[Path]:
    """Remove all that is damaged; return what is gone. It is made again when it is needed."""
    gone = []
    for path in dict.fromkeys(problem.path for problem in checked.problems):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if not path.exists():
            gone.append(path)
    return gone


def prune(
    cache: Path | None = None,
    *,
    max_bytes: int | None = None,
    older_than: float | None = None,
    everything: bool = False,
) -> list[Entry]:
    """Remove what is old, then the least recently used until the rest is small enough; return what is gone.

    Args:
        cache: the folder; `storage.cache_dir()` by default.
        max_bytes: what may be left.
        older_than: days since the last use.
        everything: leave nothing.
    """
    before = math.inf if everything else 0.0 if older_than is None else time.time() - older_than * 86400
    gone = [entry for entry in cachefolder.entries(cache) if entry.used < before and cachefolder.remove(entry)]
    if max_bytes is not None:
        gone += cachefolder.evict(max_bytes, cache)
    return gone


def _line(entry: Entry) -> Line:
    images, views, what = _count(entry.said.get("rows")), None, "of a process that has not finished"
    if entry.kind == "stores":
        what = _frames(entry, images)
    elif entry.kind == "outputs":
        views = len(list(entry.path.glob("view-*.rows")))
        what = f"{entry.said.get('teacher', 'a teacher')} on {entry.said.get('data', 'some images')}"
    return Line(entry.kind, what, str(entry.path), images, views, entry.nbytes, _time(entry.used))


def _together(kind: str, some: list[Entry]) -> Line:
    nbytes, used = sum(entry.nbytes for entry in some), max(entry.used for entry in some)
    files = f"{len(some)} file" + ("s" if len(some) > 1 else "")
    return Line(kind, files, str(some[0].path.parent), None, None, nbytes, _time(used))


def _frames(entry: Entry, images: int | None) -> str:
    side, channels = _geometry(entry, images)
    return f"{side} x {side} pixels, {'grey' if channels == 1 else 'colour'}" if side else "decoded images"


def _geometry(entry: Entry, images: int | None) -> tuple[int, int]:
    """Return side and channels of stored frames from the size of their file; zeros where it fits none."""
    try:
        frame, rest = divmod((entry.path / "frames.u8").stat().st_size, images or 1)
    except OSError:
        return 0, 0
    for channels in (1, 3):
        side = math.isqrt(frame // channels)
        if rest == 0 and frame and side * side * channels == frame:
            return side, channels
    return 0, 0


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _damage(entry: Entry) -> Iterator[Problem]:
    """Yield what is wrong with an entry, without a teacher."""
    if entry.kind == "stores" and not _geometry(entry, _count(entry.said.get("rows")))[0]:
        yield Problem(entry.path, "the decoded images do not have the size that they should have")
    elif entry.kind == "outputs":
        yield from _torn(entry.path)
    elif entry.path.suffix == ".json":
        try:
            storage.read_json(entry.path)
        except (OSError, ValueError):
            yield Problem(entry.path, "it is not readable")


def _torn(path: Path) -> Iterator[Problem]:
    folder = kept.read(path)
    if folder is None:
        yield Problem(path, "its card is missing or damaged")
        return
    for number in folder.views():
        file = folder.view(number)
        damaged = len(file.damaged())
        if damaged:
            yield Problem(file.path, f"{damaged} of {file.blocks} blocks of view {number + 1} fail their checksums")
        file.close()


def _ask_again(entry: Entry, checked: Checked, chance: random.Random) -> None:
    """Compare a sample of some outputs with what their teacher answers now, where it is still there."""
    run = Path(str(entry.said.get("run", "")))
    reason = _not_there(entry, run)
    if reason is None:
        try:
            with _gathered(run, silent) as (outputs, materials):
                if outputs is not None and outputs.kept.path == entry.path:
                    _sample(outputs, materials, checked, chance)
                    return
            reason = "other versions, another device, or other images"
        except UnderstudyError as error:
            reason = str(error).rstrip(".")
    checked.notes.append(f"{entry.path.name} is not computed again: {reason}")


def _not_there(entry: Entry, run: Path) -> str | None:
    """Return why a teacher cannot be asked, as far as that can be told at once."""
    try:
        record, card = records.load(run), storage.read_json(run / "teacher" / "model.json")
    except (RunError, OSError, ValueError):
        return "the run of its teacher is gone"
    if not isinstance(card, dict) or card.get("weights") != entry.said.get("weights"):
        return f"{run} holds another teacher now"
    store = entry.said.get("store")
    if store and not Path(str(store)).exists():
        return "its decoded images are gone"
    models = [record.config.get(role, {}).get("model", "") for role in ("teacher", "student")]
    if any(":" in str(model) for model in [*models, card.get("architecture")]):
        return f"it would import code; understudy cache verify {run} does"
    return None


def _sample(outputs: Outputs, materials: Materials, checked: Checked, chance: random.Random) -> None:
    numbers = outputs.kept.views()
    blocks = [(view, block) for view in numbers for block in range(outputs.kept.view(view).blocks)]
    slack = _SLACK[materials.choices["teacher"].numerics.precision]
    for view, block in chance.sample(blocks, min(_SAMPLED, len(blocks))):
        error = outputs.again(view, block)
        if error is None:
            continue
        checked.answers += len(error)
        wrong = int((~(error <= slack)).sum())
        if wrong:
            text = f"the teacher answers {wrong} of {len(error)} images otherwise, by up to {error.max():.1%}"
            checked.problems.append(Problem(outputs.kept.view(view).path, text))
    outputs.release()


@contextmanager
def _gathered(folder: Path, progress: Progress) -> Iterator[tuple[Outputs | None, Materials]]:
    """Open the images of a run, and its teacher's outputs as far as there are any; the run itself stays as it is."""
    from understudy.config import validate
    from understudy.pipeline import teaching
    from understudy.pipeline.folder import Run
    from understudy.pipeline.materials import gather

    record = records.load(folder)
    teacher = record.models.get("teacher")
    if teacher is None or not (folder / teacher.weights).exists():
        raise RunError(f"{folder} holds no teacher yet, so there is nothing to compare with.")
    with tempfile.TemporaryDirectory() as place:  # whoever gathers also writes: record and log
        for name in ("teacher", *teacher.shares):
            shutil.copytree(folder / name, Path(place) / name)
        run = Run(Path(place), validate(record.config), record, progress, lambda: False)
        materials = gather(run)
        found = None
        if not teaching.runs_along(run.config):
            found = teaching.find(run, materials)
        yield found, materials
