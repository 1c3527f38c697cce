"""Training loops of others, and ours, each in a file of its own; `benchmarks/peers.py` measures them in turns.

A loop is a function `(nets, data, tick)` that trains the student for as long as `tick` lets it, and calls `tick` after
every step. Nothing here imports a framework: only the process that measures a loop does.
"""

from __future__ import annotations

from typing import NamedTuple


class Variant(NamedTuple):
    """One row of the table."""

    module: str
    """The file in this folder, without its ending."""
    loop: str
    """The function in it."""
    requires: tuple[str, ...] = ()
    """Distributions that must be installed."""
    note: str = ""


VARIANTS: dict[str, Variant] = {
    "student alone": Variant("ours", "alone", note="our loop without a teacher: the limit"),
    "ours, online": Variant("ours", "online", note="the teacher runs along"),
    "ours, cached": Variant("ours", "cached", note="the teacher's logits are read"),
    "tutorial": Variant("tutorial", "train", note="plain PyTorch: DataLoader over tensors, teacher under no_grad"),
    "fasterai": Variant("fasterai", "train", ("fastai", "fasterai"), note="Learner and callback as documented"),
    "fasterai, frozen": Variant(
        "fasterai", "train_frozen", ("fastai", "fasterai"), note="the same after `teacher.requires_grad_(False)`"
    ),
    "torchdistill": Variant("torchdistill", "train", ("torchdistill",), note="DistillationBox with KDLoss"),
    "keras": Variant("keras", "train", ("keras",), note="keras.distillation on torch, networks written in Keras"),
    "timm": Variant("timm", "train", ("timm",), note="LogitDistillationTask"),
}
