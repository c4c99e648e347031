"""TextPair to token ids, and the records that the stages read.

Prompt and reply are tokenised apart, and ids(prompt) + ids(reply) is what every stage trains on.
Tokenised together, the boundary can merge into a token that no sampled reply begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlhf_lib.data.dialogues import TextPair
from rlhf_lib.settings import SettingsError

CHUNK = 1024  # texts tokenised at once
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


class Encoder:
    """TextPair to token ids, under the length limits of a run."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, max_response_tokens: int
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
        self.eos: int = tokenizer.eos_token_id  # type: ignore[assignment]
        unknown: int | None = tokenizer.unk_token_id  # type: ignore[assignment]
        self.unknown = None if unknown == self.eos else unknown  # GPT-2 has one id for both
        self.max_prompt, self.max_response = max_prompt_tokens, max_response_tokens
        self.cut_prompts: set[int] = set()  # hashes of texts: the texts would fill the memory

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
        """Cut from the left: the latest turns, and the marker of the reply, always stay."""
        rows = self._encode(texts)
        self.cut_prompts |= {
            hash(text) for text, row in zip(texts, rows, strict=True) if len(row) > self.max_prompt
        }
        return [row[-self.max_prompt :] for row in rows]

    def _reply_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """With EOS where the reply ends in time; a cut reply must not teach to stop there."""
        return [
            [*row, self.eos] if len(row) < self.max_response else row[: self.max_response]
            for row in self._encode(texts)
        ]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # split_special_tokens: "<|endoftext|>" typed by a human is text, never the token
        return self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
