"""TextPair to token ids, and the records that the stages read.

Prompt and reply are tokenised apart, and ids(prompt) + ids(reply) is what every stage trains on.
Tokenised together, the boundary can merge into a token that no sampled reply begins with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf_lib.data.dialogues import TextPair, Unusable, messages_of
from rlhf_lib.settings import DataConfig, SettingsError

CHUNK = 1024  # texts tokenised at once
HOLDER = "\u2402"  # begins and ends the place of a turn in a template; no template has it
DAY = "01 Jan 2024"  # some templates write today's date: tomorrow's data would be others
DATED = ", which writes the day's date: on another day the data are others"
FAILS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
NO_LIMIT = 1_000_000  # tokenizers without a limit say a number far above this


@dataclass(frozen=True)
class Pair:
    """One preference pair. Replies end with EOS unless they were cut at max_response_tokens."""

    conversation: str  # key of the first human turn: no key stands in two splits
    prompt_text: str  # ends with "\n\nAssistant:"
    chosen_text: str  # begins with a space
    rejected_text: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float | None = None
    subset: str | None = None  # part of the source, such as "helpful-base"


def sides(pairs: Sequence[Pair]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Token lists of prompts, chosen and rejected replies."""
    return [p.prompt for p in pairs], [p.chosen for p in pairs], [p.rejected for p in pairs]


def paired_lengths(pairs: Sequence[Pair]) -> list[int]:
    """Tokens of each pair's prompt, chosen and rejected reply together."""
    return [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs]


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a reply worth imitating."""

    prompt_text: str
    response_text: str
    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-sequence token; `load_tokenizer` made sure that there is one."""
    return int(tokenizer.eos_token_id)  # type: ignore[arg-type]


class Encoder:
    """TextPair to token ids, under the length limits of a run and in one template.

    `template`: "hh" writes a dialogue in HH format, as the texts here are; "chat" as the model was
    taught to, by the template that its tokenizer has; "auto" takes that where there is one.
    Training and sampling get the same ids, for both come from here. Raises SettingsError.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        max_response_tokens: int,
        template: str = "auto",
    ) -> None:
        longest = max_prompt_tokens + max_response_tokens
        if min(max_prompt_tokens, max_response_tokens) < 1:
            raise SettingsError("data.max_prompt_tokens and data.max_response_tokens: at least 1")
        if longest > tokenizer.model_max_length and tokenizer.model_max_length < NO_LIMIT:
            raise SettingsError(
                f"data.max_prompt_tokens + data.max_response_tokens = {longest}, but the model "
                f"reads at most {tokenizer.model_max_length} tokens: lower one of them"
            )
        self.tokenizer = tokenizer
        self.chat = bool(tokenizer.chat_template) if template == "auto" else template == "chat"
        if self.chat and not tokenizer.chat_template:
            raise SettingsError(
                "data.template=chat: this model's tokenizer has no chat template; take hh, or auto"
            )
        self.eos = eos_id(tokenizer)
        unknown: int | None = tokenizer.unk_token_id  # type: ignore[assignment]
        self.unknown = None if unknown == self.eos else unknown  # GPT-2 has one id for both
        self.special = set(tokenizer.all_special_ids) - {unknown}
        # a chat template writes its own beginning
        self.begin = [] if self.chat else _beginning(tokenizer)
        if len(self.begin) >= max_prompt_tokens:
            raise SettingsError(
                f"data.max_prompt_tokens={max_prompt_tokens}: a prompt of this model begins with "
                f"{len(self.begin)} of its own tokens and needs room for more"
            )
        self.max_prompt = max_prompt_tokens - len(self.begin)
        self.max_response = max_response_tokens
        self.cut_prompts: set[int] = set()  # hashes of texts: the texts would fill the memory
        self._rendered: dict[tuple[tuple[str, ...], bool], str] = {}

    @property
    def written(self) -> str:
        """How a dialogue is written, for the audit."""
        if not self.chat:
            begins = self.tokenizer.convert_ids_to_tokens(self.begin)
            return f"HH format{', behind ' if begins else ''}{' '.join(begins)}"
        try:
            said = self._render(("user", "assistant"), answered=True)
        except FAILS as error:
            raise SettingsError(
                f"this model's chat template fails on a question and its answer ({error}): take "
                "data.template=hh"
            ) from error
        end, after = self.tokenizer.eos_token, said.rpartition(HOLDER)[2].strip()
        if after.startswith(str(end)):
            template = str(self.tokenizer.get_chat_template())
            dated = "strftime_now" in template and "date_string" not in template
            return f"the model's chat template{DATED if dated else ''}"
        return f"the model's chat template, but replies end with {end} and there with {after!r}"

    def check(self, prompt: str) -> None:
        """Raises Unusable for a prompt that the chat template does not take."""
        if not self.chat:
            return
        roles = tuple(turn.role for turn in messages_of(prompt))
        try:
            shown = self._render(roles).split(HOLDER)[1::2]
        except FAILS as error:
            raise Unusable(f"no place in the chat template for {', '.join(roles)}") from error
        if shown != [str(place) for place in range(len(roles))]:
            raise Unusable(f"the chat template leaves out one of {', '.join(roles)}")

    def pairs(self, texts: Sequence[TextPair]) -> list[Pair]:
        prompts = self._prompt_ids([t.prompt for t in texts])
        chosen = self._reply_ids([t.chosen for t in texts])
        rejected = self._reply_ids([t.rejected for t in texts])
        return [
            Pair(t.conversation, t.prompt, t.chosen, t.rejected, p, c, r, t.margin, t.subset)
            for t, p, c, r in zip(texts, prompts, chosen, rejected, strict=True)
        ]

    def demonstrations(self, texts: Sequence[tuple[str, str]]) -> list[Demonstration]:
        prompts = self._prompt_ids([prompt for prompt, _ in texts])
        replies = self._reply_ids([reply for _, reply in texts])
        return [
            Demonstration(*text, prompt, reply)
            for text, prompt, reply in zip(texts, prompts, replies, strict=True)
        ]

    def prompts(self, texts: Sequence[str]) -> list[Prompt]:
        return [Prompt(text, ids) for text, ids in zip(texts, self._prompt_ids(texts), strict=True)]

    def _prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Cut from the left, behind what every text of this tokenizer begins with: the latest
        turns, and the marker of the reply, always stay.
        """
        rows = [self._in_template(text) for text in texts] if self.chat else self._encode(texts)
        self.cut_prompts |= {
            hash(text) for text, row in zip(texts, rows, strict=True) if len(row) > self.max_prompt
        }
        return [[*self.begin, *row[-self.max_prompt :]] for row in rows]

    def _in_template(self, text: str) -> list[int]:
        """A prompt as the chat template writes it.

        Only the template's own words may become special tokens: "<|im_end|>" typed by a human ends
        nothing. Where one did type such a thing, what people wrote is tokenised apart.
        """
        turns = messages_of(text)
        parts = self._render(tuple(turn.role for turn in turns)).split(HOLDER)
        # the template's words and people's take turns
        said = [turns[int(part)].text if place % 2 else part for place, part in enumerate(parts)]
        special = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        if not any(token in turn.text for turn in turns for token in special):
            return self._encode(["".join(said)], special=True)[0]
        apart = (self._encode([p], special=not n % 2)[0] for n, p in enumerate(said))
        return list(chain.from_iterable(apart))

    def _render(self, roles: tuple[str, ...], answered: bool = False) -> str:
        """What the template makes of turns of these roles, turn k being HOLDER k HOLDER."""
        if (roles, answered) not in self._rendered:
            messages = [
                {"role": role, "content": f"{HOLDER}{place}{HOLDER}"}
                for place, role in enumerate(roles)
            ]
            self._rendered[roles, answered] = str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=not answered,
                    date_string=DAY,
                )
            )
        return self._rendered[roles, answered]

    def _reply_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """With EOS where the reply ends in time; a cut reply must not teach to stop there."""
        if self.chat:  # HH format has a space behind its marker, a template what it writes itself
            texts = [text.removeprefix(" ") for text in texts]
        return [
            [*row, self.eos] if len(row) < self.max_response else row[: self.max_response]
            for row in self._encode(texts)
        ]

    def _encode(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        # split_special_tokens: "<|endoftext|>" typed by a human is text, never the token
        rows = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not special,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        if special:
            return rows
        # of some tokenizers it is an ordinary piece as well
        return [
            row if self.special.isdisjoint(row) else self._apart(text)
            for text, row in zip(texts, rows, strict=True)
        ]

    def _apart(self, text: str) -> list[int]:
        """Ids of a text in which somebody typed a special token, cut behind its first sign."""
        typed = "|".join(re.escape(token) for token in self.tokenizer.all_special_tokens)
        parts = re.sub(f"(?:{typed})", lambda m: m[0][0] + HOLDER + m[0][1:], text).split(HOLDER)
        rows = self.tokenizer(parts, add_special_tokens=False, split_special_tokens=True)
        return [i for row in rows["input_ids"] for i in row if i not in self.special]


def encoder_of(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Encoder:
    """The encoder that the settings of the data ask for."""
    limits = config.max_prompt_tokens, config.max_response_tokens
    return Encoder(tokenizer, *limits, config.template)


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: a token for its beginning, or nothing."""
    bare, whole = (tokenizer("a", add_special_tokens=own)["input_ids"] for own in (False, True))
    starts = range(len(whole) - len(bare) + 1)  # type: ignore[arg-type]
    found = next((n for n in starts if whole[n : n + len(bare)] == bare), 0)  # type: ignore[index]
    return list(whole[:found])  # type: ignore[index]
