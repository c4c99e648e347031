"""The checks behind the notebooks' exercises: an answer is right if it does what it is asked to.

No solution is stored here. An answer is compared with what the library computes for the same
input, or with the run at hand, or it must have the property that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from rlhf_lib.data.dialogues import split_dialogue
from rlhf_lib.data.encoding import Encoder, Pair, Prompt
from rlhf_lib.measure import rankings
from rlhf_lib.methods import sft
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.objectives import advantages, losses
from rlhf_lib.objectives.preference import ipo_loss
from rlhf_lib.show import widgets
from rlhf_lib.world import rewards


class Unanswered(Exception):
    """The scaffold's `...` still stands where the answer is to go."""


def check(name: str, answer: object, *given: object) -> None:
    """`judge` by the checks of this module: notebooks 1 and 3 to 6."""
    judge(CHECKS, name, answer, *given)


def judge(checks: Mapping[str, Callable], name: str, answer: object, *given: object) -> None:
    """Print whether the answer to exercise `name` is right, a hint if it is not.

    answer: a value or a function, as the exercise asks; `...` counts as not answered yet.
    given: what of the run the check needs. Raises KeyError for an exercise that does not exist.
    """
    try:
        refuse_blank(answer)
        hint = checks[name](answer, *given)
    except Unanswered:
        print(f"{name}: not answered yet")
    else:
        print(f"{name}: right" if hint is None else f"{name}: not yet. {hint}")


def refuse_blank(answer: object) -> None:
    if answer is ...:
        raise Unanswered


def differs(answer: object, truth: object, tolerance: float = 1e-3) -> bool:
    """Whether an answer (number, tensor, list) is not the truth; raises Unanswered for `...`."""
    refuse_blank(answer)
    got, wanted = (np.asarray(torch.as_tensor(x).detach(), float) for x in (answer, truth))
    return got.shape != wanted.shape or not np.allclose(got, wanted, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------ 1, the data


def _fooling_reply(reply: str) -> str | None:
    prompt = "\n\nHuman: What does a stored dialogue look like?\n\nAssistant:"
    if split_dialogue(f"{prompt} {reply}")[1] == reply.strip():
        return "The splitter gave the reply back whole. Which characters does it look for?"
    return None


def _cut(cut: Callable, tokenizer: PreTrainedTokenizerBase) -> str | None:
    prompt, reply = "\n\nHuman: Is tea hot?\n\nAssistant:", " Yes, it is. Be careful."
    asked, said = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, reply)
    )
    eos = tokenizer.eos_token_id
    for less in (2, 0, -1):  # limits below, at and above the lengths
        limits = len(asked) - less, len(said) - less
        truth = Encoder(tokenizer, *limits).demonstrations([(prompt, reply)])[0]
        answer = cut(asked, said, *limits, eos)
        refuse_blank(answer)
        if [list(side) for side in answer] != [truth.prompt, truth.response]:
            relation = {2: "two tokens below", 0: "equal to", -1: "one token above"}[less]
            return f"Wrong where each limit is {relation} the length. What must stay, what may end?"
    return None


def _kept_share(probability: Callable) -> str | None:
    asked = "\n\nHuman: Give me two tips on playing guitar.\n\nAssistant:"
    replies = ("Relax your wrist. Thanks, friend.", "Curve your fingers, then relax your wrist.",
               "Sorry, I cannot help.")  # fmt: skip
    for a, b in zip(replies, (*replies[1:], replies[0]), strict=True):
        seen = [(rewards.gold_reward(asked, x).total, rewards.observe(x)) for x in (a, b)]
        (gold_a, one), (gold_b, two) = seen
        differences = gold_a - gold_b, one.polite - two.polite, one.length - two.length
        if differs(probability(*differences), rewards.preference_probability(asked, a, b)):
            return "Compute the sigmoid first. Then: what does a label turned round do to it?"
    return None


def _longer_share(share: float, pairs: Sequence[Pair]) -> str | None:
    if differs(share, rankings.wins(rankings.length_preferences(pairs)).mean(), 1e-6):
        return "Length counts characters of the reply's text, and a tie counts half."
    return None


# -------------------------------------------------------------------------------------- 3, SFT


def _combined(combine: Callable) -> str | None:
    lengths, mask = torch.tensor([2, 7, 1, 4]), torch.zeros(4, 7)
    for row, length in zip(mask, lengths.tolist(), strict=True):
        row[:length] = 1
    logprobs = -torch.rand(4, 7)
    parts = [losses.sft_loss(logprobs[i : i + 2], mask[i : i + 2]).item() for i in (0, 2)]
    tokens = [int(lengths[i : i + 2].sum()) for i in (0, 2)]
    if differs(combine(parts, tokens), losses.sft_loss(logprobs, mask)):
        return "The loss is a mean over tokens: how many of them stand behind each part?"
    return None


def _reply_logprobs(logprobs: Callable, model: Module) -> str | None:
    prompt, reply = [3, 5, 4, 7], [6, 2, 3]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + reply])).logits[0].cpu().float()
        truth = response_logprobs(model, [prompt], [reply])[0][0]
    if differs(logprobs(logits, prompt, reply), truth.cpu()):
        return "Row t of the logits has read token t and speaks of the next one."
    return None


def _favourite(favourite: Callable) -> str | None:
    for _ in range(20):
        scores, finished = torch.randn(4), torch.rand(4) < 0.4
        answer = favourite(scores, finished)
        replies = [[10 + i, *[1] * ended] for i, ended in enumerate(finished.int().tolist())]
        sampler = SimpleNamespace(
            draw=lambda *_, drawn=(replies, scores): drawn, reference=None,
            tokenizer=SimpleNamespace(eos_token_id=1, batch_decode=lambda r, **_: [""] * len(r)),
        )  # fmt: skip
        (best,), _ = sft.best_of_n(sampler, [Prompt("", [2])], 4)  # type: ignore[arg-type]
        if differs(answer, best.response[0] - 10):
            return f"Wrong for scores {scores.tolist()}, finished {finished.tolist()}."
    return None


# -------------------------------------------------------------------------------------- 4, PPO


class _Reply(NamedTuple):
    """A made-up reply of five tokens, and what the library makes of it; one number a token."""

    rewards: list[float]
    values: list[float]
    advantages: list[float]
    returns: list[float]


def _one_reply(gae_lambda: float, gamma: float) -> _Reply:
    rewards, values, mask = torch.randn(1, 5), torch.randn(1, 5), torch.ones(1, 5)
    found = advantages.gae(rewards, values, mask, gamma, gae_lambda)
    return _Reply(*(tensor[0].tolist() for tensor in (rewards, values, *found)))


def _gae(my_gae: Callable) -> str | None:
    for gae_lambda, gamma in ((0.95, 1.0), (0.0, 1.0), (0.5, 0.9)):
        made = _one_reply(gae_lambda, gamma)
        answer = my_gae(made.rewards, made.values, gamma, gae_lambda)
        if differs(answer, made.advantages):
            return f"Wrong at γ = {gamma}, λ = {gae_lambda}. Begin at the last token: no value next"
    return None


def _returns(returns: Callable) -> str | None:
    made = _one_reply(1.0, 1.0)
    if differs(returns(made.rewards), made.returns):
        return "Write out Â₁ + V₁ for a reply of two tokens: which values are left over?"
    return None


def _silent_token(silent: Callable) -> str | None:
    for ratio in (0.5, 0.9, 1.1, 1.5):
        for advantage in (-1.0, 1.0):
            logprob = torch.tensor([[ratio]]).log().requires_grad_()
            one = torch.ones(1, 1)
            loss, _ = losses.ppo_policy_loss(logprob, 0 * one, advantage * one, one, 0.2)
            (gradient,) = torch.autograd.grad(loss, logprob)
            answer = silent(ratio, advantage, 0.2)
            refuse_blank(answer)
            if bool(answer) != (gradient.item() == 0):
                return f"Wrong at ratio {ratio} and advantage {advantage}: which term is smaller?"
    return None


def _deductions(cost: float, metrics: Sequence[Mapping]) -> str | None:
    scores, leash, whole = (
        np.array([row[f"objective/{key}"] for row in metrics])
        for key in ("scores", "non_score_reward", "rlhf_reward")
    )
    if differs(cost, (scores + leash - whole).mean(), 1e-5):
        return "rlhf_reward = score − β·KL − what is asked for, in each update; then the mean."
    return None


# -------------------------------------------------------------------------------------- 5, GRPO


def _shrinkage(factor: Callable) -> str | None:
    for size in (2, 3, 8):
        rewards = torch.arange(float(size))
        centred = advantages.group_advantages(rewards, size, "none")
        if differs(factor(size), (centred / advantages.leave_one_out_advantages(rewards, size))[0]):
            return f"Wrong for a group of {size}. By what is r − (mean of all) the smaller one?"
    return None


def _token_weight(weight: Callable) -> str | None:
    lengths = [2, 5, 3]
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).float()
    for aggregation in ("sequence", "token", "constant"):
        logprobs = torch.zeros(3, 5, requires_grad=True)
        loss, _ = losses.grpo_loss(
            logprobs, torch.zeros(3, 5), torch.ones(3), mask, aggregation=aggregation
        )
        (gradient,) = torch.autograd.grad(loss, logprobs)
        for i in range(3):
            if differs(weight(lengths, i, aggregation), -gradient[i, 0]):
                return f"Wrong for {aggregation!r}: by what is each token's term divided?"
    return None


def _silent_share(share: Callable) -> str | None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.1, 0.2, 0.7, 0.7, 0.7, 1.0, -1.0, 0.0])
    silent = ~advantages.group_advantages(rewards, 3).view(-1, 3).any(1)
    if differs(share(rewards.tolist(), 3), silent.float().mean()):
        return "A group is silent if all its rewards are equal; count groups, not replies."
    return None


# --------------------------------------------------------------------------------------- 6, DPO


def _dpo(margin: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO's loss for pairs whose chosen reply leads by `margin` nats."""
    zero = torch.zeros_like(margin)
    return losses.dpo_loss(margin, zero, zero, zero, beta, label_smoothing)[0]


def _pull(pull: Callable) -> str | None:
    for lead, beta in ((0.0, 0.1), (12.0, 0.1), (-7.0, 0.3)):
        margin = torch.tensor([lead], requires_grad=True)
        (gradient,) = torch.autograd.grad(_dpo(margin, beta), margin)
        if differs(pull(lead, beta), -gradient[0], 1e-5):
            return f"Wrong at a lead of {lead} nats and β = {beta}: differentiate −log σ(β·lead)."
    return None


def _best_margin(best: Callable) -> str | None:
    grid = torch.linspace(-8, 8, 3201)  # steps of 0.005
    for smoothing in (0.1, 0.25):
        values = torch.stack([_dpo(margin[None], 1.0, smoothing) for margin in grid])
        if differs(best(smoothing), grid[values.argmin()], 0.006):
            return f"Wrong at ε = {smoothing}: where is the derivative of the two terms zero?"
    return None


def _leash(beta: float, reference: Sequence[float], reward: Sequence[float]) -> str | None:
    known = np.asarray(reference, dtype=float), np.asarray(reward, dtype=float)
    paid = widgets.kl_divergence(widgets.optimum(*known, float(beta)), known[0])
    if differs(paid, 0.5, 0.01):
        return f"This β pays {paid:.3f} nats. A larger β pays less."
    return None


def _ipo_target(target: Callable) -> str | None:
    for beta in (0.1, 0.5):
        answer, zero = target(beta), torch.zeros(1)
        refuse_blank(answer)
        lead = torch.tensor([float(answer)])
        if differs(ipo_loss(lead, zero, zero, zero, beta)[0], 0.0, 1e-6):
            return f"At β = {beta} the loss is not yet zero there. Where does its square vanish?"
    return None


CHECKS: dict[str, Callable[..., str | None]] = {
    "01-1": _fooling_reply, "01-2": _cut, "01-3": _kept_share, "01-4": _longer_share,
    "03-1": _combined, "03-2": _reply_logprobs, "03-3": _favourite,
    "04-1": _gae, "04-2": _returns, "04-3": _silent_token, "04-4": _deductions,
    "05-1": _shrinkage, "05-2": _token_weight, "05-3": _silent_share,
    "06-1": _pull, "06-2": _best_margin, "06-3": _leash, "06-4": _ipo_target,
}  # fmt: skip
