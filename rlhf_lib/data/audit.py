"""What is in the data, measured: lengths, what was cut or left out, biases a reader should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from rlhf_lib.data.dialogues import turns
from rlhf_lib.data.encoding import Pair

EXAMPLES = 5  # row numbers kept for each reason
BINS = 24
SIDES = ("prompt", "chosen", "rejected")
# what is kept of a pair while its split is measured: 57 bytes
MEASURED = np.dtype([
    ("conversation", "S16"), ("words", "i4", 3), ("tokens", "i4", 3), ("unknown", "i4"),
    ("several_turns", bool), ("longer", bool), ("margin", bool), ("cut", bool, 3),
])  # fmt: skip


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
    pairs: Sequence[Pair],
    cut_prompts: AbstractSet[int],
    eos_token_id: int,
    unknown_token_id: int | None,
) -> dict:
    """Statistics of one split as JSON values. Lengths in words and tokens (cut, with EOS).

    `cut_prompts`: hashes of prompts longer than allowed. Shares are between 0 and 1.
    """

    unknown = -1 if unknown_token_id is None else unknown_token_id

    def measure(pair: Pair) -> tuple:
        texts = pair.prompt_text, pair.chosen_text, pair.rejected_text
        ids = pair.prompt, pair.chosen, pair.rejected
        cut = hash(texts[0]) in cut_prompts, *(reply[-1] != eos_token_id for reply in ids[1:])
        return (
            pair.conversation, [len(text.split()) for text in texts], list(map(len, ids)),
            sum(row.count(unknown) for row in ids), turns(texts[0]) > 1,
            len(texts[1]) > len(texts[2]), pair.margin is not None, cut,
        )  # fmt: skip

    subsets: Counter[str] = Counter()
    rows = np.zeros(len(pairs), MEASURED)
    for i, pair in enumerate(pairs):
        rows[i] = measure(pair)
        subsets.update([pair.subset] if pair.subset else [])
    words, tokens, cut = (
        {side: rows[name][:, i] for i, side in enumerate(SIDES)}
        for name in ("words", "tokens", "cut")
    )
    conversations = len(np.unique(rows["conversation"]))
    return {
        "pairs": len(pairs),
        "conversations": conversations,
        "repeated_first_turns": len(pairs) - conversations,
        "multi_turn_share": float(rows["several_turns"].mean()),
        "chosen_longer_share": float(rows["longer"].mean()),  # in characters
        "subsets": dict(subsets),
        "with_margin": int(rows["margin"].sum()),
        "words": {side: _summary(words[side]) for side in SIDES},
        "tokens": {side: _summary(tokens[side]) for side in SIDES},
        "truncated_share": {side: float(cut[side].mean()) for side in SIDES},
        "unknown_token_share": int(rows["unknown"].sum()) / int(rows["tokens"].sum()),
        "empty_prompts": int((tokens["prompt"] == 0).sum()),
        "histogram": _histogram(tokens),
    }


def _summary(lengths: np.ndarray) -> dict[str, float]:
    p5, p50, p95 = np.percentile(lengths, (5, 50, 95)).tolist()
    return {
        "mean": float(lengths.mean()), "min": int(lengths.min()), "p5": p5, "p50": p50,
        "p95": p95, "max": int(lengths.max()),
    }  # fmt: skip


def _histogram(tokens: dict[str, np.ndarray]) -> dict[str, dict[str, list[int]]]:
    """Counts of token lengths over bins between `edges`, of which there is one more."""
    plots = {}
    for name, sides in (("prompt", SIDES[:1]), ("reply", SIDES[1:])):
        longest = max(int(tokens[side].max()) for side in sides)
        edges = np.unique(np.linspace(0, longest, BINS + 1).round().astype(int))
        counts = {side: np.histogram(tokens[side], edges)[0].tolist() for side in sides}
        plots[name] = {"edges": edges.tolist(), **counts}
    return plots
