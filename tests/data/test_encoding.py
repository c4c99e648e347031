"""Token ids of dialogues: in the model's own template or HH's, the same wherever they are read."""

from __future__ import annotations

import pytest
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
