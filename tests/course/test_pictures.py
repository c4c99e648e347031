"""The course's pictures: files that exist, runs that can be told apart."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import rlhf_lib
from rlhf_lib.course import pictures

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def test_every_notebook_has_a_diagram_and_every_box_a_file() -> None:
    assert sorted(pictures.DIAGRAMS) == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    for columns in pictures.DIAGRAMS.values():
        for box in (box for column in columns for box in column):
            assert Path(rlhf_lib.__file__).with_name(box.file.split("/")[0]).is_dir()
            assert (Path(rlhf_lib.__file__).parent / box.file).is_file(), box.file


@pytest.mark.parametrize("chapter", pictures.DIAGRAMS)
def test_what_a_box_says_stays_within_it(chapter: str) -> None:
    figure = pictures.diagram(chapter)
    (axis,) = figure.axes
    figure.canvas.draw()
    boxes = [patch.get_window_extent() for patch in axis.patches]
    texts = [text for text in axis.texts if text.get_text()]
    assert len(texts) == 2 * len(boxes)
    for text in texts:
        around = text.get_window_extent()
        assert any(
            box.x0 <= around.x0
            and around.x1 <= box.x1
            and box.y0 <= around.y0 <= around.y1 <= box.y1
            for box in boxes
        ), text.get_text()
    for upper, lower in zip(texts[::2], texts[1::2], strict=True):
        assert not upper.get_window_extent().overlaps(lower.get_window_extent()), upper.get_text()


def test_a_trial_draws_both_runs_in_every_panel() -> None:
    runs = {
        "as it should be": [{"kl": x, "gold": 1.0} for x in range(3)],
        "a mistake": [{"kl": -x, "gold": 0.0} for x in range(3)],
    }
    figure = pictures.trial(runs, {"kl": "KL", "gold": "gold reward"}, "#0072b2")
    for axis, title in zip(figure.axes, ("KL", "gold reward"), strict=True):
        assert axis.get_title() == title
        right, wrong = axis.lines
        assert (right.get_color(), wrong.get_color()) == ("#0072b2", pictures.WRONG)
    assert figure.axes[0].lines[1].get_ydata().tolist() == [0, -1, -2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)


def test_the_steps_have_one_panel_an_update() -> None:
    frames = [pd.DataFrame({"advantage": [1.0, -1.0], "change": [0.1 * i, -0.2]}) for i in (1, 2)]
    figure = pictures.steps(frames, "#0072b2")
    assert [axis.get_title() for axis in figure.axes] == ["update 1", "update 2"]
    assert figure.axes[1].lines[-1].get_ydata().tolist() == [0.2, -0.2]
