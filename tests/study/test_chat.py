"""Several policies, one request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_lib.data.encoding import Encoder
from rlhf_lib.data.truth import truth_of
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.models.load import load_reference, load_tokenizer
from rlhf_lib.profiles import load_profile
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import SettingsError
from rlhf_lib.study import chat


@pytest.fixture
def study(tmp_path: Path) -> Any:
    """A study in which every policy is the tiny model, and longer replies earn more."""
    tokenizer, truth = load_tokenizer("tiny"), truth_of("bundled")
    sampler = Sampler(
        make_accelerator("fp32"),
        tokenizer,
        load_reference("tiny"),
        lambda prompts, replies: torch.tensor([float(len(r.ids)) for r in replies]),
        max_new_tokens=12,
        truth=truth,
    )
    offer = SimpleNamespace(
        sampler=sampler, encoder=Encoder(tokenizer, 64, 12), accelerator=sampler.accelerator
    )
    return SimpleNamespace(
        run=SimpleNamespace(profile=load_profile("smoke")),
        data=SimpleNamespace(truth=truth),
        stage=lambda name: SimpleNamespace(model_path="tiny"),
        offer=lambda name: offer,
    )


def test_every_policy_answers_with_its_rewards(study: Any) -> None:
    panel = chat.Panel(study, ["base", "ppo"])
    frame = panel.ask("Give me one tip on brewing coffee.", seed=3)
    assert frame["policy"].tolist() == ["Base", "PPO"]
    assert frame["reply"].nunique() == 1, "the same model, the same random numbers"
    assert {"proxy", "gold", "log-ratio to SFT"} <= set(frame)
    assert set(frame["log-ratio to SFT"]) <= {"0.0", "-0.0"}


def test_a_request_that_the_world_does_not_know_has_no_gold(study: Any) -> None:
    frame = chat.Panel(study, ["base"]).ask("How do I learn a language?")
    assert "gold" not in frame
    assert "gold" in chat.Panel(study, ["base"]).ask("Give me one tip on brewing coffee.")


def test_a_line_is_a_request_and_an_empty_one_is_none(study: Any) -> None:
    answers = list(chat.talk(chat.Panel(study, ["base"]), ["Hello?\n", "\n", "Hello?\n"]))
    assert len(answers) == 2
    assert all(answer.startswith("Base  (proxy ") for answer in answers)


def test_a_policy_that_does_not_exist_is_named(study: Any) -> None:
    with pytest.raises(SettingsError, match=r"'pppo'.*ppo"):
        chat.Panel(study, ["pppo"])
