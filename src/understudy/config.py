"""What a user may say about a run, validated once, at the edge. Any part above the mathematics may import this file.

`RunConfig` is the whole of it; `load` reads YAML and `--set` words into one. An unknown key is an error that names
the nearest known one. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from understudy.errors import ConfigError, near

Seed = Annotated[int, Field(ge=0, lt=2**63)]
_MOST_SEEDS = 1000


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which images, and how they are kept."""

    source: str
    """A folder of images, or one of digits, mnist, fashion_mnist, cifar10, cifar100, pets."""
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


class TrainConfig(Section):
    """The budget and the recipe of one training."""

    epochs: PositiveInt = 20
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW; it warms up linearly, then falls along a half cosine to zero."""
    weight_decay: float = Field(1e-2, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of all steps in which the learning rate rises to its peak."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    clip_norm: PositiveFloat | None = None
    """Largest norm of the whole gradient; none by default."""
    augment: Literal["auto", "none", "light", "standard"] = "auto"
    """How far a training view may differ from its image; see `understudy.data.views`."""
    views: PositiveInt | Literal["online"] = 16
    """How many distinct views an image has, each seen by the teacher once for all trainings; `online`: another view in
    every epoch, the teacher running along."""
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


class TeacherConfig(Section):
    """The teacher: a name, a file, a run folder or `module:function`; trained first unless it is ready."""

    model: str = "resnet18"
    ready: bool = False
    """`module:function` returns a trained model: do not train it."""
    pretrained: bool = False
    """Fetch the library's pretrained weights over the network, then fine-tune."""
    weights: Path | None = None
    """Initial weights from a local file, then fine-tune; safetensors, or a pickle with `unsafe_pickle`."""
    epochs: PositiveInt | None = None
    """The teacher's own budget; the run's by default, as for the next two."""
    lr: PositiveFloat | None = None
    batch_size: PositiveInt | None = None
    seed: Seed = 0


class StudentConfig(Section):
    """The student: a name or `module:function`."""

    model: str = "cnn3"


class DistillConfig(Section):
    """The distillation objective: `ce_weight` x cross-entropy + `kd_weight` x T^2 x KL(teacher || student)."""

    method: str = "kd"
    temperature: PositiveFloat = 4.0
    ce_weight: float = Field(0.5, ge=0)
    kd_weight: float = Field(0.5, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _alpha_is_sugar(cls, values: Any) -> Any:
        """Accept `alpha=a` for `ce_weight=1-a, kd_weight=a`."""
        if not isinstance(values, Mapping):
            return values
        rest = {key: value for key, value in values.items() if key != "alpha"}
        alpha = values.get("alpha")
        if alpha is None:
            return rest
        if rest.keys() & {"ce_weight", "kd_weight"}:
            raise ValueError("say either alpha or ce_weight and kd_weight, not both")
        return {**rest, **_weights_of(alpha)}

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistillConfig:
        if self.ce_weight == 0 and self.kd_weight == 0:
            raise ValueError("ce_weight and kd_weight are both 0, so there is nothing to learn from")
        return self


def _weights_of(alpha: Any) -> dict[str, float]:
    try:
        share = float(alpha)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"alpha is the share of the distillation term, between 0 and 1, not {alpha!r}")
    return {"ce_weight": 1 - share, "kd_weight": share}


Share = Annotated[float, Field(ge=0, le=1)]


class SweepConfig(Section):
    """Many cells instead of one objective: what to vary, and how to spread the trials.

    A setting that is not varied keeps the value that the rest of the configuration gives it. Where nothing is named,
    alpha and temperature are varied.
    """

    alpha: tuple[Share, ...] = ()
    """Shares of the distillation term; 0 is the student trained alone."""
    temperature: tuple[PositiveFloat, ...] = ()
    method: tuple[str, ...] = ()
    lr: tuple[PositiveFloat, ...] = ()
    student: tuple[str, ...] = ()
    trials: PositiveInt | None = None
    """Search this many cells between the smallest and the largest values with Optuna, instead of all combinations."""
    search_seed: Seed = 0
    workers: PositiveInt | None = None
    """Trials at a time on this machine; one for each core by default, one on a GPU."""
    ray: str | None = None
    """Address of a Ray cluster that carries out the trials; "local" starts one on this machine."""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        """Accept a single value for a list of one; vary alpha and temperature where nothing is named."""
        if not isinstance(values, Mapping):
            return values
        given = {
            key: (value,) if key in VARIED and isinstance(value, str | int | float) else value
            for key, value in values.items()
        }
        return given if any(given.get(key) for key in VARIED) else {**given, **_SWEPT}


VARIED = ("alpha", "temperature", "method", "lr", "student")
_SWEPT = {"alpha": (0.0, 0.25, 0.5, 0.75, 1.0), "temperature": (1.0, 2.0, 4.0, 8.0, 16.0)}


class RunConfig(Section):
    """A whole run."""

    name: str = Field("", pattern=r"^([\w-][\w.-]*)?$")
    data: DataConfig
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    train: TrainConfig = TrainConfig()
    distill: DistillConfig = DistillConfig()
    sweep: SweepConfig | None = None
    """Search for the best objective before it is judged."""
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    min_gain: float = Field(0.005, ge=0, lt=1)
    """Smallest gain in accuracy worth having, as a share; the verdict NO GAIN rests on it."""
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: PositiveInt | None = None
    """CPU threads of torch; all cores by default."""
    checkpoint_seconds: float = Field(30.0, ge=0)
    """Write a checkpoint when this much time has passed since the last one."""
    force: bool = False
    """Go on although the gate refuses the teacher."""
    unsafe_pickle: bool = False
    """Allow weights in pickle files, which can run any code when loaded."""

    @model_validator(mode="before")
    @classmethod
    def _number_of_seeds(cls, values: Any) -> Any:
        """Accept a number n of seeds for 0 .. n-1."""
        seeds = values.get("seeds") if isinstance(values, Mapping) else None
        if not isinstance(seeds, int):
            return values
        if isinstance(seeds, bool) or not 1 <= seeds <= _MOST_SEEDS:
            raise ValueError(f"'seeds' is a list, or a number of seeds from 1 to {_MOST_SEEDS}, not {seeds}")
        return {**values, "seeds": tuple(range(seeds))}

    @model_validator(mode="after")
    def _distinct_seeds(self) -> RunConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("the same seed stands twice in seeds")
        return self

    @property
    def temperatures(self) -> tuple[float, ...]:
        """All temperatures that students are taught with."""
        return (self.distill.temperature, *(self.sweep.temperature if self.sweep else ()))

    @property
    def teacher_train(self) -> TrainConfig:
        """The teacher's budget and recipe: its views are always fresh, and never mixed."""
        own = {key: getattr(self.teacher, key) for key in ("epochs", "lr", "batch_size")}
        given = {key: value for key, value in own.items() if value is not None}
        return self.train.model_copy(update={"views": "online", "mix": "none", **given})


def load(file: Path | None = None, given: Mapping[str, Any] | None = None, words: Iterable[str] = ()) -> RunConfig:
    """Read a configuration from a YAML file, then options that were given, then `section.key=value` words.

    Args:
        file: YAML; nothing where None.
        given: nested values that replace the file's; a None is passed over.
        words: such as `"distill.temperature=4"`; the value is read as YAML, and null means the default again.

    Raises:
        ConfigError: unreadable YAML, an unknown key (the nearest known one is named), or a value out of range.
    """
    values: dict[str, Any] = _read(file) if file else {}
    merge(values, given or {})
    for word in words:
        merge(values, _parse_word(word), null_resets=True)
    return validate(values)


def validate(values: Mapping[str, Any]) -> RunConfig:
    """Turn nested values into a `RunConfig`.

    Raises:
        ConfigError: as for `load`.
    """
    data = values.get("data")
    if data is None or (isinstance(data, Mapping) and not data.get("source")):
        raise ConfigError(
            "No data given. Name a folder of images, or one of digits, mnist, cifar10, ... "
            "(data.source in a config file)."
        )
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_sentence(error)) from None


def _read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(read, dict):
            merge(values, read)
    except OSError as error:
        raise ConfigError(f"The configuration {file} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError for a date such as 2024-13-45
        first = str(error).splitlines()[0]
        raise ConfigError(f"The configuration {file} is not valid YAML: {first}.") from None
    if not isinstance(read, dict):
        raise ConfigError(f"The configuration {file} holds no settings; it should start like 'data:'.")
    return values


def _without_alpha(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Spell alpha out as the weights it stands for, so that a later layer's alpha or weights replace them."""
    section = layer.get("distill")
    if not isinstance(section, Mapping):
        return layer
    given = {key: value for key, value in section.items() if value is not None}
    if "alpha" not in given or given.keys() & {"ce_weight", "kd_weight"}:
        return layer
    try:
        weights = _weights_of(given.pop("alpha"))
    except ValueError:  # validation says what is wrong
        return layer
    return {**layer, "distill": {**given, **weights}}


def merge(values: dict[str, Any], over: Mapping[str, Any], *, null_resets: bool = False) -> None:
    """Put nested values over others, in place; alpha replaces the weights below, and they an alpha below.

    A None is passed over; with `null_resets`, it takes away the value below, so that the default holds again.
    """
    _put_over(values, _without_alpha(over), null_resets=null_resets)


def _put_over(values: dict[str, Any], over: Mapping[str, Any], *, null_resets: bool) -> None:
    for key, value in over.items():
        if value is None:
            if null_resets:
                values.pop(key, None)
            continue
        if isinstance(value, Mapping):
            inner = values.get(key, {})
            if not isinstance(inner, Mapping):
                raise ConfigError(f"Setting '{key}' is a section of settings ({', '.join(value)}), not {inner!r}.")
            values[key] = inner = dict(inner)
            _put_over(inner, value, null_resets=null_resets)
        else:
            values[key] = value


def _parse_word(word: str) -> dict[str, Any]:
    path, equals, text = word.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set takes section.key=value, such as distill.temperature=4, not '{word}'.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


def _one_sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1])
        key = str(first["loc"][-1])
        hint = near(key, known) or " Known here: " + ", ".join(known) + "."
        return f"Unknown setting '{where}'.{hint}"
    if first["type"] == "model_type":
        known = _fields_at(first["loc"])
        return f"Setting '{where}' is a section of settings ({', '.join(known)}), not {first['input']!r}."
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], Mapping) else f" (given: {first['input']!r})"
    return f"Setting '{where or 'run'}': {message[:1].lower()}{message[1:]}{value}."


def _fields_at(path: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for part in path:
        annotation: Any = section.model_fields[str(part)].annotation
        options = getattr(annotation, "__args__", (annotation,))
        section = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    sugar = ["alpha"] if section is DistillConfig else []
    return [*section.model_fields, *sugar]
