"""The repository's own rules: who imports whom, what is written where, and what is never written at all."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
PACKAGE = SRC / "understudy"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON_FILES = [
    file for folder in ("src", "tests", "benchmarks", "examples") for file in sorted((ROOT / folder).rglob("*.py"))
]

# A part imports only from rows above its own; parts of one row never import one another.
ROWS = (
    {"__version__", "errors", "progress", "launch"},
    {"storage", "config", "losses"},
    {"record", "cachefolder", "costs"},
    {"distillation"},
    {"models", "data", "evaluate", "compress", "export", "checkpoint", "numerics", "sharding"},
    {"engine", "profiling"},
    {"snapshot", "tracking"},
    {"train", "integrations"},
    {"stacked"},
    {"pipeline", "answer"},
    {"report", "sweep", "housekeeping", "merging"},
    {"api", "display", "options", "methodtexts"},
    {"recipefigures"},
    {"recipes"},
    {"sweeping", "comparing", "cachecommands", "methodcommands", "recipecommands", "reruncommands"}
    | {"compresscommands", "profilecommands", "exportcommands", "answercommands"},
    {"cli"},
    {"__init__", "__main__"},
)
ROW = {part: row for row, parts in enumerate(ROWS) for part in parts}
# Each of these libraries is known to these parts only.
HOME = {
    "accelerate": {"engine", "tracking"},
    "optuna": {"sweep"},
    "ray": {"sweep"},
    **{
        name: {"export"}
        for name in ("onnx", "onnxruntime", "onnxscript", "executorch", "litert_torch", "ai_edge_litert")
    },
    **{name: {"compress"} for name in ("torch_pruning", "torchao")},
    **{name: {"integrations"} for name in ("lightning", "pytorch_lightning", "fastai", "keras")},
    "transformers": {"integrations", "models"},
    **{name: {"tracking"} for name in ("tensorboard", "mlflow", "wandb")},
}
WITHOUT_TORCH = {
    "errors",
    "progress",
    "launch",
    "storage",
    "config",
    "record",
    "cachefolder",
    "costs",
    "report",
}
# Slow to import, so only the functions that need them do.
LAZY = {"torchvision", "timm", "onnx", "onnxruntime", "onnxscript", "sklearn", "scipy", "accelerate", "optuna", "ray"}
LAZY |= {"torch_pruning", "torchao", "executorch", "litert_torch", "ai_edge_litert"}
LAZY |= {"transformers", "huggingface_hub", "mlflow", "wandb", "tensorboard"}
EAGER = {"integrations"}
"""Users import these files on purpose."""


def part_of(file: Path) -> str:
    """Name the part of the package that a source file belongs to: `losses`, `train`, ..."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(node: ast.AST, package: tuple[str, ...]) -> set[str]:
    """Return the dotted names that an import statement of a module in `package` names; none for other nodes."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        around = package[: len(package) - node.level + 1] if node.level else ()
        base = ".".join((*around, *filter(None, [node.module])))
        return {f"{base}.{alias.name}" for alias in node.names}
    return set()


def imports(file: Path) -> set[str]:
    """Return what a source file imports anywhere: in functions and under TYPE_CHECKING, too."""
    package = file.relative_to(SRC).parts[:-1]
    return set().union(*(imported(node, package) for node in ast.walk(ast.parse(file.read_text()))))


def offence(file: Path, name: str) -> str:
    """Say which rule it breaks that `file` imports `name`; nothing where it breaks none."""
    part = part_of(file)
    library, _, inside = name.partition(".")
    if library == "understudy":
        other = inside.partition(".")[0] or "__init__"
        if other == part or ROW.get(other, len(ROWS)) < ROW.get(part, 0):
            return ""
        return f"{part} may not import {other}: it is not on a row above"
    if library == "torch" and part in WITHOUT_TORCH:
        return f"{part} does without torch"
    if part not in HOME.get(library, {part}):
        return f"only {' and '.join(sorted(HOME[library]))} imports {library}"
    return ""


def test_every_part_stands_on_a_row() -> None:
    assert {part_of(file) for file in SOURCES} <= set(ROW)


def test_imports_point_upwards_only() -> None:
    offences = [
        f"{file.relative_to(ROOT)}: {name}: {text}"
        for file in SOURCES
        for name in sorted(imports(file))
        if (text := offence(file, name))
    ]
    assert not offences, "\n".join(offences)


def test_slow_libraries_are_imported_by_functions() -> None:
    offences = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in SOURCES
        for node in ast.parse(file.read_text()).body
        for name in imported(node, file.relative_to(SRC).parts[:-1])
        if name.partition(".")[0] in LAZY
        and part_of(file) not in EAGER | (HOME.get(name.partition(".")[0], set()) - {"models", "tracking"})
    ]
    assert not offences, "\n".join(offences)


@pytest.mark.parametrize(
    ("file", "statement", "name", "allowed"),
    [
        (
            "data/store.py",
            "def f():\n    from understudy.evaluate import metrics",
            "understudy.evaluate.metrics",
            False,
        ),
        ("data/store.py", "if TYPE_CHECKING:\n    import understudy.train", "understudy.train", False),
        ("data/store.py", "from ..pipeline import run", "understudy.pipeline.run", False),
        ("data/store.py", "from . import views", "understudy.data.views", True),
        ("data/store.py", "from understudy import storage", "understudy.storage", True),
        ("data/store.py", "from understudy import distill", "understudy.distill", False),
        ("losses/logits.py", "from understudy.config import RunConfig", "understudy.config.RunConfig", False),
        ("report/html.py", "def f():\n    import torch.nn", "torch.nn", False),
        ("pipeline.py", "from accelerate import Accelerator", "accelerate.Accelerator", False),
        ("engine.py", "from accelerate import Accelerator", "accelerate.Accelerator", True),
        ("data/store.py", "import onnxruntime as ort", "onnxruntime", False),
    ],
)
def test_the_import_rules_see(file: str, statement: str, name: str, allowed: bool) -> None:
    path = PACKAGE / file
    package = path.relative_to(SRC).parts[:-1]
    found = set().union(*(imported(node, package) for node in ast.walk(ast.parse(statement))))
    assert found == {name}
    assert (offence(path, name) == "") is allowed


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(file.relative_to(ROOT)) for file in PYTHON_FILES if not ast.get_docstring(ast.parse(file.read_text()))
    ]
    assert not silent


def test_no_source_file_is_over_400_lines() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in SOURCES}
    assert not {name: lines for name, lines in lengths.items() if lines > 400}


def catalogue() -> dict[str, str]:
    """Return the docstring of every function that `understudy.losses` exports."""
    exports = imports(PACKAGE / "losses" / "__init__.py")
    return {
        node.name: ast.get_docstring(node) or ""
        for file in sorted((PACKAGE / "losses").glob("*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and f"understudy.losses.{file.stem}.{node.name}" in exports
    }


@pytest.mark.parametrize("section", ["Args", "Returns", "Example", "Source"])
def test_every_loss_documents(section: str) -> None:
    losses = catalogue()
    assert "kd" in losses
    assert not [name for name, text in losses.items() if not re.search(rf"^{section}:$\n +\S", text, re.MULTILINE)]


SECTIONS = {
    "cat_kd", "correlation_congruence", "ft", "mlkd", "nst", "pkt", "simkd", "srrl",
    "nkd", "wsld", "cross_entropy",
}  # fmt: skip
"""Losses that cite a section or the paper alone: no copy of these papers with numbered equations could be had."""


def test_every_loss_cites_an_equation_by_its_number() -> None:
    numbered = {name for name, text in catalogue().items() if re.search(r"(equations?|algorithm) \d", sources(text))}
    assert numbered == set(catalogue()) - SECTIONS


def sources(text: str) -> str:
    """Return what a docstring says below `Source:`, on one line."""
    return " ".join(text.partition("Source:")[2].split())


def readme_tree() -> list[tuple[str, str]]:
    """Return (file name, what it is for) for every line of README's fenced blocks that names a Python file."""
    blocks = re.findall(r"^ *```.*?\n(.*?)^ *```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    found = [re.match(r"[\s│├└─|`+-]*(?:[\w.-]+/)*([\w-]+\.py)\s+(\S.*)$", line) for line in lines]
    return [(match[1], match[2]) for match in found if match]


def test_readme_tree_lists_every_source_file() -> None:
    told = Counter(name for name, _ in readme_tree())
    there = Counter(file.name for file in SOURCES if file.name != "__init__.py")
    assert not there - told, "source files without a line in README's tree"


def test_readme_tree_names_no_file_that_is_gone() -> None:
    assert {name for name, _ in readme_tree()} <= {file.name for file in PYTHON_FILES}


def project_requirements() -> list[Requirement]:
    """Return every requirement of pyproject.toml, extras included, but not the package itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [requirement for text in texts if (requirement := Requirement(text)).name != "understudy"]


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert not [line for line in lines if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][a-z0-9.]*", line)]
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_every_requirement_has_a_lower_bound_and_a_pin_within_its_bounds() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    for requirement in project_requirements():
        assert any(bound.operator == ">=" for bound in requirement.specifier), requirement
        assert requirement.specifier.contains(Version(pins[requirement.name])), requirement


def missing_pins(pins: set[str]) -> set[str]:
    """Return the distributions that developers get on this machine, transitive ones included, without a pin."""
    seen: set[tuple[str, str]] = set()
    pending = [("understudy", ""), ("understudy", "dev"), ("uv", "")]
    while pending:
        name, extra = pending.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                found = canonicalize_name(requirement.name)
                pending += [(found, wanted) for wanted in ("", *requirement.extras)]
    return {name for name, _ in seen} - pins - {"understudy"}


def test_everything_that_is_installed_is_pinned() -> None:
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert not missing_pins(pins)
    assert missing_pins(pins - {"sympy"}) == {"sympy"}


def git(*words: str) -> str:
    """Return what git prints; skip the test where this folder is no git checkout."""
    try:
        top = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if top.returncode or Path(top.stdout.strip()) != ROOT:
        pytest.skip(f"not a git checkout: {top.stderr.strip()}")
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


FORBIDDEN = {
    "a path of one machine": rb"(?:^|[^\w.])/(?:work|farm|root|opt/pypi[\w-]*|opt/wheels)/",
    "a package registry": rb"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.(?:npmjs|yarnpkg)\."
    rb"|conda\.anaconda\.org|crates\.io",
    "an index option": rb"--(?:(?:extra-)?index-url|find-links)|(?:PIP|UV)_(?:EXTRA_)?INDEX",
}


def offending_lines(name: str, data: bytes) -> list[str]:
    """Return `name:line: what` for every line of a file that holds something forbidden."""
    return [
        f"{name}:{number}: {what}"
        for number, line in enumerate(data.splitlines(), start=1)
        for what, pattern in FORBIDDEN.items()
        if re.search(pattern, line)
    ]


def test_no_machine_paths_and_no_registries() -> None:
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    files = [ROOT / name for name in names if (ROOT / name).is_file()]
    assert Path(__file__) in files
    assert not [line for file in files for line in offending_lines(str(file.relative_to(ROOT)), file.read_bytes())]


@pytest.mark.parametrize(
    "parts", [("see /", "work/main"), ("=/", "opt/wheels/x"), ("https://py", "pi.org"), ("--index", "-url x")]
)
def test_the_search_finds(parts: tuple[str, str]) -> None:
    assert offending_lines("file", "".join(parts).encode()) != []
    assert offending_lines("file", b"frame/work/x and https://example.org") == []


def test_commit_messages_are_conventional() -> None:
    subjects = git("log", "--no-merges", "--format=%s").splitlines()
    if not subjects:
        pytest.skip("no commits yet")
    kinds = "feat|fix|docs|test|refactor|perf|build|ci|chore|style|revert"
    assert not [line for line in subjects if not re.match(rf"(?:{kinds})(?:\([\w./-]+\))?!?: \S", line)]


def test_the_ci_script_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
