"""Scripts that the PDF can draw, and the warning where it cannot."""

from __future__ import annotations

import warnings

import pytest

from rlhf_lib.report import scripts

PLAIN = "Reward, Grüße, λόγος, Привет, 0.5 ≤ β → ∞ \u200b\n"


def test_what_comes_with_the_packages_is_enough_for_latin_greek_and_signs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not scripts.fonts_for(PLAIN)


@pytest.mark.parametrize(
    ("text", "name"),
    [("你好", "Cjk"), ("नमस्ते", "Devanagari"), ("🦜", "emoji"), ("ሰላም", "Ethiopic")],
)
def test_a_script_without_a_font_is_named(
    text: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "findSystemFonts", list)
    with pytest.warns(UserWarning, match=f"no font on this machine draws {name} "):
        assert scripts.fonts_for(PLAIN + text)


def test_a_font_of_the_system_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts, "findSystemFonts", lambda: ["a.ttf"])
    known = scripts.drawn([str(scripts.DEJAVU / "DejaVuSans.ttf")])
    monkeypatch.setattr(scripts, "drawn", lambda fonts: {*"你好"} if "a.ttf" in fonts else known)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scripts.fonts_for("你好")


def test_a_font_that_cannot_be_read_draws_nothing(tmp_path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert scripts.drawn([str(tmp_path / "broken.ttf"), str(tmp_path / "none.ttf")]) == set()
