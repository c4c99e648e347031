"""What an answer to each exercise is held against: it is right if it does what it was asked to.

No solution is stored here. An answer is compared with what the library computes for the same
input, or with the run at hand, or it must have the property that was asked for. `updates` has those
in which a whole update is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.special import expit
from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from rlhf_lib.data.dialogues import Unusable, read_pair, split_dialogue
from rlhf_lib.data.encoding import Encoder, Pair, Prompt
from rlhf_lib.data.sources import Row
from rlhf_lib.measure import rankings
from rlhf_lib.measure.statistics import holm
from rlhf_lib.methods import sft
from rlhf_lib.methods.rewards import Reply
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.objectives import advantages, losses
from rlhf_lib.objectives.preference import dpo_loss, ipo_loss
from rlhf_lib.show.widgets import kl_divergence, optimum
from rlhf_lib.world import rewards


class Claim(NamedTuple):
    """What the reader's answer came to, what is right, and the hint where the two differ."""

    answer: Any  # number, tensor or list
    truth: Any
    hint: str
    tolerance: float = 1e-3

    def holds(self) -> bool:
        sides = answered(self.answer), self.truth
        got, wanted = (np.asarray(torch.as_tensor(side).detach(), float) for side in sides)
        return got.shape == wanted.shape and np.allclose(got, wanted, 0, self.tolerance)


Claims = Iterator[Claim]
Check = Callable[..., Claims]  # of an answer, and what of the run it needs
CHECKS: dict[str, Check] = {}


class Unanswered(Exception):
    """The scaffold's `...` still stands where the answer is to go."""


class NoAnswer(Exception):
    """The answer is None: what a function gives that returns nothing."""


def exercise(name: str) -> Callable[[Check], Check]:
    """Enter a function as the check of this exercise."""
    return lambda function: CHECKS.setdefault(name, function)


def answered(answer: Any) -> Any:
    if answer is ...:
        raise Unanswered
    if answer is None:
        raise NoAnswer
    return answer


# ------------------------------------------------------------------------------------ 1, the data


@exercise("01-1")
def _fooling_reply(reply: str) -> Claims:
    prompt = "\n\nHuman: What does a stored dialogue look like?\n\nAssistant:"
    whole = split_dialogue(f"{prompt} {reply}")[1] == reply.strip()
    hint = "The splitter gave the reply back whole. Which characters does it look for?"
    yield Claim(whole, False, hint)


@exercise("01-2")
def _cut(cut: Callable, tokenizer: PreTrainedTokenizerBase) -> Claims:
    prompt, reply = "\n\nHuman: Is tea hot?\n\nAssistant:", " Yes, it is. Be careful."
    asked, said = tokenizer([prompt, reply], add_special_tokens=False)["input_ids"]
    begin = len(Encoder(tokenizer, 9, 1, "hh").begin)  # the reader's function knows none
    for less, relation in ((2, "two tokens below"), (0, "equal to"), (-1, "one token above")):
        limits = len(asked) - less, len(said) - less
        encoder = Encoder(tokenizer, limits[0] + begin, limits[1], "hh")
        truth = encoder.demonstrations([(prompt, reply)])[0]
        answer = answered(cut(asked, said, *limits, tokenizer.eos_token_id))
        same = [list(side) for side in answer] == [truth.prompt[begin:], truth.response]
        hint = f"Wrong where each limit is {relation} the length. What must stay, what may end?"
        yield Claim(same, True, hint)


@exercise("01-3")
def _kept_share(probability: Callable) -> Claims:
    asked = "\n\nHuman: Give me two tips on playing guitar.\n\nAssistant:"
    polite, refusal = "Relax your wrist. Thanks, friend.", "Sorry, I cannot help."
    plain = "Curve your fingers, then relax your wrist."
    for a, b in ((polite, plain), (plain, refusal), (refusal, polite)):
        gold_a, gold_b = (rewards.gold_reward(asked, reply).total for reply in (a, b))
        one, two = rewards.observe(a), rewards.observe(b)
        differences = gold_a - gold_b, one.polite - two.polite, one.length - two.length
        hint = "Compute the sigmoid first. Then: what does a label turned round do to it?"
        yield Claim(probability(*differences), rewards.preference_probability(asked, a, b), hint)


@exercise("01-4")
def _longer_share(share: float, pairs: Sequence[Pair]) -> Claims:
    hint = "Length counts characters of the reply's text, and a tie counts half."
    yield Claim(share, rankings.wins(rankings.length_preferences(pairs)).mean(), hint, 1e-6)


@exercise("01-5")
def _reader(read: Callable) -> Claims:
    asked = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Is tea hot?\n\nAssistant:"
    other = asked.replace("tea", "ice")
    rows = (
        (f"{asked} Yes.", f"{asked} No."),
        (f"{asked} Yes.", f"{asked} Yes. "),
        (f"{asked} Yes.", f"{asked} "),
        (f"{asked} Yes.", f"{other} No."),
        ("\n\nHuman: Is tea hot?", f"{asked} No."),
        ("\n\nAssistant: Yes.", "\n\nAssistant: No."),
        (f"\n\n{asked.strip()}  Yes.\n", f"{asked} No."),
    )
    for chosen, rejected in rows:
        try:
            pair = read_pair(Row("exercise", 1, {"chosen": chosen, "rejected": rejected}))
            truth = (pair.prompt, pair.chosen.strip(), pair.rejected.strip())
        except Unusable:
            truth = ("", "", "")
        answer = read(chosen, rejected)
        if answer is ...:
            raise Unanswered
        same = tuple(answer or ("", "", "")) == truth
        wanted = "left out (None)" if not truth[0] else "kept, as prompt and two bare replies"
        yield Claim(same, True, f"This row is to be {wanted}: {chosen!r} against {rejected!r}.")


# ----------------------------------------------------------------------------- 2, the reward model


@exercise("02-1")
def _difference(difference: Callable) -> Claims:
    for probability in (0.5, 0.9, 0.2):
        hint = f"Your difference for {probability} does not give it back. Solve σ(z) = p for z."
        yield Claim(expit(answered(difference(probability))), probability, hint, 1e-6)


@exercise("02-2")
def _last_scores(last_scores: Callable) -> Claims:
    hidden, weight, lengths = torch.randn(3, 6, 4), torch.randn(4), torch.tensor([6, 2, 4])
    truth = [hidden[i, int(n) - 1] @ weight for i, n in enumerate(lengths)]
    hint = "Row i has lengths[i] real tokens, the first of them at place 0: where is the last?"
    yield Claim(last_scores(hidden, weight, lengths), torch.stack(truth), hint)


@exercise("02-3")
def _expected_error(ece: Callable) -> Claims:
    preferences = np.random.default_rng(0).normal(0.7, 2.0, size=42)
    confidence, won = expit(np.abs(preferences)), rankings.wins(preferences)
    for bins in (1, 6):
        truth = rankings.calibration(preferences, bins, samples=10)["ece"]["mean"]
        hint = f"Wrong with {bins} bin(s). Sort by confidence, cut, and weigh each bin by size."
        yield Claim(ece(confidence, won, bins), truth, hint, 1e-6)


@exercise("02-4")
def _surer_half(accuracy: float, preferences: np.ndarray) -> Claims:
    surest = np.argsort(-np.abs(preferences))[: len(preferences) // 2]
    hint = "Sure means far from 0 on either side; right means above 0."
    yield Claim(accuracy, rankings.wins(preferences[surest]).mean(), hint, 1e-6)


# -------------------------------------------------------------------------------------- 3, SFT


@exercise("03-1")
def _combined(combine: Callable) -> Claims:
    lengths, mask = torch.tensor([2, 7, 1, 4]), torch.zeros(4, 7)
    for row, length in zip(mask, lengths.tolist(), strict=True):
        row[:length] = 1
    logprobs = -torch.rand(4, 7)
    parts = [losses.sft_loss(logprobs[i : i + 2], mask[i : i + 2]).item() for i in (0, 2)]
    tokens = [int(lengths[i : i + 2].sum()) for i in (0, 2)]
    hint = "The loss is a mean over tokens: how many of them stand behind each part?"
    yield Claim(combine(parts, tokens), losses.sft_loss(logprobs, mask), hint)


@exercise("03-2")
def _reply_logprobs(logprobs: Callable, model: Module) -> Claims:
    prompt, reply = [3, 5, 4, 7], [6, 2, 3]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + reply])).logits[0].cpu().float()
        truth = response_logprobs(model, [prompt], [reply])[0][0]
    answer = answered(logprobs(logits, prompt, reply))
    rows = logits[len(prompt) :].log_softmax(-1)
    hint = "Row t of the logits has read token t and speaks of the next one."
    if len(answer) == len(reply) and torch.allclose(answer, rows[range(len(reply)), reply]):
        hint = "One place too late: these rows have already read the token that they are asked for."
    yield Claim(answer, truth.cpu(), hint)


@exercise("03-3")
def _favourite(favourite: Callable) -> Claims:
    for _ in range(20):
        scores, finished = torch.randn(4), torch.rand(4) < 0.4
        answer = favourite(scores, finished)
        replies = [Reply("", [i], ended) for i, ended in enumerate(finished.tolist())]
        drawn = {"draw": lambda *_, replies=replies: replies, "reference": None}
        sampler = SimpleNamespace(score=lambda *_, scores=scores: (scores, None), **drawn)
        (best,), _ = sft.best_of_n(sampler, [Prompt("", [2])], 4)  # type: ignore[arg-type]
        hint = f"Wrong for scores {scores.tolist()}, finished {finished.tolist()}."
        yield Claim(answer, best.response[0], hint)


# -------------------------------------------------------------------------------------- 4, PPO


def _reply(gamma: float, gae_lambda: float) -> tuple[list[float], ...]:
    """A made-up reply of five tokens: rewards, values, and the library's advantages and returns."""
    rewards, values = torch.randn(1, 5), torch.randn(1, 5)
    found = advantages.gae(rewards, values, torch.ones(1, 5), gamma, gae_lambda)
    return tuple(tensor[0].tolist() for tensor in (rewards, values, *found))


@exercise("04-1")
def _gae(my_gae: Callable) -> Claims:
    for gamma, gae_lambda in ((1.0, 0.95), (1.0, 0.0), (0.9, 0.5)):
        rewards, values, truth, _ = _reply(gamma, gae_lambda)
        hint = f"Wrong at γ = {gamma}, λ = {gae_lambda}. Begin at the last token: no value next."
        answer = answered(my_gae(rewards, values, gamma, gae_lambda))
        if np.allclose(answer[::-1], truth, atol=1e-3):
            hint = "Right, but the wrong way round: the first advantage is that of the first token."
        elif np.allclose(answer, np.add(truth, values), atol=1e-3):
            hint = "These are the returns: advantages plus values."
        yield Claim(answer, truth, hint)


@exercise("04-2")
def _returns(returns: Callable) -> Claims:
    rewards, _, _, truth = _reply(1.0, 1.0)
    hint = "Write out Â₁ + V₁ for a reply of two tokens: which values are left over?"
    yield Claim(returns(rewards), truth, hint)


@exercise("04-3")
def _silent_token(silent: Callable) -> Claims:
    for ratio in (0.5, 0.9, 1.1, 1.5):
        for advantage in (-1.0, 1.0):
            logprob = torch.tensor([[ratio]]).log().requires_grad_()
            one = torch.ones(1, 1)
            loss, _ = losses.ppo_policy_loss(logprob, 0 * one, advantage * one, one, 0.2)
            (gradient,) = torch.autograd.grad(loss, logprob)
            answer = bool(answered(silent(ratio, advantage, 0.2)))
            hint = f"Wrong at ratio {ratio} and advantage {advantage}: which term is smaller?"
            yield Claim(answer, gradient.item() == 0, hint)


@exercise("04-4")
def _deductions(cost: float, metrics: Sequence[Mapping]) -> Claims:
    scores, leash, whole = (
        np.array([row[f"objective/{key}"] for row in metrics])
        for key in ("scores", "non_score_reward", "rlhf_reward")
    )
    hint = "rlhf_reward = score − β·KL − what is asked for, in each update; then the mean."
    yield Claim(cost, (scores + leash - whole).mean(), hint, 1e-5)


# -------------------------------------------------------------------------------------- 5, GRPO


@exercise("05-1")
def _shrinkage(factor: Callable, first: int) -> Claims:
    for size in (2, 3, 8):
        rewards = torch.arange(float(size))
        centred = advantages.group_advantages(rewards, size, "none")
        left_out = advantages.leave_one_out_advantages(rewards, size)
        hint = f"Wrong for a group of {size}. By what is r − (mean of all) the smaller one?"
        yield Claim(factor(size), (centred / left_out)[0], hint)
    small = next(size for size in range(2, 99) if 1 - factor(size) < 0.1 - 1e-9)
    hint = "The factor is right. From which G on is it above 0.9, and not just equal to it?"
    yield Claim(answered(first), small, hint)


@exercise("05-2")
def _token_weight(weight: Callable) -> Claims:
    lengths = [2, 5, 3]
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).float()
    for aggregation in ("sequence", "token", "constant"):
        logprobs = torch.zeros(3, 5, requires_grad=True)
        loss, _ = losses.grpo_loss(
            logprobs, torch.zeros(3, 5), torch.ones(3), mask, aggregation=aggregation
        )
        (gradient,) = torch.autograd.grad(loss, logprobs)
        for i in range(3):
            hint = f"Wrong for {aggregation!r}: by what is each token's term divided?"
            yield Claim(weight(lengths, i, aggregation), -gradient[i, 0], hint)


@exercise("05-3")
def _silent_share(share: Callable) -> Claims:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.1, 0.2, 0.7, 0.7, 0.7, 1.0, -1.0, 0.0])
    silent = ~advantages.group_advantages(rewards, 3).view(-1, 3).any(1)
    hint = "A group is silent if all its rewards are equal; count groups, not replies."
    yield Claim(share(rewards.tolist(), 3), silent.float().mean(), hint)
    tenths = [0.1] * 3 + [0.7] * 3  # of which the standard deviation is some 1e-17, and not zero
    hint = (
        "Wrong for 0.1, 0.1, 0.1: its mean is not 0.1 to the last bit, so its spread is not zero. "
        "Compare the rewards with each other."
    )
    yield Claim(share(tenths, 3), 1.0, hint)


# --------------------------------------------------------------------------------------- 6, DPO


def _dpo(margin: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO's loss for pairs whose chosen reply leads by `margin` nats."""
    zero = torch.zeros_like(margin)
    return dpo_loss(margin, zero, zero, zero, beta, label_smoothing)[0]


@exercise("06-1")
def _pull(pull: Callable) -> Claims:
    for lead, beta in ((0.0, 0.1), (12.0, 0.1), (-7.0, 0.3)):
        margin = torch.tensor([lead], requires_grad=True)
        (gradient,) = torch.autograd.grad(_dpo(margin, beta), margin)
        hint = f"Wrong at a lead of {lead} nats and β = {beta}: differentiate −log σ(β·lead)."
        yield Claim(pull(lead, beta), -gradient[0], hint, 1e-5)


@exercise("06-2")
def _best_margin(best: Callable) -> Claims:
    grid = torch.linspace(-8, 8, 3201)  # steps of 0.005
    for smoothing in (0.1, 0.25):
        values = torch.stack([_dpo(margin[None], 1.0, smoothing) for margin in grid])
        hint = f"Wrong at ε = {smoothing}: where is the derivative of the two terms zero?"
        yield Claim(best(smoothing), grid[values.argmin()], hint, 0.006)


@exercise("06-3")
def _leash(beta: float, reference: Sequence[float], reward: Sequence[float]) -> Claims:
    known = np.asarray(reference, dtype=float), np.asarray(reward, dtype=float)
    above = "β must be above 0: it divides the reward, and at 0 nothing holds the policy."
    yield Claim(float(beta) > 0, True, above)
    paid = kl_divergence(optimum(*known, float(beta)), known[0])
    hint = f"This β pays {paid:.3f} nats. A larger β pays less."
    yield Claim(paid, 0.5, hint, 0.01)


@exercise("06-4")
def _ipo_target(target: Callable) -> Claims:
    for beta in (0.1, 0.5):
        lead, zero = torch.tensor([float(answered(target(beta)))]), torch.zeros(1)
        hint = f"At β = {beta} the loss is not yet zero there. Where does its square vanish?"
        yield Claim(ipo_loss(lead, zero, zero, zero, beta)[0], 0.0, hint, 1e-6)


# ------------------------------------------------------------------------------ 7, the evaluation


@exercise("07-1")
def _paired_error(error: Callable) -> Claims:
    rng = np.random.default_rng(0)
    easy = rng.normal(size=50)  # how easy each prompt is, for both policies alike
    one, other = easy + 0.3 * rng.normal(size=50), easy + 0.3 * rng.normal(size=50)
    hint = "Subtract prompt by prompt first; then the error of a mean, with n − 1 in the spread."
    yield Claim(error(one, other), stats.sem(one - other), hint, 1e-6)


@exercise("07-2")
def _win_rate(rate: Callable) -> Claims:
    one, other = np.array([1.0, 0.0, 2.0, 2.0, -1.0]), np.array([0.0, 0.0, 3.0, 1.0, -1.0])
    hint = "What does a tie count?"
    yield Claim(rate(one, other), rankings.wins(one - other).mean(), hint, 1e-6)


@exercise("07-3")
def _best_of_n(kl: Callable) -> Claims:
    size = 100_000  # so many equally likely replies, each with a reward of its own
    share = np.arange(size + 1) / size
    for n in (1, 2, 16):
        best = np.diff(share**n)  # P(the best of n is this one)
        hint = f"Wrong for n = {n}. The formula is above."
        yield Claim(kl(n), kl_divergence(best, np.full(size, 1 / size)), hint)


@exercise("07-4")
def _seed_interval(interval: Callable) -> Claims:
    for means in ([0.2, 0.5, 0.3], [1.0, -1.0, 0.5, 0.0, 2.0]):
        truth = stats.ttest_1samp(means, 0.0).confidence_interval(0.95)
        hint = f"Wrong for the seeds {means}. How many degrees of freedom are left?"
        yield Claim(interval(means), [truth.low, truth.high], hint, 1e-6)


@exercise("07-5")
def _differing(differ: Callable) -> Claims:
    rng = np.random.default_rng(85)
    for shifts in ({"a": 0.0, "b": 0.36, "c": 0.0}, {"a": 0.9, "b": 0.42, "c": 0.4, "d": 0.0}):
        gains = {name: shift + rng.normal(size=40) for name, shift in shifts.items()}
        # scipy's types do not know what its test returns
        tests: list[Any] = [stats.ttest_1samp(gain, 0.0) for gain in gains.values()]
        p_values = [float(test.pvalue) for test in tests]
        corrected = dict(zip(gains, holm(p_values), strict=True))
        truth = {name for name, p in corrected.items() if p < 0.05}
        alone = {name for name, p in zip(gains, p_values, strict=True) if p < 0.05}
        answer = set(answered(differ(gains)))
        hint = f"Of p = {[round(p, 3) for p in p_values]} you took {sorted(answer)}."
        if answer == alone != truth:
            hint += " Each alone is below 0.05; all of them together are a family."
        yield Claim(answer == truth, True, hint)
