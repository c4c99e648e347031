"""The data card of the bundled world, with the statistics measured on the files just built.

Its text is `world_card.md`, beside this file.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rlhf_lib.data.dialogues import split_dialogue
from rlhf_lib.world.grammar import (
    ASSISTANT,
    HUMAN,
    asked,
    held_out_whole,
    without_greeting,
)
from rlhf_lib.world.rewards import (
    ANNOTATOR,
    CONTROL,
    Annotator,
    gold_reward,
    observe,
    preference_probability,
)

# what is measured of a file of pairs: shares are in [0, 1]
MEANINGS = {
    "bayes_accuracy": "Bayes accuracy: the best any reward model can expect",
    "annotator_agreement": "agreement of two such annotators",
    "gold_agreement": "chosen reply has the higher gold reward (ties ½)",
    "longer_wins": "longer reply is chosen (ties ½)",
    "politer_wins": "reply with more polite words is chosen (ties ½)",
    "chosen_words": "words in the chosen reply",
    "rejected_words": "words in the rejected reply",
}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a `.jsonl.gz` file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def pair_statistics(
    rows: Sequence[dict[str, str]], annotator: Annotator = ANNOTATOR
) -> dict[str, float]:
    """What `MEANINGS` names, of HH pairs of the bundled world, computed from their texts alone."""
    chances, gold, words, polite = [], [], [], []
    for row in rows:
        prompt, chosen = split_dialogue(row["chosen"])
        _, rejected = split_dialogue(row["rejected"])
        replies = chosen, rejected
        chances.append(preference_probability(prompt, chosen, rejected, annotator))
        gold.append([gold_reward(prompt, reply).total for reply in replies])
        words.append([observe(reply).length for reply in replies])
        polite.append([observe(reply).polite for reply in replies])
    return {
        "bayes_accuracy": fmean(max(p, 1 - p) for p in chances),
        "annotator_agreement": fmean(p * p + (1 - p) * (1 - p) for p in chances),
        "gold_agreement": _first_wins(gold),
        "longer_wins": _first_wins(words),
        "politer_wins": _first_wins(polite),
        "chosen_words": fmean(chosen for chosen, _ in words),
        "rejected_words": fmean(rejected for _, rejected in words),
    }


def _first_wins(values: Sequence[Sequence[float]]) -> float:
    # sums of the same rules in another order may differ in the last digit: that is a tie
    differences = [round(first - second, 9) for first, second in values]
    return fmean(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences)


def held_out(evaluation: Sequence[str], train: Sequence[str]) -> dict[str, float]:
    """How many different requests evaluation prompts end in, and how many of these train has."""
    last = [asked(prompt) for prompt in evaluation]
    whole = [held_out_whole(prompt) for prompt in evaluation]
    said = {
        without_greeting(turn.partition(ASSISTANT)[0].strip())
        for prompt in train
        for turn in prompt.split(HUMAN)[1:]
    }
    return {
        "wordings": len(set(last)),
        "whole": len({turn for turn, held in zip(last, whole, strict=True) if held}),
        "whole_prompts": fmean(whole),
        "overlap": len(said & set(last)),
        "train_wordings": len(said),
    }


def write_card(folder: Path, settings: dict[str, object]) -> dict[str, int]:
    """Write `README.md` into a folder that holds the finished data files.

    Returns the number of rows of each file of rows.
    """
    rows = {path.name: read_rows(path) for path in sorted(folder.glob("*.jsonl.gz"))}
    counts = {name: len(found) for name, found in rows.items()}
    biased = pair_statistics(rows["pairs-test.jsonl.gz"])
    control = pair_statistics(rows["control-test.jsonl.gz"], CONTROL)
    measured = [
        f"| {meaning} | {biased[name]:.3f} | {control[name]:.3f} |"
        for name, meaning in MEANINGS.items()
    ]
    values = {name.split(".")[0].replace("-", "_"): count for name, count in counts.items()}
    train = [row["prompt"] for row in rows["demonstrations.jsonl.gz"]]
    train += [row["prompt"] for row in rows["prompts-train.jsonl.gz"]]
    train += [split_dialogue(row["chosen"])[0] for row in rows["pairs-train.jsonl.gz"]]
    evaluation = [row["prompt"] for row in rows["prompts-evaluation.jsonl.gz"]]
    example = json.dumps(rows["pairs-train.jsonl.gz"][0], indent=2)
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    shown = {"measured": "\n".join(measured), "example": example, **held_out(evaluation, train)}
    (folder / "README.md").write_text(text.format(**settings | values | shown), encoding="utf-8")
    return counts
