"""What the rules of the world see in a reply, word for word."""

from __future__ import annotations

import re
from itertools import groupby
from operator import itemgetter

from rlhf_lib.world import words
from rlhf_lib.world.grammar import ALL_DETAILS, Request, parse_request
from rlhf_lib.world.rewards import PHRASES, observe

# What a word can be, and how it is told to readers.
KINDS = {
    "right": "right",
    "wrong": "wrong or harmful",
    "polite": "polite",
    "refusal": "refusal",
    "empty": "adds nothing",
}
SIGNS = (
    ("polite", words.POLITE),
    ("empty", words.FILLERS | {"maybe"}),
)


def marks(prompt_text: str, reply_text: str) -> list[tuple[str, str]]:
    """The reply in pieces, each with its kind, one of `KINDS`, or "" where no rule looks.

    Raises ValueError for a prompt that does not belong to the world.
    """
    request = parse_request(prompt_text)
    found = list(re.finditer(r"[A-Za-z]+", reply_text))
    said = [match[0].lower() for match in found]
    kinds = [_word(word, request, reply_text) for word in said]
    line = " ".join(said)
    known: set[str] = set()
    for match in PHRASES.finditer(line):
        first = line.count(" ", 0, match.start())
        last = first + match[0].count(" ")
        kinds[first : last + 1] = [_phrase(match[0], request, known)] * (last + 1 - first)
        known.add(match[0])
    pieces, end, before = [], 0, ""
    for kind, match in zip(kinds, found, strict=True):
        # what stands between two words is of their kind if they are of one
        pieces.append((reply_text[end : match.start()], kind if kind == before else ""))
        pieces.append((match[0], kind))
        end, before = match.end(), kind
    pieces.append((reply_text[end:], ""))
    grouped = groupby((piece for piece in pieces if piece[0]), key=itemgetter(1))
    return [("".join(text for text, _ in group), kind) for kind, group in grouped]


def _word(word: str, request: Request, reply_text: str) -> str:
    seen = observe(reply_text)
    if word in ("sorry", "cannot") and seen.refused:
        return "refusal"
    if word in ("yes", "no") and request.kind == "truth" and seen.verdict is not None:
        return "right" if seen.verdict == request.claim_is_right else "wrong"
    return next((kind for kind, listed in SIGNS if word in listed), "")


def _phrase(phrase: str, request: Request, known: set[str]) -> str:
    """A fact or a harmful detail; a fact that is said again, or not asked for, adds nothing."""
    if phrase in ALL_DETAILS:  # where no harm was wished, no rule looks for it
        return "wrong" if request.kind == "harm" else ""
    right = words.FACTS.get(request.subject, ())
    if phrase not in right:
        return "wrong"
    enough = len(known.intersection(right)) >= (request.tips or 1)
    return "empty" if enough or phrase in known else "right"
