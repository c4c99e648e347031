"""What a row means: prompt, chosen and rejected reply, in HH format, whatever format it came in.

HH format is one text: turns that begin with "\\n\\nHuman:" and "\\n\\nAssistant:". A prompt here
ends with the marker of the reply, and a reply begins with a space. A row that could be read in two
ways is left out, with the reason: nothing is guessed.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rlhf_lib.data.sources import Row
from rlhf_lib.world.grammar import ASSISTANT, HUMAN

MARKERS = {"user": HUMAN, "assistant": ASSISTANT, "system": "\n\nSystem:"}
MARKER = re.compile("|".join(MARKERS.values()))
ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatbot", "chatgpt", "ai"),
    "system": ("system", "developer"),
}
ROLE = {name: role for role, names in ROLES.items() for name in names}
# what columns are called, the first that a row has counts
PROMPT = ("prompt", "conversations", "question", "instruction")
REPLY = ("response", "completion")
DIALOGUE = ("messages", "conversations", "text")
SYSTEM = ("system", "system_prompt")
BESIDE = ("input", "history", "context")  # columns that change what is asked, in ways of their own
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
MARGINS = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
OTHER_FORMAT = re.compile(  # how other formats begin: as text it would be taken for words
    r"\A\s*(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]"
    r"|### (?:Human|Assistant):|[\[{]+\s*['\"](?:role|content|from|value)['\"]\s*:)"
)
ONE_NEWLINE = re.compile(r"(?<!\n)\n(?:Human|Assistant|System):")
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


class Turn(NamedTuple):
    role: str  # a key of MARKERS
    text: str


def read_pair(row: Row) -> TextPair:
    """The pair in a row of HH dialogues, of explicit prompt and replies, or of message lists.

    Raises Unusable with the reason for a row to leave out.
    """
    _check_beside(row)
    chosen, rejected = _need(row, "chosen"), _need(row, "rejected")
    column = next((name for name in PROMPT if row.values.get(name) is not None), "prompt")
    asked = row.values.get(column)
    if sum(map(_size, (chosen, rejected, asked))) > MAX_CHARACTERS:
        raise Unusable("row too long")
    given = None if asked is None else _prompt_of(column, asked)
    prompt, chosen_reply = _side("chosen", chosen, given)
    other_prompt, rejected_reply = _side("rejected", rejected, given)
    if prompt != other_prompt:
        raise Unusable("different prompts")
    if not _said(prompt):
        raise Unusable("empty prompt")
    if not chosen_reply or not rejected_reply:
        raise Unusable("empty reply")
    if chosen_reply == rejected_reply:
        raise Unusable("identical replies")
    prompt = _with_system(row, prompt)
    _check_unicode(prompt, chosen_reply, rejected_reply)
    replies = f" {chosen_reply}", f" {rejected_reply}"
    return TextPair(conversation_key(prompt), prompt, *replies, _margin(row), row.subset, row.place)


def read_demonstration(row: Row) -> tuple[str, str]:
    """(prompt, reply) of a row with a `prompt` and a `response` or `completion`, or with a whole
    dialogue as `messages` or `text`. Raises Unusable.
    """
    _check_beside(row)
    asked = row.values.get("prompt")
    columns = DIALOGUE if asked is None else (*REPLY, *DIALOGUE)
    missing = "prompt" if asked is None else REPLY[0]
    column = next((name for name in columns if row.values.get(name) is not None), missing)
    given = None if asked is None else _prompt_of("prompt", asked)
    whole = column in DIALOGUE  # then the prompt beside it may be any question of it
    prompt, reply = _side(column, _need(row, column), None if whole else given)
    if whole and given and _words(given.removesuffix(ASSISTANT)) not in _words(prompt):
        raise Unusable("prompt and dialogue differ")
    if not _said(prompt):
        raise Unusable("empty prompt")
    if not reply:
        raise Unusable("empty reply")
    prompt = _with_system(row, prompt)
    _check_unicode(prompt, reply)
    return prompt, f" {reply}"


def read_prompt(row: Row) -> str:
    """The prompt of a row with the key `prompt`. Raises Unusable."""
    prompt = _prompt_of("prompt", _need(row, "prompt"))
    _check_unicode(prompt)
    return prompt


def unpaired(values: Mapping[str, Any]) -> bool:
    """Whether a row has one reply and says whether it is good, as for KTO."""
    return "completion" in values and "chosen" not in values and "rejected" not in values


def pair_up(rows: Iterable[Row], leave_out: Callable[[str, str], None]) -> Iterator[Row]:
    """Pairs of rows that are `unpaired`: good and bad completions of one prompt, in their order.

    Rows of another kind stay as they are. `leave_out` gets the reason and the place of the others.
    """
    by_prompt: dict[str, dict[bool, list[Row]]] = {}
    for row in rows:
        if not unpaired(row.values):
            yield row
            continue
        label = row.values.get("label")
        if (good := LABELS.get(str(label).strip().lower())) is None:
            leave_out("no `label`" if label is None else f"label {label!r}", row.place)
            continue
        asked = [row.values.get(key) for key in ("prompt", *SYSTEM)]
        by_prompt.setdefault(repr(asked), {True: [], False: []})[good].append(row)
    for both in by_prompt.values():
        several = min(map(len, both.values()))
        for chosen, rejected in zip(both[True][:several], both[False][:several], strict=True):
            sides = {"chosen": chosen, "rejected": rejected}
            replies = {key: row.values["completion"] for key, row in sides.items()}
            yield replace(chosen, values={**chosen.values, **replies})
        for row in both[True][several:] + both[False][several:]:
            leave_out("no reply of the other label to its prompt", row.place)


def conversation_key(prompt: str) -> str:
    """A key of the first human turn, whatever its case: rows that share it belong together."""
    parts = MARKER.split(prompt.partition(HUMAN)[2] or prompt)
    return hashlib.sha256(parts[0].strip().lower().encode()).hexdigest()[:16]


def turns(prompt: str) -> int:
    """Human turns in a prompt."""
    return prompt.count(HUMAN)


def messages_of(prompt: str) -> list[Turn]:
    """The turns of a prompt in HH format, without the marker of the reply at its end."""
    roles = {marker: role for role, marker in MARKERS.items()}
    starts = [*MARKER.finditer(prompt.removesuffix(ASSISTANT))]
    ends = [start.start() for start in starts[1:]] + [len(prompt.removesuffix(ASSISTANT))]
    return [
        Turn(roles[start.group()], prompt[start.end() : end].strip())
        for start, end in zip(starts, ends, strict=True)
    ]


def as_prompt(text: str) -> str:
    """HH format that ends with the assistant's marker; plain text becomes a human turn."""
    text = _canonical(text)
    if not MARKER.search(text):
        text = f"{HUMAN} {text.strip()}"
    elif not MARKER.match(text):
        raise Unusable("marker inside a turn")
    if ONE_NEWLINE.search(text):
        raise Unusable("marker behind one newline, not two")
    text = text.rstrip().removesuffix(ASSISTANT)
    if text.rfind(ASSISTANT) > text.rfind(HUMAN):
        raise Unusable("prompt ends with a reply")
    return text + ASSISTANT


def split_dialogue(dialogue: str) -> tuple[str, str]:
    """(prompt, reply) of an HH dialogue, cut at its last assistant marker.

    The first marker would take an early turn for all of it (three quarters of HH has several).
    """
    prompt, marker, reply = _canonical(dialogue).rpartition(ASSISTANT)
    if not marker:
        raise Unusable("no assistant marker")
    if MARKER.search(reply):
        raise Unusable("last turn is not the assistant's")
    return prompt + marker, reply.strip()


# --------------------------------------------------------------------------------------- formats


def _prompt_of(column: str, value: Any) -> str:
    """The prompt in a column of its own, in HH format."""
    if isinstance(value, str):
        return as_prompt(value) if value.strip() else ASSISTANT
    turns = _turns(column, value)
    if turns and turns[-1].role == "assistant":
        raise Unusable("prompt ends with a reply")
    return _join(turns) + ASSISTANT


def _side(key: str, value: Any, given: str | None) -> tuple[str, str]:
    """(prompt, reply) of one side; the prompt may stand in its own column or inside the side."""
    if isinstance(value, str):
        text = _canonical(value)
        if given is not None and not MARKER.match(text):
            if MARKER.search(text):
                raise Unusable("marker inside a reply")
            return given, text.strip()
        if MARKER.search(text) and not MARKER.match(text):
            raise Unusable("text before the first turn")
        prompt, reply = split_dialogue(text)
    else:
        *before, last = _turns(key, value) or [Turn("", "")]
        if last.role != "assistant":
            raise Unusable("no assistant reply")
        if before and given and before[0].role == "assistant":
            raise Unusable("reply of several turns")
        prompt, reply = _join(before) + ASSISTANT, last.text
    if given is None or prompt == ASSISTANT:
        return (given or prompt), reply
    if not _words(prompt).endswith(_words(given)):
        raise Unusable("prompt and dialogue differ")
    return prompt, reply  # a side that repeats the whole conversation is the fuller source


def _words(prompt: str) -> str:
    """To compare two prompts by: some exports strip a space, or a line."""
    return " ".join(prompt.split())


def _turns(key: str, value: Any) -> list[Turn]:
    """The messages of a list, or one message: of `role` and `content`, or of `from` and `value`."""
    found = []
    for message in value if isinstance(value, list) else [value]:
        if not isinstance(message, dict):
            raise Unusable(f"`{key}` is neither text nor messages")
        name = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, some of which may be pictures
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        if (role := ROLE.get(str(name).lower())) is None:
            raise Unusable(f"role {name!r}")
        if not isinstance(content, str):
            raise Unusable("message without text")
        text = content.replace("\r\n", "\n").strip()
        if MARKER.search(text):
            raise Unusable("marker inside a turn")
        found.append(Turn(role, text))
    return found


def _join(turns: list[Turn]) -> str:
    return "".join(f"{MARKERS[turn.role]} {turn.text}" for turn in turns)


def _with_system(row: Row, prompt: str) -> str:
    """The prompt behind what a column of its own tells the assistant to be."""
    system = next((row.values[key] for key in SYSTEM if row.values.get(key) is not None), None)
    if not isinstance(system, str) or not system.strip() or prompt.startswith(MARKERS["system"]):
        return prompt
    return _join([Turn("system", system.strip())]) + prompt


def _canonical(text: str) -> str:
    """HH text whose leading newlines somebody stripped gets them back; lines end as in Unix."""
    text = text.replace("\r\n", "\n")
    if found := OTHER_FORMAT.search(text):
        raise Unusable(f"text of another format, {found.group().strip()!r}")
    bare = text.lstrip()
    names = tuple(marker.lstrip() for marker in MARKERS.values())
    return f"\n\n{bare}" if bare.startswith(names) else text


# ---------------------------------------------------------------------------------------- checks


def _check_beside(row: Row) -> None:
    for key in BESIDE:
        if row.values.get(key):
            raise Unusable(f"`{key}` beside the prompt: write it into the prompt")


def _said(prompt: str) -> str:
    """What a prompt says besides its markers."""
    return MARKER.sub("", prompt).strip()


def _need(row: Row, key: str) -> Any:
    value = row.values.get(key)
    if value is None:
        raise Unusable(f"no `{key}`")
    if not isinstance(value, str | list | dict):
        raise Unusable(f"`{key}` is {type(value).__name__}")
    return value


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return _size(value.get("content", value.get("value")))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str) else 0


def _check_unicode(*texts: str) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no tokenizer takes it
        raise Unusable("broken unicode") from None


def _margin(row: Row) -> float | None:
    """How much better the chosen reply is, where the row says so, or scores both."""
    values = row.values
    if values.get("margin") is not None:
        return _number("margin", values["margin"])
    for better, worse in MARGINS:
        if values.get(better) is not None and values.get(worse) is not None:
            margin = _number(better, values[better]) - _number(worse, values[worse])
            if margin <= 0:
                raise Unusable("the chosen reply has no higher score")
            return margin
    return None


def _number(key: str, value: Any) -> float:
    try:
        found = math.nan if isinstance(value, bool) else float(value)  # in CSV all is text
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise Unusable(f"`{key}` is no number")
    return found
