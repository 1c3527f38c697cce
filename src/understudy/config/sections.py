"""Images, budget, teacher and student: the plain sections of a configuration. Used inside `config` only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which images, and how they are kept."""

    source: str
    """A folder of images, or one of digits, mnist, fashion_mnist, cifar10, cifar100, pets, cats_dogs."""
    data_dir: Path | None = None
    """Where torchvision's data sets lie."""
    download: bool = False
    """Let torchvision download a data set that `data_dir` lacks."""
    image_size: PositiveInt | None = None
    """Side in pixels of the square that the student sees; by default the data's own size, at most 224."""
    channels: Literal["auto", "grey", "colour"] = "auto"
    fit: Literal["crop", "squash"] = "crop"
    """Resize the shorter side and cut the middle square out, or squeeze both sides to the square."""
    val_fraction: float = Field(0.15, gt=0, lt=0.5)
    """Share of the training images held out where there is no usable validation split."""
    test_fraction: float = Field(0.15, gt=0, lt=0.5)
    """Share of all images held out where there is no test split."""
    split_seed: Seed = 0
    max_bad_share: float = Field(0.05, ge=0, le=1)
    """Refuse the data when more than this share of the files cannot be read; fewer are skipped and listed."""
    store_budget: PositiveFloat | None = None
    """Gigabytes that the decoded images may take on the disk; beyond that they are decoded anew whenever they are
    used. By default as much as leaves 10 % of the disk free, or 5 GB where that is less."""
    train_share: float = Field(1.0, gt=0, le=1)
    """Share of the training images that are used, the same of every class, at least one; the others are left out."""
    label_share: float = Field(1.0, gt=0, le=1)
    """Share of these that keep their label, at least one of each class; the others teach without it."""
    drop_unlabelled: bool = False
    """Leave images without a label out altogether, for the comparison."""


class TrainConfig(Section):
    """The budget and the recipe of one training."""

    epochs: PositiveInt = 20
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW, which it reaches linearly."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate after warm-up: along a half cosine to zero, or as it is."""
    weight_decay: float = Field(1e-2, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of all steps in which the learning rate rises to its peak."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    clip_norm: PositiveFloat | None = None
    """Largest norm of the whole gradient; none by default."""
    augment: Literal["auto", "none", "light", "standard", "strong"] = "auto"
    """How far a training view may differ from its image; see `understudy.data.views`."""
    views: PositiveInt | Literal["online"] = 16
    """How many distinct views an image has, each seen by the teacher once for all trainings; `online`: another view in
    every epoch, the teacher running along."""
    running_statistics: bool = True
    """Let a network whose batch normalisation keeps no running statistics keep them, so that in evaluation and on the
    device an answer does not depend on the other images of a batch."""
    mix: Literal["none", "mixup", "cutmix"] = "none"
    mix_alpha: PositiveFloat = 1.0
    """The share of an image in a mixed one is drawn from Beta(mix_alpha, mix_alpha)."""

    @field_validator("views", mode="before")
    @classmethod
    def _number_or_online(cls, value: Any) -> Any:
        """Say in one sentence what is possible; of two types, each would have its own complaint."""
        number = str(value).isdecimal() and int(value) > 0
        if value != "online" and not number:
            raise ValueError("a number of views of at least 1, or 'online'")
        return int(value) if number else value


class MemberConfig(Section):
    """A further teacher of an ensemble; the budget is the first teacher's."""

    model: str
    share: PositiveFloat = 1.0
    """Of its probabilities in the mean, compared with the other teachers' shares."""
    ready: bool | None = None
    """The first teacher's by default, as for `pretrained`."""
    pretrained: bool | None = None
    weights: Path | None = None
    seed: Seed | None = None
    """The first teacher's plus 1, 2, ... by default."""

    @model_validator(mode="before")
    @classmethod
    def _model_alone(cls, values: Any) -> Any:
        """Accept a model's name for a section."""
        return {"model": values} if isinstance(values, str) else values


class TeacherConfig(Section):
    """The teacher: a name, a file, a run folder, a folder of transformers or `module:function`; trained first unless
    it is ready."""

    model: str = "resnet18"
    also: tuple[MemberConfig, ...] = ()
    """Further teachers: all of them together answer with the weighted mean of their probabilities."""
    share: PositiveFloat = 1.0
    """Of this teacher in that mean."""
    ready: bool = False
    """`module:function` returns a trained model, or the folder of transformers holds one for these classes: do not
    train it."""
    pretrained: bool = False
    """Fetch the library's pretrained weights over the network, then fine-tune."""
    weights: Path | None = None
    """Initial weights from a local file, then fine-tune; safetensors, or a pickle with `unsafe_pickle`."""
    epochs: PositiveInt | None = None
    """The teacher's own budget; the run's by default, as for the next two."""
    lr: PositiveFloat | None = None
    batch_size: PositiveInt | None = None
    seed: Seed = 0

    @property
    def members(self) -> tuple[TeacherConfig, ...]:
        """Every teacher by itself: one, or those of the ensemble."""
        others = (self._of(member, number) for number, member in enumerate(self.also, 1))
        return (self.model_copy(update={"also": ()}), *others)

    def _of(self, member: MemberConfig, number: int) -> TeacherConfig:
        own = {name: value for name, value in dict(member).items() if value is not None}
        return self.model_copy(update={"also": (), "weights": None, "seed": self.seed + number, **own})


class StudentConfig(Section):
    """The student: a name, a folder of transformers, or `module:function`."""

    model: str = "cnn3"
