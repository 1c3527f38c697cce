"""What 8 bits do to each layer, in the report: the folded tables, and the layer that is named."""

from __future__ import annotations

import html
from pathlib import Path

import pytest

from browser import Browser, find
from compressed_record import compressed_record, in_8_bits, layer
from report_page import HOSTILE, Page
from understudy import report
from understudy.record import LayerNote, Quantized, Record
from understudy.report.compressed import compressed_section
from understudy.report.layers import jump, layer_tables


@pytest.fixture(scope="module")
def record() -> Record:
    return in_8_bits(compressed_record())


def of(*layers: LayerNote) -> Record:
    """Return a record with one form in 8 bits, of these layers."""
    whole = compressed_record()
    whole.compressed[4].quantized = Quantized(way="post-training", images=8, layers=list(layers))
    return whole


def shown(record: Record) -> str:
    """Return the folded tables as markup."""
    return "".join(layer_tables(record)).replace("\u00a0", " ")


def body(markup: str) -> list[list[str]]:
    """Return the texts of the cells of the first table, row by row; the bars' are left out."""
    lines = markup.split("<tbody>")[1].split("</tbody>")[0].split("<tr")[1:]
    cells = [line.replace("</th>", "</td>").split("</td>")[:-1] for line in lines]
    return [
        [" | ".join(Page(_opened(cell) + _closed(cell)).text) for cell in row if "strip" not in cell] for row in cells
    ]


def _opened(cell: str) -> str:
    return "<" + cell.partition("<")[2]


def _closed(cell: str) -> str:
    return "</td>" if "<td" in cell else "</th>"


def test_nothing_is_said_of_forms_without_layers() -> None:
    assert layer_tables(compressed_record()) == []
    assert "layer by layer" not in report.render(compressed_record())
    assert layer_tables(of()) == []


def test_every_layer_has_its_range_error_and_bar(record: Record) -> None:
    assert body(shown(record)) == [
        ["block1.0", "0.00 to 6.00", "1.1 %", ""],
        ["block2.0 | grows most here", "0.00 to 213", "7.4 %", ""],
        ["block3.0", "0.00 to 6.00", "8.1 %", ""],
        ["head", "−8.26 to 8.37", "7.9 %", ""],
    ]
    widths = [float(str(one["width"])) for one in Page(layer_tables(record)[0]).all("rect")]
    assert widths == pytest.approx([204 * error / 0.081 for error in (0.011, 0.074, 0.081, 0.079)], abs=0.01)


def test_the_tables_are_folded_and_part_of_their_section(record: Record) -> None:
    section = str(compressed_section(record))
    first, second = layer_tables(record)
    assert first in section
    assert second in section
    assert all("open" not in attributes for attributes in Page(first + second).all("details"))
    assert "int8-ptq: 8 bits, layer by layer (4 layers)" in shown(record)
    assert "int8-qat: 8 bits, layer by layer (3 layers)" in shown(record)


def test_the_layer_at_which_the_error_jumps_is_named_with_the_option(record: Record) -> None:
    first, second = ("".join(Page(one).text).replace("\u00a0", " ") for one in layer_tables(record))
    assert "grows most in block2.0, from 1.1 % to 7.4 %." in first
    assert "--keep-float block2.0" in first
    assert "--keep-float head" in second
    for one in layer_tables(record):
        assert [row.get("class") for row in Page(one).all("tr")].count("chosen") == 1


def test_that_training_on_counts_as_error_is_said_where_it_does(record: Record) -> None:
    after, aware = layer_tables(record)
    assert "trained on" not in after
    assert "trained on, and what that changed counts as error" in aware


def test_a_layer_that_stays_float_is_told_but_not_advised() -> None:
    kept = of(layer("first", 0.01), layer("second", 0.5, kept_float=True), layer("third", 0.52))
    assert [row[3] for row in body(shown(kept))] == ["", "yes", ""]
    assert "--keep-float third" in shown(kept)
    assert "--keep-float second" not in shown(kept)


@pytest.mark.parametrize(
    ("errors", "found"),
    [
        ([], None),
        ([0.0, 0.0], None),
        ([0.3, 0.2, 0.1], (0.0, "0")),  # the first layer starts from nothing
        ([0.1, 0.15, 0.4, 0.45], (0.15, "2")),  # the largest step, not the largest error
        ([0.1, 0.2, 0.05, 0.3], (0.05, "3")),
    ],
)
def test_the_jump_is_the_largest_step(errors: list[float], found: tuple[float, str] | None) -> None:
    seen = jump([layer(str(place), error) for place, error in enumerate(errors)])
    assert (seen and (seen[0], seen[1].name)) == found


def test_nothing_is_advised_where_nothing_is_lost() -> None:
    exact = of(layer("only", 0.0))
    assert body(shown(exact)) == [["only", "0.00 to 6.00", "0.0 %", ""]]
    assert "--keep-float" not in shown(exact)
    assert 'class="chosen"' not in shown(exact)


def test_a_calibrated_form_does_not_show_the_same_layers_again(record: Record) -> None:
    again = record.model_copy(deep=True)
    last = again.compressed[-1]
    again.compressed.append(last.model_copy(update={"name": "calibrated", "before": last.name}))
    assert shown(again) == shown(record)


def test_hostile_names_stay_text_and_are_quoted_for_the_shell() -> None:
    name = HOSTILE + "; rm -rf $HOME"
    page = Page(shown(of(layer(name, 0.2))))
    assert page.all("img") == page.all("script") == []
    advice = next(text for text in page.text if text.startswith("--keep-float"))
    assert advice.startswith("--keep-float '")
    assert "alert(1)>" not in shown(of(layer(name, 0.2)))
    assert html.escape("; rm -rf $HOME") in shown(of(layer(name, 0.2)))


@pytest.mark.skipif(find() is None, reason="no Chromium on this machine")
@pytest.mark.slow
def test_a_browser_shows_the_tables_in_narrow_windows_too(record: Record, tmp_path: Path) -> None:
    report.write(record, tmp_path / "report.html")
    browser = Browser(tmp_path / "profile")
    try:
        for width in (360, 1100):
            browser.open(tmp_path / "report.html", width=width)
            browser.evaluate("document.querySelectorAll('#compressed details').forEach(one => { one.open = true })")
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate("document.querySelectorAll('#compressed tr.chosen').length") == 2
        assert browser.named("Log.entryAdded", "Runtime.exceptionThrown") == []
    finally:
        browser.close()
