"""Every method, sampling, scoring and evaluation on a device that is not the CPU.

    python -m tests.elsewhere FOLDER     with a run and its data pickled in FOLDER/given.pickle

Prints JSON: `losses` of each stage, and of each mistake that was put back, what was raised.
"""

from __future__ import annotations

import inspect
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate.state import PartialState

from tests.pretend_device import DEVICE

PartialState(cpu=True).device = DEVICE  # what every accelerator of this process takes

from rlhf_lib import catalogue  # noqa: E402
from rlhf_lib.methods import dpo, ppo, rewards, rollout  # noqa: E402
from rlhf_lib.models import generation, logprobs, packing  # noqa: E402
from rlhf_lib.study import offer  # noqa: E402
from rlhf_lib.study.training import run_stage  # noqa: E402

SMALL = {
    "ppo": {"updates": 2, "batch_size": 4, "minibatch_size": 2},
    "grpo": {"updates": 2, "prompts_per_update": 2, "group_size": 2},
    "rejection_sft": {"prompts": 4, "samples": 2},
    "evaluate": {"samples_per_prompt": 2, "baseline_samples": 2, "best_of_n": 2,
                 "best_of_n_prompts": 2, "heldout_texts": 2},
}  # fmt: skip
STAGES = ("sft", "reward_model", "dpo", "ppo", "grpo", "rejection_sft", "evaluate")
VARIANTS = {
    "dpo_kto": ("dpo", {"loss": "kto"}),
    "ppo_shared": ("ppo", {"value_model": "shared"}),
    "grpo_kl": ("grpo", {"kl_coef": 0.1}),
}
# stage, function, what stands there, what somebody forgot
MISTAKES: dict[str, tuple[str, ModuleType, Callable, str, str]] = {
    "labels": ("sft", packing, packing.lay_out, "for token in response], device=device)",
               "for token in response])"),
    "positions": ("dpo", packing, packing.lay_out, "positions.to(device)", "positions"),
    "table": ("dpo", dpo, dpo.reference_logprobs, "dim=1).cpu()", "dim=1)"),
    "reference": ("dpo", dpo, dpo.update, "[rows].to(chosen.device)", "[rows]"),
    "kto": ("dpo_kto", logprobs, logprobs.reply_logprobs, ".sum(1).cpu()", ".sum(1)"),
    "luck": ("grpo", generation, generation.generate, "[rows].to(model.device)", "[rows]"),
    "padding": ("grpo", generation, generation.prefill, ".long().to(model.device)", ".long()"),
    "scores": ("ppo", rewards, rewards.raw_scores, "*batch).cpu()", "*batch)"),
    "values": ("ppo", ppo, ppo.make_experience, "part.cpu()", "part"),
    "advantages": ("ppo", ppo, ppo.update, "advantages[place].to(device)", "advantages[place]"),
    "measured": ("ppo", rollout, rollout.Sampler._measure, "x.cpu() for x in", "x for x in"),
}  # fmt: skip


def main(folder: Path) -> None:
    run, data = pickle.loads((folder / "given.pickle").read_bytes())
    logprobs.checkpoint = lambda function, *inputs, **how: function(*inputs)  # torch dies in it
    save = offer.save_model
    offer.save_model = lambda model, *more: save(model.to("cpu"), *more)  # a file is of the CPU
    done: dict[str, Any] = {}

    def stage(name: str, run: Any = run) -> Any:
        of, changes = VARIANTS.get(name, (name, {}))
        record, changes = catalogue.record(of), SMALL.get(of, {}) | changes
        earlier = record.changes
        record = replace(record, name=name, changes=lambda profile: earlier(profile) | changes)
        return run_stage(run, record, data, dict(done) if record.needs else {})

    for name in (*STAGES[:-1], *VARIANTS, STAGES[-1]):
        done[name] = stage(name)
    metrics = {name: each.metrics() for name, each in done.items() if name != "evaluate"}
    losses = {name: [row["loss"] for row in rows] for name, rows in metrics.items()}
    raised = {
        name: put_back(mistake, lambda of, name=name: stage(of, replace(run, root=folder / name)))
        for name, mistake in MISTAKES.items()
    }
    print(json.dumps({"losses": losses, "raised": raised}))


def put_back(mistake: tuple[str, ModuleType, Callable, str, str], stage: Callable) -> str:
    """What the stage raises with this mistake in its source; empty where nothing is noticed."""
    name, module, function, right, wrong = mistake
    text = inspect.cleandoc("\n" + inspect.getsource(function))
    assert text.count(right) == 1, f"{function.__qualname__} has no {right!r} any more"
    namespace = dict(vars(module))
    exec(compile("from __future__ import annotations\n" + text.replace(right, wrong), "", "exec"),
         namespace)  # fmt: skip
    owner, _, attribute = function.__qualname__.rpartition(".")
    place = getattr(module, owner) if owner else module
    setattr(place, attribute, namespace[attribute])
    holders = [m for m in sys.modules.values() if vars(m).get(attribute) is function]
    for holder in holders:  # who imported it by name
        setattr(holder, attribute, namespace[attribute])
    try:
        stage(name)
        return ""
    except Exception as error:  # a reward that fails is told as its own kind
        return str(error)
    finally:
        for holder in (place, *holders):
            setattr(holder, attribute, function)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
