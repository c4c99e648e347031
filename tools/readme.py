"""The README's numbers: blocks between markers, filled from stored JSON.

    python -m tools.readme [README.md] [--figures figures]

<!-- results: offline -->  ... whatever stands here is replaced ...  <!-- end -->

`results: NAME` is a study, `figures/NAME/results.json`; `benchmark: NAME` a measurement of speed or
memory, `benchmarks/results/NAME.json`; `tuning: NAME` a search, `figures/tuning/NAME.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from benchmarks import text as benchmark_text
from rlhf_lib.measure.statistics import interval
from rlhf_lib.results import verdict
from rlhf_lib.results.summary import FORMAT
from rlhf_lib.review import trials
from rlhf_lib.show.costs import total_sentence
from rlhf_lib.show.display import markdown
from rlhf_lib.show.tables import comparison_table

BLOCK = re.compile(
    r"(<!-- (results|benchmark|tuning): ([a-z0-9-]+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL
)
EARLIER = (
    "*These numbers and sentences are those of an earlier state of the code, whose statistics were "
    "other ones (see CHANGELOG): they stand until the study has been measured again.*"
)
JUDGES = {
    "reward_model": "reward model",
    "bag_of_words": "bag of words (TF-IDF, logistic)",
    "learned_length": "length, direction learned",
    "longer_wins": "longer wins",
    "gold": "gold reward",
}


def fill(text: str, figures: Path) -> str:
    """`text` with every block filled anew from its JSON.

    `benchmarks/results` lies beside `figures`. A study that is missing is an error; a comparison
    belongs to one machine, and where nobody has run it yet the block says so.
    """

    def block(match: re.Match[str]) -> str:
        start, kind, name, old, end = match.groups()
        if kind == "results":
            results = json.loads((figures / name / "results.json").read_text())
            shown = summary(results) if results.get("format") == FORMAT else kept(old)
        elif kind == "tuning":
            shown = markdown(trials.table(trials.load(figures / "tuning" / f"{name}.json")))
        else:
            path = figures.parent / "benchmarks" / "results" / f"{name}.json"
            shown = f"Not measured yet: there is no `{path.name}` in `benchmarks/results`."
            if path.exists():
                shown = benchmark_text.summary(json.loads(path.read_text()))
        return f"{start}\n{shown}\n\n{end}"

    return BLOCK.sub(block, text)


def kept(old: str) -> str:
    """What a block said of a study that has not been measured again, marked as such."""
    return f"{EARLIER}\n\n{old.strip().removeprefix(EARLIER).strip()}"


def summary(results: Mapping) -> str:
    """Verdict, judges of pairs, policies and time of one study, as Markdown."""
    accuracy = results["reward_model"]["accuracy"]
    shown = {
        label: interval(accuracy[key], 1, percent=True)
        for key, label in JUDGES.items()
        if key in accuracy
    }
    if ceiling := results["reward_model"].get("ceiling"):
        shown["reachable ceiling"] = f"{ceiling:.1%}"
    judges = pd.DataFrame({"judge of held-out pairs": shown.keys(), "accuracy": shown.values()})
    tables = markdown(judges), markdown(comparison_table(results))
    return "\n\n".join([*verdict.sentences(results), *tables, total_sentence(results)])


def main(
    text: Annotated[Path, typer.Argument()] = Path("README.md"), figures: Path = Path("figures")
) -> None:
    """Fill the blocks of a text from the studies that were exported to --figures."""
    text.write_text(fill(text.read_text(), figures))


if __name__ == "__main__":
    typer.run(main)
