"""The job: rows of token ids, models on disk and settings, written once and read by both sides.

The peer's interpreter may not have all of this library's dependencies: this file imports none.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_lib.session.work import Sizes, Work, count

# what is compared with TRL or transformers; with bare torch
STAGES = ("sft", "reward_model", "dpo", "grpo", "generation", "ppo", "dpo_plain", "grpo_plain")
POOL = 50  # batches that transformers' `group_by_length` sorts at a time


@dataclass(frozen=True)
class Row:
    """One pair as token ids: a prompt and two replies."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def longest(self, stage: str) -> int:
        """Tokens of the longest sequence that a stage reads of it."""
        rejected = 0 if stage == "sft" else len(self.rejected)
        return len(self.prompt) + max(len(self.chosen), rejected)


@dataclass(frozen=True)
class Job:
    """What one round of each stage computes, the same for both sides."""

    model: str  # folder of the policy that everything starts from, with its tokenizer
    reward_model: str  # folder of a sequence classifier with one label
    precision: str  # of the forward passes (autocast); weights are fp32
    threads: int
    sizes: Sizes
    rows: list[Row]  # to choose from
    prompt_texts: list[str]  # of the rows: the peer's GRPO takes text
    pairs: int = 32  # in a round
    batch_size: int = 8  # pairs or dialogues in an optimizer step
    max_length: int = 256  # of prompt and reply together; the rows keep to it
    samples: int = 32  # of GRPO, PPO and generation in a round
    samples_per_step: int = 16
    group_size: int = 4  # of GRPO
    max_new_tokens: int = 32
    ppo_epochs: int = 2
    ppo_minibatch: int = 8
    kl_coef: float = 0.05
    beta: float = 0.1  # of DPO
    learning_rate: float = 1e-6
    generation_batch: int = 16

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def batches(self, stage: str) -> list[list[Row]]:
        """The optimizer steps of a round, the same for both sides: rows of one length together.

        All rows are sorted by length and cut into batches, as `group_by_length` of transformers
        does with 50 batches at a time; a round has some, evenly spaced from the longest to the
        shortest. Fewer rows than that would be padded as if nobody had sorted them.
        """
        rows, size = sorted(self.rows, key=lambda row: -row.longest(stage)), self.batch_size
        cut = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]  # whole ones
        if not cut:
            raise ValueError(f"{len(rows)} rows do not fill a batch of {size}: give more pairs")
        count = min(len(cut), max(1, self.pairs // size))
        return [cut[(2 * place + 1) * len(cut) // (2 * count)] for place in range(count)]

    def order(self, number: int, batches: int) -> list[int]:
        """In which order round `number` takes its batches."""
        return random.Random(number).sample(range(batches), batches)

    def rows_of_round(self, stage: str) -> list[Row]:
        """Those of its batches, one batch after the other."""
        return [row for batch in self.batches(stage) for row in batch]

    def pair_work(self, stage: str) -> Work:
        """The work of one round over pairs: SFT takes the chosen replies, the others both."""
        rows = self.rows_of_round(stage)
        rejected = 0 if stage == "sft" else sum(len(r.rejected) for r in rows)
        replies = rejected + sum(len(r.chosen) for r in rows)
        return count(stage, self.sizes, len(rows), sum(len(r.prompt) for r in rows), replies)

    def sample_work(self, stage: str, prompt_tokens: int, replies: list[int]) -> Work:
        """The work behind replies of these lengths; `prompt_tokens` has each prompt once."""
        epochs = self.ppo_epochs if stage == "ppo" else 1
        return count(stage, self.sizes, len(replies), prompt_tokens, sum(replies), epochs)

    def prompts_of_round(self, number: int, prompts: int) -> list[int]:
        """Places of the prompts that round `number` samples from: on through the rows, in turn."""
        start = number * prompts
        return [place % len(self.rows) for place in range(start, start + prompts)]


def read_job(path: str | Path) -> Job:
    fields = json.loads(Path(path).read_text(encoding="utf-8"))
    fields["rows"] = [Row(**row) for row in fields["rows"]]
    fields["sizes"] = Sizes(*fields["sizes"])
    return Job(**fields)
