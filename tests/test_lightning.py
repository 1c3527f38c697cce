"""Lightning's own Trainer, callbacks and loggers with our tasks."""

from __future__ import annotations

import csv
import importlib.util
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_fits import SGD, WARNINGS, data, net, same, shuffled, state, trainer, val
from understudy import Distiller, losses
from understudy.distillation import Term
from understudy.distillation.schedules import Schedule
from understudy.errors import ConfigError, DataError

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from understudy.integrations.lightning import ClassificationTask, DistillationTask, adamw  # noqa: E402

pytestmark = [
    pytest.mark.slow,  # the import alone takes seconds
    *WARNINGS,
]
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "lightning_task.py"


class Rows(Dataset[dict[str, Any]]):
    """Batches of it are mappings."""

    def __init__(self, images: str, labels: str) -> None:
        self.names = images, labels

    def __len__(self) -> int:
        return 24

    def __getitem__(self, position: int) -> dict[str, Any]:
        image, label = data()[position]
        return {self.names[0]: image, self.names[1]: label, "index": position, "file": f"{position}.png"}


def by_hand(distiller: Distiller, *, seed: int, epochs: int) -> dict[str, Tensor]:
    """Train as a hand-written loop does; return the student's weights."""
    optimizer = SGD(distiller.parameters())
    torch.manual_seed(seed)
    distiller.train()
    for epoch in range(epochs):
        for step, (images, labels) in enumerate(shuffled()):
            distiller.advance((epoch * 3 + step) / (epochs * 3))
            optimizer.zero_grad()
            distiller(images, labels).total.backward()
            optimizer.step()
    return state(distiller.student)


@pytest.mark.parametrize("method", ["kd", "dkd", "kd+attention"])
def test_a_fit_equals_a_loop_by_hand(method: str, tmp_path: Path) -> None:
    task = DistillationTask(net(8, 0), net(4, 1), method=method, temperature=4, optimizer=SGD)
    torch.manual_seed(3)
    trainer(tmp_path).fit(task, shuffled())
    example = data().tensors[0][:2]
    distiller = Distiller(net(8, 0), net(4, 1), method=method, temperature=4, example=example)
    assert same(state(task.student), by_hand(distiller, seed=3, epochs=2))


def test_plain_training_equals_a_loop_by_hand(tmp_path: Path) -> None:
    task = ClassificationTask(net(4, 1), optimizer=SGD)
    torch.manual_seed(3)
    trainer(tmp_path).fit(task, shuffled())
    assert same(state(task.model), by_hand(Distiller(None, net(4, 1)), seed=3, epochs=2))


def test_a_projector_is_trained_and_equals_a_loop_by_hand(tmp_path: Path) -> None:
    example = data().tensors[0][:2]
    task = DistillationTask(net(8, 0), net(4, 1), method="kd+hint", example=example, optimizer=SGD)
    distiller = Distiller(net(8, 0), net(4, 1), method="kd+hint", example=example)
    before = state(task.projectors)
    distiller.projectors.load_state_dict(before)
    torch.manual_seed(3)
    trainer(tmp_path).fit(task, shuffled())
    assert same(state(task.student), by_hand(distiller, seed=3, epochs=2))
    assert same(state(task.projectors), state(distiller.projectors))
    assert not same(state(task.projectors), before)


def test_the_teacher_stays_what_it_was(tmp_path: Path) -> None:
    teacher = net(8, 0)
    before = state(teacher)
    task = DistillationTask(teacher, net(4, 1), method="kd+hint")
    trainer(tmp_path).fit(task, shuffled(), val())
    assert same(state(teacher), before)
    assert not teacher.training
    assert all(one.grad is None and not one.requires_grad for one in teacher.parameters())
    assert not any("teacher" in name for name in task.state_dict())
    count = sum(one.numel() for one in task.student.parameters()) + sum(
        one.numel() for one in task.projectors.parameters()
    )
    assert sum(one.numel() for one in task.parameters()) == count


def test_a_student_in_evaluation_mode_is_trained_in_training_mode(tmp_path: Path) -> None:
    task = DistillationTask(net(8, 0), net(4, 1).eval())
    trainer(tmp_path).fit(task, shuffled(), val())
    assert int(task.student[0][1].num_batches_tracked) == 6


def test_the_teacher_moves_along() -> None:
    teacher = net(8, 0)
    DistillationTask(teacher, net(4, 1)).double()
    assert next(teacher.parameters()).dtype == torch.float64


def test_validation_is_plain(tmp_path: Path) -> None:
    student = net(4, 1)
    task = DistillationTask(net(8, 0), student, temperature=4, alpha=0.9, label_smoothing=0.1)
    found = trainer(tmp_path).validate(task, DataLoader(data(), batch_size=5), verbose=False)[0]
    logits, labels = student.eval()(data().tensors[0]), data().tensors[1]
    assert found["val_loss"] == pytest.approx(float(F.cross_entropy(logits, labels).detach()), rel=1e-5)
    assert found["val_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    tested = trainer(tmp_path).test(task, val(), verbose=False)[0]
    assert tested["test_loss"] == pytest.approx(found["val_loss"], rel=1e-5)
    answers = torch.cat(trainer(tmp_path).predict(task, val()))
    assert torch.allclose(answers, logits, atol=1e-6)


class Watching(pl.Callback):
    """A user's callback: the losses of all steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def test_callbacks_and_loggers_see_every_term(tmp_path: Path) -> None:
    watching, logger = Watching(), CSVLogger(tmp_path)
    task = DistillationTask(net(8, 0), net(4, 1), temperature=4, alpha=0.75, optimizer=SGD)
    trainer(tmp_path, callbacks=[watching], logger=logger).fit(task, shuffled(), val())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["train_loss"]]
    assert len(trained) == 2
    assert len([row for row in rows if row["val_loss"] and row["val_accuracy"]]) == 2
    assert float(trained[0]["train_loss"]) == pytest.approx(sum(watching.losses[:3]) / 3, rel=1e-5)
    for row in trained:
        parts = 0.25 * float(row["train_loss_ce"]) + 0.75 * float(row["train_loss_kd"])
        assert float(row["train_loss"]) == pytest.approx(parts, rel=1e-5)
    told = (Path(logger.log_dir) / "hparams.yaml").read_text()
    for line in ("method: kd", "alpha: 0.75", "weight_ce: 0.25", "weight_kd: 0.75", "optimizer_class: SGD", "lr: 0.1"):
        assert line in told


def test_looking_at_the_first_batch_leaves_random_numbers_alone(tmp_path: Path) -> None:
    class Order(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(batch[1])

    orders = []
    for method in ("kd", "kd+attention"):
        order = Order()
        loader = DataLoader(data(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(7))
        task = DistillationTask(net(8, 0), net(4, 1), method=method)
        trainer(tmp_path, max_epochs=1, callbacks=[order]).fit(task, loader)
        orders.append(torch.cat(order.seen))
    assert torch.equal(*orders)


def test_batches_may_be_mappings(tmp_path: Path) -> None:
    usual = DistillationTask(net(8, 0), net(4, 1), method="kd+hint")
    trainer(tmp_path).fit(usual, DataLoader(Rows("image", "label"), batch_size=8))
    named = ClassificationTask(net(4, 1), images_key="scan", labels_key="finding")
    trainer(tmp_path).fit(named, DataLoader(Rows("scan", "finding"), batch_size=8))
    with pytest.raises(
        DataError, match=r"no 'images'\. Its keys are scan, finding, index, file; say which with images_key"
    ):
        trainer(tmp_path).fit(ClassificationTask(net(4, 1)), DataLoader(Rows("scan", "finding"), batch_size=8))


def test_a_method_with_a_memory_is_told_positions(tmp_path: Path) -> None:
    task = DistillationTask(net(8, 0), net(4, 1), method="crd", samples=24)
    trainer(tmp_path).fit(task, DataLoader(Rows("image", "label"), batch_size=8, shuffle=True))
    assert int(task.state_dict()["projectors.crd.0.step"]) == 6
    with pytest.raises(ConfigError, match="The term 'crd' takes positions; none given"):
        trainer(tmp_path).fit(DistillationTask(net(8, 0), net(4, 1), method="crd", samples=24), shuffled())


def test_the_optimizer_is_the_users(tmp_path: Path) -> None:
    def factory(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, lr=0.4)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    fitting = trainer(tmp_path)
    fitting.fit(ClassificationTask(net(4, 1), optimizer=factory), shuffled())
    assert fitting.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)
    groups = adamw(net(4, 1).parameters()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(net(4, 1).parameters()))


def test_schedules_follow_the_training(tmp_path: Path) -> None:
    class Progress(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.seen.append(pl_module.distiller._progress)

    terms = [Term("kd", losses.kd, weight=Schedule("linear", 0.0, 1.0), temperature=2.0)]
    progress = Progress()
    task = DistillationTask(net(8, 0), net(4, 1), terms=terms)
    trainer(tmp_path, callbacks=[progress], accumulate_grad_batches=3).fit(task, shuffled(4), val())
    assert progress.seen == pytest.approx([0, 0, 0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 0.75, 0.75])
    assert task.hparams["weight_kd"] == "rising from 0 to 1 over training"
    with pytest.raises(ConfigError, match="when training ends"):
        trainer(tmp_path, max_epochs=-1).fit(DistillationTask(net(8, 0), net(4, 1), terms=terms), shuffled())


@pytest.mark.parametrize("method", ["kd", "kd+hint"])
def test_half_precision_and_accumulation(method: str, tmp_path: Path) -> None:
    task = DistillationTask(net(8, 0), net(4, 1), method=method)
    before = state(task.student)
    fitting = trainer(tmp_path, precision="bf16-mixed", accumulate_grad_batches=2)
    fitting.fit(task, shuffled(4), val())
    assert fitting.global_step == 6
    assert torch.isfinite(fitting.callback_metrics["train_loss"])
    assert not same(state(task.student), before)


def test_a_task_may_be_the_teacher(tmp_path: Path) -> None:
    teacher = ClassificationTask(net(8, 0))
    trainer(tmp_path).fit(teacher, shuffled())
    before = state(teacher)
    task = DistillationTask(teacher, net(4, 1), method="kd+hint")
    trainer(tmp_path).fit(task, shuffled())
    assert same(state(teacher), before)


def test_faults_are_told_early(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown method 'kdd'"):
        DistillationTask(net(8, 0), net(4, 1), method="kdd")
    with pytest.raises(ConfigError, match="alpha is the share"):
        DistillationTask(net(8, 0), net(4, 1), alpha=2)
    with pytest.raises(ConfigError, match=r"learns in Trainer.fit"):
        DistillationTask(net(8, 0), net(4, 1)).training_step(data()[:8], 0)


@pytest.fixture
def _without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)


@pytest.mark.usefixtures("_without_lightning")
def test_a_missing_lightning_is_one_sentence() -> None:
    found = importlib.util.find_spec("understudy.integrations.lightning")
    assert found is not None
    assert found.loader is not None
    with pytest.raises(ConfigError, match=r"pip install 'understudy\[lightning\]'"):
        found.loader.exec_module(importlib.util.module_from_spec(found))


def test_two_processes_train_one_student(tmp_path: Path) -> None:
    """Forked on the CPU: what they send each other is what spawned ones would."""
    example = data().tensors[0][:2]

    def task() -> DistillationTask:
        # without what depends on which images are together
        network = [nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), nn.Flatten()]
        torch.manual_seed(1)
        student = nn.Sequential(*network, nn.Linear(64, 3))
        gently = partial(torch.optim.SGD, lr=0.01)
        return DistillationTask(net(8, 0), student, method="kd+hint", example=example, optimizer=gently)

    alone, together = task(), task()
    before = state(alone)
    together.load_state_dict(alone.state_dict())
    trainer(tmp_path, max_epochs=3).fit(alone, DataLoader(data(), batch_size=24))
    trainer(tmp_path, max_epochs=3, devices=2, strategy="ddp_fork").fit(together, DataLoader(data(), batch_size=12))
    assert not same(state(alone), before)
    for name, tensor in alone.state_dict().items():
        assert torch.allclose(together.state_dict()[name], tensor, atol=1e-5), name


def test_the_example_teaches_a_student() -> None:
    found = runpy.run_path(str(EXAMPLE))["main"](epochs=5)
    assert found["teacher"]["val_accuracy"] > 0.85
    assert found["distilled"]["val_accuracy"] > 0.6  # by chance 0.1
    assert found["alone"]["val_accuracy"] > 0.6
