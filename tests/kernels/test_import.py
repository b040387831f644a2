"""The package itself needs neither triton nor a GPU."""

import subprocess
import sys


def test_importing_the_kernels_does_not_import_triton():
    code = "import sys, rayllm_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
