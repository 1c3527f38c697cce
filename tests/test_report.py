"""The report, without a browser: the final table, the terminal, the page, and records with parts missing."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from report_page import HOSTILE, NAN, Page, hostile_record, ten
from sample_record import TWO, interrupted_record, sample_record, train_record
from understudy import record as records
from understudy import report
from understudy.record import Record
from understudy.report.screen import plain

__all__ = ["ten"]  # a fixture


@pytest.fixture(scope="module")
def two() -> Record:
    return sample_record(classes=TWO)


@pytest.fixture(scope="module")
def hostile() -> Record:
    return hostile_record()


# The final table


def test_the_fixture_survives_saving_and_loading(ten: Record, tmp_path: Path) -> None:
    records.save(ten, tmp_path)
    assert records.load(tmp_path) == ten


def test_final_table_has_every_role_and_divides_by_the_model(ten: Record) -> None:
    teacher, baseline, student = report.final_table(ten)
    assert [row.role for row in (teacher, baseline, student)] == ["teacher", "baseline", "student"]
    assert teacher.ratios is None
    assert student.ratios is not None
    assert student.ratios.parameters == pytest.approx(11_181_642 / 277_034)
    assert student.ratios.bytes == pytest.approx(44_780_112 / 1_112_904)
    assert student.ratios.latency == pytest.approx(5.91 / 0.288)
    assert student.accuracy == ten.summary["student"].accuracy
    assert (student.seeds, baseline.latency_p95, student.sensitivity) == (3, 0.331, None)


def test_of_two_networks_that_do_the_same_work_none_is_faster(ten: Record) -> None:
    quicker = ten.summary["student"].profile.latency
    same = ten.summary["teacher"].profile.model_copy(update={"latency": quicker})
    summary = {**ten.summary, "student": ten.summary["student"].model_copy(update={"profile": same})}
    teacher, _, student = report.final_table(ten.model_copy(update={"summary": summary}))
    assert student.latency_p50 != teacher.latency_p50
    assert student.ratios is not None
    assert student.ratios.latency == 1


def test_two_classes_show_sensitivity_and_ten_do_not(ten: Record, two: Record) -> None:
    assert "Sensitivity" in report.render(two)
    assert "AUROC" in report.render(two)
    assert "Sensitivity" not in report.render(ten)


def test_a_model_that_costs_nothing_has_no_ratio(ten: Record) -> None:
    free = ten.summary["student"].profile.model_copy(update={"macs": 0})
    summary = {**ten.summary, "student": ten.summary["student"].model_copy(update={"profile": free})}
    student = report.final_table(ten.model_copy(update={"summary": summary}))[-1]
    assert student.ratios is not None
    assert student.ratios.macs is None


def test_training_alone_has_one_row_and_no_student_words() -> None:
    page = report.render(train_record())
    assert [row.role for row in report.final_table(train_record())] == ["teacher"]
    assert "of 600\u00a0test images correctly" in page
    assert "Agrees with teacher" not in page
    assert "distilled" not in Page(page).text


# The terminal


def shown(record: Record, width: int = 80, **options: Any) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(report.terminal(record, **options))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("classes", [TWO, ["one", "two", "three"]])
def test_terminal_fits_80_columns_without_cutting(classes: list[str]) -> None:
    record = sample_record(classes=classes, images=90, epochs=3)
    text = shown(record, report=Path("runs/sample/report.html"))
    assert record.verdict is not None
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    words = " ".join(text.split())
    for part in (
        record.verdict.outcome,
        record.verdict.text,
        "×40 smaller",
        "11.2 M",
        "cat/broken_017.jpg (truncated)",
    ):
        assert part in words.replace("\u00a0", " ")
    assert "export/student.onnx (1.13 MB)" in words
    assert "runs/sample/report.html" in words


def test_terminal_of_an_interrupted_run_lists_what_was_finished() -> None:
    text = shown(interrupted_record())
    assert "The run stopped before its end: The disk is full." in text
    assert re.search(r"baseline-2 +— +—", text)
    assert re.search(r"baseline-0 +7\d\.\d. %".replace(". %", ".%"), text)


def test_terminal_is_not_steered_by_names(hostile: Record) -> None:
    assert "\x1b" not in shown(hostile.model_copy(update={"failure": "\x1b[2J[red]", "status": "failed"}))
    assert plain("a\x1b[31m\u202eb\tc") == "a�[31m�b�c"


# The page


def test_page_is_balanced_and_stands_alone(ten: Record) -> None:
    page = Page(report.render(ten))
    assert not page.all("link")
    assert not page.all("iframe")
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "style", "xlink:href"):
            value = attributes.get(name)
            assert value is None or (tag == "img" and re.fullmatch(r"data:image/png;base64,[\w+/=]+", value))
    inside = "".join(page.raw["style"] + page.raw["script"])
    assert not re.search(r"https?:|url\(|@import|//\w|fetch|XMLHttp|import\(", inside.replace("// Redraws", ""))


def test_policy_allows_exactly_this_style_and_script(ten: Record) -> None:
    page = Page(report.render(ten))
    [policy] = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    data, script = page.raw["script"]
    assert policy is not None
    assert sorted(json.loads(data)[0]) == ["baseline", "student", "teacher"]
    for kind, text in (("script", script), ("style", page.raw["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    assert "Content-Security-Policy" in report.render(ten)[:200]


def test_sections_come_in_order(ten: Record) -> None:
    assert [title.strip() for title in Page(report.render(ten)).raw["h2"]] == [
        "BEATS",
        "Final table",
        "Before trusting these numbers",
        "Training",
        "Can its confidence be trusted?",
        "Which classes are confused?",
        "Recall per class",
        "What the teacher passes on",
        "Exported files",
        "Data",
        "What the student learned from",
        "How this came about",
    ]


def test_page_says_what_the_record_says(ten: Record) -> None:
    words = " ".join(" ".join(Page(report.render(ten)).text).split())
    assert ten.verdict is not None
    trained = ten.models["student-1"]
    for part in (
        ten.verdict.text,
        ten.verdict.method,
        trained.weights_hash,
        trained.initial,
        "2.14.1",
        "averaged over the batch: 8",
    ):
        assert part in words
    assert "0.5 × cross-entropy(labels) + 0.5 × 4² × KL(teacher ‖ student; T = 4)" in words
    assert "train/cat/a.png = test/cat/b.png" in words
    assert "source: photos" in words


@pytest.mark.parametrize("outcome", ["BEATS", "NO GAIN", "INCONCLUSIVE"])
def test_every_outcome_has_its_own_look(ten: Record, outcome: str) -> None:
    assert ten.verdict is not None
    verdict = ten.verdict.model_copy(update={"outcome": outcome})
    page = Page(report.render(ten.model_copy(update={"verdict": verdict})))
    assert page.raw["h2"][0].strip() == outcome
    first = page.all("section")[0]
    assert first["class"] == f"verdict {outcome.lower().replace(' ', '-')}"


def test_drawings_have_names(ten: Record) -> None:
    drawings = [one for one in Page(report.render(ten)).all("svg") if one.get("aria-hidden") != "true"]
    assert len(drawings) == 1 + 4 + 3 + 10
    assert all(one["role"] == "img" and one["aria-label"] for one in drawings)


def test_write_writes_what_render_returns(ten: Record, tmp_path: Path) -> None:
    report.write(ten, tmp_path / "deep" / "report.html")
    assert (tmp_path / "deep" / "report.html").read_text(encoding="utf-8") == report.render(ten)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_hostile_texts_stay_text(hostile: Record) -> None:
    page = Page(report.render(hostile))
    assert len(page.all("script")) == 2
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.all("img"))
    assert len(page.all("img")) == len(hostile.examples) - 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert sum(HOSTILE in text for text in page.text) > 30
    assert page.raw["title"][0] == f"{HOSTILE} · understudy"


# Parts that are missing

EMPTY = Record(name="", created="2026-03-01T10:20:30+00:00", config={})


@pytest.mark.parametrize("field", [name for name, info in Record.model_fields.items() if not info.is_required()])
def test_any_part_may_be_missing(ten: Record, field: str) -> None:
    default = Record.model_fields[field].get_default(call_default_factory=True)
    without = ten.model_copy(update={field: default})
    assert "<footer>" in report.render(without)
    assert Page(report.render(without)).raw["h2"]
    assert shown(without)


def test_a_run_that_has_only_begun_has_a_page_and_no_script() -> None:
    page = Page(report.render(EMPTY))
    assert page.raw["h2"][0] == "No verdict yet"
    assert not page.all("script")
    assert not any("—" in text for text in page.raw["title"])
    assert "has not ended" in shown(EMPTY)


def test_a_role_without_summary_shows_dashes(ten: Record) -> None:
    partial = ten.model_copy(update={"summary": {"teacher": ten.summary["teacher"]}, "verdict": None})
    cells = re.findall(r'<td class="(\w+)">([^<]*)', report.render(partial))
    assert {text for role, text in cells if role == "student"} == {"—"}
    assert "—" not in {text for role, text in cells if role == "teacher"} - {"—"}


def test_an_interrupted_run_shows_its_curves_and_models() -> None:
    page = report.render(interrupted_record())
    assert "The disk is full." in page
    assert "Finished so far" in page
    assert page.count("<polyline") >= 2
    assert "<article" not in page


def test_nan_is_shown_as_a_dash_and_never_as_a_word(ten: Record) -> None:
    nothing = {"accuracy": NAN, "macro_f1": NAN, "nll": NAN, "ece": NAN, "recall": {"cat": NAN}}
    rotten = {
        name: model.model_copy(
            update={
                "test": model.test and model.test.model_copy(update=nothing),
                "val": None,
                "epochs": [
                    row.model_copy(update={"val_accuracy": NAN, "train_loss": math.inf}) for row in model.epochs[:3]
                ],
            }
        )
        for name, model in ten.models.items()
    }
    assert ten.verdict is not None
    gap = ten.verdict.gain.model_copy(update={"value": NAN, "low": NAN, "high": math.inf})
    verdict = ten.verdict.model_copy(update={"gain": gap, "per_seed": {"0": NAN, "1": 0.01}, "gap_closed": NAN})
    example = ten.examples[0].model_copy(update={"teacher_logits": [NAN] * 10})
    changed = {"models": rotten, "verdict": verdict, "examples": [example, *ten.examples[1:]]}
    text = report.render(ten.model_copy(update=changed))
    words = re.sub(r"<style>.*?</style>|<script.*?</script>|data:[^\"]*", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf|infinity)\b", words, re.IGNORECASE)
    assert text.count('<article class="card">') == len(ten.examples) - 1
    assert shown(ten.model_copy(update=changed))


@pytest.mark.slow
def test_a_thousand_classes_stay_readable() -> None:
    record = sample_record(classes=[f"class {number:04d}" for number in range(1000)], images=60, seeds=(0,), epochs=2)
    text = report.render(record)
    page = Page(text)
    assert len(text) < 600_000
    assert text.count("Of 1,000 classes, the 20 most often confused are shown.") == 2
    assert [one["class"] for one in page.all("table")].count("confusion") == 3
    assert text.count('<tr><th scope="row"') < 150
    assert "994 others" in text
    assert "980 more classes" in text


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from sample_record import sample_record; from understudy import report\n"
        "report.render(sample_record(images=40, epochs=2)); report.terminal(sample_record(images=40, epochs=2))\n"
        "print(*sorted({'torch', 'numpy', 'sklearn', 'jinja2', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    path = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=path, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
