"""Which scripts of a text no font on this machine can draw.

The PDF is set in fonts that come with the packages: Latin, Greek, Cyrillic and signs, and some
more. Text in another script takes the system's fonts, where it has some.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import matplotlib as mpl
from fontTools.ttLib import TTFont, TTLibError
from matplotlib.font_manager import findSystemFonts

from rlhf_lib.report.mathfont import font_path

DEJAVU = Path(mpl.get_data_path()) / "fonts" / "ttf"
INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Mn", "Zs", "Zl", "Zp")  # what needs no glyph of its own


def fonts_for(text: str) -> bool:
    """Whether the system's fonts are wanted for a text; warns of scripts that none of them has."""
    wanted = {c for c in text if unicodedata.category(c) not in INVISIBLE}
    wanted -= drawn([str(DEJAVU / "DejaVuSans.ttf"), str(font_path())])
    if not wanted:
        return False
    if left := wanted - drawn(findSystemFonts()):
        examples: dict[str, str] = {}
        for character in sorted(left):
            examples.setdefault(script(character), character)
        named = ", ".join(f"{name} ({example})" for name, example in examples.items())
        warnings.warn(
            f"no font on this machine draws {named}: in the PDF there are gaps; install fonts of "
            "these scripts (Noto has all of them; Debian: fonts-noto)",
            stacklevel=3,
        )
    return True


def script(character: str) -> str:
    """The script of a character, as its name in Unicode begins: Devanagari, Arabic, CJK."""
    first = unicodedata.name(character, "unknown").split()[0]
    return "emoji" if unicodedata.category(character) == "So" else first.capitalize()


def drawn(fonts: Iterable[str]) -> set[str]:
    """All characters that some of these font files have a glyph for."""
    return set().union(*map(_glyphs, fonts))


@cache
def _glyphs(font: str) -> frozenset[str]:
    try:
        with open(font, "rb") as file, TTFont(file, fontNumber=0, lazy=True) as read:
            return frozenset(map(chr, read.getBestCmap() or {}))
    except (TTLibError, OSError):  # of a kind that fontTools does not read
        return frozenset()
