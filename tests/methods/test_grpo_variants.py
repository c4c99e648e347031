"""Settings that change a method: what a stage does under each, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_lib import catalogue
from rlhf_lib.methods import dpo, ppo
from rlhf_lib.models.logprobs import logprobs_and_entropies, response_logprobs
from rlhf_lib.objectives.losses import grpo_loss
from rlhf_lib.profiles import load_profile
from rlhf_lib.records import MEMBERS
from rlhf_lib.settings import DPOConfig, SettingsError
from rlhf_lib.study.offer import DRAW, Offer
from rlhf_lib.study.training import run_stage
from tests.conftest import train_stage

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gspo": ("grpo", {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
    "cispo": ("grpo", {"surrogate": "cispo", "aggregation": "token"}),
    "overlong": ("grpo", {"overlong_buffer": 4}),
    "entropy": ("ppo", {"entropy_coef": 0.5}),
    "overlong_ppo": ("ppo", {"overlong_buffer": 4}),
    "online": ("dpo", {"online": True}),
}


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable, finished: Any, tiny_data: Any
) -> Callable[..., Any]:
    """`trained(name)`: a variant's stage; `trained("ppo")` ...: the method as it is."""
    run, done = make_run(tmp_path_factory.mktemp("variants")), {}

    def get(name: str) -> Any:
        if name not in done:
            of, changes = VARIANTS.get(name, (name, {}))
            done[name] = train_stage(run, of, tiny_data, finished, f"{of}_{name}", **changes)
        return done[name]

    return get


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_another_policy_and_is_another_stage(name: str, trained: Callable) -> None:
    of, _ = VARIANTS[name]
    plain, varied = trained(of), trained(name)
    assert varied.hash != plain.hash
    weights, others = (load_file(s.model_path / "model.safetensors") for s in (plain, varied))
    assert max(float((weights[k] - others[k]).abs().max()) for k in weights) > 1e-7
    assert len(varied.metrics()) == len(plain.metrics())
    assert all(row["loss"] is not None for row in varied.metrics())


def test_online_dpo_counts_what_it_samples_and_has_no_table_of_the_reference(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[int] = []
    own = dpo.own_pairs

    def counting(sampler: Any, policy: Any, pairs: Any, config: Any) -> Any:
        asked.append(len(pairs))
        return own(sampler, policy, pairs, config)

    monkeypatch.setattr(dpo, "own_pairs", counting)
    monkeypatch.setattr(dpo, "reference_table", lambda *args: 1 / 0)
    stage = train_stage(make_run(tmp_path), "dpo", tiny_data, finished, online=True)
    assert sum(asked) == stage.result()["train_pairs"] == 24
    assert stage.result()["spent"]["generated"] >= 2 * 24


def test_online_dpo_is_priced_and_judged_as_what_learns_from_rewards() -> None:
    try:
        catalogue.load("smoke", ["dpo.online=true"])
        assert catalogue.record("dpo").rewarded
        assert catalogue.record("dpo").samples
        assert catalogue.label("dpo") == "Online DPO"
    finally:
        catalogue.load("smoke")
    assert not catalogue.record("dpo").rewarded
    assert catalogue.label("dpo") == "DPO"


def test_online_pairs_have_the_prompts_of_the_dataset(
    make_sampler: Callable, tiny_data: Any
) -> None:
    sampler, pairs = make_sampler(), tiny_data.pairs["train"][:5]
    torch.manual_seed(0)
    drawn, table = dpo.own_pairs(sampler, sampler.reference, pairs, DPOConfig(online=True))
    assert [p.prompt for p in drawn] == [p.prompt for p in pairs]
    assert table.shape == (5, 2)
    assert all(p.margin is None for p in drawn)
    assert [p.chosen for p in drawn] != [p.chosen for p in pairs]


def test_kto_makes_no_pairs_of_its_own() -> None:
    with pytest.raises(SettingsError, match=r"dpo\.online makes pairs, and dpo\.loss=kto"):
        dpo.preference_loss(DPOConfig(online=True, loss="kto"))


def test_a_reply_s_own_ratio_is_averaged_over_replies(
    tmp_path: Path, make_run: Callable, finished: Any, tiny_data: Any
) -> None:
    run = make_run(tmp_path)
    with pytest.raises(SettingsError, match=r"grpo\.ratio=sequence .* set it to sequence"):
        train_stage(run, "grpo", tiny_data, finished, ratio="sequence", aggregation="token")


@pytest.mark.parametrize("wrong", [{"ratio": "word"}, {"surrogate": "none"}])
def test_a_loss_that_does_not_exist_is_refused(wrong: dict[str, str]) -> None:
    one = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"token\|sequence, clip\|cispo"):
        grpo_loss(one, one, torch.ones(1), torch.ones(1, 2), **wrong)  # type: ignore[arg-type]


def test_entropies_are_those_of_the_softmax_and_learn_where_they_are_asked_to(
    causal_model: Any,
) -> None:
    prompts, replies = [[5, 6], [7]], [[8, 9, 1], [3, 4]]
    both = {learn: logprobs_and_entropies(causal_model, prompts, replies, 0.7, learn)
            for learn in (True, False)}  # fmt: skip
    for logprobs, entropies, mask in both.values():
        expected, _ = response_logprobs(causal_model, prompts, replies, 0.7)
        assert torch.allclose(logprobs, expected)
        assert entropies[~mask.bool()].eq(0).all()
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        logits = causal_model(torch.tensor([prompt + reply])).logits[0] / 0.7
        logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found = both[True][1][i, : len(reply)]
        assert torch.allclose(found, -(logp.exp() * logp).sum(-1), atol=1e-5)
    assert both[True][1].requires_grad
    assert not both[False][1].requires_grad


def test_without_a_bonus_no_entropy_is_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_run: Callable, finished: Any,
    tiny_data: Any,
) -> None:  # fmt: skip
    monkeypatch.setattr(ppo, "logprobs_and_entropies", lambda *args: 1 / 0)
    train_stage(make_run(tmp_path), "ppo", tiny_data, finished, "ppo_none")


# ------------------------------------------------------------------------------------ ensembles


def test_who_asks_for_an_ensemble_needs_its_members_in_every_seed() -> None:
    plain = load_profile("laptop", ["extras=false"])
    asking = load_profile("laptop", ["extras=false", "ppo.reward=0.5*minimum, ended"])
    for seed in range(3):
        assert not set(MEMBERS) & set(catalogue.needs(plain, "ppo", seed))
        assert set(MEMBERS) <= set(catalogue.needs(asking, "ppo", seed))
        assert not set(MEMBERS) & set(catalogue.needs(asking, "grpo", seed))
        # the members have not learnt from its labels
        assert not set(MEMBERS) & set(catalogue.needs(asking, "ppo_control", seed))
        names = [record.name for record in catalogue.stages(asking, seed)]
        assert set(MEMBERS) <= set(names)
        assert max(map(names.index, MEMBERS)) < names.index("ppo")


def test_members_differ_in_their_luck_alone(
    tmp_path: Path, make_run: Callable, tiny_data: Any
) -> None:
    run = make_run(tmp_path)
    stages = {
        name: run_stage(run, catalogue.record(name), tiny_data, {})
        for name in ("reward_model", MEMBERS[0])
    }
    one, other = (s.config["settings"] for s in stages.values())
    assert other == one | {"draw": 1}
    seeds = replace(run, seed=run.seed + DRAW)
    same = run_stage(seeds, catalogue.record("reward_model"), tiny_data, {})
    weights = [load_file(s.model_path / "model.safetensors") for s in (*stages.values(), same)]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert all(torch.equal(weights[2][k], weights[1][k]) for k in weights[1]), "that seed's luck"


def test_a_stage_s_reward_is_that_of_all_members(
    tmp_path: Path, make_run: Callable, finished: Any, tiny_data: Any
) -> None:
    run = make_run(tmp_path, "grpo.reward=minimum")
    made = {name: run_stage(run, catalogue.record(name), tiny_data, {}) for name in MEMBERS}
    needed = {**vars(finished), **made}
    offer = Offer(run, catalogue.record("grpo"), tiny_data, needed)
    prompts = tiny_data.prompts["train"][:4]
    replies = offer.sampler.draw(offer.sampler.reference, prompts)
    each: list[Tensor] = [
        torch.as_tensor(offer.rater(name)(prompts, replies)) for name in ("reward_model", *MEMBERS)
    ]
    found, _ = offer.sampler.score(prompts, replies)
    assert torch.allclose(found, torch.stack(each).amin(0), atol=1e-5)
