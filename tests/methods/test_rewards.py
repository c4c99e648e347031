"""Rewards: what each maker says, what several say together, and which mistakes are refused."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_lib import user_code
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.data.truth import truth_of
from rlhf_lib.methods import rewards
from rlhf_lib.methods.rewards import Reply, RewardError, checked, named, of_model, of_truth
from rlhf_lib.models.logprobs import sequence_scores
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import SettingsError
from rlhf_lib.world.rewards import gold_reward
from tests.conftest import EOS, TIMINGS, train_stage

PROMPTS = [Prompt("p", [5, 6, 7]), Prompt("q", [12]), Prompt("r", [13, 14])]
REPLIES = [
    Reply("a b c", [5, 6, 7, EOS], True),
    Reply("please", [8], False),
    Reply("", [EOS], True),
]
FAKE_TRUTH: Any = SimpleNamespace(
    gold=lambda prompt, text, finished: SimpleNamespace(total=len(text) + 0.5 * finished),
    signs=lambda prompt, text: {},
)


def count(prompts: list[Prompt], replies: list[Reply]) -> list[int]:
    return [len(reply.ids) for reply in replies]


def no_model() -> list[rewards.Reward]:
    raise AssertionError("nobody asked for the reward model")


def fixed(*values: float) -> rewards.Reward:
    return lambda prompts, replies: list(values)


# ------------------------------------------------------------------------------------- makers


def test_scores_of_a_model_are_normalised_and_padding_plays_no_part(
    score_model: PreTrainedModel,
) -> None:
    score_model.config.reward_mean, score_model.config.reward_std = 3.0, 2.0
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14], [9, 8, 7, 6], [20, 21, 22]]
    responses = [[15, 1], [16, 17, 18, 19, 20], [21, 0, 1], [3], [4, 4]]
    raw = torch.cat(
        [sequence_scores(score_model, [p], [r]) for p, r in zip(prompts, responses, strict=True)]
    )
    asked, replies = [Prompt("", p) for p in prompts], [Reply("", r, True) for r in responses]
    for batch_size in (64, 2, 1):
        scores = of_model(score_model, make_accelerator("fp32"), batch_size)(asked, replies)
        assert torch.allclose(scores, (raw - 3) / 2, atol=1e-5)
    assert not scores.requires_grad


def test_the_score_is_that_of_the_end_token(score_model: PreTrainedModel) -> None:
    hidden = score_model.base_model(torch.tensor([[5, 6, 7, EOS]])).last_hidden_state
    expected = score_model.score(hidden)[0, :, 0]
    got = rewards.raw_scores(score_model, [[5, 6], [5] * 9], [[7, EOS], [7]])[0]
    assert got.item() == pytest.approx(expected[3].item(), abs=1e-5)
    assert abs(expected[3] - expected[2]) > 1e-3


def test_a_reply_is_finished_if_its_last_token_is_the_end(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    replies = rewards.read_replies(tiny_tokenizer, [[5, 6, EOS], [EOS, 5], [7], [EOS]])
    assert [reply.text for reply in replies] == ["a b", "a", "c", ""]
    assert [reply.finished for reply in replies] == [True, False, False, True]
    assert replies[0].ids == [5, 6, EOS]


def test_gold_sees_both_texts_and_whether_the_reply_ended() -> None:
    seen = []

    def gold(*given: object) -> SimpleNamespace:
        seen.append(given)
        return SimpleNamespace(total=float(len(seen)))

    truth: Any = SimpleNamespace(gold=gold)
    assert torch.as_tensor(of_truth(truth)(PROMPTS, REPLIES)).tolist() == [1.0, 2.0, 3.0]
    assert seen == [("p", "a b c", True), ("q", "please", False), ("r", "", True)]


def test_gold_of_the_bundled_world_is_that_of_the_world() -> None:
    truth = truth_of("bundled")
    assert truth is not None
    texts = truth.heldout()[:4]
    prompts = [Prompt(prompt, []) for prompt, _ in texts]
    replies = [Reply(reply, [], i % 2 == 0) for i, (_, reply) in enumerate(texts)]
    expected = [gold_reward(p, r, i % 2 == 0).total for i, (p, r) in enumerate(texts)]
    assert torch.as_tensor(of_truth(truth)(prompts, replies)).tolist() == expected
    assert len(set(expected)) > 1


def test_rules_by_hand() -> None:
    found = named("brevity, ended", no_model, None).each(PROMPTS, REPLIES)
    assert found["brevity"].tolist() == pytest.approx([-0.3, -0.1, 0.0])
    assert found["ended"].tolist() == [1.0, 0.0, 1.0]


def test_a_function_of_the_users_in_a_file_or_a_package(user_folder: Path) -> None:
    source = (
        "def polite(prompts, replies):\n    return [float('please' in r.text) for r in replies]"
    )
    (user_folder / "manners.py").write_text(source)
    package = user_folder / "of_mine" / "inner"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "deep.py").write_text(source.replace("float", "2 * float"))
    in_file = f"{user_folder}/manners.py:polite"
    assert named(in_file, no_model, None)(PROMPTS, REPLIES).tolist() == [0, 1, 0]
    both = named(f"of_mine.inner.deep:polite, {in_file}", no_model, None)
    assert both(PROMPTS, REPLIES).tolist() == [0, 3, 0]


# ------------------------------------------------------------------------- several, with weights


def test_the_sum_weighs_what_each_says() -> None:
    reward = named("0.5*gold, model,-2 * ended", lambda: [count], FAKE_TRUTH)
    each = reward.each(PROMPTS, REPLIES)
    assert {name: part.tolist() for name, part in each.items()} == {
        "gold": [5.5, 6.0, 0.5],
        "model": [4.0, 1.0, 1.0],
        "ended": [1.0, 0.0, 1.0],
    }
    assert reward(PROMPTS, REPLIES).tolist() == [4.75, 4.0, -0.75]
    assert reward(PROMPTS, REPLIES).dtype is torch.float32


def test_one_reward_alone_is_what_it_is_to_the_bit() -> None:
    values = torch.randn(3, dtype=torch.double)
    alone = named("model", lambda: [lambda prompts, replies: values], None)
    assert torch.equal(alone(PROMPTS, REPLIES), values.float())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("half*model", "'half\\*model': 'half' is no weight"),
        ("*model", "'' is no weight"),
        ("nan*model", "'nan' is no weight"),
        ("ended, inf*model", "'inf' is no weight"),
        ("model, 0.5*model", "names model twice"),
        (
            "modle",
            "'modle': choose among model, mean, minimum, gold, brevity, ended, package.module",
        ),
        ("", "reward '': choose among"),
        ("ended,", "reward '': choose among"),
        ("gold", "nobody knows the true reward of these data"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("rlhf_lib.methods.rewards:politeness", "no attribute 'politeness'"),
        ("rlhf_lib.methods.rewards:RULES", "it is no function"),
        ("no/such/file.py:f", "there is no file"),
    ],
)
def test_what_the_setting_cannot_mean_is_refused(setting: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        named(setting, lambda: count, None)


# ------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (fixed(1.0, 2.0), r"returned numbers of shape \(2,\) for 3 replies: it has to give one"),
        (lambda prompts, replies: 1.0, r"returned numbers of shape \(\) for 3 replies"),
        (
            lambda prompts, replies: torch.zeros(3, 1),
            r"returned numbers of shape \(3, 1\) for 3 replies",
        ),
        (fixed(1.0, math.nan, math.inf), r"is nan for the reply 'please' \(1 tokens\)"),
        (fixed(1.0, 2.0, -math.inf), r"is -inf for the reply ''"),
        (fixed(1.0, 1e300, 2.0), r"is inf for the reply 'please'"),
        (lambda prompts, replies: None, r"failed: .*; first on the reply 'a b c' \(4 tokens\)"),
        (
            lambda prompts, replies: [1 / len(r.text.split()) for r in replies],
            r"failed: ZeroDivisionError.*; first on the reply ''",
        ),
        (
            lambda prompts, replies: [] if len(replies) == 1 else replies[7],
            r"failed: IndexError.*; first on all 3 replies together, and on none alone",
        ),
        (lambda prompts, replies: [1.0, None, 1.0][: len(replies)], "failed: .*together"),
        (
            lambda prompts, replies: ["a" if r.text == "please" else 1.0 for r in replies],
            "failed: .*; first on the reply 'please'",
        ),
        (lambda prompts, replies: np.full(len(replies), 1j), "failed: .*have to be real"),
        (lambda prompts, replies: torch.eye(3).to_sparse()[0], "failed: .*none left out"),
    ],
)
def test_a_mistake_names_the_function_and_the_first_such_reply(
    found: rewards.Reward, message: str
) -> None:
    with pytest.raises(RewardError, match=f"^reward mine.py:polite {message}"):
        checked("mine.py:polite", found, PROMPTS, REPLIES)


def test_a_reward_may_do_what_it_likes_with_what_it_is_given() -> None:
    kept = torch.zeros(3)

    def rude(prompts: list, replies: list) -> torch.Tensor:
        replies.sort(key=lambda reply: reply.text)
        replies[0].ids[:] = []
        prompts[0].ids.clear()
        replies.pop()
        return kept

    given = [Reply(r.text, list(r.ids), r.finished) for r in REPLIES]
    found = rewards.checked("rude", rude, PROMPTS, given)
    kept += 1
    assert found.tolist() == [0, 0, 0]
    assert given == REPLIES


def test_out_of_memory_is_no_mistake_of_a_reply() -> None:
    calls = []

    def large(prompts: list, replies: list) -> list:
        calls.append(len(replies))
        raise torch.cuda.OutOfMemoryError("no room")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        rewards.checked("large", large, PROMPTS, REPLIES)
    assert calls == [3], "asked once"


def test_whoever_fails_among_several_is_named_once() -> None:
    inner = named("model", lambda: [fixed(math.nan, 1.0, 1.0)], None)
    with pytest.raises(RewardError, match=r"^reward model is nan for the reply 'a b c'"):
        checked("outer", inner, PROMPTS, REPLIES)


def test_an_interrupt_is_no_mistake_of_the_function() -> None:
    def stop(prompts: list[Prompt], replies: list[Reply]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked("mine", stop, PROMPTS, REPLIES)


# ------------------------------------------------------------------------- in a rollout and a stage


def test_each_of_several_is_logged_on_its_own(
    make_sampler: Callable, tiny_data: Any, tiny_base: Path
) -> None:
    sampler = make_sampler(named("0.5*ended, brevity", no_model, None))
    sample = sampler.sample(sampler.reference, tiny_data.prompts["train"] * 2)
    assert set(sample.parts) == {"ended", "brevity"}
    assert sample.parts["ended"].tolist() == sample.finished.float().tolist()
    assert torch.equal(sample.scores, 0.5 * sample.parts["ended"] + sample.parts["brevity"])
    metrics = sample.metrics()
    assert metrics["rewards/ended/mean"] == pytest.approx(sample.finished.float().mean().item())
    assert metrics["rewards/brevity/mean"] < 0

    alone = make_sampler(named("ended", no_model, None))
    sample = alone.sample(alone.reference, tiny_data.prompts["train"])
    assert not [name for name in sample.metrics() if name.startswith("rewards/")]


def test_a_bare_function_will_do_for_a_sampler(make_sampler: Callable, tiny_data: Any) -> None:
    sampler = make_sampler(count)
    sample = sampler.sample(sampler.reference, tiny_data.prompts["train"])
    assert sample.scores.tolist() == sample.lengths.tolist()
    sampler = make_sampler(fixed(1.0))
    with pytest.raises(
        RewardError, match=r"reward of the sampler returned numbers of shape \(1,\) for 16"
    ):
        sampler.sample(sampler.reference, tiny_data.prompts["train"])


METHODS = pytest.mark.parametrize("method", ["ppo", "grpo"])


@pytest.fixture
def train(make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path) -> Callable:
    """`train(method, reward)`: two updates of it on this reward, on data whose truth is known."""

    def stage(method: str, *reward: str) -> Any:
        overrides = [f"{method}.updates=2", *(f"{method}.reward={each}" for each in reward)]
        data = replace(tiny_data, truth=FAKE_TRUTH)
        return train_stage(make_run(tmp_path, *overrides), method, data, finished)

    return stage


def numbers_of(stage: Any) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in stage.metrics()]


@METHODS
def test_a_stage_learns_from_the_reward_that_is_named(method: str, train: Callable) -> None:
    stage = train(method, "ended")
    rows = stage.metrics()
    assert len(rows) == 2
    for row in rows:
        assert row["reward"] == pytest.approx(1 - row["completions/clipped_ratio"])
    assert stage.config["settings"]["reward"] == "ended"
    rows = train(method, "gold").metrics()
    assert [row["reward"] for row in rows] == pytest.approx([row["gold"] for row in rows])


@METHODS
def test_a_stage_learns_from_several(method: str, train: Callable, user_folder: Path) -> None:
    file = user_folder / "mine.py"
    file.write_text("def polite(prompts, replies): return [len(p.text) for p in prompts]")
    for row in train(method, f"0.5*{file}:polite, model").metrics():
        mine, model = row[f"rewards/{file}:polite/mean"], row["rewards/model/mean"]
        assert mine > 1
        assert row["reward"] == pytest.approx(0.5 * mine + model, abs=1e-5)


@METHODS
def test_the_default_is_the_reward_model_to_the_bit(method: str, train: Callable) -> None:
    default, same, once = train(method), train(method, "model"), train(method, "1.0*model")
    assert default.hash == same.hash != once.hash
    assert numbers_of(default) == numbers_of(once)
    weights, others = (load_file(s.model_path / "model.safetensors") for s in (default, once))
    assert all(torch.equal(weights[name], others[name]) for name in weights | others)
    assert numbers_of(train(method, "2*model")) != numbers_of(default)


@METHODS
def test_a_stage_whose_reward_fails_is_not_done(
    method: str, train: Callable, user_folder: Path
) -> None:
    (user_folder / "bad.py").write_text("def f(prompts, replies): return [float('nan')] * 8")
    with pytest.raises(RewardError, match=r"reward .*bad\.py:f is nan for the reply '"):
        train(method, f"{user_folder}/bad.py:f")
    for wrong in ("brevty", "much*model", f"{user_folder}/missing.py:f"):
        with pytest.raises(SettingsError, match=r"brevty|much|missing\.py"):
            train(method, wrong)
    assert not list(user_folder.glob(f"**/{method}-*/DONE"))


@METHODS
def test_another_reward_makes_another_stage(
    method: str, train: Callable, user_folder: Path, unbuilt: None
) -> None:
    file = user_folder / "mine.py"
    file.write_text("import words\ndef f(prompts, replies): return [1.0] * len(replies)\ng = f\n")

    def start_anew() -> None:
        user_code.IMPORTED.clear()
        for module in ("mine", "words"):
            sys.modules.pop(module, None)

    (user_folder / "words.py").write_text("POLITE = ['please']\n")
    settings = ("model", "gold", "ended", "0.5*ended", f"{file}:f", f"{file}:g", f"2*{file}:f")
    hashes = [train(method, setting).hash for setting in settings]
    assert len(set(hashes)) == len(settings)

    file.write_text(file.read_text() + "# a comment changes nothing\n")
    start_anew()
    assert train(method, f"{file}:f").hash == hashes[4]
    for path, old, new in ((file, "1.0", "2.0"), (user_folder / "words.py", "please", "thanks")):
        path.write_text(path.read_text().replace(old, new))
        start_anew()
        hashes.append(train(method, f"{file}:f").hash)
    assert len(set(hashes)) == len(hashes)
    assert train(method).hash == hashes[0], "who does not name the file does not hang on it"
