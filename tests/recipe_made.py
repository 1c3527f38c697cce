"""A recipe of tiny parts, for the tests of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from small_runs import values

PARTS: list[dict[str, Any]] = [
    {"name": "teacher", "kind": "train", "settings": {"teacher": {"epochs": 3}}},
    {
        "name": "published",
        "role": "published",
        "taught_by": "teacher",
        "says": "The loss as published.",
        "settings": {"distill": {"temperature": 10, "ce_weight": 0.1, "kd_weight": 0.9}},
    },
    {
        "name": "ours",
        "role": "ours",
        "taught_by": "teacher",
        "settings": {"sweep": {"alpha": [0.25, 0.5, 0.75], "temperature": [2, 4], "workers": 1}},
    },
]
DEVICE = {"name": "device", "of": "ours", "compress": {"int8": "ptq"}, "export": ["onnx"]}


def raw(source: Path | str = "digits", **over: Any) -> dict[str, Any]:
    settings = values(source, train={"epochs": 1})
    given: dict[str, Any] = {
        "name": "stripes",
        "title": "Stripes | of <two> kinds",
        "source": "Somebody, somewhere, 2020",
        "models": "small to small",
        "reference": {"teacher": 0.976, "distilled": 0.9, "measured_on": "validation", "says": "One seed."},
        "settings": settings,
        "parts": PARTS,
        "smoke": {"train": {"batch_size": 40}, "seeds": 1},
    }
    return {**given, **over}


def written(folder: Path, **over: Any) -> Path:
    path = folder / "stripes.yaml"
    path.write_text(yaml.safe_dump(raw(**over), sort_keys=False))
    return path
