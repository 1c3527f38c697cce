"""What the teacher of a run says of the training views: opened from the cache, filled where something is missing.

Imported by the stages that train students, by the plan and by the sweep.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.data.decode import DECODE_VERSION
from understudy.data.frames import StoredFrames
from understudy.data.outputs import Answer, Answers, Outputs, Source, Viewed, find_outputs, open_outputs
from understudy.data.packing import DENSE_UP_TO
from understudy.models import build, files, foreign
from understudy.numerics import Running, for_answers
from understudy.pipeline.folder import Run
from understudy.pipeline.materials import VIEW_SEED, Materials
from understudy.record import Kept

_LIBRARIES = ("torch", "torchvision", "timm", "understudy")
WEIGHTS = Path("teacher") / "model.safetensors"


def outputs(run: Run, materials: Materials) -> Outputs | None:
    """Return the outputs of the run's teacher for the training views; None where the teacher runs along.

    Nothing is computed, but for the first images where nothing is known of this teacher yet.
    """
    if run.config.train.views == "online":
        return None
    opened = open_outputs(viewed(run, materials), _source(run, materials))
    opened.progress, opened.stop, opened.notice = run.progress, run.stop, run.warn
    opened.shard, opened.any = materials.engine.shard, materials.engine.any
    stored = _stored(materials)
    opened.in_use = (stored,) if stored else ()
    return opened


def prepare(run: Run, materials: Materials) -> Outputs | None:
    """Fill all that the run's students will read, note it in the record, and let go of the teacher.

    Raises:
        Interrupted: the run is to stop; what was computed is kept.
    """
    kept = outputs(run, materials)
    if kept is None:
        return None
    kept.prepare(range(distinct_views(run)))
    computed = int(materials.engine.total(torch.tensor([kept.work.images])))
    before = run.record.outputs
    run.record.outputs = Kept(
        views=distinct_views(run),
        images=len(kept.viewed.split),
        bytes=distinct_views(run) * kept.nbytes if kept.keeps else 0,
        top=kept.packing.top,
        computed=computed + (before.computed if before else 0),
        seconds=kept.work.seconds + (before.seconds if before else 0.0),
    )
    run.save()
    return kept


def missing(run: Run, materials: Materials) -> int:
    """Return how many answers of the teacher the run's students need that are not kept yet."""
    images, views = len(materials.splits["train"]), distinct_views(run)
    if run.config.train.views == "online":
        return images * run.config.train.epochs * len(run.config.seeds)
    if "teacher" not in run.record.stages or not (run.folder / WEIGHTS).exists():
        return images * views
    found = find(run, materials)
    return images * views if found is None else sum(found.missing(view) for view in range(views))


def viewed(run: Run, materials: Materials) -> Viewed:
    """Return the training images as all students of the run see them."""
    store = materials.store
    geometry = (DECODE_VERSION, store.frame, store.channels, store.fit)
    return Viewed(materials.splits["train"], materials.policy, VIEW_SEED, materials.mix, geometry)


def distinct_views(run: Run) -> int:
    """Return how many distinct views of an image the students see."""
    config = run.config.train
    return config.epochs if config.views == "online" else min(config.views, config.epochs)


def find(run: Run, materials: Materials) -> Outputs | None:
    """Return what is kept of the outputs of the run's teacher; None where nothing is. The teacher is not loaded."""
    return find_outputs(viewed(run, materials), _source(run, materials))


def _source(run: Run, materials: Materials) -> Source:
    return Source(
        identity=_identity(run, materials),
        card=_card(run, materials),
        load=lambda: _load(run, materials),
        # few logits are all kept, so that the temperatures decide nothing and need not tell outputs apart
        temperatures=_temperatures(run) if len(materials.store.classes) > DENSE_UP_TO else (),
    )


def running(run: Run, materials: Materials) -> Running:
    """Load the run's teacher, ready to answer."""
    classifier, _ = files.load(run.folder / WEIGHTS)
    return Running(classifier.to(materials.engine.device), for_answers(materials.choices["teacher"].numerics))


def _load(run: Run, materials: Materials) -> Answer:
    network = running(run, materials)

    def answer(images: Tensor) -> Answers:
        return Answers(network(images))

    return answer


def _identity(run: Run, materials: Materials) -> dict[str, Any]:
    """Return all that the teacher's answers depend on."""
    card = files.read_card(run.folder / WEIGHTS)
    return {
        "weights": card.weights,
        "architecture": card.architecture,
        "code": foreign.code_hash(card.architecture) if build.is_function(card.architecture) else "",
        "network_channels": card.network_channels,
        "input": card.input.model_dump(mode="json"),
        # not those of training, which may differ between a long run and a short one: both share what is kept
        "numerics": str(for_answers(materials.choices["teacher"].numerics)),
        "device": materials.engine.device.type,
        "versions": {name: _installed(name) for name in _LIBRARIES},
    }


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _card(run: Run, materials: Materials) -> dict[str, Any]:
    card = files.read_card(run.folder / WEIGHTS)
    data = run.record.data
    return {
        "teacher": card.architecture,
        "weights": card.weights,
        "data": data.source if data else "",
        "run": str(run.folder.resolve()),
        "store": str(_stored(materials) or ""),
    }


def _stored(materials: Materials) -> Path | None:
    """Return the folder of the decoded images; None where they are streamed."""
    frames = materials.store.frames
    return frames.path.parent if isinstance(frames, StoredFrames) else None


def _temperatures(run: Run) -> tuple[float, ...]:
    """Return temperatures to keep logits for; in steps, so that runs of nearby temperatures share what is kept."""
    largest = max(run.config.temperatures)
    steps = [4.0]
    while steps[-1] < largest:
        steps.append(2 * steps[-1])
    return (1.0, *steps)
