"""torchdistill's `DistillationBox` with `KDLoss`, configured as its examples for CIFAR-10 are, and their loop."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import RandomSampler, TensorDataset
from torchdistill.core.distillation import get_distillation_box

from peers.pairs import ALPHA, BATCH, RATE, TEMPERATURE, Data, Nets, Tick

# "." is the answer of a whole network, which the box keeps without a hook
LOGITS = {"forward_proc": "forward_batch_only", "forward_hook": {"input": [], "output": []}}


def train(nets: Nets, data: Data, tick: Tick) -> None:
    datasets = {"train": TensorDataset(data.floats(), data.labels)}
    nets.teacher.eval()  # the box leaves its mode to the caller
    box = get_distillation_box(
        nets.teacher, nets.student, datasets, config(), torch.device("cpu"), None, distributed=False, lr_factor=1
    )
    epoch = 0
    while True:
        box.pre_epoch_process(epoch=epoch)
        for inputs, labels, extra in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(inputs, labels, extra)
            box.post_forward_process(loss=loss)
            tick()
        box.post_epoch_process()
        epoch += 1


def config() -> dict[str, Any]:
    """Return what its YAML files say, as the dictionary that they become."""
    loss = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": TEMPERATURE,
            "alpha": 1 - ALPHA,
            "reduction": "batchmean",
        },
    }
    return {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": BATCH, "num_workers": 0},
        },
        "teacher": {**LOGITS, "requires_grad": False},
        "student": {**LOGITS, "requires_grad": True},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": RATE}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
