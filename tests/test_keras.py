"""The Keras integration: what is refused on import, and the cases of two files on every backend in a process each.

Keras fixes its backend when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CASES = [Path(__file__).with_name(name) for name in ("keras_loss_cases.py", "keras_cases.py")]


def python(folder: Path, backend: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a backend, and with a home of its own: Keras writes settings there."""
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    around = {**os.environ, **quick, "KERAS_BACKEND": backend, "KERAS_HOME": str(folder)}
    return subprocess.run([sys.executable, *words], env=around, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_cases(backend: str, tmp_path: Path) -> None:
    for library in ("keras", backend):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed: pip install 'understudy[dev]'")
    done = python(tmp_path, backend, "-m", "pytest", "-p", "no:cacheprovider", "-n0", *map(str, CASES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_a_missing_keras_is_one_sentence(tmp_path: Path) -> None:
    code = "import sys; sys.modules['keras'] = None; import understudy.integrations.keras"
    done = python(tmp_path, "torch", "-c", code)
    assert done.stderr.rstrip().endswith("ConfigError: Keras is not installed: pip install 'understudy[keras]'")


def test_a_missing_backend_is_one_sentence(tmp_path: Path) -> None:
    if find_spec("keras") is None:  # not importorskip: importing it here would need a backend
        pytest.skip("keras is not installed: pip install 'understudy[dev]'")
    code = "import sys; sys.modules['jax'] = None; import understudy.integrations.keras"
    done = python(tmp_path, "jax", "-c", code)
    assert "ConfigError: Keras cannot start without jax" in done.stderr
    assert "KERAS_BACKEND" in done.stderr.splitlines()[-1]
