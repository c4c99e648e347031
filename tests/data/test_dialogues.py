"""Rows to pairs: every format means the same, and every unusable row says why."""

from __future__ import annotations

import pytest

from rlhf_lib.data.dialogues import (
    MAX_CHARACTERS,
    Unusable,
    as_prompt,
    conversation_key,
    messages_of,
    pair_up,
    read_demonstration,
    read_pair,
    split_dialogue,
    unpaired,
)
from rlhf_lib.data.sources import Row

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
    "last question and full sides": row(
        prompt="Name a tree.", chosen=dialogue(" Oak."), rejected=dialogue(" No.")
    ),
    "a space that the prompt lost": row(
        prompt=PROMPT.replace("Hi", "Hi "), chosen=dialogue(" Oak."), rejected=dialogue(" No.")
    ),
    "lines of Windows": row(
        chosen=dialogue(" Oak.").replace("\n", "\r\n"), rejected=dialogue(" No.\r\n")
    ),
    "one message a side": row(prompt=MESSAGES, chosen=says("Oak."), rejected=says("No.")),
    "ShareGPT": row(
        conversations=[
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "Name a tree."},
        ],
        chosen={"from": "gpt", "value": "Oak."},
        rejected={"from": "gpt", "value": "No."},
    ),
    "names of roles": row(
        chosen=[*MESSAGES, {"role": "Chatbot", "content": "Oak."}],
        rejected=[*MESSAGES, {"role": "MODEL", "content": "No."}],
    ),
    "parts of a message": row(
        prompt=MESSAGES,
        chosen=[{"role": "assistant", "content": [{"type": "text", "text": "Oak."}]}],
        rejected="No.",
    ),
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


def test_a_column_for_the_system_message_counts() -> None:
    pair = read_pair(row(system="Be brief.", question="Hi", chosen="Yo.", rejected="No."))
    assert pair.prompt == "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:"
    same = read_pair(row(system="Be brief.", prompt=pair.prompt, chosen="Yo.", rejected="No."))
    assert same.prompt == pair.prompt


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
    "last turn is not the assistant's": [
        row(chosen=dialogue(" Oak.\n\nHuman: Thanks."), rejected=dialogue(" No.")),
    ],
    "marker inside a turn": [
        row(prompt=MESSAGES, chosen=[says("A log:\n\nHuman: hi")], rejected=[says("No.")]),
        row(prompt="Read:\n\nAssistant: hi", chosen="Oak.", rejected="No."),
    ],
    "marker inside a reply": [
        row(prompt="Hi", chosen="A log:\n\nHuman: hi\n\nAssistant: yo", rejected="No.")
    ],
    "text before the first turn": [row(chosen="Chat" + dialogue(), rejected=dialogue(" No."))],
    "prompt and dialogue differ": [
        row(prompt="Name a bush.", chosen=dialogue(), rejected=dialogue(" No.")),
        row(prompt="Hi", chosen=[*MESSAGES, says("Oak.")], rejected=[*MESSAGES, says("No.")]),
    ],
    "prompt ends with a reply": [
        row(prompt=MESSAGES[:2], chosen=[says("Oak.")], rejected=[says("No.")]),
        row(prompt="\n\nHuman: Hi\n\nAssistant: Sure,", chosen="Oak.", rejected="No."),
    ],
    "marker behind one newline, not two": [
        row(prompt="Human: Hi\nAssistant:", chosen="Oak.", rejected="No."),
    ],
    "text of another format, '<|im_start|>'": [
        row(prompt="<|im_start|>user\nHi<|im_end|>\n", chosen="Oak.", rejected="No."),
    ],
    "text of another format, \"[{'content':\"": [
        row(prompt="Hi", chosen="[{'content': 'Oak.', 'role': 'assistant'}]", rejected="No."),
    ],
    "`input` beside the prompt: write it into the prompt": [
        row(instruction="Translate", input="Bonjour", chosen="Hello.", rejected="No."),
    ],
    "`history` beside the prompt: write it into the prompt": [
        row(prompt="Hi", history=[["a", "b"]], chosen="Hello.", rejected="No."),
    ],
    "the chosen reply has no higher score": [
        row(chosen=dialogue(), rejected=dialogue(" No."), score_chosen=4, score_rejected=4),
        row(chosen=dialogue(), rejected=dialogue(" No."), chosen_score="3", rejected_score="4"),
    ],
    "message without text": [
        row(prompt=[{"role": "user", "content": None}], chosen="Oak.", rejected="No."),
        row(prompt=[{"role": "user", "content": [{"image": 1}]}], chosen="A.", rejected="No."),
    ],
    "no `chosen`": [row(prompt="Hi", good="Oak.")],
    "no `rejected`": [row(chosen=dialogue(), rejected=None)],
    "`rejected` is int": [row(chosen=dialogue(), rejected=3)],
    "`prompt` is neither text nor messages": [row(prompt=3, chosen="Oak.", rejected="No.")],
    "`chosen` is neither text nor messages": [row(chosen=["Oak."], rejected=["No."])],
    "`margin` is no number": [
        row(chosen=dialogue(), rejected=dialogue(" No."), margin="big"),
        row(chosen=dialogue(), rejected=dialogue(" No."), margin=float("nan")),
        row(chosen=dialogue(), rejected=dialogue(" No."), margin=True),
    ],
    "`score_rejected` is no number": [
        row(chosen=dialogue(), rejected=dialogue(" No."), score_chosen=1, score_rejected="?")
    ],
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


def test_margin_is_read() -> None:
    assert read_pair(row(chosen=dialogue(), rejected=dialogue(" No."), margin=2)).margin == 2.0
    assert read_pair(row(chosen=dialogue(), rejected=dialogue(" No."), margin=None)).margin is None


def test_two_scores_make_a_margin() -> None:
    sides = {"chosen": dialogue(), "rejected": dialogue(" No.")}
    assert read_pair(row(**sides, score_chosen=8.5, score_rejected=6)).margin == 2.5
    assert read_pair(row(**sides, chosen_score="4", rejected_score="3")).margin == 1.0
    assert read_pair(row(**sides, margin=1, score_chosen=8.5, score_rejected=6)).margin == 1.0
    assert read_pair(row(**sides, score_chosen=8.5)).margin is None


def test_turns_come_back() -> None:
    text = f"\n\nSystem: Be brief.{PROMPT}"
    assert [turn.role for turn in messages_of(text)] == ["system", "user", "assistant", "user"]
    assert [turn.text for turn in messages_of(text)][1:] == ["Hi", "Hello.", "Name a tree."]


DEMONSTRATIONS = {
    "prompt and response": row(prompt="Hi", response=" Yo. "),
    "prompt and completion": row(prompt="Hi", completion="Yo."),
    "prompt and completion, messages": row(
        prompt=[{"role": "user", "content": "Hi"}], completion=[says("Yo.")]
    ),
    "messages": row(messages=[{"role": "user", "content": "Hi"}, says("Yo.")]),
    "ShareGPT": row(
        conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo."}]
    ),
    "text": row(text="\n\nHuman: Hi\n\nAssistant: Yo."),
    "prompt and messages": row(
        prompt="Hi", messages=[{"role": "user", "content": "Hi"}, says("Yo.")]
    ),
}


def test_the_first_question_may_stand_beside_a_whole_dialogue() -> None:
    several = row(prompt=MESSAGES[0]["content"], messages=[*MESSAGES, says("Oak.")])
    assert read_demonstration(several) == (PROMPT, " Oak.")


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_every_format_gives_the_same_demonstration(name: str) -> None:
    assert read_demonstration(DEMONSTRATIONS[name]) == ("\n\nHuman: Hi\n\nAssistant:", " Yo.")


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        ("no `prompt`", row(response="Yo.")),
        ("no `response`", row(prompt="Hi")),
        ("empty reply", row(prompt="Hi", completion=" ")),
        ("empty prompt", row(prompt="", completion="Yo.")),
        ("prompt and dialogue differ", row(prompt="Bye", messages=[*MESSAGES, says("Yo.")])),
        ("empty prompt", row(messages=[says("Yo.")])),
        ("no assistant reply", row(messages=[{"role": "user", "content": "Hi"}])),
    ],
)
def test_unusable_demonstration_says_why(reason: str, bad: Row) -> None:
    with pytest.raises(Unusable) as error:
        read_demonstration(bad)
    assert str(error.value) == reason


def test_unpaired_replies_become_pairs() -> None:
    said = [
        ("Hi", "Yo.", True), ("Hi", "No.", False), ("Bye", "So long.", True),
        ("Hi", "Hm.", "false"), ("Hi", "Hello.", 1), ("Bye", "Nope.", None),
        ("Bye", "Well.", "good"),
    ]  # fmt: skip
    rows = [
        Row("kto.jsonl", number, {"prompt": prompt, "completion": completion, "label": label})
        for number, (prompt, completion, label) in enumerate(said, 1)
    ]
    assert all(unpaired(each.values) for each in rows)
    assert not unpaired({"chosen": "a", "rejected": "b", "label": 1})
    ready = row(chosen=dialogue(), rejected=dialogue(" No."))
    rows[2:2] = [ready, Row("kto.jsonl", 8, {"completion": "Without a label."})]
    for number, (system, label) in enumerate([("Be brief.", True), ("Be long.", False)], 9):
        values = {"system": system, "prompt": "Hm?", "completion": "Ho.", "label": label}
        rows.append(Row("kto.jsonl", number, values))
    left: dict[str, str] = {}
    found = list(pair_up(rows, lambda reason, place: left.update({place: reason})))
    assert found.pop(0) is ready, "a row of another kind stays as it is"
    pairs = [read_pair(each) for each in found]
    assert [(p.chosen, p.rejected, p.place) for p in pairs] == [
        (" Yo.", " No.", "kto.jsonl, row 1"),
        (" Hello.", " Hm.", "kto.jsonl, row 5"),
    ]
    assert {int(place.rpartition(" ")[2]): reason for place, reason in left.items()} == {
        **dict.fromkeys((3, 9, 10), "no reply of the other label to its prompt"),
        6: "no `label`", 7: "label 'good'", 8: "no `label`",
    }  # fmt: skip
