"""Blocks of a page that a command writes: what stands between two markers is replaced.

<!-- NAME: ... -->  ...  <!-- end -->
"""

from __future__ import annotations

import re
from pathlib import Path


def write_block(page: Path, name: str, text: str) -> None:
    """Replace the block `name` of a page. Raises ValueError where it has none."""
    pattern = rf"(<!-- {re.escape(name)}\b[^>]*-->\n).*?(<!-- end -->)"
    old = page.read_text(encoding="utf-8")
    new, found = re.subn(pattern, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", old, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"{page} has {found} blocks {name!r}, and should have one")
    page.write_text(new, encoding="utf-8")
