"""The README's commands, for the tests that run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

from support import ROOT

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]


def shell(command: str, cwd: Path, timeout: float = 900) -> str:
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def command(beginning: str) -> str:
    """The README's command that begins like this."""
    (found,) = [line for line in COMMANDS if line.startswith(beginning)]
    return found
