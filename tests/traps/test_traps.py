"""The traps in which RLHF code gets caught, each closed by a test with its number in its name.

The tests stand in `test_traps_*.py`, and all read the same way. Below the `with` stands a property
of the library. Above stand the mistakes that others have made: each is put back into the library,
and the same property must then fail. So every test here proves that it can.

    @put_back(a_mistake, another)
    def test_trap_03_sampled_at_one_temperature(mistake, monkeypatch):
        ...
        with holds_unless(mistake, monkeypatch):
            assert ...
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlhf_lib.data.encoding import Pair
from rlhf_lib.methods import rewards
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rollout import Rollout, Sampler
from rlhf_lib.models import generation
from rlhf_lib.models.load import (
    freeze,
    load_reference,
    load_reward_model,
    load_tokenizer,
    save_model,
)
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.models.packing import Tokens, length_mask
from rlhf_lib.runtime import make_accelerator

TRAPS = {
    1: "left padding without position ids",
    2: "masks from ids == pad, where pad is the end token",
    3: "sampled at one temperature, scored at another",
    4: "dropout left on",
    5: "KL with its sign or ratio reversed; k1 as a loss",
    6: "filtered sampling, and a KL below 0",
    7: "statistics over padding",
    8: "the score on the pad after the end; no penalty for a missing end",
    9: "dialogues cut at the wrong place",
    10: "the reward head not saved; the wrong pad token",
    11: "prompt and reply tokenised together",
    12: "accumulation by a mean of means",
    13: "logits of every position",
    14: "half-precision weights, bf16 on a T4, checkpointing without a cache",
    15: "generation that never stops, or without a cache",
    16: "a run that cannot be resumed",
    17: "whitening before returns, or of the reward's mean",
    18: "division by a group's deviation of 0",
    19: "pairs equal once cut; conversations in two splits",
    20: "sequence log-probabilities averaged, unlabelled",
    21: "a reference in another precision than its policy",
    22: "an fp16 step that overflowed, counted as one",
    23: "a finished stage kept in memory",
    24: "a sequence's ratio that is a product, or a mean over padding",
    25: "a limited weight that is learnt, or that takes the gradient",
    26: "an entropy bonus without gradient, or with its sign reversed",
    27: "a length penalty of the padded batch, or one that pays for being short",
    28: "online pairs with the dataset's log-probs, or the worse one chosen",
    29: "an ensemble of rewards on different scales",
}
WITHOUT_MODEL = {
    9: "a dialogue is cut as text",
    11: "only the tokenizer decides: one of each family",
    19: "splits are made of texts and token ids",
    23: "whatever the model is, the stage before has to let go of it",
}

Mistake = Callable[[pytest.MonkeyPatch], None]

kinds = pytest.mark.parametrize("kind", ["gpt2", "llama"])  # absolute and rotary positions


def put_back(*mistakes: Mistake) -> pytest.MarkDecorator:
    """Run a test with the library as it is, and again for each mistake."""
    names = ["as it is", *(mistake.__name__ for mistake in mistakes)]
    return pytest.mark.parametrize("mistake", [None, *mistakes], ids=names)


@contextmanager
def holds_unless(mistake: Mistake | None, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The block passes; with a mistake put back one of its assertions has to fail."""
    if mistake is None:
        yield
        return
    mistake(patch)
    try:
        yield
    except AssertionError:
        return
    pytest.fail(f"{mistake.__name__} was put back, and nothing failed")


# --------------------------------------------------------------------- what the trap tests stand on

EOS = 1  # of the tiny tokenizer
# mixed lengths; the end token and the padding's own id (0) stand inside on purpose
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [0, 13, 14], [9, 8, 7, 6], [20, EOS, 22], [4, 4], [30]]
RESPONSES = [
    [15, EOS],
    [16, 17, 18, 19, 20, 21, 22, 23],
    [21, 0, EOS],
    [3],
    [25, 24, 23, EOS],
    [26, 27],
    [EOS],
]


def pad(rows: Tokens) -> Tensor:
    """Token lists as one (B, longest) tensor, filled with 0 on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def plain_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """Log-probability of each response token, by one forward of one sequence without padding."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0] / temperature
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logits.log_softmax(-1)[list(places), list(response)]


@torch.no_grad()
def likeliest(model: PreTrainedModel, prompt: Sequence[int], length: int) -> list[int]:
    """The response of likeliest tokens, found without padding and without a cache."""
    response: list[int] = []
    while len(response) < length and response[-1:] != [EOS]:
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, -1]
        response.append(int(logits.argmax()))
    return response


def other_model(make_model: Callable, kind: str) -> PreTrainedModel:
    """The model of `make_model(kind)` after somebody trained it."""
    model = make_model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9).add_(0.05 * torch.randn_like(parameter))
    return model


def pairs_of() -> list[Pair]:
    """A preference pair to each prompt."""
    rows = zip(PROMPTS, RESPONSES, RESPONSES[::-1], strict=True)
    return [Pair("", "", "", "", *row) for row in rows]


def learner_of(model: PreTrainedModel, rate: float = 0.0) -> Learner:
    return Learner(
        make_accelerator("fp32"), model, learning_rate=rate, steps=1000, max_grad_norm=1e9
    )


def write_models(
    folder: Path, kind: str, make_model: Callable, tokenizer: Any, **settings: Any
) -> SimpleNamespace:
    """Stages as PPO, GRPO and DPO read them: `sft` and `reward_model`, of random weights."""
    made = SimpleNamespace(
        sft=SimpleNamespace(model_path=folder / "sft", hash="made up"),
        reward_model=SimpleNamespace(model_path=folder / "reward", hash="made up"),
    )
    save_model(make_model(kind, **settings), tokenizer, made.sft.model_path)
    judge, own = load_reward_model(made.sft.model_path, tokenizer, seed=0)
    judge.score.weight.data.mul_(30)
    judge.config.reward_mean, judge.config.reward_std = 0.2, 0.7
    save_model(judge, own, made.reward_model.model_path)
    return made


def sampler_of(made: SimpleNamespace) -> Sampler:
    """What PPO and GRPO sample with; a reply has eight tokens at most."""
    accelerator, tokenizer = make_accelerator("fp32"), load_tokenizer(made.sft.model_path)
    judge, _ = load_reward_model(made.reward_model.model_path, tokenizer, seed=0)
    reward = rewards.of_model(freeze(accelerator, judge), accelerator)
    reference = freeze(accelerator, load_reference(made.sft.model_path))
    return Sampler(accelerator, tokenizer, reference, reward, max_new_tokens=8)


def rollout_of(
    policy: PreTrainedModel,
    prompts: Sequence[list[int]] = PROMPTS,
    responses: Sequence[list[int]] = RESPONSES,
    **changes: Any,
) -> Rollout:
    """A rollout of given responses: old log-probs are the policy's, the reference's are others."""
    with torch.no_grad():
        logprobs, mask = response_logprobs(policy, prompts, responses)
    sample = Rollout(
        prompts=list(prompts),
        responses=list(responses),
        response_mask=mask,
        logprobs=logprobs,
        ref_logprobs=(logprobs - torch.randn_like(logprobs)) * mask,
        finished=torch.tensor([r[-1] == EOS for r in responses]),
        scores=torch.randn(len(mask)),
        rewards=torch.randn(len(mask)),
        entropies=mask,
        gold=None,
        exact_kl=None,
    )
    assert torch.equal(mask, length_mask([len(r) for r in responses]))
    return replace(sample, **changes)


def generate_without_mask(patch: pytest.MonkeyPatch) -> None:
    """The padding on the left is attended to, and counted as positions."""
    step = generation.next_logits
    patch.setattr(
        generation,
        "next_logits",
        lambda model, ids, mask, positions, cache: step(model, ids, None, None, cache),
    )


# ------------------------------------------------------------------------- are all of them closed?


def _trap_tests() -> dict[int, list[ast.FunctionDef]]:
    found: dict[int, list[ast.FunctionDef]] = {}
    for path in sorted(Path(__file__).parent.glob("test_traps_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                number = re.match(r"test_trap_(\d\d)_", node.name)
                assert number, f"{path.name}: {node.name} names no trap"
                found.setdefault(int(number[1]), []).append(node)
    return found


def _mistakes(test: ast.FunctionDef) -> int:
    calls = [d for d in test.decorator_list if isinstance(d, ast.Call)]
    return sum(
        len(c.args) for c in calls if isinstance(c.func, ast.Name) and c.func.id == "put_back"
    )


def test_every_trap_has_a_test_that_can_fail() -> None:
    tests = _trap_tests()
    assert sorted(tests) == sorted(TRAPS) == list(range(1, 30))
    for test in (t for group in tests.values() for t in group):
        assert _mistakes(test) > 0, f"{test.name}: no mistake is put back"
        guarded = [ast.unparse(n.items[0]) for n in ast.walk(test) if isinstance(n, ast.With)]
        assert any(g.startswith("holds_unless(mistake, monkeypatch") for g in guarded), test.name


def test_every_trap_is_tried_on_both_kinds_of_positions() -> None:
    for number, tests in _trap_tests().items():
        arguments = {a.arg for test in tests for a in test.args.args}
        assert ("kind" in arguments) != (number in WITHOUT_MODEL), TRAPS[number]


def test_a_mistake_that_breaks_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def harmless(patch: pytest.MonkeyPatch) -> None:
        patch.setenv("HARMLESS", "1")

    with (
        pytest.raises(pytest.fail.Exception, match="harmless was put back, and nothing failed"),
        holds_unless(harmless, monkeypatch),
    ):
        pass
    with pytest.raises(ZeroDivisionError), holds_unless(harmless, monkeypatch):
        raise ZeroDivisionError  # code that crashes proves nothing
    with pytest.raises(AssertionError), holds_unless(None, monkeypatch):
        raise AssertionError
