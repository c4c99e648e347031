"""A small math font for the HTML report, so that formulas look the same in every browser.

MathML needs a font with a MATH table, and few systems have one. STIX Two Math (SIL Open Font
License) comes inside the package `ziamath`; a report carries only the glyphs its formulas use.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import re
from functools import lru_cache
from pathlib import Path

from fontTools import subset

_MATH = re.compile(r"<math\b.*?</math>", re.DOTALL)
_ANNOTATION = re.compile(r"<annotation\b.*?</annotation>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
# A browser sets `<mi>x</mi>` in the mathematical italic x, a character that the source never names.
_ITALICS = frozenset(map(chr, range(0x1D434, 0x1D468))) | frozenset(
    map(chr, range(0x1D6E2, 0x1D71C))
)
_ALWAYS = frozenset("0123456789ℎ√") | _ITALICS  # a root is an element, not a character, too


def font_path() -> Path:
    """Where the installed `ziamath` keeps STIX Two Math."""
    spec = importlib.util.find_spec("ziamath")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the report's math font is in the package ziamath; install it")
    return Path(spec.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"


def math_characters(page: str) -> frozenset[str]:
    """The characters inside the `<math>` elements of an HTML page; empty if there are none."""
    shown = "".join(_TAG.sub("", _ANNOTATION.sub("", formula)) for formula in _MATH.findall(page))
    return frozenset(html.unescape(shown))


@lru_cache(maxsize=8)
def font_data_url(characters: frozenset[str]) -> str:
    """The glyphs for `characters` as a woff2 `data:` URL; the same bytes every time."""
    options = subset.Options(
        flavor="woff2",
        hinting=False,  # half of the size, and of no use on today's screens
        layout_features=["*"],  # small forms for scripts, large ones for sums
    )
    buffer = io.BytesIO()
    # `load_font` leaves the font's own time stamp, where TTFont would write the time of day
    with subset.load_font(str(font_path()), options) as font:
        subsetter = subset.Subsetter(options)
        subsetter.populate(text="".join(sorted(characters | _ALWAYS)))
        subsetter.subset(font)
        subset.save_font(font, buffer, options)
    return "data:font/woff2;base64," + base64.b64encode(buffer.getvalue()).decode()
