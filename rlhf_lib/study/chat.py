"""One request, the replies of several policies beside each other, with reward and KL.

python -m rlhf_lib chat sft ppo dpo
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

import pandas as pd

from rlhf_lib import catalogue
from rlhf_lib.catalogue import label
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.models.load import load_reference
from rlhf_lib.runtime import seed_everything
from rlhf_lib.settings import unknown
from rlhf_lib.study.stages import Study

DEFAULT = ("sft", "ppo", "grpo", "dpo")


class Panel:
    """Policies of one seed of a study, ready to answer. What is not trained yet is trained first.

    Raises SettingsError for a policy that the study does not have.
    """

    def __init__(self, study: Study, names: Sequence[str] = DEFAULT) -> None:
        known = ["base", *catalogue.trained()]
        for name in names:
            if name not in known:
                raise unknown("policy", name, known)
        self.study, self.names = study, list(names)
        folders = {n: study.stage(n).model_path for n in names if n != "base"}
        folders = {"base": study.run.profile.model.name} | folders
        offer = study.offer("ppo")  # whose sampler knows reference and reward
        self.sampler, self.encoder = offer.sampler, offer.encoder
        device = offer.accelerator.device
        self.policies = {name: load_reference(folders[name]).to(device) for name in names}

    def ask(self, request: str, seed: int = 0, temperature: float = 1.0) -> pd.DataFrame:
        """One reply of each policy to a request, or to a whole dialogue in HH's format."""
        text = request
        if "Human:" not in request:
            text = f"\n\nHuman: {request.strip()}\n\nAssistant:"
        prompt, sampler = self.encoder.prompts([text]), copy.copy(self.sampler)
        if not self._of_the_world(text):
            sampler.truth = None  # its rules say nothing of such a request
        rows = [self._reply(name, sampler, prompt, seed, temperature) for name in self.names]
        return pd.DataFrame(rows)

    def _of_the_world(self, prompt: str) -> bool:
        try:
            return self.study.data.truth is not None and bool(self.study.data.truth.request(prompt))
        except ValueError:
            return False

    def _reply(
        self, name: str, sampler: Sampler, prompt: list[Prompt], seed: int, temperature: float
    ) -> dict:
        seed_everything(seed)  # the same random numbers for all
        rollout = sampler.sample(self.policies[name], prompt, temperature=temperature)
        (ids,) = rollout.responses
        text = self.sampler.tokenizer.decode(ids, skip_special_tokens=True)
        row = {"policy": label(name), "reply": str(text).strip()}
        row["proxy"] = f"{float(rollout.scores):.2f}"
        if rollout.gold is not None:
            row["gold"] = f"{rollout.gold[0]:.2f}"
        return row | {"log-ratio to SFT": f"{round(float(rollout.kl), 1) + 0.0:.1f}"}


def talk(panel: Panel, requests: Iterable[str]) -> Iterator[str]:
    """An answer for each request, for a terminal; each line is drawn anew."""
    for number, request in enumerate(requests):
        if request.strip():
            yield _shown(panel.ask(request, seed=number))


def _shown(frame: pd.DataFrame) -> str:
    lines = []
    for row in frame.to_dict("records"):
        numbers = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("policy", "reply"))
        lines.append(f"{row['policy']}  ({numbers})\n    {row['reply']}")
    return "\n".join(lines)
