"""Models in files: safetensors beside a JSON card that says how to rebuild them. No pickle.

The weights are written first and the card after them with their hash, so that a pair torn by a crash is noticed.
A card that names `module:function` makes `load` import that module: load such models only with code that you trust.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import nn

from understudy import record, storage
from understudy.distillation.inputs import logits_of
from understudy.errors import ModelError
from understudy.models import huggingface, norms, shapes, tensors
from understudy.models.build import from_folder, network, seeded
from understudy.models.classifier import Classifier, head_layer
from understudy.models.foreign import quote
from understudy.record import ModelCard, Role


def save(
    classifier: Classifier,
    path: Path,
    *,
    role: str = "",
    seed: int | None = None,
    metrics: Mapping[str, float] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Write the weights to `path` (`.safetensors`) and the card beside them (`.json`), each atomically.

    Numbers in `metrics` that are not finite are left out.

    Raises:
        ModelError: a path with another ending, or a network that keeps more than tensors.
    """
    if path.suffix != ".safetensors":
        raise ModelError(f"Weights are saved as .safetensors, not as {path}.")
    tensors.write(path, tensors.of(classifier.net))
    card = ModelCard(
        architecture=classifier.architecture,
        network_channels=3 if classifier.network_channels == 3 else 1,
        classes=list(classifier.classes),
        input=classifier.spec,
        pruned=classifier.pruned,
        role=role,
        seed=seed,
        weights=storage.hash_file(path),
        metrics={name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)},
        provenance=dict(provenance or {}),
    )
    storage.write_text(card_path(path), card.model_dump_json(indent=1) + "\n")
    return card


def load(source: Path | str, *, prefer: Role | None = None) -> tuple[Classifier, ModelCard]:
    """Load a model from a weights file or a run folder; it comes on the CPU, in evaluation mode.

    Args:
        source: `*.safetensors` with its card beside it, a run folder, or what transformers saved (see `huggingface`).
        prefer: which model of a run, of the baselines the one with the chosen student's seed; by default the chosen
            student, or the teacher where only a teacher was trained.

    Raises:
        ModelError: a missing or damaged file, weights that belong to another card, or a pickle.
        RunError: the record of the run cannot be read.
    """
    path = Path(source).expanduser()
    if not (path / "record.json").is_file() and huggingface.is_saved(str(source)):
        return _of_transformers(huggingface.located(str(source)))
    path = weights_file(path, prefer)
    if tensors.is_pickle(path):
        raise ModelError(
            f"{path} is a pickle, not safetensors, and says nothing of its network. Name the architecture and give "
            f"the file with --teacher-weights {path} --unsafe-pickle."
        )
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}.")
    if path.suffix != ".safetensors":
        raise ModelError(
            f"{path} is no weights file (.safetensors). Of a run of understudy name its folder, or a model.safetensors "
            "below it."
        )
    card = read_card(path)
    given = tensors.read(path)
    if card.weights and card.weights != storage.hash_file(path):
        raise ModelError(
            f"{path} is not the file that {card_path(path).name} describes: one of the two was changed or replaced. "
            "Copy both again from where they were saved."
        )
    return _rebuild(card, given, path).eval(), card


def weights_file(source: Path | str, prefer: Role | None = None) -> Path:
    """Return the weights file that `load` reads of a run folder; any other path is one itself.

    Raises:
        ModelError, RunError: the run has no such model, or its record cannot be read.
    """
    path = Path(source).expanduser()
    return _in_run(path, prefer) if path.is_dir() else path


def read_card(path: Path) -> ModelCard:
    """Read the card beside a weights file.

    Raises:
        ModelError: it is missing or damaged.
    """
    card = card_path(path)
    try:
        return ModelCard.model_validate_json(card.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} has no card: {card.name}, saved beside it, is missing.") from None
    except OSError as error:
        raise ModelError(f"{card} cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"{card} is damaged or of another version (at '{where}': {first['msg']}).") from None


def card_path(path: Path) -> Path:
    """Return where the card of a weights file lies."""
    return path.with_suffix(".json")


def weights_fingerprint(net: nn.Module) -> str:
    """Return 32 hexadecimal digits that name the weights of a network: names, types, shapes and bytes.

    A student and its baseline start from the same ones.
    """
    return tensors.fingerprint(net)


def head(net: nn.Module) -> tuple[NDArray[np.float32], NDArray[np.float32] | None] | None:
    """Return weight [classes, features] and bias [classes] of the layer that yields the classes.

    That is the last linear layer or 1x1 convolution, of a `Classifier` the last with as many outputs as classes; None
    where there is none.
    """
    found = head_layer(net.net, len(net.classes)) if isinstance(net, Classifier) else head_layer(net)
    if found is None:
        return None
    layer = found[1]
    weight = layer.weight.detach().float().cpu().flatten(1).numpy().copy()
    return weight, None if layer.bias is None else layer.bias.detach().float().cpu().numpy().copy()


def _of_transformers(folder: Path) -> tuple[Classifier, ModelCard]:
    found = from_folder(folder)
    card = ModelCard(
        architecture=found.architecture,
        network_channels=3 if found.network_channels == 3 else 1,
        classes=list(found.classes),
        input=found.spec,
        weights=weights_fingerprint(found.net),
    )
    return found.eval(), card


def _in_run(folder: Path, prefer: Role | None) -> Path:
    run = record.load(folder)
    if prefer == "teacher" or (prefer is None and run.kind == "train"):
        name: str | None = "teacher"
    elif prefer == "baseline":
        name = f"baseline-{run.models[run.chosen].seed}" if run.chosen in run.models else None
    else:
        name = run.chosen
    if name is None or name not in run.models:
        raise ModelError(
            f"The run {folder} has no {prefer or 'student'} yet. Finish it with: understudy resume {folder}"
        )
    return folder / run.models[name].weights


def _rebuild(card: ModelCard, given: Mapping[str, Any], path: Path) -> Classifier:
    with seeded(0):
        net = network(card.architecture, classes=card.classes, channels=card.network_channels, size=card.input.size)
    norms.keep_running_statistics(net, within=given)  # where it was trained so; see TrainConfig.running_statistics
    if card.pruned:
        _narrow(net, card, given, path)
    wrong = tensors.differences(net, given)
    if wrong:
        raise ModelError(f"{path} does not fit its network '{card.architecture}': {tensors.first_few(wrong)}.")
    net.load_state_dict(dict(given))
    return Classifier(
        net,
        architecture=card.architecture,
        classes=card.classes,
        spec=card.input,
        network_channels=card.network_channels,
        pruned=card.pruned,
    )


def _narrow(net: nn.Module, card: ModelCard, given: Mapping[str, Any], path: Path) -> None:
    """Give a network the widths of a pruned one, and prove that its layers still fit one another."""
    try:
        shapes.fit(net, given)
        with torch.no_grad():
            images = torch.zeros(2, card.network_channels, card.input.size, card.input.size)
            shape = logits_of(net.eval()(images)).shape
    except ModelError as error:
        raise ModelError(f"{path} does not fit its network '{card.architecture}'. {error}") from None
    except Exception as error:  # the network may be a user's own code
        raise ModelError(f"{path} holds layers that do not fit one another ({quote(error)}).") from None
    if shape != (2, len(card.classes)):
        raise ModelError(f"{path} answers {shape[-1]} classes, and its card names {len(card.classes)}.")
