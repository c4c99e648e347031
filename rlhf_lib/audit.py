"""What is in the data, measured: lengths, what was cut or left out, biases a reader should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from rlhf_lib.dialogues import turns
from rlhf_lib.encoding import Pair

EXAMPLES = 5  # row numbers kept for each reason
BINS = 24
SIDES = ("prompt", "chosen", "rejected")


class Dropped:
    """Rows left out, counted by reason, with the places of the first few."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}

    def add(self, reason: str, place: str) -> None:
        self._counts[reason] += 1
        places = self._places.setdefault(reason, [])
        if len(places) < EXAMPLES:
            places.append(place)

    def __str__(self) -> str:
        return ", ".join(f"{reason} {n}" for reason, n in self._counts.most_common()) or "none"

    def as_dict(self) -> dict[str, dict]:
        return {
            reason: {"count": count, "first": self._places[reason]}
            for reason, count in self._counts.most_common()
        }


def describe(
    pairs: Sequence[Pair], cut_prompts: set[str], eos_token_id: int, unknown_token_id: int | None
) -> dict:
    """Statistics of one split as JSON values. Lengths in words and tokens (cut, with EOS).

    `cut_prompts`: texts of prompts longer than allowed. Shares are between 0 and 1.
    """
    texts = {side: [getattr(p, f"{side}_text") for p in pairs] for side in SIDES}
    ids = {side: [getattr(p, side) for p in pairs] for side in SIDES}
    words = {side: [len(text.split()) for text in texts[side]] for side in SIDES}
    tokens = {side: [len(row) for row in ids[side]] for side in SIDES}
    conversations = Counter(p.conversation for p in pairs)
    longer = [len(c) > len(r) for c, r in zip(texts["chosen"], texts["rejected"], strict=True)]
    unknown = sum(row.count(unknown_token_id) for rows in ids.values() for row in rows)
    return {
        "pairs": len(pairs),
        "conversations": len(conversations),
        "repeated_first_turns": len(pairs) - len(conversations),
        "multi_turn_share": _share(turns(text) > 1 for text in texts["prompt"]),
        "chosen_longer_share": _share(longer),  # in characters
        "subsets": dict(Counter(p.subset for p in pairs if p.subset)),
        "with_margin": sum(p.margin is not None for p in pairs),
        "words": {side: _summary(words[side]) for side in SIDES},
        "tokens": {side: _summary(tokens[side]) for side in SIDES},
        "truncated_share": {
            "prompt": _share(text in cut_prompts for text in texts["prompt"]),
            "chosen": _share(row[-1] != eos_token_id for row in ids["chosen"]),
            "rejected": _share(row[-1] != eos_token_id for row in ids["rejected"]),
        },
        "unknown_token_share": unknown / sum(map(sum, tokens.values())),
        "empty_prompts": tokens["prompt"].count(0),
        "histogram": _histogram(tokens),
    }


def _share(flags: Iterable[bool]) -> float:
    return float(np.mean(list(flags)))


def _summary(lengths: Sequence[int]) -> dict[str, float]:
    p5, p50, p95 = np.percentile(lengths, (5, 50, 95)).tolist()
    return {
        "mean": float(np.mean(lengths)), "min": min(lengths), "p5": p5, "p50": p50, "p95": p95,
        "max": max(lengths),
    }  # fmt: skip


def _histogram(tokens: dict[str, list[int]]) -> dict[str, dict[str, list[int]]]:
    """Counts of token lengths over bins between `edges`, of which there is one more."""
    plots = {}
    for name, sides in (("prompt", SIDES[:1]), ("reply", SIDES[1:])):
        longest = max(max(tokens[side]) for side in sides)
        edges = np.unique(np.linspace(0, longest, BINS + 1).round().astype(int))
        counts = {side: np.histogram(tokens[side], edges)[0].tolist() for side in sides}
        plots[name] = {"edges": edges.tolist(), **counts}
    return plots
