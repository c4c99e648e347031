"""The page as a browser shows it: at three widths, light, dark, printed, looked into as pictures.

A browser is no dependency of ours: where there is none these tests are skipped.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.image import imread

from rlhf_lib.data.truth import truth_of
from rlhf_lib.report.exporters import render
from rlhf_lib.review import reader
from rlhf_lib.study.poster import front_page
from rlhf_lib.world import grammar
from tests.report.cells import code

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

MADE_UP = Path(__file__).parents[1] / "made_up" / "gold.json"
VIEWS = [(width, scheme) for width in (1440, 820, 390) for scheme in ("light", "dark")]
PAPER = 718  # A4 in pixels, less the margins that browsers leave
TILE = 64  # pixels: a slab is a square of so many that is white all over
# What lies in a frame of this width and cannot be read: boxes that cut their content off, and
# whether the page itself is wider than its frame. What scrolls is no fault but on paper, nor is
# what is hidden. For paper the style sheet's rules for it are put in force: a frame is a screen.
LOOK = """
const paper = document.body.dataset.view == "paper";
const frame = document.querySelector("iframe");
frame.onload = () => setTimeout(() => {
  const page = frame.contentDocument, view = frame.contentWindow, cut = [];
  const folds = page.querySelectorAll(paper ? "details:not(.reading)" : "details");
  folds.forEach((fold) => (fold.open = true));
  const rules = paper ? [...page.styleSheets].flatMap((sheet) => [...sheet.cssRules]) : [];
  for (const { media } of rules.filter((rule) => rule.media))
    media.mediaText = media.mediaText.replace("print", "all").replace("screen", "speech");
  const hiding = ["hidden", "clip", ...(paper ? ["auto", "scroll"] : [])];
  for (const box of page.body.querySelectorAll("*")) {
    const style = view.getComputedStyle(box);
    const hides = hiding.includes(style.overflowX) && box.clientWidth > 0;
    if (hides && box.scrollWidth > box.clientWidth + 1 && style.textOverflow != "ellipsis"
        && !box.matches(".skip, .skip *, math")) cut.push(box.tagName + "." + box.className);
  }
  for (const reply of page.querySelectorAll("details.reading > p"))
    if (!reply.checkVisibility()) cut.push("a reply");  // paper does not unfold
  const wide = page.documentElement.scrollWidth > view.innerWidth;
  const dark = view.matchMedia("(prefers-color-scheme: dark)").matches;
  const shown = page.querySelectorAll("details.reading").length;
  document.title = JSON.stringify({ wide, cut, dark, shown });
}, 200);
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The poster of a made-up study, and a chapter with the reader, a wide table and code."""
    folder = tmp_path_factory.mktemp("report")
    shown: list[dict] = []
    patch = pytest.MonkeyPatch()
    patch.setattr(reader, "display", lambda bundle, raw: shown.append(bundle))
    prompts = grammar.sample_prompts("screens", 60, "test", seed=1)
    rows = [
        {"prompt": p, "response": " Sure! " + "very " * 40 + "helpful.", "proxy": 1.0, "gold": -1.0}
        for p in prompts
    ]
    reader.read({"sft": rows, "ppo_low_kl": rows}, truth_of("bundled"))
    patch.undo()
    outputs = [nbformat.v4.new_output("display_data", data=bundle) for bundle in shown]
    wide = "<table><tr>" + "<td>a long heading</td>" * 30 + "</tr></table>"
    outputs.append(nbformat.v4.new_output("display_data", data={"text/html": wide}))
    title = nbformat.v4.new_markdown_cell("# A chapter\n\n$$\\sum_i " + "x_i + " * 60 + "1$$")
    long = code(*outputs, source="value = " + " + ".join(["something"] * 40))
    chapter = nbformat.v4.new_notebook(cells=[title, long])
    files = [folder / "front.ipynb", folder / "01_chapter.ipynb"]
    results = json.loads(MADE_UP.read_text())
    for file, page in zip(files, (front_page(results), chapter), strict=True):
        nbformat.write(page, file)
    page, _ = render(files, folder / "out", title="Made up", banner="Smoke run: " + "word " * 60)
    return page


def browser(*arguments: str) -> str:
    settings = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    settings += ["--allow-file-access-from-files", "--virtual-time-budget=4000"]
    with tempfile.TemporaryDirectory() as own:  # two browsers cannot share a profile
        command = [str(CHROMIUM), f"--user-data-dir={own}", *settings, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return done.stdout


def framed(report: Path, width: int, view: str, folder: Path) -> Path:
    """A page that holds the report in a frame of this width: a window cannot be that narrow."""
    held = html.escape(report.read_text(encoding="utf-8"))
    style = f"width: {width}px; height: 1600px; border: 0; display: block"
    page = folder / f"{width}.html"
    page.write_text(
        f'<!doctype html><meta charset="utf-8"><body style="margin: 0" data-view="{view}">'
        f'<iframe style="{style}" srcdoc="{held}"></iframe><script>{LOOK}</script>',
        encoding="utf-8",
    )
    return page


@pytest.mark.parametrize(("width", "scheme"), [*VIEWS, (PAPER, "paper")])
def test_nothing_is_cut_off_and_the_dark_is_dark(
    report: Path, width: int, scheme: str, tmp_path: Path
) -> None:
    address = framed(report, width, scheme, tmp_path).as_uri()
    chosen = f"--blink-settings=preferredColorScheme={int(scheme != 'dark')}"
    size = f"--window-size={max(width, 600)},1600"
    found = re.search("<title>(.*?)</title>", browser(chosen, size, "--dump-dom", address))
    assert found, "the page was not looked at"
    seen = json.loads(html.unescape(found[1]))
    assert seen == {"wide": False, "cut": [], "dark": scheme == "dark", "shown": 24}
    picture = tmp_path / "picture.png"
    browser(chosen, size, f"--screenshot={picture}", address)
    light = imread(picture)[:, :width, :3].mean(axis=2)
    assert light.std() > 0.05, "something is on it"
    rows, columns = (side // TILE for side in light.shape)
    tiles = light[: rows * TILE, : columns * TILE].reshape(rows, TILE, columns, TILE)
    white = (tiles.min(axis=(1, 3)) > 0.93).sum()
    assert (white == 0) == (scheme == "dark"), f"{white} white squares"
    assert np.median(light) < 0.3 if scheme == "dark" else np.median(light) > 0.8
