"""The replies of all policies to the same requests, to be read beside each other.

One request unfolds at a time, without a script: by mouse, by keyboard, on a phone. The words that
the rules of the world count are marked, and the rewards are drawn as bars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite

from IPython.display import display

from rlhf_lib.catalogue import label
from rlhf_lib.data.truth import Truth
from rlhf_lib.world.grammar import last_request
from rlhf_lib.world.marks import KINDS

OF_A_KIND, OF_ONE = 6, 24  # requests of each of the world's four kinds, or of real pairs
PRINTED = 1  # of each kind, in the PDF
RULE = (
    "The first {count} requests {of} in the order of the evaluation, whatever was replied; of each "
    "policy its first reply, in the first seed. Every reply to every request stands in samples/, "
    "beside results.json, with its rewards and its KL."
)
REWARDS = ("proxy", "gold", "judge")
CELLS = 8  # of a bar
# Where no style sheet is at hand, as in a live notebook; the report has its own.
STYLES = {
    "right": "color: #1a7f37; text-decoration: underline",
    "wrong": "color: #c4312b; text-decoration: line-through",
    "polite": "color: #8250df; font-style: italic",
    "refusal": "color: #0969da; font-weight: 600",
    "empty": "color: #7d6608; text-decoration: underline dotted",
}

Samples = Mapping[str, Sequence[Mapping]]  # policy -> rows with prompt, response, rewards


def read(samples: Samples, truth: Truth | None) -> None:
    """Display the reader, and by what rule its requests were chosen."""
    shown = chosen([row["prompt"] for row in next(iter(samples.values()))], truth)
    of = "of each kind" if truth else "there are"
    rule = RULE.format(count=OF_A_KIND if truth else OF_ONE, of=of)
    legend = ", ".join(mark(kind, name) for kind, name in KINDS.items())
    opening = f"<p>{rule}</p>" + (f"<p>Marked: {legend}.</p>" if truth else "")
    cases = [Case(number, prompt, samples, truth) for number, prompt in enumerate(shown, 1)]
    ends = {key: _ends(cases, key) for key in REWARDS}
    kinds = [case.kind for case in cases]
    first = {i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < PRINTED}
    markup = [case.html(ends, printed=i in first) for i, case in enumerate(cases)]
    plain = "\n\n".join([rule, *(case.text() for case in cases)])
    display({"text/html": "\n".join([opening, *markup]), "text/plain": plain}, raw=True)


def chosen(prompts: Sequence[str], truth: Truth | None) -> list[str]:
    """By `RULE`, kinds together; each prompt once."""
    asked = list(dict.fromkeys(prompts))
    if truth is None:
        return asked[:OF_ONE]
    kinds: dict[str, list[str]] = {}
    for prompt in asked:
        kinds.setdefault(truth.kind(prompt), []).append(prompt)
    return [prompt for kind in sorted(kinds) for prompt in kinds[kind][:OF_A_KIND]]


class Case:
    """One request and what each policy replied to it."""

    def __init__(self, number: int, prompt: str, samples: Samples, truth: Truth | None) -> None:
        self.number, self.prompt, self.truth = number, prompt, truth
        self.kind = truth.kind(prompt) if truth else ""
        self.rows: dict[str, Mapping] = {}
        for policy, rows in samples.items():
            found = next((row for row in rows if row["prompt"] == prompt), None)
            if found is None:
                raise KeyError(f"{policy} has no reply to the prompt {prompt[:80]!r}")
            self.rows[policy] = found

    def rewards(self, row: Mapping) -> dict[str, float]:
        known = {key: row[key] for key in REWARDS if row.get(key) is not None}
        return {key: value for key, value in known.items() if isfinite(value)}

    def title(self) -> str:
        asked = last_request(self.prompt)
        return " · ".join(filter(None, (str(self.number), self.kind, asked)))

    def html(self, ends: Mapping[str, tuple[float, float]], printed: bool) -> str:
        """Folded, but for those that a PDF shows: `printed`."""
        replies = []
        for policy, row in self.rows.items():
            bars = " ".join(
                f'<span class="bar {key}">{key} {bar(value, *ends[key])} {number(value)}</span>'
                for key, value in self.rewards(row).items()
            )
            said = self._marked(row["response"]) + ("" if row.get("finished", True) else " (cut)")
            replies.append(f"<p><b>{escape(label(policy))}</b> {said}<br>{bars}</p>")
        start = '<details class="reading printed">' if printed else '<details class="reading">'
        summary = f"<summary>{escape(self.title())}</summary>"
        return "\n".join([start, summary, *replies, "</details>"])

    def _marked(self, reply: str) -> str:
        if self.truth is None:
            return escape(reply)
        pieces = self.truth.marks(self.prompt, reply)
        return "".join(mark(kind, text) if kind else escape(text) for text, kind in pieces)

    def text(self) -> str:
        rewards = {
            policy: ", ".join(f"{key} {value:.2f}" for key, value in self.rewards(row).items())
            for policy, row in self.rows.items()
        }
        said = [f"  {label(p)}:{row['response']} [{rewards[p]}]" for p, row in self.rows.items()]
        return "\n".join([self.title(), *said])


def mark(kind: str, text: str) -> str:
    """A piece of a reply as HTML, in the style of its kind."""
    return f'<span class="{kind}" style="{STYLES[kind]}">{escape(text)}</span>'


def bar(value: float, low: float, high: float) -> str:
    """Filled from the lowest to the highest of what is shown: `▇▇▇▇▁▁▁▁`."""
    filled = round(CELLS * (value - low) / (high - low)) if high > low else CELLS
    return "▇" * filled + "▁" * (CELLS - filled)


def number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _ends(cases: Sequence[Case], key: str) -> tuple[float, float]:
    known = [case.rewards(row) for case in cases for row in case.rows.values()]
    values = [rewards[key] for rewards in known if key in rewards]
    return (min(values), max(values)) if values else (0.0, 1.0)
