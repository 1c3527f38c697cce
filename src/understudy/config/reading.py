"""From YAML, options and words to a checked `RunConfig`, or to one sentence. Used inside `config` only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from understudy.config.compress import CompressConfig
from understudy.config.objective import DistillConfig, weights_of
from understudy.config.run import RunConfig
from understudy.errors import ConfigError, near


def load(file: Path | None = None, given: Mapping[str, Any] | None = None, words: Iterable[str] = ()) -> RunConfig:
    """Read a configuration from a YAML file, then options that were given, then `section.key=value` words.

    Args:
        file: YAML; nothing where None.
        given: nested values that replace the file's; a None is passed over.
        words: such as `"distill.temperature=4"`; the value is read as YAML, and null means the default again.

    Raises:
        ConfigError: unreadable YAML, an unknown key (the nearest known one is named), or a value out of range.
    """
    values: dict[str, Any] = {}
    merge(values, read_yaml(file) if file else {})
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
        raise ConfigError(one_sentence(error)) from None


def compression(given: Mapping[str, Any]) -> CompressConfig:
    """Turn values into a `CompressConfig`; a None is passed over.

    Raises:
        ConfigError: as for `load`.
    """
    try:
        return CompressConfig.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(one_sentence(error, CompressConfig)) from None


def read_yaml(file: Path) -> dict[str, Any]:
    """Read nested values from a YAML file.

    Raises:
        ConfigError: a file that cannot be read, or holds no settings.
    """
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(read, dict):
            merge({}, read)  # a value that holds itself is told here
    except OSError as error:
        raise ConfigError(f"The configuration {file} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError for a date such as 2024-13-45
        raise ConfigError(f"The configuration {file} is not valid YAML: {_first_line(error)}.") from None
    if not isinstance(read, dict):
        raise ConfigError(f"The configuration {file} holds no settings; it should start like 'data:'.")
    return read


def _first_line(error: Exception) -> str:
    """Return what is wrong, and where it stands."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).splitlines()[0]
    return f"{getattr(error, 'problem', None) or 'it breaks off'} (line {mark.line + 1}, column {mark.column + 1})"


def _without_alpha(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Spell alpha out as the weights it stands for, so that a later layer's alpha or weights replace them."""
    section = layer.get("distill")
    if not isinstance(section, Mapping):
        return layer
    given = {key: value for key, value in section.items() if value is not None}
    if "alpha" not in given or given.keys() & {"ce_weight", "kd_weight"}:
        return layer
    try:
        weights = weights_of(given.pop("alpha"))
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


def one_sentence(error: ValidationError, root: type[BaseModel] = RunConfig) -> str:
    """Say what is wrong with values for `root`: the first mistake, with the nearest known name of an unknown one."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part not in ("number", "schedule")]
    where = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        known = _fields_at(place[:-1], root)
        key = str(place[-1])
        hint = near(key, known) or " Known here: " + ", ".join(known) + "."
        return f"Unknown setting '{where}'.{hint}"
    if first["type"] == "model_type":
        known = _fields_at(place, root)
        return f"Setting '{where}' is a section of settings ({', '.join(known)}), not {first['input']!r}."
    message = first["msg"].removeprefix("Value error, ")
    if not where and root is not RunConfig:
        return f"{message[:1].upper()}{message[1:]}."
    value = "" if isinstance(first["input"], Mapping) else f" (given: {first['input']!r})"
    return f"Setting '{where or 'run'}': {message[:1].lower()}{message[1:]}{value}."


def _fields_at(path: list[int | str], root: type[BaseModel]) -> list[str]:
    section = root
    for part in path:
        if isinstance(part, int):
            continue
        annotation: Any = section.model_fields[str(part)].annotation
        options = getattr(annotation, "__args__", (annotation,))
        section = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    sugar = ["alpha"] if section is DistillConfig else []
    return [*section.model_fields, *sugar]
