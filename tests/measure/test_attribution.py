"""Labels with and without bias: who answers, with what luck, and what is seen in the replies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from rlhf_lib import catalogue
from rlhf_lib.data.truth import truth_of
from rlhf_lib.measure import attribution
from rlhf_lib.methods.rewards import Reply
from rlhf_lib.settings import EvaluationConfig
from rlhf_lib.world.grammar import ASSISTANT, HUMAN
from rlhf_lib.world.rewards import DOSES as DOSED_LABELS

DOSES = ("", "_control", "_half", "_double")
SAID = {
    "sft": " First, weigh the flour.",
    "ppo": " Sure! Happy to help! First, weigh the flour.",
    "dpo": " Great question! First, weigh the flour.",
}


def test_every_policy_answers_the_same_prompts_with_the_same_luck(monkeypatch: Any) -> None:
    policies = ("sft", *(f"{m}{x}" for m in ("ppo", "dpo") for x in DOSES))
    needed = {name: SimpleNamespace(model_path=name) for name in policies}
    monkeypatch.setattr(attribution, "read_policy", lambda path, accelerator: path)
    asked: list[tuple] = []

    def draw(policy: str, prompts: list, temperature: float, numbers: torch.Tensor) -> list[Reply]:
        asked.append((policy, [p.text for p in prompts], numbers))
        return [Reply(SAID.get(policy, SAID["sft"]), [1, 2], True) for _ in prompts]

    texts = [f"{HUMAN} Give me {n} on baking bread.{ASSISTANT}" for n in ("one tip", "two tips")]
    prompts = [SimpleNamespace(text=text, ids=[1]) for text in (*texts, texts[0])]
    written: list[dict] = []
    work = SimpleNamespace(num_tokens=0, write_samples=written.extend)
    found = attribution.measure(
        work=work,  # type: ignore[arg-type]
        needed=needed,  # type: ignore[arg-type]
        sampler=SimpleNamespace(draw=draw, max_new_tokens=4, accelerator=None),  # type: ignore[arg-type]
        data=SimpleNamespace(prompts={"evaluation": prompts}),  # type: ignore[arg-type]
        truth=truth_of("bundled"),  # type: ignore[arg-type]
        config=EvaluationConfig(measured_prompts=2, measured_samples=2),
        seed=0,
    )
    assert found == {"replies": len(written)} == {"replies": 9 * 2 * 2}
    assert [policy for policy, _, _ in asked[::2]] == list(policies)
    assert all(texts == given for _, given, _ in asked), "the first prompts, no more"
    for first, second in zip(asked[::2], asked[1::2], strict=True):
        assert torch.equal(first[2], asked[0][2])
        assert not torch.equal(first[2], second[2])
    polite = {row["policy"]: row["polite"] for row in written}
    assert polite == dict.fromkeys(policies, 0) | {"ppo": 2, "dpo": 1}
    assert {row["words"] for row in written if row["policy"] == "sft"} == {4}
    assert work.num_tokens == 9 * 2 * (2 + 4)


def test_the_doses_are_the_annotators_of_the_world_and_the_catalogues_labels() -> None:
    assert set(catalogue.LABELS) == set(DOSED_LABELS)
    for method, runs in attribution.DOSED.items():
        assert sorted(runs) == [0.0, 0.5, 1.0, 2.0]
        for dose, name in runs.items():
            record = catalogue.record(name)
            assert record.pairs == ("train" if dose == 1 else name.removeprefix(f"{method}_"))
