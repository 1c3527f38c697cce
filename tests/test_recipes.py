"""Recipes carried out: parts in order, each a run; stopped and gone on with; one table of all; the command."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import small_runs
from recipe_made import DEVICE, PARTS, raw, written
from small_runs import stripes, weights, work_done
from understudy import cli, recipecommands, recipefigures, recipes
from understudy import record as records
from understudy.config.recipe import Recipe
from understudy.errors import Interrupted, RunError
from understudy.recipes import Order
from understudy.record.recipe import RecipeRecord, load_recipe_record, save_recipe
from understudy.report import recipes as report


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stripes(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def order(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Order:
    """A recipe that was carried out, without exports."""
    found = Order(Recipe.model_validate(raw(photos)), tmp_path_factory.mktemp("recipe") / "out", command="as told")
    with pytest.MonkeyPatch.context() as patch:
        small_runs.without_export(patch)
        recipes.run(found)
    return found


@pytest.fixture
def record(order: Order) -> RecipeRecord:
    return load_recipe_record(order.folder)


# What carrying one out leaves


def test_every_part_is_a_run_with_the_teacher_of_the_first(order: Order) -> None:
    runs = {part.name: records.load(order.folder / part.name) for part in order.parts}
    assert {name: (run.kind, run.status) for name, run in runs.items()} == {
        "teacher": ("train", "done"),
        "published": ("distill", "done"),
        "ours": ("distill", "done"),
    }
    taught = {weights(order.folder / name)["teacher"] for name in runs}
    assert len(taught) == 1
    assert (order.folder / "ours" / "report.html").is_file()


def test_the_record_repeats_what_the_runs_measured(order: Order, record: RecipeRecord) -> None:
    assert [part.status for part in record.parts] == ["done"] * 3
    for part in record.parts[1:]:
        run = records.load(order.folder / part.name)
        assert part.verdict == run.verdict
        assert part.objective == run.objective
        assert part.images == {"train": 80, "val": 50, "test": 40}
        assert part.seeds == list(small_runs.SEEDS)
        for role, figures in part.figures.items():
            own = [model for model in run.models.values() if model.role == role]
            assert figures.test is not None
            assert figures.val is not None
            assert figures.test.accuracy == run.summary[role].accuracy
            mean = sum(model.val.accuracy for model in own if model.val) / len(own)
            assert figures.val.accuracy.value == pytest.approx(mean)
            assert figures.val.accuracy.low <= mean <= figures.val.accuracy.high
            assert figures.val.sensitivity is not None
            assert figures.epochs == (3 if role == "teacher" else 1)
    assert record.parts[2].sweep == records.load(order.folder / "ours").sweep


def test_the_gap_is_closed_by_the_share_of_the_way(record: RecipeRecord) -> None:
    for part in record.parts[1:]:
        assert part.gap_closed is not None
        for split in ("test", "val"):
            scores = [getattr(part.figures[role], split).accuracy.value for role in ("teacher", "baseline", "student")]
            teacher, alone, distilled = scores
            found = getattr(part.gap_closed, split)
            if teacher - alone < 0.001:
                assert found is None
            else:
                assert found == pytest.approx((distilled - alone) / (teacher - alone))


def test_the_record_names_no_path(order: Order) -> None:
    for name in ("recipe.json", "recipe.md"):
        text = (order.folder / name).read_text()
        assert str(order.folder) not in text
        assert not [word for word in ("/tmp/", "/home/", str(Path.home()) + "/") if word in text]


def test_done_parts_are_not_done_again(order: Order, record: RecipeRecord) -> None:
    before = {part.name: work_done(records.load(order.folder / part.name)) for part in record.parts}
    again = recipes.run(dataclasses.replace(order, only=("ours",)))
    assert {part.name: work_done(records.load(order.folder / part.name)) for part in record.parts} == before
    assert [part.model_dump() for part in again.parts] == [part.model_dump() for part in record.parts]


def test_other_settings_over_what_was_done_are_refused_and_lose_nothing(order: Order, record: RecipeRecord) -> None:
    with pytest.raises(RunError, match="already holds another run"):
        recipes.run(dataclasses.replace(order, words=("train.lr=0.5",)))
    assert load_recipe_record(order.folder).parts == record.parts
    other = dataclasses.replace(order, recipe=order.recipe.model_copy(update={"name": "other"}))
    with pytest.raises(RunError, match="already holds the recipe 'stripes'"):
        recipes.run(other)
    with pytest.raises(RunError, match="is the folder of a run"):
        recipes.run(dataclasses.replace(order, folder=order.folder / "teacher"))


def test_a_stopped_recipe_goes_on_where_it_stopped(
    order: Order, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_runs.without_export(monkeypatch)
    mine = Order(Recipe.model_validate(raw(photos, parts=PARTS[:2])), tmp_path / "out")
    said: list[str] = []
    with pytest.raises(Interrupted):
        recipes.run(mine, say=said.append, stop=lambda: "Part 2 of 2: published" in said)
    stopped = load_recipe_record(mine.folder)
    assert [part.status for part in stopped.parts] == ["done", "failed"]
    assert stopped.parts[1].failure == "stopped before its end"
    before = work_done(records.load(mine.folder / "teacher"))
    gone_on = recipes.run(mine)
    assert [part.status for part in gone_on.parts] == ["done", "done"]
    assert work_done(records.load(mine.folder / "teacher")) == before
    assert gone_on.parts[0] == stopped.parts[0]
    assert weights(mine.folder / "published") == weights(order.folder / "published")


def test_a_recipe_without_parts_says_why_it_is_not_measured(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(raw(parts=[], unmeasured="no GPU here"))
    record = recipes.run(Order(recipe, tmp_path / "out"))
    assert record.parts == []
    assert report.page([record]).count("not measured here: no GPU here") == 2  # in both columns
    assert "90 %" in report.page([record])


def test_the_command_that_is_kept_has_no_path(tmp_path: Path) -> None:
    words = ["train.epochs=2", f"teacher.weights={tmp_path}/some.safetensors"]
    told = recipes.command(tmp_path / "mnist.yaml", smoke=True, data=str(tmp_path / "photos"), words=words)
    expected = "understudy run mnist.yaml --smoke --data photos --set train.epochs=2"
    assert told == f"{expected} --set teacher.weights=some.safetensors"
    assert recipes.command(Path("recipes/mnist.yaml")) == "understudy run recipes/mnist.yaml"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("In /home/me/runs/a is nothing.", "In a is nothing."),
        ("kd/dkd at 1/2, see https://example.org/a/b", "kd/dkd at 1/2, see https://example.org/a/b"),
        ("~/photos: 3 images", "photos: 3 images"),
    ],
)
def test_paths_are_cut_to_their_last_name(text: str, clean: str) -> None:
    assert recipefigures.without_paths(text) == clean


# The table


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")]


def test_the_page_has_a_row_for_each_recipe_and_every_row_every_column(record: RecipeRecord) -> None:
    other = RecipeRecord(name="other", title="Other", source="Nobody")
    page = report.page([record, other])
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("| ")]
    assert [cells(line)[0] for line in tables[0]] == ["Recipe", "---", "Stripes ¦ of &lt;two&gt; kinds", "Other"]
    for lines in tables:
        assert {len(cells(line)) for line in lines} == {len(cells(lines[0]))}, lines[0]
    row = dict(zip(cells(tables[0][0]), cells(tables[0][2]), strict=True))
    assert row["Published"] == "teacher 97.6 %<br>distilled 90 %<br>on validation"
    assert row["Seeds"] == "2"
    assert row["Epochs"] == "teacher 3, student 1"
    figures = record.parts[1].figures["student"].test
    assert figures is not None
    ends = figures.accuracy.low, figures.accuracy.high
    told = f"distilled {100 * figures.accuracy.value:.1f} % ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})"
    assert told in row["As published, here"]
    assert cells(tables[0][3])[3:5] == ["not measured here"] * 2


def test_a_section_tells_source_command_verdict_search_and_notes(record: RecipeRecord) -> None:
    text = report.markdown(record)
    chosen = next(cell for cell in record.parts[2].sweep.cells if cell.key == record.parts[2].sweep.chosen)  # type: ignore[union-attr]
    assert chosen.mean is not None
    for part in (
        "Somebody, somewhere, 2020",
        "One seed.",
        "```\nas told\n```",
        "The loss as published.",
        "80 training",
    ):
        assert part in text
    assert f"**{100 * chosen.mean.value:.1f} %**" in text
    assert "| alpha | T 2 | T 4 |" in text
    assert "labels x 0.1 + kd x 0.9, T 10; effective weight 90" in text
    assert text.count("Sensitivity") == 1
    for done in record.parts[1:]:
        assert done.verdict is not None
        assert done.verdict.outcome in text
    assert "Compressed" not in text
    assert "Exported" not in text


def test_what_is_not_finished_is_said_and_not_shown_as_a_figure(record: RecipeRecord) -> None:
    part = record.parts[2].model_copy(update={"status": "failed", "failure": "a <b> | c"})
    text = report.markdown(record.model_copy(update={"parts": [*record.parts[:2], part]}))
    assert "`ours` (our best) is not finished: a &lt;b&gt; \\| c" in text
    assert "| alpha |" not in text


def test_a_student_that_needs_no_teacher_is_said_to(record: RecipeRecord) -> None:
    part = record.parts[1]
    assert part.gap_closed is not None
    shown = part.model_copy(update={"gap_closed": part.gap_closed.model_copy(update={"test": None})})
    text = report.markdown(record.model_copy(update={"parts": [shown]}))
    assert "gap closed: none: the student alone is at or above its teacher" in text


def test_a_record_is_read_as_it_was_written(record: RecipeRecord, tmp_path: Path) -> None:
    save_recipe(record, tmp_path)
    assert load_recipe_record(tmp_path) == load_recipe_record(tmp_path / "recipe.json") == record
    (tmp_path / "recipe.json").write_text('{"name": 3}')
    with pytest.raises(RunError, match=r"no record of a recipe, or damaged \(at 'name'"):
        load_recipe_record(tmp_path)
    with pytest.raises(RunError, match="cannot be read"):
        load_recipe_record(tmp_path / "none.json")


# The command

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Call]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["understudy", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    yield run
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_the_command_carries_a_recipe_out(
    call: Call, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_runs.without_export(monkeypatch)
    recipe = written(tmp_path)
    code, out, err = call("run", recipe, "--smoke", "--data", photos, "--only", "published", "--set", "threads=1")
    assert (code, err) == (0, "")
    assert "cut down to show that it works: runs/stripes-smoke" in out
    assert "Part 1 of 2: teacher" in out
    assert "97.6" in out
    left = json.loads((tmp_path / "runs/stripes-smoke/recipe.json").read_text())
    assert [(part["name"], part["status"]) for part in left["parts"]] == [
        ("teacher", "done"),
        ("published", "done"),
        ("ours", "waiting"),
    ]
    assert left["command"] == f"understudy run stripes.yaml --smoke --data {photos.name} --set threads=1"
    assert "batch_size: 40" in (tmp_path / "runs/stripes-smoke/published/config.yaml").read_text()
    code, out, err = call("run", "--table", tmp_path / "runs/stripes-smoke")
    assert code == 1
    assert err.strip().endswith("Run the recipe without it.")


def test_the_command_prints_the_table(call: Call, order: Order) -> None:
    code, out, err = call("run", "--table", order.folder / "recipe.json", order.folder)
    assert (code, err) == (0, "")
    assert out == report.page([load_recipe_record(order.folder)] * 2)


def test_mistakes_at_the_command_are_one_sentence(call: Call, tmp_path: Path) -> None:
    recipe = written(tmp_path)
    for words in (["none.yaml"], [recipe, recipe], [recipe, "--only", "nobody"], [recipe, "--set", "trian.epochs=1"]):
        code, _, err = call("run", *words)
        assert code == 1, words
        assert len(err.strip().splitlines()) == 1
        assert err.startswith("Error: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "spread"),
    [
        (["run", "a.yaml", "--only", "b", "c", "--smoke"], ["run", "a.yaml", "--only", "b", "--only", "c", "--smoke"]),
        (["run", "--only", "b", "c", "a.yaml"], ["run", "--only", "b", "--only", "c", "a.yaml"]),
        (["run", "a.yaml", "--only", "b", "--out", "c", "d"], ["run", "a.yaml", "--only", "b", "--out", "c", "d"]),
        (["train", "--only", "b", "c"], ["train", "--only", "b", "c"]),
    ],
)
def test_several_parts_may_follow_only(words: list[str], spread: list[str]) -> None:
    assert recipecommands.spread(words) == spread


# With compression and exports


@pytest.mark.slow
def test_a_student_is_compressed_and_exported(photos: Path, tmp_path: Path) -> None:
    asked = {"int8": "ptq", "max_drop": 0.9}
    device = {**DEVICE, "of": "published", "compress": asked, "export": ["onnx", "torch"]}
    mine = Order(Recipe.model_validate(raw(photos, parts=[*PARTS[:2], device])), tmp_path / "out", smoke=True)
    found = recipes.run(mine).parts[2]
    run = records.load(mine.folder / "published")
    assert [form.name for form in found.forms] == ["teacher", "baseline-0", "student-0", "int8-ptq"]
    for form, row in zip(found.forms, run.compressed, strict=True):
        assert (form.accuracy, form.drop, form.bytes, form.p95) == (row.accuracy, row.drop, row.bytes, row.latency.p95)
    assert [one.name for one in found.files] == ["student.onnx", "student.pt2", "int8-ptq.onnx"]
    text = (mine.folder / "recipe.md").read_text()
    assert "| `student.pt2` |" in text
    assert "| int8-ptq |" in text
    before = work_done(run)
    again = recipes.run(mine)
    assert again.parts[2] == found
    assert work_done(records.load(mine.folder / "published")) == before
