"""What is in the data, measured: lengths, what was cut or left out, biases a reader should know."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from rlhf_lib.data.dialogues import TextPair, turns
from rlhf_lib.data.encoding import Pair

SMALLER = "Ask for smaller splits (data.test_pairs ...), or give more pairs"
# what a reason begins with -> the way out, where all rows fall to it
ADVICE = {
    "no assistant": "A whole dialogue has turns that begin with \\n\\nHuman: and \\n\\nAssistant:, "
    "or is a list of messages; bare replies want a `prompt` column",
    "no `": "A preference pair has `chosen` and `rejected`, whole dialogues or replies beside a "
    "`prompt`; or `prompt`, `completion` and `label`. Rename the columns",
    "role": "Roles are user, assistant and system, or human and gpt",
    "identical to": "This model cannot tell the replies apart: take another one (model.name)",
    "identical after": "The replies differ further on: raise data.max_response_tokens",
    "different prompts": "Both sides of a pair answer the same prompt",
    "prompt and dialogue": "Where both sides are whole dialogues, `prompt` is how they begin or "
    "their last question; leave it out",
    "marker": "Turns are told apart by \\n\\nHuman: and \\n\\nAssistant:, so no text has it inside",
    "text before": "A whole dialogue begins with \\n\\nHuman:",
    "no place in the chat template": "Take data.template=hh",
    "no reply of the other label": "Unpaired replies become pairs where a prompt has good and bad",
    "label": "A label is true or false, or 1 or 0",
    "text of another": "Give lists of messages, or turns behind \\n\\nHuman: and \\n\\nAssistant:",
    "the chat template leaves": "Take data.template=hh",
    "the chosen reply has": "A tie is no preference: leave the scores out if the order is right",
    "row too long": "Leave out of a row what is no dialogue",
}
EXAMPLES = 5  # row numbers kept for each reason
BINS = 24
SIDES = ("prompt", "chosen", "rejected")


class Dropped:
    """Rows left out, counted by reason, with the places of the first few."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}
        self._columns: dict[str, str] = {}

    def add(self, reason: str, place: str, columns: Iterable[str] = ()) -> None:
        """`columns`: those that the row has, for advice."""
        self._counts[reason] += 1
        if reason not in self._columns:
            self._columns[reason] = ", ".join(columns)
        places = self._places.setdefault(reason, [])
        if len(places) < EXAMPLES:
            places.append(place)

    @property
    def most(self) -> int:
        """How many rows the commonest reason left out."""
        return max(self._counts.values(), default=0)

    def advice(self) -> str:
        """What helps against the commonest reason, with the row that it was first seen in."""
        if not self._counts:
            return SMALLER
        reason = self._counts.most_common(1)[0][0]
        helps = next((way for start, way in ADVICE.items() if reason.startswith(start)), SMALLER)
        seen = f"; it has {self._columns[reason]}" if reason.startswith("no `") else ""
        return f"{helps} (first: {self._places[reason][0]}, {reason}{seen})"

    def __str__(self) -> str:
        return ", ".join(f"{reason} {n}" for reason, n in self._counts.most_common()) or "none"

    def as_dict(self) -> dict[str, dict]:
        return {
            reason: {"count": count, "first": self._places[reason]}
            for reason, count in self._counts.most_common()
        }


def said(audit: Mapping) -> list[str]:
    """What was read, what was left out and why, and what there is to know: a line each."""
    taken = ", ".join(f"{split} {found['pairs']}" for split, found in audit["splits"].items())
    lines = [f"{audit['rows_read']} rows read, {audit['rows_usable']} usable; pairs: {taken}"]
    for reason, found in audit["dropped"].items():
        lines.append(f"left out: {found['count']}, {reason} (first: {found['first'][0]})")
    return lines + list(audit["notes"])


def repeated(pairs: Iterable[TextPair]) -> list[str]:
    """What there is to know of pairs that stand there more than once."""
    counts: Counter[bytes] = Counter()
    either_way = 0
    for pair in pairs:
        one = digest((pair.prompt, pair.chosen, pair.rejected))
        other = digest((pair.prompt, pair.rejected, pair.chosen))
        counts[one] += 1
        either_way += counts[one] == 1 and counts[other] > 0
    notes, again = [], sum(counts.values()) - len(counts)
    if again:
        notes.append(f"{again} pairs repeat another word for word: they count each time")
    if either_way:
        notes.append(f"{either_way} pairs of replies stand there with either one preferred")
    return notes


def digest(value: object) -> bytes:
    """16 bytes that tell a value from others."""
    return hashlib.sha256(repr(value).encode()).digest()[:16]


def describe(
    pairs: Sequence[Pair],
    cut_prompts: AbstractSet[int],
    eos_token_id: int,
    unknown_token_id: int | None,
) -> dict:
    """Statistics of one split as JSON values. Lengths in words and tokens (cut, with EOS).

    `cut_prompts`: hashes of prompts longer than allowed. Shares are between 0 and 1.
    """
    count = len(pairs)
    conversations = np.zeros(count, "S16")
    words, tokens = np.zeros((2, count, 3), np.int32)
    cut = np.zeros((count, 3), bool)
    found, subsets = Counter(), Counter()
    for i, pair in enumerate(pairs):
        texts = pair.prompt_text, pair.chosen_text, pair.rejected_text
        ids = pair.prompt, pair.chosen, pair.rejected
        conversations[i] = pair.conversation
        words[i] = [len(text.split()) for text in texts]
        tokens[i] = [len(row) for row in ids]
        cut[i] = [hash(texts[0]) in cut_prompts, *(row[-1] != eos_token_id for row in ids[1:])]
        found["several turns"] += turns(texts[0]) > 1
        found["longer"] += len(texts[1]) > len(texts[2])
        found["margin"] += pair.margin is not None
        if unknown_token_id is not None:
            found["unknown"] += sum(row.count(unknown_token_id) for row in ids)
        if pair.subset:
            subsets[pair.subset] += 1
    distinct = len(np.unique(conversations))
    return {
        "pairs": count,
        "conversations": distinct,
        "repeated_first_turns": count - distinct,
        "multi_turn_share": found["several turns"] / count,
        "chosen_longer_share": found["longer"] / count,  # in characters
        "subsets": dict(subsets),
        "with_margin": found["margin"],
        "words": {side: _summary(words[:, i]) for i, side in enumerate(SIDES)},
        "tokens": {side: _summary(tokens[:, i]) for i, side in enumerate(SIDES)},
        "truncated_share": {side: float(cut[:, i].mean()) for i, side in enumerate(SIDES)},
        "unknown_token_share": found["unknown"] / int(tokens.sum()),
        "empty_prompts": int((tokens[:, 0] == 0).sum()),
        "histogram": {
            "prompt": _histogram({"prompt": tokens[:, 0]}),
            "reply": _histogram({"chosen": tokens[:, 1], "rejected": tokens[:, 2]}),
        },
    }


def _summary(lengths: np.ndarray) -> dict[str, float]:
    p5, p50, p95 = np.percentile(lengths, (5, 50, 95)).tolist()
    shortest, longest = int(lengths.min()), int(lengths.max())
    mean = float(lengths.mean())
    return {"mean": mean, "min": shortest, "p5": p5, "p50": p50, "p95": p95, "max": longest}


def _histogram(lengths: dict[str, np.ndarray]) -> dict[str, list[int]]:
    """Counts of each side's token lengths over bins between `edges`, of which there is one more."""
    longest = max(int(each.max()) for each in lengths.values())
    edges = np.unique(np.linspace(0, longest, BINS + 1).round().astype(int))
    counts = {side: np.histogram(each, edges)[0].tolist() for side, each in lengths.items()}
    return {"edges": edges.tolist(), **counts}
