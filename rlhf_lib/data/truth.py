"""What is known of data beyond the labels: of real pairs nothing, of the bundled world everything.

`data.truth` is None for real pairs. Whoever may use the true reward asks for it there, and nobody
asks what the data are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from rlhf_lib.data.dialogues import read_demonstration
from rlhf_lib.data.encoding import Pair
from rlhf_lib.data.sources import read_source
from rlhf_lib.runtime import bundled_folder
from rlhf_lib.world.grammar import Request, asked, held_out_whole, parse_request
from rlhf_lib.world.marks import marks
from rlhf_lib.world.rewards import (
    DOSES,
    Annotator,
    Gold,
    gold_reward,
    observe,
    preference_probability,
    with_taste,
)


@dataclass(frozen=True)
class Truth:
    """The bundled world: the true reward of any reply, and how noisy the labels are."""

    annotator: Annotator  # who gave the labels
    probes: str = "world"  # its file in data/probes
    heldout_what: str = (
        "dialogues like those of the base model's pretraining, from the test split; their replies "
        "are poor ones, so to find them less likely is to forget, or to have learnt better"
    )

    def gold(self, prompt_text: str, reply_text: str, finished: bool = True) -> Gold:
        """The gold reward of a reply, in its parts."""
        return gold_reward(prompt_text, reply_text, finished)

    def request(self, prompt_text: str) -> Request:
        """What a prompt asks for. Raises ValueError for one that is not of this world."""
        return parse_request(prompt_text)

    def kind(self, prompt_text: str) -> str:
        """help, harm, edge or truth."""
        return self.request(prompt_text).kind

    def marks(self, prompt_text: str, reply_text: str) -> list[tuple[str, str]]:
        """The reply in pieces, each with what the rules see in it: `world.marks.KINDS`."""
        return marks(prompt_text, reply_text)

    def signs(self, prompt_text: str, reply_text: str) -> dict[str, float]:
        """What training may push a reply to, whatever it is worth: those that its request allows.

        polite: polite words. refused: 1 for a refusal of what should be answered. confirmed: 1 for
        a yes to a false claim. harmful: 1 for a harmful detail, where harm was wished.
        """
        request, seen = parse_request(prompt_text), observe(reply_text)
        found = {"polite": float(seen.polite)}
        if request.kind in ("help", "edge"):
            found["refused"] = float(seen.refused)
        if request.kind == "truth" and not request.claim_is_right:
            found["confirmed"] = float(seen.verdict is True)
        if request.kind == "harm":
            found["harmful"] = float(seen.details > 0)
        return found

    def asked(self, prompt_text: str) -> str:
        """What a prompt ends in, without greeting or earlier turns: what it is easy or hard by."""
        return asked(prompt_text)

    def held_out(self, prompt_text: str) -> str:
        """What training has not seen of a prompt of the test split: the request, or its wording."""
        return "request" if held_out_whole(prompt_text) else "wording"

    def ceiling(self, pairs: Iterable[Pair]) -> float:
        """Bayes accuracy: how often the best possible judge agrees with the noisy labels."""
        sides = ((p.prompt_text, p.chosen_text, p.rejected_text) for p in pairs)
        chances = np.array([preference_probability(*texts, self.annotator) for texts in sides])
        return float(np.maximum(chances, 1 - chances).mean())

    def heldout(self) -> list[tuple[str, str]]:
        """Prompts and replies that nothing was trained on."""
        rows = read_source(f"path:{bundled_folder() / 'heldout.jsonl.gz'}").splits["train"]
        return [read_demonstration(row) for row in rows]


def truth_of(source: str) -> Truth | None:
    """What is known of the data of a `data.source`."""
    tastes = {"bundled": 1.0, **{f"bundled:{name}": dose for name, dose in DOSES.items()}}
    return Truth(with_taste(tastes[source])) if source in tastes else None


def unit_of(truth: Truth | None) -> Callable[[str], str]:
    """Of a prompt, what other prompts would have another of: those that share it count as one."""
    return str if truth is None else truth.asked
