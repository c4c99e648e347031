"""You are the annotator: label pairs without seeing their labels, and see with whom you agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from textwrap import shorten

import ipywidgets
import numpy as np
import pandas as pd

from rlhf_lib.data.encoding import Pair
from rlhf_lib.measure.statistics import interval, share
from rlhf_lib.show.display import table_bundle
from rlhf_lib.show.widgets import offer
from rlhf_lib.world.grammar import last_request

COUNT, TWIN = 30, 3  # pairs to label, and how many of them the report prints
CAPTION = (
    "How often the judges of these {count} pairs agree with each other, with Jeffreys' 95 % "
    "intervals; a judge that does not tell two replies apart agrees by half. You are one of them "
    "where this notebook is open: read both replies and press a button, {count} times."
)


class Annotator:
    """Some pairs, each with its replies in an order drawn anew, and the reader's choices.

    judges: name -> (pairs,) numbers above 0 where it prefers the chosen reply, below where the
    rejected one. The labels themselves are one of them. Raises ValueError for another length.
    """

    def __init__(
        self, pairs: Sequence[Pair], judges: Mapping[str, Sequence[float]], seed: int = 0
    ) -> None:
        if any(len(prefers) != len(pairs) for prefers in judges.values()):
            raise ValueError(f"a judge has no preference for each of the {len(pairs)} pairs")
        draw = np.random.default_rng(seed)
        self.places = draw.permutation(len(pairs))[:COUNT]
        self.pairs = [pairs[int(place)] for place in self.places]
        self.judges = {k: np.sign(np.asarray(v, float)[self.places]) for k, v in judges.items()}
        self.chosen_first = draw.random(len(self.pairs)) < 0.5
        self.said: list[float] = []  # 1 where the reader took the chosen reply, 0 for no choice

    def replies(self, place: int) -> tuple[str, str]:
        """Both replies of a pair in the order in which they are shown."""
        pair = self.pairs[place]
        sides = pair.chosen_text.strip(), pair.rejected_text.strip()
        return sides if self.chosen_first[place] else (sides[1], sides[0])

    def answer(self, first: bool | None) -> None:
        """The first reply of the next pair is the better one, or the second; None: neither."""
        chosen = first == self.chosen_first[len(self.said)]
        self.said.append(0.0 if first is None else 1.0 if chosen else -1.0)

    def agreement(self) -> pd.DataFrame:
        """How often every judge, the reader among them, agrees with every other."""
        heard = {**self.judges, **({"you": np.array(self.said)} if self.said else {})}
        names, rows = list(heard), []
        for name in names:
            row = {"judge": name}
            for other in names:
                seen = min(len(heard[name]), len(heard[other]))
                same = (1 + heard[name][:seen] * heard[other][:seen]) / 2
                row[f"with {other}"] = "" if name == other else interval(share(same), 0, True)
            rows.append(row)
        return pd.DataFrame(rows)

    def control(self) -> ipywidgets.VBox:
        """The next pair over three buttons, and the agreement so far under them."""
        page, found = ipywidgets.HTML(), ipywidgets.HTML()
        labels = {"the first is better": True, "the second is better": False, "no difference": None}
        buttons = [ipywidgets.Button(description=text) for text in labels]

        def turn() -> None:
            if self.said:
                found.value = table_bundle(self.agreement())["text/html"]
            if len(self.said) < len(self.pairs):
                page.value = self._markup(len(self.said))
            else:
                page.value = "<p>That was the last pair.</p>"
                for button in buttons:
                    button.disabled = True

        def take(first: bool | None) -> Callable[[object], None]:
            def pressed(_: object) -> None:
                self.answer(first)
                turn()

            return pressed

        for button, first in zip(buttons, labels.values(), strict=True):
            button.on_click(take(first))
        turn()
        return ipywidgets.VBox([page, ipywidgets.HBox(buttons), found])

    def _markup(self, place: int) -> str:
        request = escape(last_request(self.pairs[place].prompt_text))
        first, second = (escape(text) for text in self.replies(place))
        return (
            f"<p>Pair {place + 1} of {len(self.pairs)}. <b>{request}</b></p>"
            f"<p>First: {first}</p><p>Second: {second}</p>"
        )

    def show(self) -> None:
        """Display the judges' agreement, with the buttons over it where somebody can press them."""
        caption = CAPTION.format(count=len(self.pairs))
        offer(table_bundle(self.agreement()), "table", caption, self.control)

    def some(self) -> pd.DataFrame:
        """The first pairs as the reader sees them, and which reply is labelled better."""
        rows = [
            {
                "request": shorten(last_request(self.pairs[place].prompt_text), 160),
                "first reply": shorten(self.replies(place)[0], 160),
                "second reply": shorten(self.replies(place)[1], 160),
                "labelled better": "first" if self.chosen_first[place] else "second",
            }
            for place in range(min(TWIN, len(self.pairs)))
        ]
        return pd.DataFrame(rows)
