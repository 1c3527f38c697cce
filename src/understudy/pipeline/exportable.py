"""What of a run can be exported: the chosen student, and every form that compression made of it.

Imported by `exporting` only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from understudy.errors import ConfigError, RunError, unknown
from understudy.evaluate import metrics
from understudy.export.graph import Exportable
from understudy.models import files
from understudy.models.classifier import Classifier
from understudy.pipeline import eightbits, forms, judge
from understudy.pipeline.folder import Run
from understudy.pipeline.materials import Materials
from understudy.record import Compressed
from understudy.storage import hash_file

STUDENT = "student"
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Form:
    """A network of a run in one form, float or in 8 bits."""

    name: str
    """`student`, or that of a compressed stage."""
    seed: int
    weights: str
    """Hash of what the file is made of."""
    logits: Floats
    """For the validation images, over the temperature: [images, classes]. Of the float network, in PyTorch; of one that
    was trained in 8 bits, what its ONNX file answered."""
    folder: Path
    """Of the float network's weights."""
    temperature: float = 1.0
    onnx: Path | None = None
    """The form as an ONNX file, where compression wrote one."""
    int8: eightbits.Recipe | None = None
    """How it came to 8 bits; None for a float one."""

    @property
    def is_int8(self) -> bool:
        """Whether it computes in 8 bits."""
        return self.int8 is not None

    @property
    def probabilities(self) -> Floats:
        """What a file is to answer for the validation images: [images, classes]."""
        return np.exp(metrics.log_softmax(self.logits)).astype(np.float32)

    def model(self, run: Run, materials: Materials) -> Exportable:
        """Load the network, in 8 bits where the form is.

        Raises:
            ConfigError, ModelError: as for `eightbits.network`.
        """
        network: Classifier = files.load(self.folder / forms.WEIGHTS)[0]
        provenance = {"data": materials.store.fingerprint, "run": run.record.name}
        return Exportable(
            network.net if self.int8 is None else eightbits.network(materials, network, self.int8),
            network.spec,
            network.network_channels,
            network.classes,
            {"architecture": network.architecture, "weights": self.weights, **provenance},
            self.temperature,
        )


def find(run: Run, name: str) -> Form:
    """Return a form by its name.

    Raises:
        ConfigError: the run has no such form.
        RunError: the run has no student that was judged.
    """
    chosen = run.record.chosen
    if run.record.kind == "train":
        raise RunError(run.no_student)
    if chosen is None or "evaluate" not in run.record.stages:
        raise RunError(
            f"{run.folder} holds no student that was judged, so there is nothing to export. "
            f"Finish it with: understudy resume {run.folder}"
        )
    if name == STUDENT:
        model = run.record.models[chosen]
        logits = judge.predictions(run)[f"val/{chosen}"]
        return Form(STUDENT, model.seed or 0, model.weights_hash, logits, (run.folder / model.weights).parent)
    if name not in names(run):
        raise ConfigError(unknown("stage", name, names(run)))
    return _compressed(run, name, run.record.models[chosen].seed or 0)


def names(run: Run, *, accepted: bool = False) -> list[str]:
    """Return the names of the forms of the chosen student, or of those that lost no more than was allowed."""
    made = [row for row in run.record.compressed if row.name not in run.record.models]
    return [STUDENT, *(row.name for row in made if row.accepted or not accepted)]


def _compressed(run: Run, name: str, seed: int) -> Form:
    row = forms.find(run, name)
    source = _float_form(run, row)
    file = run.folder / row.path
    return Form(
        name,
        seed,
        hash_file(file),
        _expected(run, row, source),
        _folder(run, source),
        row.temperature,
        onnx=file,
        int8=None if row.quantized is None else eightbits.recipe(run, row),
    )


def _expected(run: Run, row: Compressed, source: Compressed) -> Floats:
    """Return what files of a form are to answer for the validation images, as logits.

    Training in 8 bits goes on from the float network and may well improve on it, so what it came to is expected.
    """
    if row is source or (row.quantized and row.quantized.way == "quantization-aware"):
        return forms.logits(run, row.name)["val"]
    return forms.logits(run, source.name)["val"] / row.temperature


def _float_form(run: Run, row: Compressed) -> Compressed:
    """Return the float form that a form in 8 bits was made of; a float one is its own."""
    while row.quantized is not None:
        row = forms.find(run, row.before)
    return row


def _folder(run: Run, row: Compressed) -> Path:
    """Return where the weights of a float form lie: a calibrated one has those of the form before."""
    folder = run.folder / forms.FOLDER / row.name
    if (folder / forms.WEIGHTS).exists():
        return folder
    if row.name in run.record.models:
        return run.folder / row.name
    return _folder(run, forms.find(run, row.before))
