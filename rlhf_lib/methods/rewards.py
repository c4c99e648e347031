"""Rewards: functions that say how good replies are.

A reward takes prompts and the replies to them and gives one number a reply. A reward model, the
gold reward of the bundled world, a rule and a function of the user's are four makers of one; PPO,
GRPO, best-of-n and evaluation do not know which they got.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lib import processes
from rlhf_lib.data.encoding import Prompt, eos_id
from rlhf_lib.data.truth import Truth
from rlhf_lib.models.logprobs import sequence_scores
from rlhf_lib.models.packing import Tokens, by_prompt
from rlhf_lib.records import ENSEMBLES
from rlhf_lib.runtime import phase
from rlhf_lib.settings import SettingsError, UserError
from rlhf_lib.user_code import resolve


@dataclass(frozen=True)
class Reply:
    """One reply. `ids` end with the end-of-sequence token if it `finished`; `text` is without."""

    text: str
    ids: list[int]
    finished: bool


# (prompts, replies) -> (B,)
Reward = Callable[[Sequence[Prompt], Sequence[Reply]], Tensor | Sequence[float]]


class RewardError(UserError):
    """A reward function failed; the message names it and the first reply that it failed on."""


def read_replies(tokenizer: PreTrainedTokenizerBase, responses: Tokens) -> list[Reply]:
    """Sampled token ids as replies."""
    rows, eos = [list(row) for row in responses], eos_id(tokenizer)
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [Reply(text, ids, ids[-1] == eos) for text, ids in zip(texts, rows, strict=True)]


# --------------------------------------------------------------------------------- reward models


@phase("scoring")
@torch.no_grad()
def raw_scores(
    reward_model: PreTrainedModel, prompts: Tokens, responses: Tokens, batch_size: int = 64
) -> Tensor:
    """The reward model's own output for each response, (B,) on the CPU."""
    scores = torch.zeros(len(prompts))
    for rows in processes.dealt(by_prompt, prompts, responses, size=batch_size):
        batch = [prompts[i] for i in rows], [responses[i] for i in rows]
        scores[rows] = sequence_scores(reward_model, *batch).cpu()
    return processes.summed(scores)


def of_model(model: PreTrainedModel, accelerator: Accelerator, batch_size: int = 64) -> Reward:
    """The normalised score of a reward model: 0 and 1 are mean and deviation over demonstrations.

    The two numbers were measured after its training and stand in its config.
    """

    def reward(prompts: Sequence[Prompt], replies: Sequence[Reply]) -> Tensor:
        ids = [p.ids for p in prompts], [r.ids for r in replies]
        with accelerator.autocast():
            scores = raw_scores(model, *ids, batch_size)
        return (scores - model.config.reward_mean) / model.config.reward_std

    return reward


def of_ensemble(members: Sequence[Reward], minimum: bool = False) -> Reward:
    """The mean of several reward models, or the lowest: where they differ nobody knows.

    Source: Coste et al. 2024, arXiv:2310.02743; that it does not end over-optimisation, Eisenstein
    et al. 2023, arXiv:2312.09244.
    """

    def reward(prompts: Sequence[Prompt], replies: Sequence[Reply]) -> Tensor:
        each = torch.stack([torch.as_tensor(member(prompts, replies)) for member in members])
        return each.amin(0) if minimum else each.mean(0)

    return reward


# ------------------------------------------------------------------------------- known and ruled


def of_truth(truth: Truth) -> Reward:
    """The gold reward, float64."""

    def gold(prompts: Sequence[Prompt], replies: Sequence[Reply]) -> Tensor:
        pairs = zip(prompts, replies, strict=True)
        found = [truth.gold(p.text, r.text, r.finished).total for p, r in pairs]
        return torch.tensor(found, dtype=torch.float64)

    return gold


def brevity(prompts: Sequence[Prompt], replies: Sequence[Reply]) -> Tensor:
    """Minus a tenth of a point for each word."""
    return torch.tensor([-0.1 * len(reply.text.split()) for reply in replies])


def ended(prompts: Sequence[Prompt], replies: Sequence[Reply]) -> Tensor:
    """1 for a reply that ended by itself, 0 for one that was cut."""
    return torch.tensor([float(reply.finished) for reply in replies])


RULES: dict[str, Reward] = {"brevity": brevity, "ended": ended}

# ------------------------------------------------------------------- what the settings ask for


@dataclass(frozen=True)
class WeightedSum:
    """Rewards by name, each with its weight; as a reward, their sum."""

    parts: dict[str, tuple[float, Reward]]

    def each(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> dict[str, Tensor]:
        """What each reward says before it is weighed, (B,) float32."""
        return {n: checked(n, r, prompts, replies) for n, (_, r) in self.parts.items()}

    def total(self, each: dict[str, Tensor]) -> Tensor:
        weighed = [weight * each[name] for name, (weight, _) in self.parts.items()]
        return torch.stack(weighed).sum(0)

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> Tensor:
        return self.total(self.each(prompts, replies))


def terms(setting: str) -> dict[str, float]:
    """`0.5*model, gold, mine.py:polite` as {name: weight}. Raises SettingsError."""
    found: dict[str, float] = {}
    for term in (part.strip() for part in setting.split(",")):
        weight, star, name = (part.strip() for part in term.rpartition("*"))
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise SettingsError(
                f"reward {term!r}: {weight!r} is no weight, which comes first: 0.5*NAME"
            )
        if name in found:
            raise SettingsError(f"reward {setting!r} names {name} twice")
        found[name] = value
    return found


Models = Callable[[], Sequence[Reward]]


def named(setting: str, models: Models, truth: Truth | None) -> WeightedSum:
    """The rewards that a setting such as `ppo.reward` names.

    `model` stands for the first of `models()`, `mean` and `minimum` for those of them all, `gold`
    for the gold reward, others for a rule of RULES, or a function `package.module:name` or
    `FILE.py:name`. Raises SettingsError for a name that leads nowhere.
    """
    parts = terms(setting).items()
    return WeightedSum({name: (weight, _named(name, models, truth)) for name, weight in parts})


def _named(name: str, models: Models, truth: Truth | None) -> Reward:
    if name == "model":
        return models()[0]
    if name in ENSEMBLES:
        return of_ensemble(models(), minimum=name == "minimum")
    if name == "gold":
        if truth is None:
            raise SettingsError("reward gold: nobody knows the true reward of these data")
        return of_truth(truth)
    if name in RULES:
        return RULES[name]
    if ":" not in name:
        known = ", ".join(("model", *ENSEMBLES, "gold", *RULES))
        raise SettingsError(
            f"reward {name!r}: choose among {known}, package.module:function and FILE.py:function"
        )
    found = resolve(name)
    if not callable(found):
        raise SettingsError(f"reward {name}: it is no function")
    return _asked_once(cast(Reward, found))


def _asked_once(users: Reward) -> Reward:
    """The user's function, asked by one process for all: it may cost, draw, or change its mind."""

    def reward(prompts: Sequence[Prompt], replies: Sequence[Reply]) -> Tensor | Sequence[float]:
        found, drawn = processes.told(lambda: (users(prompts, replies), torch.get_rng_state()))
        torch.set_rng_state(drawn)  # all go on with the random numbers that are left
        return found

    return reward


def modules(setting: str) -> list[str]:
    """The modules and files whose source such a setting brings in."""
    return [name.rpartition(":")[0] for name in terms(setting) if ":" in name]


def checked(
    name: str, reward: Reward, prompts: Sequence[Prompt], replies: Sequence[Reply]
) -> Tensor:
    """What a reward says, (B,) float32. Raises RewardError unless it is a finite number a reply."""
    try:
        found = _numbers(reward, prompts, replies)
    except (RewardError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        first = _first_failing(reward, prompts, replies)
        raise RewardError(f"reward {name} failed: {error!r}; first on {first}") from error
    if found.shape != (len(replies),):
        raise RewardError(
            f"reward {name} returned numbers of shape {tuple(found.shape)} for {len(replies)} "
            "replies: it has to give one number a reply"
        )
    if not found.isfinite().all():
        place = int((~found.isfinite()).nonzero()[0])
        raise RewardError(f"reward {name} is {found[place]} for {_shown(replies[place])}")
    return found


def _numbers(reward: Reward, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> Tensor:
    """What a reward says of copies, which it may change or keep; a copy of its own, float32."""
    asked = [replace(prompt, ids=list(prompt.ids)) for prompt in prompts]
    found = torch.as_tensor(reward(asked, [replace(r, ids=list(r.ids)) for r in replies]))
    if found.is_complex() or found.is_sparse:
        raise TypeError("its numbers have to be real, and none left out")
    return found.detach().to("cpu", torch.float32, copy=True)


def _first_failing(reward: Reward, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> str:
    for prompt, reply in zip(prompts, replies, strict=True):
        try:
            _numbers(reward, [prompt], [reply])
        except Exception:
            return _shown(reply)
    return f"all {len(replies)} replies together, and on none alone"


def _shown(reply: Reply) -> str:
    return f"the reply {reply.text[:80]!r} ({len(reply.ids)} tokens)"
