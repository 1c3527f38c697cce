"""Our training loop, on Accelerate for devices and processes; the only file that imports accelerate.

One loop trains the teacher, the student alone and the distilled student: they differ in the objective. It checkpoints,
goes on in the middle of an epoch as if nothing had happened, keeps the weights that were best on the validation split,
and stops on a loss that is not a number. With one process nothing is wrapped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from understudy import checkpoint
from understudy.config import TrainConfig
from understudy.data.batches import Batch, Epochs, Split
from understudy.distillation import Distiller, Losses
from understudy.errors import ConfigError, Interrupted, TrainingError
from understudy.numerics import Numerics
from understudy.progress import Progress, silent
from understudy.record import Epoch

_EVALUATION_BATCH = 256
_CHECK_EVERY = 32  # steps between looks at the loss: a look waits for the device
_PROGRESS_SECONDS = 0.1


class Engine:
    """Where training runs.

    Args:
        device: "auto", "cpu", "cuda" or "mps".
        threads: of torch on the CPU; its own choice, all physical cores, where None.

    Raises:
        ConfigError: this machine has no such device.
    """

    def __init__(self, *, device: str = "auto", threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.device: torch.device = self.accelerator.device
        if device != "auto" and self.device.type != device.split(":")[0]:
            raise ConfigError(
                f"This machine offers the device '{self.device.type}', not '{device}'. Leave --device out."
            )

    @property
    def shard(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        return self.accelerator.process_index, self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return bool(self.accelerator.is_main_process)

    def wrap(self, objective: Distiller) -> nn.Module:
        """Return the objective ready for several processes; the objective itself where there is one."""
        if self.accelerator.num_processes == 1:
            return objective
        wrapped: nn.Module = self.accelerator.prepare_model(objective)
        return wrapped

    def autocast(self, numerics: Numerics) -> AbstractContextManager[object]:
        """Return the context of a forward pass."""
        return numerics.autocast(self.device)


@dataclass
class State:
    """Where a training is; what a checkpoint holds beside tensors."""

    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    best_epoch: int = 0
    best_score: tuple[float, float] = (-1.0, 0.0)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Fit:
    """What a training yields; the student holds the weights of the best epoch."""

    epochs: list[Epoch]
    best_epoch: int
    seconds: float


class Training:
    """One training of one objective, from the first step or from a checkpoint.

    Args:
        objective: what is minimised; its student is trained in place.
        data: the training split, epoch by epoch.
        val: the validation split; the epoch with the best accuracy on it is kept (then the lowest NLL, then the first).
        config: the recipe.
        seed: of the order of the images and of dropout; initial weights are the caller's.
        engine: where it runs.
        numerics: precision and layout.
        path: the checkpoint; None writes none.
        every: seconds between checkpoints.
        stop: asked after each step; True writes a checkpoint and raises `Interrupted`.
        progress: told of steps.
        task: the name it is told under.
    """

    def __init__(
        self,
        objective: Distiller,
        data: Epochs,
        val: Split,
        config: TrainConfig,
        *,
        seed: int,
        engine: Engine,
        numerics: Numerics | None = None,
        path: Path | None = None,
        every: float = 30.0,
        stop: Callable[[], bool] = lambda: False,
        progress: Progress = silent,
        task: str = "train",
    ) -> None:
        if data.batch_size < 2 * engine.shard[1]:
            raise ConfigError(f"--batch-size {data.batch_size} is too small: every process needs 2 images a step.")
        self.data, self.val, self.config, self.seed = data, val, config, seed
        self.engine, self.path, self.every, self.stop = engine, path, every, stop
        self.numerics = numerics or Numerics()
        self.progress, self.task = progress, task
        self.objective = objective.to(engine.device)
        self.student = self.numerics.prepare(objective.student)
        self.optimizer = _optimizer(self.student, config)
        self.state = State()
        self.names = [term.name for term in objective.terms]
        self.sums = self._zeros()
        self.best: dict[str, Tensor] = {}
        self.total_steps = config.epochs * data.steps
        self._written = self._shown = time.monotonic()

    def run(self) -> Fit:
        """Train to the end.

        Raises:
            TrainingError: the loss is not a number; the last checkpoint is kept.
            Interrupted: `stop` said so.
        """
        torch.manual_seed(self.seed)
        self._restore()
        wrapped = self.engine.wrap(self.objective)
        while self.state.epoch < self.config.epochs:
            self._epoch(wrapped)
            self._close_epoch()
        self.student.load_state_dict(self.best)
        history = [Epoch.model_validate(row) for row in self.state.history]
        return Fit(history, self.state.best_epoch, self.state.seconds)

    def _epoch(self, wrapped: nn.Module) -> None:
        wrapped.train()
        start = time.monotonic()
        for batch in self.data.epoch(self.seed, self.state.epoch, start=self.state.step, shard=self.engine.shard):
            losses = self._step(wrapped, batch)
            self._count(losses, batch)
            self.state.step += 1
            now = time.monotonic()
            self.state.epoch_seconds += now - start
            start = now
            self._look_around(now)

    def _step(self, wrapped: nn.Module, batch: Batch) -> Losses:
        rate = learning_rate(self._global_step(), self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.engine.autocast(self.numerics):
            losses: Losses = wrapped(self.numerics.layout(batch.images), batch.labels)
        share = self._share(batch)
        (losses.total if share == 1.0 else losses.total * share).backward()  # type: ignore[no-untyped-call]
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    def _share(self, batch: Batch) -> float:
        """Weigh a process by its images, since processes are averaged and the last batch may be uneven."""
        _, world = self.engine.shard
        if world == 1:
            return 1.0
        first = self.state.step * self.data.batch_size
        together = min(self.data.batch_size, len(self.data.split) - first)
        return len(batch.labels) * world / together

    def _count(self, losses: Losses, batch: Batch) -> None:
        images = len(batch.labels)
        values = torch.stack([losses.total.detach(), *losses.parts.values()]).double() * images
        correct = (losses.logits.argmax(1) == batch.labels).sum().double()
        self.sums += torch.cat([values, correct[None], correct.new_tensor([float(images)])])

    def _zeros(self) -> Tensor:
        # mps has no float64
        dtype = torch.float32 if self.engine.device.type == "mps" else torch.float64
        return torch.zeros(len(self.names) + 3, dtype=dtype, device=self.engine.device)

    def _global_step(self) -> int:
        return self.state.epoch * self.data.steps + self.state.step

    def _look_around(self, now: float) -> None:
        due = self.path is not None and now - self._written >= self.every
        stop = self.stop()
        if due or stop or self.state.step % _CHECK_EVERY == 0:
            self._refuse_nan()
        if due or stop:
            self._write()
        if stop:
            raise Interrupted
        if now - self._shown >= _PROGRESS_SECONDS:
            self._shown = now
            self.progress(self.task, done=self._global_step(), total=self.total_steps, note=self._note())

    def _note(self) -> str:
        epoch = min(self.state.epoch + 1, self.config.epochs)
        last = f", val {self.state.history[-1]['val_accuracy']:.1%}" if self.state.history else ""
        return f"epoch {epoch}/{self.config.epochs}{last}"

    def _refuse_nan(self) -> None:
        if math.isfinite(float(self.sums[0])):
            return
        kept = f" The last good state is kept in {self.path}." if self.path and self.path.exists() else ""
        raise TrainingError(
            f"The loss of {self.task} is not a number (epoch {self.state.epoch + 1}, at step {self.state.step}).{kept}"
            f" Try a lower learning rate (--lr {self.config.lr / 10:g}), --clip-norm 1, or --precision fp32."
        )

    def _close_epoch(self) -> None:
        self._refuse_nan()
        start = time.monotonic()
        accuracy, nll = self._judge()
        state = self.state
        state.epoch_seconds += time.monotonic() - start
        state.history.append(self._row(accuracy, nll).model_dump())
        if (accuracy, -nll) > state.best_score:
            state.best_score, state.best_epoch = (accuracy, -nll), state.epoch + 1
            self.best = _copy(self.student)
        state.seconds += state.epoch_seconds
        state.epoch, state.step, state.epoch_seconds = state.epoch + 1, 0, 0.0
        self.sums = self._zeros()
        self.progress(self.task, done=self._global_step(), total=self.total_steps, note=self._note())
        if state.epoch == self.config.epochs or time.monotonic() - self._written >= self.every:
            self._write()

    def _judge(self) -> tuple[float, float]:
        """Return accuracy and NLL on the validation split."""
        logits = torch.from_numpy(answers(self.student, self.val, numerics=self.numerics))
        labels = self.val.labels
        nll = float(F.cross_entropy(logits.double(), labels))
        if not math.isfinite(nll):
            raise TrainingError(
                f"The answers of {self.task} are not numbers after epoch {self.state.epoch + 1}. "
                f"Try a lower learning rate (--lr {self.config.lr / 10:g}) or --precision fp32."
            )
        return float((logits.argmax(1) == labels).double().mean()), nll

    def _row(self, accuracy: float, nll: float) -> Epoch:
        total, *parts, correct, images = (float(value) for value in self.sums)
        return Epoch(
            epoch=self.state.epoch + 1,
            lr=learning_rate(self._global_step() - 1, self.total_steps, self.config),
            train_loss=total / images,
            parts={name: part / images for name, part in zip(self.names, parts, strict=True)},
            train_accuracy=correct / images,
            val_accuracy=accuracy,
            val_nll=nll,
            seconds=self.state.epoch_seconds,
        )

    def _write(self) -> None:
        if self.path is None or not self.engine.is_main:
            return
        tensors = (
            checkpoint.with_prefix("student.", dict(self.student.state_dict()))
            | checkpoint.with_prefix("best.", self.best)
            | checkpoint.with_prefix("optimizer.", checkpoint.flatten_optimizer(self.optimizer))
            | {"sums": self.sums, "rng": torch.get_rng_state()}
        )
        if self.engine.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.engine.device)
        checkpoint.save(self.path, tensors, {**vars(self.state), "numerics": str(self.numerics)})
        self._written = time.monotonic()

    def _restore(self) -> None:
        found = checkpoint.load(self.path) if self.path else None
        if found is None:
            return
        tensors, state = found
        if state.pop("numerics") != str(self.numerics):
            return  # another precision would not give the same weights: start again
        self.state = State(**{**state, "best_score": tuple(state["best_score"])})
        self.student.load_state_dict(checkpoint.under_prefix("student.", tensors))
        self.best = checkpoint.under_prefix("best.", tensors)
        checkpoint.restore_optimizer(self.optimizer, checkpoint.under_prefix("optimizer.", tensors))
        self.sums = tensors["sums"].to(self.engine.device)
        torch.set_rng_state(tensors["rng"])
        if "rng.cuda" in tensors and self.engine.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.engine.device)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Return the rate of step `step` of `total`: a linear rise to `config.lr`, then half a cosine down to zero."""
    rise = config.warmup * total
    if step < rise:
        return config.lr * (step + 1) / (math.ceil(rise) + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


def answers(network: nn.Module, split: Split, *, numerics: Numerics | None = None) -> np.ndarray:
    """Return the logits of a network on the unchanged views of a split, float32 [images, classes], in order.

    Always float32 arithmetic; the network's mode is restored.
    """
    layout = (numerics or Numerics()).layout
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            parts = [network(layout(images)).float().cpu() for images in split.whole(_EVALUATION_BATCH)]
    finally:
        network.train(training)
    return np.asarray(torch.cat(parts).numpy())


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _optimizer(student: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    # decay pulls weights of layers to zero; for biases and the scales of normalisation that does harm
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, fused=fused)
