"""The stages that export: files for the device, each run on its own runtime and compared with PyTorch.

`export` writes the chosen student as ONNX at the end of every run; `export_to` writes any form of it in any format. A
file gets its name only after it answered all validation images as PyTorch does.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from understudy import storage
from understudy.errors import ConfigError, unknown
from understudy.evaluate import verdict
from understudy.export import conformance, golden, runtimes, web
from understudy.export.formats import FORMATS, Format
from understudy.export.graph import card_path
from understudy.pipeline import eightbits, exportable
from understudy.pipeline.exportable import STUDENT, Form
from understudy.pipeline.folder import Run
from understudy.pipeline.materials import Materials
from understudy.profiling import resident
from understudy.record import Agreement, Export
from understudy.train import EVALUATION_BATCH

FOLDER = "export"
FILE = f"{FOLDER}/{STUDENT}.onnx"
GOLDEN = f"{FOLDER}/golden"
WEB = "web"
KINDS = (*FORMATS, WEB)
"""What may be asked for."""
IN_8_BITS = ("onnx", "executorch")
"""Formats of a stage in 8 bits: others would be no smaller or no faster for it."""
LEAST_AGREEMENT = 0.9
"""Share of validation images that a file in 8 bits must answer as the network it was made of."""
_DRAFTS = ".making"
_STEPS = 3
_SAME = 1e-3
"""Between the probabilities that a float file gives an image alone and in a batch."""
_TRIED = 8
"""Images that show whether a file's answers depend on the batch."""
_TRIED_ALONE = 1_000
"""Images asked for one by one of a file whose answers depend on the batch."""

Bytes = NDArray[np.uint8]


def export(run: Run, materials: Materials) -> None:
    """Write the chosen student as ONNX, run the file over the validation frames and compare."""
    chosen = run.record.chosen
    if chosen is None:
        return
    inputs = {"weights": run.record.models[chosen].weights_hash, "input": materials.spec.model_dump(mode="json")}
    run.stage("export", inputs, [FILE], lambda: _export(run, materials))


def export_to(
    run: Run,
    materials: Materials,
    kinds: Sequence[str],
    stages: Sequence[str] = (STUDENT,),
    *,
    threads: int = 1,
    engine: Path | None = None,
) -> list[Export]:
    """Write forms of the student in several formats, each a stage of its own that is skipped where it was done.

    Beside the files come golden images with their answers and a stand-alone script that checks both on the device.

    Args:
        run: an opened run.
        materials: of the run.
        kinds: names of `FORMATS`, or `web` for a page that runs the ONNX file in a browser.
        stages: `student`, or compressed stages.
        threads: of the runtimes, when they are timed.
        engine: folder with the files of ONNX Runtime Web; needed for `web`.

    Returns:
        The files that were asked for, in that order.

    Raises:
        ConfigError: an unknown format or stage, or a stage in 8 bits in a format that knows none of it.
        ModelError: a runtime is not installed, the network cannot be expressed, or a file answers otherwise.
        RunError: the run has no student that was judged.
    """
    found, formats = asked(run, kinds, stages)
    if WEB in kinds:
        engine = engine or web.engine()
    for form, name in product(found, formats):
        _export_form(run, materials, form, name)
    _write_golden(run, materials)
    if WEB in kinds and engine is not None:
        for form in found:
            _write_page(run, form, engine)
    wanted = [_noted(run, _path(form, FORMATS[name])) for form, name in product(found, formats)]
    for one in wanted:
        _measure(run, materials, one, threads)
    run.save()
    return wanted


def asked(run: Run, kinds: Sequence[str], stages: Sequence[str]) -> tuple[list[Form], list[str]]:
    """Return the forms and the formats that are to be written, each once; a page needs the ONNX file.

    Raises:
        ConfigError, RunError: as for `export_to`, without any work.
    """
    found = [exportable.find(run, name) for name in dict.fromkeys(stages)]
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(unknown("format", kind, KINDS))
    if not kinds:
        raise ConfigError(f"No format given: name some of {', '.join(KINDS)} after --to.")
    formats = list(dict.fromkeys("onnx" if kind == WEB else kind for kind in kinds))
    for form in found:
        _check_8_bits(form, formats)
    return found, formats


def _check_8_bits(form: Form, formats: Sequence[str]) -> None:
    """Refuse what a form in 8 bits cannot be exported to, before any work."""
    if form.int8 is None:
        return
    others = [name for name in formats if name not in IN_8_BITS]
    if others:
        raise ConfigError(
            f"The stage {form.name} computes in 8 bits, which is exported to onnx, executorch and web only. Leave out "
            f"{others[0]}, or export a float stage to it."
        )
    if formats != ["onnx"]:
        eightbits.check(form.int8)


def _export(run: Run, materials: Materials) -> None:
    """Write the student anew; whatever else was exported is of what it was before."""
    for name in [name for name in run.record.stages if name.startswith("export-")]:
        del run.record.stages[name]
    run.record.exports = []
    _write(run, materials, exportable.find(run, STUDENT), "onnx")


def _export_form(run: Run, materials: Materials, form: Form, name: str) -> None:
    if (form.name, name) == (STUDENT, "onnx"):
        return export(run, materials)
    path = _path(form, FORMATS[name])
    inputs = {"weights": form.weights, "temperature": form.temperature, "format": name}
    outputs = [path, *([str(card_path(Path(path)))] if FORMATS[name].has_card else [])]
    return run.stage(f"export-{form.name}-{name}", inputs, outputs, lambda: _write(run, materials, form, name))


def _write(run: Run, materials: Materials, form: Form, name: str) -> None:
    """Write one file, compare and time it; only then does it get its name and its place in the record."""
    kind = FORMATS[name]
    path = run.folder / _path(form, kind)
    tell = partial(run.progress, f"export {path.name}", total=_STEPS)
    with _draft(path) as draft:
        tell(done=0, note=f"writing {kind.title}")
        _write_file(run, materials, form, kind, draft)
        tell(done=1, note="comparing with PyTorch")
        session = runtimes.open_file(draft, trusted=True)  # written above
        agreement = _compare(materials, form, session)
        alone = _one_by_one(materials, form, session)
        tell(done=2, note="measuring latency")
        latency = conformance.latency(session, _image(materials))
    _note(
        run,
        Export(
            format=kind.title,
            path=_path(form, kind),
            bytes=path.stat().st_size,
            runtime=latency.runtime,
            seed=form.seed,
            on_frames=agreement,
            latency=latency,
            stage=form.name,
            hash=storage.hash_file(path),
            one_by_one=alone,
            note=_remark(session, form, alone, _lost(run, materials, form, agreement)),
        ),
    )
    tell(done=_STEPS)


def _write_file(run: Run, materials: Materials, form: Form, kind: Format, path: Path) -> None:
    if form.onnx is not None and kind is FORMATS["onnx"]:  # the very file that compression measured
        shutil.copyfile(form.onnx, path)
    else:
        kind.write(form.model(run, materials), path)


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a folder beside it; what is there in the end gets its final place.

    Nothing is left under the final name where it fails: an older file of that name is of other weights.
    """
    folder = path.parent / _DRAFTS
    shutil.rmtree(folder, ignore_errors=True)  # of a killed process
    for stale in (path, card_path(path)):
        stale.unlink(missing_ok=True)
    with storage.disk_errors(folder):
        folder.mkdir(parents=True)
    try:
        yield folder / path.name
        for written in (path, card_path(path)):
            if (folder / written.name).exists():
                (folder / written.name).replace(written)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compare(materials: Materials, form: Form, session: runtimes.Session) -> Agreement:
    """Run a file over all validation frames and refuse it where it answers otherwise."""
    rows = materials.store.splits["val"]
    # batches as PyTorch answered them: a network may normalise by the statistics of each
    size = EVALUATION_BATCH.get(materials.engine.device.type, 64)
    frames = (np.asarray(materials.store.frames[part]) for part in np.split(rows, range(size, len(rows), size)))
    agreement = conformance.compare(session, frames, form.probabilities, materials.store.labels[rows])
    if form.is_int8:
        conformance.check_quantized(agreement, LEAST_AGREEMENT)
    else:
        conformance.check(agreement)
    return agreement


def _one_by_one(materials: Materials, form: Form, session: runtimes.Session) -> Agreement | None:
    """Ask a file for one image at a time, as devices do; None where that changes no answer."""
    rows = materials.store.splits["val"][:_TRIED_ALONE]
    tolerance = golden.INT8_TOLERANCE if form.is_int8 else _SAME
    if not conformance.depends_on_batch(session, np.asarray(materials.store.frames[rows[:_TRIED]]), tolerance):
        return None
    frames = (np.asarray(materials.store.frames[rows[at : at + 1]]) for at in range(len(rows)))
    return conformance.compare(session, frames, form.probabilities[: len(rows)], materials.store.labels[rows])


def _remark(session: runtimes.Session, form: Form, alone: Agreement | None, lost: str) -> str:
    said = [] if session.side is None else [f"It takes images of {session.side} x {session.side} pixels only."]
    if alone is not None:
        said.append(
            "Its answers depend on the other images of a batch, as where a network normalises by their statistics. "
            f"Asked for one image at a time, as devices do, it answers {1 - alone.agreement:.1%} of {alone.images} "
            f"validation images otherwise and {alone.accuracy:.1%} right: do not judge it by the figures of batches."
        )
    if form.int8 is not None and form.int8.is_trained:
        said.append("It computes in 8 bits, and is compared with what the training in 8 bits came to.")
    elif form.int8 is not None:
        said.append("It computes in 8 bits; PyTorch's answers are those of the float network that it was made of.")
        if not session.runtime.startswith(runtimes.ONNX_RUNTIME):
            said.append("Its ranges are of the same images as the ONNX file's, but by other rules.")
    return " ".join([*said, lost]).rstrip()


def _lost(run: Run, materials: Materials, form: Form, agreement: Agreement) -> str:
    """Say where a file in 8 bits loses more than compression was allowed to; else nothing."""
    allowed = (run.record.compress or {}).get("max_drop")
    if form.int8 is None or allowed is None:
        return ""
    labels = materials.store.labels[materials.store.splits["val"]]
    lost = float((form.logits.argmax(1) == labels).mean()) - agreement.accuracy
    if lost <= allowed + 1e-12:
        return ""
    return (
        f"It loses {verdict.points(lost)} points on the validation images, more than the {verdict.points(allowed)} "
        "allowed."
    )


def _image(materials: Materials) -> Bytes:
    """Return the first validation frame, [side, side, channels]."""
    images = _images(materials, materials.store.splits["val"][:1])
    return np.ascontiguousarray(images[0])


def _images(materials: Materials, rows: NDArray[np.int64]) -> Bytes:
    frames: Bytes = np.asarray(materials.store.frames[rows])
    return np.ascontiguousarray(frames.transpose(0, 2, 3, 1))


def _path(form: Form, kind: Format) -> str:
    return f"{FOLDER}/{form.name}{kind.suffix}"


def _note(run: Run, export: Export) -> None:
    """Put an export in the place of an earlier one of its path, or behind the others."""
    rows = run.record.exports
    places = [place for place, one in enumerate(rows) if one.path == export.path]
    if places:
        rows[places[0]] = export
    else:
        rows.append(export)


def _noted(run: Run, path: str) -> Export:
    return next(one for one in run.record.exports if one.path == path)


def _measure(run: Run, materials: Materials, export: Export, threads: int) -> None:
    """Note load time and memory, asked of a process of its own, and latency where it was of other threads."""
    path = run.folder / export.path
    image = _image(materials)
    export.hash = export.hash or storage.hash_file(path)  # a run of an older version has none
    if export.latency.threads != threads:
        session = runtimes.open_file(path, threads=threads, trusted=True)
        export.latency = conformance.latency(session, image)
        export.memory_bytes = None
    if export.memory_bytes is None:
        side, _, channels = image.shape
        found = resident.ask(resident.Request(str(path.absolute()), threads, 1, side, channels, trusted=True))
        export.load_ms, export.memory_bytes = found.load_ms, found.peak
        if found.problem:
            run.log(f"{export.path}: its memory is not known: {found.problem}")


def _write_golden(run: Run, materials: Materials) -> None:
    """Write golden images, and the answers expected of every file that was exported so far."""
    known = exportable.names(run)  # a later `compress` may have left out what an earlier one made
    there = [one for one in run.record.exports if one.stage in known and (run.folder / one.path).exists()]
    hashes = {Path(one.path).name: storage.hash_file(run.folder / one.path) for one in there}
    outputs = [f"{GOLDEN}/{name}" for name in (golden.ANSWERS, golden.PIXELS)] + [f"{FOLDER}/{golden.SCRIPT}"]
    inputs = {"files": hashes, "data": materials.store.fingerprint}
    run.stage("golden", inputs, outputs, lambda: _golden(run, materials, there, hashes))
    for one in there:
        one.golden = GOLDEN


def _golden(run: Run, materials: Materials, there: Sequence[Export], hashes: dict[str, str]) -> None:
    rows = materials.store.splits["val"]
    chosen = golden.choose(materials.store.labels[rows], exportable.find(run, STUDENT).logits)
    images = _images(materials, rows[chosen])
    answers, in_8_bits = {}, []
    for one in there:
        name, form = Path(one.path).name, exportable.find(run, one.stage)
        answers[name] = form.probabilities[chosen]
        if form.is_int8:
            in_8_bits.append(name)
        if form.is_int8 or one.one_by_one is not None:  # of the file itself: other machines are compared with this one
            session = runtimes.open_file(run.folder / one.path, trusted=True)
            answers[name] = np.concatenate([session(images[row : row + 1]) for row in range(len(images))])
    golden.write(
        run.folder / GOLDEN,
        images,
        answers,
        classes=materials.store.classes,
        tolerance={name: golden.INT8_TOLERANCE if name in in_8_bits else golden.FLOAT_TOLERANCE for name in answers},
        hashes=hashes,
        int8=in_8_bits,
    )
    golden.copy_script(run.folder / FOLDER)


def _write_page(run: Run, form: Form, engine: Path) -> None:
    """Write the page that runs a form in a browser."""
    folder = f"{FOLDER}/{WEB}" if form.name == STUDENT else f"{FOLDER}/{WEB}-{form.name}"
    file, images = run.folder / _path(form, FORMATS["onnx"]), run.folder / GOLDEN
    hashes = [storage.hash_file(path) for path in (file, images / golden.ANSWERS)]
    write = partial(web.export_web, run.folder / folder, file, golden=images, engine=engine, title=run.record.name)
    run.stage(f"export-{form.name}-web", {"files": hashes, "version": web.VERSION}, [f"{folder}/index.html"], write)
