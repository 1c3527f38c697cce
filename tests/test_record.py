"""The record: what is saved is read back, and a file that is no record of ours is told in one sentence."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from understudy import record as records
from understudy.errors import RunError
from understudy.record import Epoch, InputSpec, Metrics, ModelCard, Record, Stage, Trained


def _metrics(accuracy: float) -> Metrics:
    return Metrics(
        images=3,
        accuracy=accuracy,
        recall={"cat": 1.0, "dog": None},
        macro_f1=0.1 + 0.2,
        nll=1e-300,
        brier=0.0,
        ece=1 / 3,
        confusion=[[1, 2], [0, 0]],
        reliability=[records.Bin(low=0, high=0.1, count=0, confidence=None, accuracy=None)],
    )


def _record(**values: Any) -> Record:
    epoch = Epoch(epoch=1, lr=1e-3, train_loss=0.7, parts={"ce": 0.7}, val_accuracy=0.5, val_nll=0.6, seconds=1.25)
    teacher = Trained(
        role="teacher",
        seed=None,
        architecture="resnet18",
        weights="teacher/model.safetensors",
        weights_hash="0" * 32,
        epochs=[epoch],
        val=_metrics(2 / 3),
    )
    given = {
        "name": "größe",
        "created": records.now(),
        "config": {"data": {"source": "digits"}, "seeds": [0, 1]},
        "models": {"teacher": teacher},
        "stages": {"teacher": Stage(inputs="00ff", seconds=2.0, finished=records.now())},
    }
    return Record.model_validate({**given, **values})


def _change(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values))


def _refused(run: Path) -> str:
    with pytest.raises(RunError) as told:
        records.load(run)
    text = str(told.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    record = _record()
    records.save(record, tmp_path)
    assert records.load(tmp_path) == record
    assert records.load(tmp_path / "record.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    st.dictionaries(st.text(), st.none() | st.floats(0, 1), max_size=4),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_every_number_and_every_name_survives(
    tmp_path: Path, number: float, text: str, recall: dict[str, float | None]
) -> None:
    metrics = _metrics(0.5).model_copy(update={"nll": number, "recall": recall})
    record = _record(name=text, failure=text, seconds=number, models={})
    record.models[text] = Trained(
        role="student", seed=2**62, architecture=text, weights="w", weights_hash="h", test=metrics
    )
    records.save(record, tmp_path)
    assert records.load(tmp_path) == record


def test_a_save_replaces_the_old_record_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.save(_record(name="old"), tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(5, "disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk"):
            records.save(_record(name="new"), tmp_path)
    assert records.load(tmp_path).name == "old"
    records.save(_record(name="new"), tmp_path)
    assert records.load(tmp_path).name == "new"


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    records.save(_record(), tmp_path)
    text = (tmp_path / "record.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse)["format"] == "understudy-record/1"
    assert text.endswith("}\n")
    assert "größe" in text


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_is_refused_before_it_is_saved(number: float) -> None:
    # saved as null, it would make the run unreadable
    values = _metrics(0.5).model_dump() | {"nll": number}
    with pytest.raises(ValidationError, match="nll"):
        Metrics.model_validate(values)


def test_no_record(tmp_path: Path) -> None:
    expected = "{} is not a run folder: it holds no record.json."
    assert _refused(tmp_path) == expected.format(tmp_path)
    assert _refused(tmp_path / "none") == expected.format(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff\xfe", bytes(1000), b'{"name": "x"}'])
def test_damaged_records(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(content)
    text = _refused(tmp_path)
    assert text.startswith(f"{tmp_path / 'record.json'} is damaged or of another version (")
    assert "''" not in text


def test_a_record_cut_anywhere_is_told(tmp_path: Path) -> None:
    records.save(_record(), tmp_path)
    data = (tmp_path / "record.json").read_bytes()
    for length in range(0, len(data) - 2, 37):
        (tmp_path / "record.json").write_bytes(data[:length])
        assert "damaged" in _refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda values: values.update(format="understudy-record/2"), "at 'format': "),
        (lambda values: values.update(extra=1), "at 'extra': "),
        (lambda values: values.pop("created"), "at 'created': "),
        (lambda values: values["models"]["teacher"].update(role="pupil"), "at 'models.teacher.role': "),
        (lambda values: values["models"]["teacher"]["epochs"][0].pop("lr"), "at 'models.teacher.epochs.0.lr': "),
        (lambda values: values["stages"].update(teacher=None), "at 'stages.teacher': "),
    ],
)
def test_a_record_of_another_version_names_the_place(
    change: Callable[[dict[str, Any]], object], place: str, tmp_path: Path
) -> None:
    records.save(_record(), tmp_path)
    _change(tmp_path / "record.json", change)
    assert f"is damaged or of another version ({place}" in _refused(tmp_path)


def test_a_record_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "record.json").mkdir()
    assert _refused(tmp_path) == f"{tmp_path / 'record.json'} cannot be read: Is a directory."


def test_a_name_is_no_setting(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="latnecy"):
        Record.model_validate({**_record().model_dump(), "latnecy": 1})


def test_records_share_no_defaults() -> None:
    one, other = _record(), _record()
    one.gate.append(records.Finding(check="chance", ok=True, severity="warn", text="x"))
    one.stages["gate"] = Stage(inputs="", seconds=0, finished="")
    assert other.gate == []
    assert "gate" not in other.stages


def test_the_size_of_a_network_s_input_is_the_last_of_the_chain() -> None:
    spec = InputSpec(channels=1, sizes=(72, 64, 32), mean=(0.5,), std=(0.25,))
    assert spec.size == 32
    with pytest.raises(ValidationError, match="sizes"):
        InputSpec(channels=1, sizes=(), mean=(0.5,), std=(0.25,))
    with pytest.raises(ValidationError, match="channels"):
        InputSpec.model_validate({"channels": 2, "sizes": (8,), "mean": (0.5,), "std": (0.25,)})


def test_a_card_survives_json() -> None:
    spec = InputSpec(channels=3, sizes=(72, 64), fit="squash", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    card = ModelCard(architecture="cnn3", network_channels=3, classes=["ja", "nein"], input=spec, seed=3)
    assert ModelCard.model_validate_json(card.model_dump_json()) == card


def test_times_are_utc_to_the_second() -> None:
    moment = datetime.datetime.fromisoformat(records.now())
    assert moment.utcoffset() == datetime.timedelta(0)
    assert moment.microsecond == 0
    assert abs((datetime.datetime.now(datetime.UTC) - moment).total_seconds()) < 60
