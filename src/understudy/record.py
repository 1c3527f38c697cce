"""What a run leaves behind: `record.json`, the single source for the report, `resume` and every table.

Pydantic models only, so that a record can be read, checked and reported without torch. Accuracies and other shares
are fractions in [0, 1]; latencies are milliseconds; sizes are bytes; durations are seconds. Any part above the
mathematics may import this file.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from understudy import storage
from understudy.errors import RunError
from understudy.parts import Interval as Interval
from understudy.parts import Objective as Objective
from understudy.parts import Part as Part
from understudy.parts import Sweep as Sweep
from understudy.parts import SweepCell as SweepCell
from understudy.parts import TermNote as TermNote

RECORD_FORMAT = "understudy-record/1"
CARD_FORMAT = "understudy-model/1"
Role = Literal["teacher", "member", "assistant", "baseline", "student"]
"""A member is one teacher of an ensemble; an assistant learns from the teacher and teaches the student."""
ROLES: tuple[Role, ...] = ("teacher", "baseline", "student")
"""Those that every run judges."""


class InputSpec(Part):
    """How an image of any size becomes the input of a network.

    The shorter side is resized to `sizes[0]` (antialiased bilinear, rounded to whole grey levels) and the middle square
    cut out (`fit="crop"`), or both sides are squeezed to `sizes[0]` (`"squash"`); the square is then resized in turn
    to each further size; at last `(x / 255 - mean) / std` per channel.
    """

    channels: Literal[1, 3]
    sizes: tuple[int, ...] = Field(min_length=1)
    fit: Literal["crop", "squash"] = "crop"
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def size(self) -> int:
        """Side in pixels of the square that the network sees."""
        return self.sizes[-1]


class ModelCard(Part):
    """What stands beside weights, in `<weights>.json`: enough to rebuild and to judge the model."""

    format: Literal["understudy-model/1"] = "understudy-model/1"
    architecture: str
    """A name that `models.build` knows, or `module:function`."""
    network_channels: Literal[1, 3]
    """Channels of the network's first layer; grey images are repeated where it is 3."""
    classes: list[str]
    input: InputSpec
    role: str = ""
    seed: int | None = None
    weights: str = ""
    """Hash of the weights file (`storage.hash_file`)."""
    metrics: dict[str, float] = {}
    """The headline numbers at the time of saving, such as `val_accuracy`."""
    provenance: dict[str, Any] = {}
    """Fingerprints of configuration and data, versions, date."""


class Bin(Part):
    """One bin of a reliability diagram."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


class Metrics(Part):
    """How one model does on one split."""

    images: int
    accuracy: float
    recall: dict[str, float | None]
    """Per class; None where the split has no image of it."""
    macro_f1: float
    nll: float
    brier: float
    ece: float
    confusion: list[list[int]]
    """`confusion[truth][answer]` counts images."""
    reliability: list[Bin]
    positive: str | None = None
    """Two classes only: the class that sensitivity speaks of (the second one)."""
    sensitivity: float | None = None
    specificity: float | None = None
    auroc: float | None = None
    agreement: float | None = None
    """Share of images on which the model and its teacher give the same answer; None for the teacher."""
    kl_to_teacher: float | None = None
    """Mean of KL(teacher || model) at temperature 1, in nats; None for the teacher."""


class Epoch(Part):
    """One row of the training curves."""

    epoch: int
    """1 for the first."""
    lr: float
    train_loss: float
    parts: dict[str, float]
    """Mean of each term, unweighted."""
    train_accuracy: float | None = None
    val_accuracy: float
    val_nll: float
    seconds: float


class Latency(Part):
    """Milliseconds for one image."""

    runtime: str
    threads: int
    runs: int
    p50: float
    p95: float


class Profile(Part):
    """What a model costs; the same for every seed of a role."""

    parameters: int
    macs: int
    """Multiply-accumulates for one image."""
    bytes: int
    """Size of its weights file."""
    peak_bytes: int
    """Weights plus the largest sum of live activations while one image passes."""
    latency: Latency


class Trained(Part):
    """One model of the run: one role, one seed; or an ensemble of such."""

    role: Role
    seed: int | None
    architecture: str
    weights: str
    """Path of the weights, relative to the run folder (absolute for a teacher from elsewhere)."""
    weights_hash: str
    initial: str = ""
    """Fingerprint of the initial weights: a student and its baseline share it."""
    best_epoch: int | None = None
    epochs: list[Epoch] = []
    seconds: float = 0.0
    precision: str = "fp32"
    taught_by: str = ""
    """Name of the model that it learned from; empty for one trained alone, or given."""
    shares: dict[str, float] = {}
    """Of an ensemble: the models whose probabilities it averages, and their weights, which add up to 1."""
    val: Metrics | None = None
    test: Metrics | None = None


class RoleSummary(Part):
    """All seeds of a role together, on the test split."""

    accuracy: Interval
    macro_f1: float
    nll: float
    ece: float
    sensitivity: float | None = None
    specificity: float | None = None
    auroc: float | None = None
    agreement: float | None = None
    profile: Profile


class Finding(Part):
    """One thing that the gate looked at."""

    check: str
    ok: bool
    severity: Literal["refuse", "warn"]
    text: str
    """One sentence in plain words."""


class DataSummary(Part):
    """The images of the run."""

    source: str
    fingerprint: str
    classes: list[str]
    counts: dict[str, dict[str, int]]
    """`counts[split][class]`."""
    unlabelled: int = 0
    """Training images without a label, in none of the counts."""
    channels: int
    frame: int
    """Side in pixels of the stored frames."""
    image_size: int
    notes: list[str] = []
    """What a reader must know, such as a split that was held out."""
    skipped: dict[str, str] = {}
    """File: why it was left out (the first hundred)."""
    skipped_total: int = 0
    duplicates: list[list[str]] = []
    """Groups of identical images that straddle splits (the first hundred)."""
    duplicates_total: int = 0


class Verdict(Part):
    """The student against the same student trained alone."""

    outcome: Literal["BEATS", "NO GAIN", "INCONCLUSIVE"]
    gain: Interval
    """Difference in test accuracy, student minus baseline."""
    min_gain: float
    seeds: int
    images: int
    per_seed: dict[str, float]
    gap_closed: float | None = None
    """Share of the gap between baseline and teacher that the student closes; None where there is no gap."""
    text: str
    """Plain words."""
    method: str
    """How the interval was computed."""


class Agreement(Part):
    """An exported file against PyTorch."""

    images: int
    max_difference: float
    """Largest difference between two probabilities."""
    agreement: float
    """Share of images with the same answer."""
    accuracy: float
    tolerance: float


class Export(Part):
    """One exported file."""

    format: str
    path: str
    bytes: int
    runtime: str
    seed: int
    on_frames: Agreement
    """The stored validation frames."""
    latency: Latency


class Example(Part):
    """A test image for the report's view of the teacher's dark knowledge."""

    name: str
    label: int | None
    png: str
    """The frame as PNG, base64."""
    teacher_logits: list[float]
    student_logits: list[float]
    baseline_logits: list[float]


class Kept(Part):
    """The teacher's outputs, kept for all students."""

    views: int
    """Distinct views of each image."""
    images: int
    """In the training split."""
    bytes: int
    """Of all views."""
    top: int | None
    """How many logits are kept of each answer; None for all."""
    computed: int
    """Answers that this run computed itself; the others it found."""
    seconds: float
    """That it took to compute them."""


class Stage(Part):
    """A finished stage: skipped as long as its inputs have this fingerprint."""

    inputs: str
    seconds: float
    finished: str


class Environment(Part):
    """Where the run ran."""

    understudy: str
    python: str
    platform: str
    processor: str
    cores: int
    threads: int
    device: str
    precision: dict[str, str] = {}
    """Per architecture, and how it was chosen."""
    versions: dict[str, str] = {}
    peak_memory_bytes: int | None = None
    """Largest resident memory of the process."""


class Record(Part):
    """A whole run."""

    format: Literal["understudy-record/1"] = "understudy-record/1"
    kind: Literal["distill", "train"] = "distill"
    name: str
    status: Literal["running", "done", "failed"] = "running"
    failure: str | None = None
    created: str
    seconds: float = 0.0
    config: dict[str, Any]
    environment: Environment | None = None
    data: DataSummary | None = None
    gate: list[Finding] = []
    """Of the teacher."""
    suitability: list[Finding] = []
    """Of the methods."""
    objective: Objective | None = None
    outputs: Kept | None = None
    """Of the teacher; those of other models that teach, by name, are in `more_outputs`."""
    more_outputs: dict[str, Kept] = {}
    models: dict[str, Trained] = {}
    """By the name of the folder: `teacher`, `baseline-0`, `student-0`, ...; see `understudy.pipeline.chain`."""
    summary: dict[Role, RoleSummary] = {}
    verdict: Verdict | None = None
    sweep: Sweep | None = None
    chosen: str | None = None
    """The student picked on validation, such as `student-2`; it is the one exported."""
    exports: list[Export] = []
    examples: list[Example] = []
    stages: dict[str, Stage] = {}


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def save(record: Record, run: Path) -> None:
    """Write `record.json` into the run folder, atomically."""
    storage.write_text(run / "record.json", record.model_dump_json(indent=1) + "\n")


def load(run: Path) -> Record:
    """Read the record of a run.

    Raises:
        RunError: the folder holds no record, or one that cannot be read.
    """
    path = run / "record.json" if run.is_dir() else run
    try:
        return Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{run} is not a run folder: it holds no record.json.") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        place = f"at '{where}': " if where else ""
        raise RunError(f"{path} is damaged or of another version ({place}{first['msg']}).") from None
