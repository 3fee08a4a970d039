"""A process in which `msgfm_hf` cannot be imported: what somebody has who takes a checkpoint with remote code."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run_without_package(folder: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a script there, its working folder and cache in `folder`; what it prints and says is captured. `variables`
    are added to the environment."""
    # -S and -P keep site-packages' editable installs and the working folder out; the libraries come back by path.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    path = folder / "script.py"
    path.write_text(f"import sys\nsys.path += {libraries!r}\n" + textwrap.dedent(script))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HOME": str(folder / "hub"),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-S", "-P", str(path), *arguments], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done
