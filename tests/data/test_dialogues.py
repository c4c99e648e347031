"""Rows to pairs: every format means the same, and every unusable row says why."""

from __future__ import annotations

import pytest

from rlhf_lib.data.dialogues import (
    MAX_CHARACTERS,
    Unusable,
    as_prompt,
    conversation_key,
    read_pair,
    split_dialogue,
)
from rlhf_lib.data.sources import DataError, Row

PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a tree.\n\nAssistant:"
MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Name a tree."},
]


def row(**values: object) -> Row:
    return Row("pairs.jsonl", 7, values)


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def dialogue(reply: str = " Oak.", prompt: str = PROMPT) -> str:
    return prompt + reply


FORMATS = {
    "HH": row(chosen=dialogue(" Oak. "), rejected=dialogue(" No.")),
    "HH, stripped": row(chosen=dialogue(" Oak.").strip(), rejected=dialogue(" No.").strip()),
    "prompt column": row(prompt=PROMPT, chosen="Oak.", rejected=" No.\n"),
    "prompt column without marker": row(prompt=PROMPT[:-12], chosen="Oak.", rejected="No."),
    "prompt column and full sides": row(
        prompt=PROMPT, chosen=dialogue(" Oak."), rejected=dialogue(" No.")
    ),
    "messages": row(chosen=[*MESSAGES, says("Oak.")], rejected=[*MESSAGES, says("No.")]),
    "messages, prompt apart": row(prompt=MESSAGES, chosen=[says("Oak.")], rejected=[says("No.")]),
    "messages, prompt twice": row(
        prompt="Name a tree.", chosen=[*MESSAGES, says("Oak.")], rejected=[*MESSAGES, says("No.")]
    ),
    "prompt as messages, text replies": row(prompt=MESSAGES, chosen="Oak.", rejected="No."),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pair(name: str) -> None:
    pair = read_pair(FORMATS[name])
    assert (pair.prompt, pair.chosen, pair.rejected) == (PROMPT, " Oak.", " No.")


def test_plain_prompt_becomes_a_human_turn() -> None:
    pair = read_pair(row(prompt="Name a tree.", chosen="Oak.", rejected="No."))
    assert pair.prompt == "\n\nHuman: Name a tree.\n\nAssistant:"
    assert as_prompt(pair.prompt) == pair.prompt


def test_system_message_stands_before_the_first_turn() -> None:
    messages = [{"role": "system", "content": "Be brief."}, MESSAGES[0]]
    pair = read_pair(row(prompt=messages, chosen=[says("Yo.")], rejected=[says("No.")]))
    assert pair.prompt == "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:"
    assert pair.conversation == conversation_key("\n\nHuman: hi\n\nAssistant:")


def test_dialogue_is_cut_at_the_last_marker() -> None:
    """Trap 9: cut at the first marker, the prompt is one turn and the reply a conversation."""
    assert split_dialogue(dialogue(" Oak.")) == (PROMPT, "Oak.")


def test_conversation_is_the_first_human_turn_whatever_its_case() -> None:
    one = conversation_key("\n\nHuman: Hi there \n\nAssistant: A\n\nHuman: B\n\nAssistant:")
    assert one == conversation_key("\n\nHuman: hi THERE\n\nAssistant:")
    assert one == conversation_key("\n\nHuman: Hi there\n\nHuman: again\n\nAssistant:")
    assert one != conversation_key("\n\nHuman: Hi you\n\nAssistant:")


LONG = "a" * (MAX_CHARACTERS // 2)
UNUSABLE = {
    "no assistant marker": [row(chosen="\n\nHuman: Hi", rejected=dialogue())],
    "different prompts": [
        row(chosen=dialogue(), rejected=dialogue(prompt=PROMPT.replace("tree", "bush"))),
        # one side is a prefix of the other: its last reply is an early turn of the other side
        row(chosen=dialogue(), rejected="\n\nHuman: Hi\n\nAssistant: Hello."),
    ],
    "empty prompt": [
        row(chosen="\n\nAssistant: Oak.", rejected="\n\nAssistant: No."),
        row(chosen="\n\nHuman: \n\nAssistant: Oak.", rejected="\n\nHuman: \n\nAssistant: No."),
        row(prompt=" ", chosen="Oak.", rejected="No."),
        row(chosen=[says("Oak.")], rejected=[says("No.")]),
    ],
    "empty reply": [row(chosen=dialogue(), rejected=dialogue(" \n"))],
    "identical replies": [row(chosen=dialogue(" Oak."), rejected=dialogue("  Oak.\n"))],
    "row too long": [row(chosen=dialogue(LONG), rejected=dialogue(LONG))],
    "broken unicode": [row(chosen=dialogue(" \ud800"), rejected=dialogue())],
    "no assistant reply": [
        row(chosen=MESSAGES, rejected=MESSAGES),
        row(chosen=[], rejected=[*MESSAGES, says("No.")]),
    ],
    "role 'tool'": [row(chosen=[{"role": "tool", "content": "1"}], rejected=[says("No.")])],
    "reply of several turns": [
        row(prompt=MESSAGES, chosen=[says("Oak."), *MESSAGES[:1], says("A.")], rejected=[says("B")])
    ],
}


@pytest.mark.parametrize(("reason", "bad"), [(r, b) for r, rows in UNUSABLE.items() for b in rows])
def test_unusable_row_says_why(reason: str, bad: Row) -> None:
    with pytest.raises(Unusable) as error:
        read_pair(bad)
    assert str(error.value) == reason


def test_a_row_just_short_enough_is_kept() -> None:
    room = MAX_CHARACTERS - 2 * len(PROMPT) - len(" No.")
    read_pair(row(chosen=dialogue("a" * room), rejected=dialogue(" No.")))
    with pytest.raises(Unusable, match="row too long"):
        read_pair(row(chosen=dialogue("a" * (room + 1)), rejected=dialogue(" No.")))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(prompt="Hi", good="Oak."), r"pairs.jsonl, row 7: no `chosen`.*`prompt`, `good`"),
        (row(chosen=dialogue(), rejected=None), "no `rejected`.*the row has `chosen`"),
        (row(chosen=dialogue(), rejected=3), "`rejected` is int"),
        (row(prompt=3, chosen="Oak.", rejected="No."), "`prompt` is int"),
        (row(chosen=["Oak."], rejected=["No."]), "`chosen` is str, expected messages like"),
        (row(chosen=dialogue(), rejected=dialogue(" No."), margin="big"), "`margin` is 'big'"),
        (row(chosen=dialogue(), rejected=dialogue(" No."), margin=float("nan")), "margin.*finite"),
    ],
)
def test_row_of_another_shape_is_an_error(bad: Row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pair(bad)


def test_margin_is_read() -> None:
    assert read_pair(row(chosen=dialogue(), rejected=dialogue(" No."), margin=2)).margin == 2.0
    assert read_pair(row(chosen=dialogue(), rejected=dialogue(" No."), margin=None)).margin is None
