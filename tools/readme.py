"""The README's numbers: blocks between markers, filled from stored JSON.

<!-- results: offline -->  ... whatever stands here is replaced ...  <!-- end -->

`results: NAME` is a study, `figures/NAME/results.json`; `benchmark: NAME` a measurement of speed or
memory, `benchmarks/results/NAME.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from benchmarks import text as benchmark_text
from rlhf_lib.measure.statistics import interval
from rlhf_lib.results import verdict
from rlhf_lib.show.display import markdown
from rlhf_lib.show.tables import comparison_table, total_sentence

LINK = re.compile(r"\]\(([^)]+)\)")
BLOCK = re.compile(r"(<!-- results: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
BENCHMARK = re.compile(r"(<!-- benchmark: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, figures: Path, benchmarks: Path | None = None) -> str:
    """`text` with every block filled anew from its JSON.

    `benchmarks` is where the comparisons lie: where it is left out, `benchmarks/results` beside
    `figures`. A study that is missing is an error; a comparison belongs to one machine, and where
    nobody has run it yet the block says so.
    """
    measured = benchmarks or figures.parent / "benchmarks" / "results"

    def block(match: re.Match[str]) -> str:
        results = json.loads((figures / match[2] / "results.json").read_text())
        return f"{match[1]}\n{summary(results)}\n\n{match[3]}"

    def benchmark(match: re.Match[str]) -> str:
        path = measured / f"{match[2]}.json"
        shown = f"Not measured yet: there is no `{path.name}` in `benchmarks/results`."
        if path.exists():
            shown = benchmark_text.summary(json.loads(path.read_text()))
        return f"{match[1]}\n{shown}\n\n{match[3]}"

    return BENCHMARK.sub(benchmark, BLOCK.sub(block, text))


def summary(results: Mapping) -> str:
    """Verdict, judges of pairs, policies and time of one study, as Markdown."""
    tables = markdown(_judges(results)), markdown(comparison_table(results))
    return "\n\n".join([*verdict.sentences(results), *tables, total_sentence(results)])


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
