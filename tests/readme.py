"""The commands of README and docs, for the tests that run them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from support import ROOT, sctd

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}


def _commands(text: str) -> list[str]:
    """The lines of the page's bash blocks, continued ones joined, comments left out."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in blocks.splitlines()) if line]


COMMANDS = {page: _commands(text) for page, text in PAGES.items()}


def shell(line: str, cwd: Path, timeout: float = 900) -> str:
    """What a command line that must succeed writes to standard output; plain calls of `sctd` spare their imports."""
    if line.startswith("sctd "):
        done = sctd(*shlex.split(line)[1:], cwd=cwd)
    else:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            ["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
        )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def command(beginning: str, page: str = "README.md") -> str:
    """The page's command that begins like this."""
    (found,) = [line for line in COMMANDS[page] if line.startswith(beginning)]
    return found
