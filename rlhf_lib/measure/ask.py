"""The stage that asks every policy the probes of `data/probes` and counts its failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from rlhf_lib.data.batches import by_length
from rlhf_lib.data.encoding import Encoder
from rlhf_lib.data.truth import Truth
from rlhf_lib.measure.evaluate import each_policy
from rlhf_lib.measure.probes import fails, load_probes
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.runs import Work, write_jsonl
from rlhf_lib.settings import EvaluationConfig


def measure(
    work: Work,
    sampler: Sampler,
    policies: Mapping[str, str],
    encoder: Encoder,
    config: EvaluationConfig,
    truth: Truth | None,
    seed: int,
) -> dict:
    """Sample each policy on the first `probe_prompts` of every probe, `probe_samples` times each.

    `policies`: name -> model folder or name.
    Writes `samples/<policy>.jsonl`, a row per reply: the probe's own columns (id, probe, prompt,
    rule, ...), `response`, `finished`, `proxy` (the sampler's reward) and `failure`, 0 or 1.
    The result has `counts`: policy -> probe -> prompts, replies, failures, and mean proxy reward.
    """
    probes = load_probes(truth, config.probe_prompts) * config.probe_samples
    prompts = encoder.prompts([probe["prompt"] for probe in probes])
    (work.path / "samples").mkdir(exist_ok=True)
    counts = {}
    for name, policy in each_policy(policies, sampler.accelerator, 1000 * seed + 500, "probes"):
        rows: list[dict] = [{} for _ in probes]
        # some probes are very long: apart from the short ones, they pad only each other
        for places in by_length([len(p.ids) for p in prompts], 4 * config.batch_size):
            batch = [prompts[i] for i in places]
            replies = sampler.draw(policy, batch, config.temperature)
            proxy, _ = sampler.score(batch, replies)
            work.num_tokens += sum(len(r.ids) for r in replies) + sum(len(p.ids) for p in batch)
            for i, reply, value in zip(places, replies, proxy.tolist(), strict=True):
                rows[i] = probes[i] | {
                    "response": reply.text,
                    "finished": reply.finished,
                    "proxy": value,
                    "failure": int(fails(probes[i], reply.text, truth)),
                }
        write_jsonl(work.path / "samples" / f"{name}.jsonl", rows)
        counts[name] = count_failures(rows)
    return {"counts": counts}


def count_failures(rows: Sequence[dict]) -> dict[str, dict]:
    """For each probe: prompts, replies, failures, and mean proxy reward."""
    groups = pd.DataFrame(list(rows)).groupby("probe", sort=False)
    return {
        str(probe): {
            "prompts": int(part["id"].nunique()),
            "replies": len(part),
            "failures": int(part["failure"].sum()),
            "proxy": float(part["proxy"].mean()),
        }
        for probe, part in groups
    }
