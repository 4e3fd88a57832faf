"""The page in a real browser: nothing sticks out of the window at any width, and it prints."""

import html
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
          "--disable-component-update", "--no-first-run", "--hide-scrollbars", "--no-pdf-header-footer")  # fmt: skip
WIDTHS = (1200, 768, 420, 320)
# Shows the page in frames of several widths, and writes down how wide its content is in each, and what sticks out.
_WATCH = """<!DOCTYPE html><html><body>{frames}<p id="found"></p><script>
window.onload = () => {{
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) {{
    const root = frame.contentDocument.documentElement;
    const out = [...root.querySelectorAll("h1, h2, p, li, figure, figcaption, .tiles div, .tiles b")].filter(
      (element) => element.getBoundingClientRect().right > root.clientWidth + 1
        || (element.tagName !== "FIGURE" && element.scrollWidth > element.clientWidth + 1));
    found.push([root.clientWidth, root.scrollWidth, out.length, root.querySelectorAll("svg").length].join(" "));
  }}
  document.getElementById("found").textContent = found.join(", ");
}};
</script></body></html>"""


@pytest.fixture
def chromium(tmp_path: Path) -> Any:
    """Runs the browser; returns what it prints."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("chromium is not installed")

    def run(*words: str) -> str:
        command = [browser, *_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout

    return run


def measured(chromium: Any, text: str, tmp_path: Path) -> dict[int, tuple[int, int, int]]:
    """For each width of a window: width of the content, elements that stick out, pictures."""
    frames = "".join(f'<iframe width="{width}" height="800" srcdoc="{html.escape(text)}"></iframe>' for width in WIDTHS)
    watch = tmp_path / "watch.html"
    watch.write_text(_WATCH.format(frames=frames), encoding="utf-8")
    dom = chromium("--virtual-time-budget=20000", "--dump-dom", f"file://{watch}")
    found = re.search(r'<p id="found">([^<]+)</p>', dom)
    assert found, "the page did not load"
    rows = [tuple(map(int, line.split())) for line in found[1].split(", ")]
    return {row[0]: (row[1], row[2], row[3]) for row in rows}


def test_nothing_sticks_out_of_the_window(chromium: Any, whole_report: Path, tmp_path: Path) -> None:
    text = whole_report.read_text(encoding="utf-8")
    found = measured(chromium, text, tmp_path)
    assert len(found) == len(WIDTHS)
    for width, (content, out, pictures) in found.items():
        assert (content, out, pictures) == (width, 0, 10)


def test_what_sticks_out_is_seen(chromium: Any, whole_report: Path, tmp_path: Path) -> None:
    wide = '<p style="width: 900px">wide</p></body>'
    found = measured(chromium, whole_report.read_text(encoding="utf-8").replace("</body>", wide), tmp_path)
    assert [out for _, out, _ in found.values()] == [0, 1, 1, 1]


@pytest.mark.parametrize("width", [1200, 500])
def test_a_screenshot_has_more_than_paper(chromium: Any, whole_report: Path, tmp_path: Path, width: int) -> None:
    shot = tmp_path / "shot.png"
    chromium(f"--window-size={width},2400", f"--screenshot={shot}", f"file://{whole_report}")
    image = matplotlib.image.imread(shot)[:, :, :3]
    assert image.shape[:2] == (2400, width)
    assert 0.02 < (image.min(axis=2) < 0.9).mean() < 0.5
    # Both margins are empty from top to bottom.
    assert image[:, :10].min() == image[:, -10:].min() == 1.0


def test_it_prints(chromium: Any, whole_report: Path, tmp_path: Path) -> None:
    paper = tmp_path / "report.pdf"
    chromium(f"--print-to-pdf={paper}", f"file://{whole_report}")
    assert paper.read_bytes().startswith(b"%PDF")
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed: what is on the pages is not looked at")
    said = subprocess.run(["pdftotext", "-layout", paper, "-"], capture_output=True, text=True, check=True).stdout
    for expected in (
        "Exactly what was run",
        "What is missing for a full reproduction",
        "paper, large: SCTD",
        "mean of",
    ):
        assert expected in said
    assert 4 < said.count("\f") < 25, "pages"
