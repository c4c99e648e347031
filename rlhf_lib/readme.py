"""The README's numbers: blocks between markers, filled from the JSON in `figures/`.

<!-- results: offline -->  ... whatever stands here is replaced ...  <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from rlhf_lib import verdict
from rlhf_lib.display import comparison_table, cost_table, interval

LINK = re.compile(r"\]\(([^)]+)\)")
BLOCK = re.compile(r"(<!-- results: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, figures: Path) -> str:
    """`text` with every block filled anew from `figures/<name>/results.json`."""

    def block(match: re.Match[str]) -> str:
        results = json.loads((figures / match[2] / "results.json").read_text())
        return f"{match[1]}\n{summary(results)}\n\n{match[3]}"

    return BLOCK.sub(block, text)


def summary(results: Mapping) -> str:
    """Verdict, judges of pairs, policies and costs of one study, as Markdown."""
    parts = [*verdict.sentences(results), _markdown(_judges(results))]
    parts += [_markdown(comparison_table(results)), _markdown(cost_table(results))]
    return "\n\n".join(parts)


def _judges(results: Mapping) -> pd.DataFrame:
    accuracy = results["reward_model"]["accuracy"]
    names = {
        "reward_model": "reward model", "bag_of_words": "bag of words (TF-IDF, logistic)",
        "learned_length": "length, direction learned", "longer_wins": "longer wins",
        "gold": "gold reward",
    }  # fmt: skip
    rows = [
        {"judge of held-out pairs": label, "accuracy": interval(accuracy[key], 1, percent=True)}
        for key, label in names.items()
        if key in accuracy
    ]
    ceiling = results["reward_model"].get("ceiling")
    if ceiling:
        rows.append({"judge of held-out pairs": "reachable ceiling", "accuracy": f"{ceiling:.1%}"})
    return pd.DataFrame(rows)


def _markdown(frame: pd.DataFrame) -> str:
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
