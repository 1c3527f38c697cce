"""The cost model: time, disk and memory of every stage of a run, from sizes and from constants that were measured.

Arithmetic only, no torch: the pipeline measures the constants, the plan and `--dry-run` tell the answer, and
`docs/scale.md` says what was checked. Imported by the pipeline and by benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from understudy.errors import ConfigError

IN_MEMORY = 256 << 20
"""Bytes of the teacher's answers for one view; more are read row by row (`data.outputs`)."""


@dataclass(frozen=True)
class Network:
    """What one network costs on one device; seconds are for one image."""

    step: float
    """A training step: its view, forward and backward pass, optimizer."""
    answer: float
    """A view and the forward pass without gradients."""
    judge: float
    """The forward pass on the unchanged view, for validation and test."""
    weight_bytes: int
    """Parameters and buffers."""
    memory_bytes: int
    """Largest memory of a process that trains it with this batch size, all else included."""
    epoch: float = 0.0
    """Seconds of an epoch that depend on no number of images: its beginning, its end, its row in the record."""


@dataclass(frozen=True)
class Constants:
    """What was measured on one machine with one device; seconds, for one image or row where nothing else is said."""

    teacher: Network
    student: Network
    list: float = 0.0
    """Read a file, hash it, look at its header."""
    decode: float = 0.0
    """Decode an image and write its frame."""
    draw: float = 0.0
    """Shuffle, and draw the view of an image, at the beginning of an epoch."""
    pack: float = 0.0
    """Pack the teacher's answer into a row and write it."""
    read: float = 0.0
    """Read a row from the file and make logits of it."""
    write_byte: float = 0.0
    """Write a byte to the disk, and wait until it is there."""
    start: float = 0.0
    """Seconds of a run: imports, opening what is there, the report."""
    profile: float = 0.0
    """Seconds of a run: latency and memory of the three models."""
    export: float = 0.0
    """Seconds of a run: the exported file written, compared and timed."""
    base_bytes: int = 0
    """Memory of a process before it trains."""
    listed_bytes: int = 0
    """Memory for each image while the images are listed and opened."""
    drawn_bytes: int = 0
    """Memory for each training image while a network trains: labels, ids, order, parameters of its view."""


@dataclass(frozen=True)
class Job:
    """The sizes of a run."""

    train: int
    val: int
    test: int
    frame_bytes: int
    """Of a stored image: channels x side x side."""
    row_bytes: int
    """Of the teacher's answer for one view of an image; see `data.packing`."""
    epochs: int
    views: int | None
    """Distinct views whose answers are kept; None where the teacher runs along."""
    seeds: int = 1
    batch: int = 64
    teacher_epochs: int = 0
    """0 for a teacher that is ready."""
    teacher_batch: int = 64
    to_list: int | None = None
    """Images whose files were not read yet; all by default, as for the next two."""
    to_decode: int | None = None
    to_answer: int | None = None
    """Views of images that the teacher must still answer."""
    stored: bool = True
    """Whether frames are kept; where they are too many, every epoch decodes them again."""
    checkpoint_every: float = 30.0
    """Seconds."""

    @property
    def images(self) -> int:
        """All images."""
        return self.train + self.val + self.test

    @property
    def answers(self) -> int:
        """Answers of the teacher that the students need; those that are kept count once for all seeds."""
        return self.train * (self.epochs * self.seeds if self.views is None else self.views)

    @property
    def unanswered(self) -> int:
        """Of these, how many the teacher must still give."""
        return self.answers if self.to_answer is None else self.to_answer

    @property
    def reads_rows(self) -> bool:
        """Whether the answers for a view are read from the file as they are needed, being too many for the memory."""
        return self.views is not None and self.train * self.row_bytes > IN_MEMORY


@dataclass(frozen=True)
class Devices:
    """How many equal devices share the work.

    Assumed: the teacher's answers and every batch divide evenly, each device is as fast as the one that was measured,
    and after every step the gradients go round once in a ring, with nothing else done meanwhile. Listing, decoding,
    validation, evaluation and export do not divide: one process does them, or each does all of it.
    """

    count: int = 1
    bytes_per_second: float = 1e9
    """Of the link between two of them."""

    def exchange(self, size: int) -> float:
        """Return the seconds in which gradients of `size` bytes are added up over all devices."""
        return 2 * (self.count - 1) / self.count * size / self.bytes_per_second


@dataclass(frozen=True)
class Stage:
    """What one stage costs."""

    name: str
    seconds: float = 0.0
    disk_bytes: int = 0
    """Written and kept."""
    memory_bytes: int = 0
    """Largest memory of a process during the stage, mapped files left out."""


@dataclass(frozen=True)
class Prediction:
    """What a run costs, stage by stage."""

    stages: Sequence[Stage] = field(default_factory=tuple)

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        """Written by all stages and kept."""
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """Of the stage that needs most."""
        return max((stage.memory_bytes for stage in self.stages), default=0)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def predict(job: Job, constants: Constants, devices: Devices | None = None) -> Prediction:
    """Return what a distillation costs.

    Args:
        job: its sizes.
        constants: measured for its networks, image size and number of classes.
        devices: that share the work; one by default.

    Raises:
        ConfigError: a device would get fewer than two images of a batch.
    """
    devices = devices or Devices()
    if min(job.batch, job.teacher_batch) < 2 * devices.count:
        raise ConfigError(f"{devices.count} devices need batches of at least {2 * devices.count} images.")
    return Prediction(
        (
            _data(job, constants),
            _teacher(job, constants, devices),
            _outputs(job, constants, devices),
            _students("baseline", job, constants, devices, read=0.0),
            _students("student", job, constants, devices, read=constants.read if job.reads_rows else 0.0),
            _evaluate(job, constants),
            Stage("export", constants.export, constants.student.weight_bytes, constants.student.memory_bytes),
        )
    )


def _data(job: Job, constants: Constants) -> Stage:
    listed = job.images if job.to_list is None else job.to_list
    decoded = job.images if job.to_decode is None else job.to_decode
    seconds = constants.start + listed * constants.list + decoded * constants.decode
    disk = decoded * job.frame_bytes if job.stored else 0
    return Stage("data", seconds, disk, _memory(job, constants, constants.base_bytes))


def _teacher(job: Job, constants: Constants, devices: Devices) -> Stage:
    network = constants.teacher
    seconds = _training(job, constants, network, devices, job.teacher_epochs, job.teacher_batch)
    gate = job.val * network.judge
    trains = network.memory_bytes if job.teacher_epochs else constants.base_bytes + network.weight_bytes
    return Stage("teacher", seconds + gate, network.weight_bytes, _memory(job, constants, trains))


def _outputs(job: Job, constants: Constants, devices: Devices) -> Stage:
    """The teacher's answers; where they are not kept, this is what the teacher adds to the students' trainings."""
    keeps = job.views is not None
    each = constants.teacher.answer + (constants.pack if keeps else 0.0)
    memory = _memory(job, constants, constants.base_bytes + constants.teacher.weight_bytes)
    return Stage(
        "outputs", job.unanswered * each / devices.count, job.unanswered * job.row_bytes if keeps else 0, memory
    )


def _students(name: str, job: Job, constants: Constants, devices: Devices, *, read: float) -> Stage:
    network = constants.student
    seconds = _training(job, constants, network, devices, job.epochs, job.batch)
    seconds += job.epochs * job.train * read / devices.count
    table = 0 if job.reads_rows else job.train * job.row_bytes
    memory = _memory(job, constants, network.memory_bytes + (table if name == "student" else 0))
    return Stage(name, job.seeds * seconds, job.seeds * network.weight_bytes, memory)


def _training(job: Job, constants: Constants, network: Network, devices: Devices, epochs: int, batch: int) -> float:
    """Return the seconds of one training, checkpoints included."""
    steps = -(-job.train // batch)
    compute = job.train * network.step / devices.count
    exchanged = steps * devices.exchange(network.weight_bytes)
    decoded = 0.0 if job.stored else (job.train + job.val) * constants.decode
    epoch = network.epoch + job.train * constants.draw + compute + exchanged + job.val * network.judge + decoded
    # student, its best state so far, and two moments of the optimizer
    checkpoint = 4 * network.weight_bytes * constants.write_byte
    return epochs * epoch * (1 + checkpoint / job.checkpoint_every) + (checkpoint if epochs else 0.0)


def _evaluate(job: Job, constants: Constants) -> Stage:
    each = constants.teacher.judge + 2 * job.seeds * constants.student.judge
    seconds = (job.val + job.test) * each + constants.profile
    return Stage("evaluate", seconds, 0, _memory(job, constants, constants.base_bytes + constants.teacher.weight_bytes))


def _memory(job: Job, constants: Constants, network: int) -> int:
    """Return the memory of a process: what does not depend on the number of images, and what does."""
    return network + job.images * constants.listed_bytes + job.train * constants.drawn_bytes
