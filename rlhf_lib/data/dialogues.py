"""What a row means: prompt, chosen and rejected reply, in HH format, whatever format it came in.

HH format is one text: turns that begin with "\\n\\nHuman:" and "\\n\\nAssistant:". A prompt here
ends with the marker of the reply, and a reply begins with a space.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

from rlhf_lib.data.sources import DataError, Row
from rlhf_lib.world.grammar import ASSISTANT, HUMAN

MARKERS = {"user": HUMAN, "assistant": ASSISTANT, "system": "\n\nSystem:"}
MAX_CHARACTERS = 50_000  # of one row: beyond it something other than a dialogue was pasted


class Unusable(Exception):
    """A row to leave out and to count; the message is the reason."""


@dataclass(frozen=True)
class TextPair:
    """One preference pair as text. `conversation` is the same for rows with the same first turn."""

    conversation: str
    prompt: str
    chosen: str
    rejected: str
    margin: float | None
    subset: str | None
    place: str


def read_pair(row: Row) -> TextPair:
    """The pair in a row of HH dialogues, of explicit prompt and replies, or of message lists.

    Raises Unusable with the reason for a row to skip; DataError for one of another shape.
    """
    chosen, rejected = _need(row, "chosen"), _need(row, "rejected")
    if _size(chosen) + _size(rejected) + _size(row.values.get("prompt")) > MAX_CHARACTERS:
        raise Unusable("row too long")
    prompt, chosen_reply = _side(row, "chosen", chosen)
    other_prompt, rejected_reply = _side(row, "rejected", rejected)
    if prompt != other_prompt:
        raise Unusable("different prompts")
    if not re.sub("|".join(MARKERS.values()), "", prompt).strip():
        raise Unusable("empty prompt")
    if not chosen_reply or not rejected_reply:
        raise Unusable("empty reply")
    if chosen_reply == rejected_reply:
        raise Unusable("identical replies")
    _check_unicode(prompt, chosen_reply, rejected_reply)
    replies = f" {chosen_reply}", f" {rejected_reply}"
    return TextPair(conversation_key(prompt), prompt, *replies, _margin(row), row.subset, row.place)


def read_demonstration(row: Row) -> tuple[str, str]:
    """(prompt, reply) of a row with the keys `prompt` and `response`."""
    reply = _text(row, "response").strip()
    if not reply:
        raise Unusable("empty reply")
    return read_prompt(row), f" {reply}"


def read_prompt(row: Row) -> str:
    """The prompt of a row with the key `prompt`."""
    return as_prompt(_text(row, "prompt"))


def conversation_key(prompt: str) -> str:
    """A key of the first human turn, whatever its case: rows that share it belong together."""
    parts = re.split("|".join(MARKERS.values()), prompt.partition(HUMAN)[2] or prompt)
    return hashlib.sha256(parts[0].strip().lower().encode()).hexdigest()[:16]


def turns(prompt: str) -> int:
    """Human turns in a prompt."""
    return prompt.count(HUMAN)


def as_prompt(text: str) -> str:
    """HH format that ends with the assistant's marker; plain text becomes a human turn."""
    text = _canonical(text)
    if HUMAN not in text:
        text = f"{HUMAN} {text.strip()}"
    return text.rstrip().removesuffix(ASSISTANT) + ASSISTANT


def split_dialogue(dialogue: str) -> tuple[str, str]:
    """(prompt, reply) of an HH dialogue, cut at its last assistant marker.

    The first marker would take an early turn for all of it (three quarters of HH has several).
    """
    prompt, marker, reply = _canonical(dialogue).rpartition(ASSISTANT)
    if not marker:
        raise Unusable("no assistant marker")
    return prompt + marker, reply.strip()


# --------------------------------------------------------------------------------------- formats


def _side(row: Row, key: str, value: Any) -> tuple[str, str]:
    """(prompt, reply) of one side; the prompt may stand in its own column or inside the side."""
    given = row.values.get("prompt")
    if isinstance(given, list):
        given = _join(_messages(row, "prompt", given))
    if given is not None and not isinstance(given, str):
        raise _wrong_type(row, "prompt", given, "a text or a list of messages")
    if isinstance(value, list):
        *before, last = _messages(row, key, value)
        if last["role"] != "assistant":
            raise Unusable("no assistant reply")
        if before and given and before[0]["role"] == "assistant":
            raise Unusable("reply of several turns")
        # where a side repeats the whole conversation, it is the fuller source of the prompt
        prompt = _join(before) if before else given
        return as_prompt(prompt) if prompt else ASSISTANT, last["content"].strip()
    if not isinstance(value, str):
        raise _wrong_type(row, key, value, "a text or a list of messages")
    if given is None:
        return split_dialogue(value)
    prompt = as_prompt(given) if given.strip() else ASSISTANT
    # some exports keep the prompt in its own column and at the head of both sides as well
    return prompt, _canonical(value).removeprefix(prompt).removeprefix(ASSISTANT).strip()


def _messages(row: Row, key: str, messages: list) -> list[dict]:
    """The messages of a list, checked. Raises DataError; Unusable for a role that HH lacks."""
    if not messages:
        raise Unusable("no assistant reply")
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str):
            raise _wrong_type(row, key, message, 'messages like {"role": "user", "content": "Hi"}')
        if message.get("role") not in MARKERS:
            raise Unusable(f"role {message.get('role')!r}")
    return messages


def _join(messages: list[dict]) -> str:
    return "".join(f"{MARKERS[m['role']]} {m['content'].strip()}" for m in messages)


def _canonical(text: str) -> str:
    """HH text whose leading newlines somebody stripped gets them back."""
    bare = text.lstrip()
    return f"\n\n{bare}" if bare.startswith(("Human:", "Assistant:")) else text


# ---------------------------------------------------------------------------------------- checks


def _need(row: Row, key: str) -> Any:
    value = row.values.get(key)
    if value is None:
        found = ", ".join(f"`{k}`" for k, v in row.values.items() if v is not None) or "nothing"
        raise DataError(
            f"{row.place}: no `{key}`; the row has {found}. A preference pair has `chosen` and "
            "`rejected`: whole dialogues, or replies beside a `prompt`; rename the columns"
        )
    return value


def _text(row: Row, key: str) -> str:
    value = row.values.get(key)
    if not isinstance(value, str):
        raise _wrong_type(row, key, value, "a text")
    _check_unicode(value)
    return value


def _wrong_type(row: Row, key: str, value: Any, expected: str) -> DataError:
    return DataError(f"{row.place}: `{key}` is {type(value).__name__}, expected {expected}")


def _size(value: Any) -> int:
    if isinstance(value, list):
        return sum(_size(m.get("content")) for m in value if isinstance(m, dict))
    return len(value) if isinstance(value, str) else 0


def _check_unicode(*texts: str) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no tokenizer takes it
        raise Unusable("broken unicode") from None


def _margin(row: Row) -> float | None:
    value = row.values.get("margin")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{row.place}: `margin` is {value!r}, expected a finite number or null")
    return float(value)
