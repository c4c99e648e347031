"""What the live loops of the notebooks work on: the tiny model and some rows of the bundled world.

The same in every profile, and there within seconds: a loop that is run to be looked at waits for
no training, and for no pairs of one's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.data.encoding import Demonstration, Pair, Prompt
from rlhf_lib.data.pairs import load_data
from rlhf_lib.models.load import load_policy, load_reference, load_reward_model, load_tokenizer
from rlhf_lib.proofs.plain import Batch
from rlhf_lib.settings import DataConfig
from rlhf_lib.world.rewards import gold_reward

SIZES = DataConfig(
    train_pairs=96,
    validation_pairs=32,
    test_pairs=8,
    demonstrations=96,
    rl_prompts=64,
    evaluation_prompts=8,
)


class Small:
    """Rows of the bundled world in the tiny model's tokens, and its models, new at each call."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.tokenizer = seed, load_tokenizer("tiny")
        self.eos = int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]
        data = load_data(SIZES, self.tokenizer)
        self.pairs: list[Pair] = list(data.pairs["train"])
        self.unseen: list[Pair] = list(data.pairs["validation"])
        self.demonstrations: list[Demonstration] = list(data.demonstrations)
        self.prompts: list[Prompt] = list(data.prompts["train"])
        self._texts = {tuple(prompt.ids): prompt.text for prompt in self.prompts}

    def policy(self) -> PreTrainedModel:
        """The pretrained model, to be trained."""
        return load_policy("tiny").eval()

    def reference(self) -> PreTrainedModel:
        return load_reference("tiny")

    def scorer(self) -> PreTrainedModel:
        """A reward or value model before its first step: the pretrained model with a new head."""
        return load_reward_model("tiny", self.tokenizer, self.seed)[0].eval()

    def gold(self, batch: Batch) -> Tensor:
        """The true reward of each reply, (B,): in place of a reward model. Prompts are its own."""
        place = batch.ids.shape[1] - batch.mask.shape[1]
        found = []
        for ids, real in zip(batch.ids.tolist(), batch.attention.tolist(), strict=True):
            prompt = tuple(i for i, there in zip(ids[:place], real[:place], strict=True) if there)
            reply, end, _ = [*ids[place:], self.eos], self.eos in ids[place:], 0
            text = self.tokenizer.decode(reply[: reply.index(self.eos)])
            found.append(gold_reward(self._texts[prompt], str(text), end).total)
        return torch.tensor(found)

    def words(self, ids: list[int]) -> list[str]:
        """Each token as a reader sees it."""
        return [repr(self.tokenizer.decode([i]))[1:-1] for i in ids]
