"""The stage that asks every policy the probes of `data/probes` and counts its failures."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from transformers import PreTrainedModel

from rlhf_lib.data.batches import by_length
from rlhf_lib.data.encoding import Encoder
from rlhf_lib.measure.probes import fails, load_probes
from rlhf_lib.methods.rollout import Sampler, is_finished
from rlhf_lib.models.learner import freeze
from rlhf_lib.models.load import eos_id, load_reference
from rlhf_lib.runs import Run, Stage, Work, write_jsonl
from rlhf_lib.runtime import make_accelerator, progress, seed_everything
from rlhf_lib.settings import content_hash


def measure(
    run: Run, policies: Mapping[str, str], reward_model: Stage, upstream: Mapping[str, str]
) -> Stage:
    """Sample each policy on the first `probe_prompts` of every probe, `probe_samples` times each.

    `policies`: name -> model folder or name; "sft" among them gives the tokenizer.
    Writes `samples/<policy>.jsonl`, a row per reply: the probe's own columns (id, probe, prompt,
    rule, ...), `response`, `finished`, `proxy` (the reward model's score) and `failure`, 0 or 1.
    The result has `counts`: policy -> probe -> prompts, replies, failures, and mean proxy reward.
    """
    source, config = run.profile.data.source, run.profile.evaluation
    probes = load_probes(source, config.probe_prompts)
    settings = {
        "samples": config.probe_samples,
        "temperature": config.temperature,
        "max_prompt_tokens": run.profile.data.max_prompt_tokens,
        "max_response_tokens": run.profile.data.max_response_tokens,
    }
    needs = {**upstream, "probes": content_hash(probes)}
    stage = run.stage("probes", settings, needs, __name__)

    def build(work: Work) -> dict:
        accelerator = make_accelerator(run.profile.model.precision)
        sampler = Sampler(
            run, accelerator, policies["sft"], str(reward_model.model_path),
            temperature=config.temperature, batch_size=config.batch_size,
        )  # fmt: skip
        (work.path / "samples").mkdir(exist_ok=True)
        counts = {}
        for number, (name, path) in enumerate(progress(list(policies.items()), "probes")):
            seed_everything(1000 * run.seed + 500 + number)  # each policy has its own draw
            policy = freeze(accelerator, load_reference(path))
            rows, tokens = _ask(run, sampler, policy, probes * config.probe_samples)
            write_jsonl(work.path / "samples" / f"{name}.jsonl", rows)
            counts[name] = _counts(rows)
            work.num_tokens += tokens
            del policy
        return {"counts": counts}

    return stage.ensure(build)


def _ask(
    run: Run, sampler: Sampler, policy: PreTrainedModel, probes: list[dict]
) -> tuple[list[dict], int]:
    """One reply to each probe, in the probes' order, and how many tokens that took."""
    settings = run.profile.data
    encoder = Encoder(sampler.tokenizer, settings.max_prompt_tokens, settings.max_response_tokens)
    prompts = encoder.prompts([probe["prompt"] for probe in probes])
    rows: list[dict] = [{} for _ in probes]
    tokens = 0
    # some probes are very long: apart from the short ones, they pad only each other
    for places in by_length([len(p.ids) for p in prompts], 4 * sampler.batch_size):
        batch = [prompts[i] for i in places]
        responses, proxy = sampler.draw(policy, batch)
        finished = is_finished(responses, eos_id(sampler.tokenizer)).tolist()
        texts = sampler.tokenizer.batch_decode(responses, skip_special_tokens=True)
        tokens += sum(map(len, responses)) + sum(len(p.ids) for p in batch)
        for i, text, end, value in zip(places, texts, finished, proxy.tolist(), strict=True):
            failure = int(fails(probes[i], text, settings.source))
            rows[i] = probes[i] | {
                "response": text, "finished": end, "proxy": value, "failure": failure
            }  # fmt: skip
    return rows, tokens


def _counts(rows: list[dict]) -> dict[str, dict]:
    groups = pd.DataFrame(rows).groupby("probe", sort=False)
    return {
        str(probe): {
            "prompts": int(part["id"].nunique()),
            "replies": len(part),
            "failures": int(part["failure"].sum()),
            "proxy": float(part["proxy"].mean()),
        }
        for probe, part in groups
    }
