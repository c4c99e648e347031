"""Token ids of dialogues: in the model's own template or HH's, the same wherever they are read."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_lib.data.dialogues import TextPair, Unusable
from rlhf_lib.data.encoding import Encoder
from rlhf_lib.settings import SettingsError
from tools.families import byte_tokenizer

PROMPT = "\n\nHuman: Hi\n\nAssistant: Yo.\n\nHuman: A tree?\n\nAssistant:"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "<s>{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "[{{ m.role }}] {{ m.content | trim }}<end> {% endfor %}"
    "{% if add_generation_prompt %}[model] {% endif %}"
)


def chatty(template: str = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<end>"]})
    tokenizer.chat_template = template
    return tokenizer


def pair(prompt: str = PROMPT) -> TextPair:
    return TextPair("", prompt, " Oak.", " No.", None, None, "row 1")


def test_a_prompt_is_what_the_template_writes() -> None:
    tokenizer = chatty()
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo."},
        {"role": "user", "content": "A tree?"},
    ]
    (found,) = Encoder(tokenizer, 100, 20).pairs([pair()])
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found.prompt == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(found.prompt) == whole
    answered = [*messages, {"role": "assistant", "content": "Oak."}]
    said = tokenizer.apply_chat_template(answered, tokenize=False)
    assert said.startswith(tokenizer.decode(found.prompt + found.chosen))


def test_training_and_sampling_read_the_same() -> None:
    for tokenizer in (chatty(), chatty(STRICT), byte_tokenizer(), byte_tokenizer(begins=True)):
        encoder = Encoder(tokenizer, 100, 20)
        (learnt,) = encoder.pairs([pair()])
        (shown,) = encoder.demonstrations([(PROMPT, " Oak.")])
        (asked,) = encoder.prompts([PROMPT])
        assert learnt.prompt == shown.prompt == asked.ids
        assert learnt.chosen == shown.response


def test_what_people_type_is_never_a_special_token() -> None:
    tokenizer = chatty()
    typed = "\n\nHuman: Say </s> and <|im_start|>system\n\nAssistant:"
    (prompt,) = Encoder(tokenizer, 200, 20).prompts([typed])
    special = tokenizer.convert_tokens_to_ids(["<|im_start|>", "</s>"])
    assert [prompt.ids.count(token) for token in special] == [2, 1], "the template's own alone"
    assert "Say </s> and <|im_start|>system" in tokenizer.decode(prompt.ids)


def in_its_words(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose model itself has the end token among its pieces."""
    pieces = {"<unk>": 0, "</s>": 1, "say": 2, "now": 3, "Human": 4, "Assistant": 5, ":": 6}
    if kind == "WordLevel":
        model = models.WordLevel(pieces, unk_token="<unk>")
    else:
        model = models.Unigram([(piece, 0.0 if piece == "</s>" else -1.0) for piece in pieces], 0)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
def test_nor_is_one_that_the_tokenizer_has_among_its_words(kind: str) -> None:
    encoder = Encoder(in_its_words(kind), 100, 20)
    typed = TextPair("", "say </s> now", " </s>", " now </s> say", None, None, "row 1")
    (pair,) = encoder.pairs([typed])
    assert encoder.eos not in pair.prompt
    assert {2, 3} <= set(pair.prompt), "what stands around it is read"
    assert [side.count(encoder.eos) for side in (pair.chosen, pair.rejected)] == [1, 1]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{% for c in m.content %}{{ c['text'] }}{% endfor %}{% endfor %}",
         "leaves out one of user, assistant, user"),
        ("{{ messages[-1].content }}", "leaves out one of user, assistant, user"),
        ("{% for m in messages %}{{ m.content[:2] }}{% endfor %}", "leaves out one of"),
        ("{{ messages + 1 }}", "no place in the chat template for user, assistant, user"),
    ],
)  # fmt: skip
def test_a_template_that_drops_what_was_said_is_not_taken(template: str, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        Encoder(chatty(template), 100, 20).check(PROMPT)


def test_a_template_that_fails_on_an_answer_is_one_sentence() -> None:
    failing = "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}"
    encoder = Encoder(chatty(f"{failing}{{% endif %}}{{{{ m.content }}}}{{% endfor %}}"), 100, 20)
    with pytest.raises(SettingsError, match=r"fails on a question and its answer .*template=hh"):
        _ = encoder.written


def test_a_template_with_a_date_writes_the_same_tomorrow() -> None:
    now = "strftime_now('%d %b %Y')"
    given = f"{{% if date_string is not defined %}}{{% set date_string = {now} %}}{{% endif %}}"
    encoder = Encoder(chatty(f"{given}{{{{ date_string }}}}: {CHATML}"), 200, 20)
    (prompt,) = encoder.prompts([PROMPT])
    assert encoder.tokenizer.decode(prompt.ids).startswith("01 Jan 2024: ")
    assert encoder.written == "the model's chat template"
    today = Encoder(chatty(f"{{{{ {now} }}}}: {CHATML}"), 200, 20)
    assert "on another day the data are others" in today.written


def test_a_dialogue_that_the_template_does_not_take_is_left_out() -> None:
    encoder = Encoder(chatty(STRICT), 100, 20)
    encoder.check(PROMPT)
    with pytest.raises(Unusable, match="no place in the chat template for system, user"):
        encoder.check("\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:")
    Encoder(byte_tokenizer(), 100, 20).check("\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:")


def test_the_audit_is_told_how_dialogues_are_written() -> None:
    assert Encoder(byte_tokenizer(), 100, 20).written == "HH format"
    assert Encoder(byte_tokenizer(begins=True), 100, 20).written == "HH format, behind <s>"
    assert Encoder(chatty(), 100, 20).written == "the model's chat template"
    assert (
        "replies end with </s> and there with '<end>'" in Encoder(chatty(STRICT), 100, 20).written
    )
    assert Encoder(chatty(), 100, 20, "hh").written == "HH format"
    with pytest.raises(SettingsError, match="has no chat template"):
        Encoder(byte_tokenizer(), 100, 20, "chat")


def test_a_text_begins_as_the_tokenizer_begins_it() -> None:
    tokenizer = byte_tokenizer(begins=True)
    (prompt,) = Encoder(tokenizer, 100, 20).prompts([PROMPT])
    assert prompt.ids == tokenizer(PROMPT)["input_ids"]
    (cut,) = Encoder(tokenizer, 10, 20).prompts([PROMPT])
    assert cut.ids == [prompt.ids[0], *prompt.ids[-9:]]
    assert Encoder(byte_tokenizer(), 100, 20).prompts([PROMPT])[0].ids == prompt.ids[1:]
    with pytest.raises(SettingsError, match="needs room for more"):
        Encoder(tokenizer, 1, 20)
