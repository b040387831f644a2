"""What `rayllm` offers by name, and that it costs nothing until it is used."""

import subprocess
import sys

import pytest

import rayllm


def test_every_name_is_there():
    assert rayllm.__all__ == sorted(rayllm.__all__)
    for name in rayllm.__all__:
        assert getattr(rayllm, name).__name__ == name
    with pytest.raises(AttributeError, match="LLLM"):
        _ = rayllm.LLLM


def test_importing_it_imports_nothing_heavy():
    script = "import sys, rayllm; print({'torch', 'ray', 'transformers'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_it_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "rayllm", "--help"], capture_output=True, text=True, check=True)
    assert "serve" in result.stdout
