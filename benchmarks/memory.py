"""Memory of the profile `t4`: a run under a cap where a GPU is at hand, else a sum of its parts.

Without a GPU the parts are measured on the CPU, with random weights of GPT-2's shape, every prompt
and reply at the profile's limit, and autocast in bf16, whose numbers have the size of fp16. Fused
attention kernels keep other tensors than a CPU's do, and an allocator's losses are not in the sum:
it is an estimate.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GPT2Config

from benchmarks import library_worker
from benchmarks.job import Job
from benchmarks.prepare import fixed_job
from benchmarks.saved import watch
from rlhf_lib import catalogue
from rlhf_lib.runtime import environment
from rlhf_lib.settings import as_dict, load_profile

FP32, HALF = 4, 2  # bytes of a number
TRAINED = FP32 * 4  # weight, gradient and Adam's two averages
STAGES = ("sft", "reward_model", "dpo", "grpo", "ppo")


def measure(cap_gb: float, say: Callable[[str], None]) -> dict:
    """`{"cap_gb", "measured_on", "stages": {stage: {"total_gb", ...}}}`, GB of 10^9 bytes."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap_gb * 1e9 / total)
    stages = {}
    for stage in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            job = t4_job(Path(folder), stage, GPT2Config())
            stages[stage] = capped_run(stage, job) if on_gpu else parts(stage, job)
        say(f"{stage}: {stages[stage]['total_gb']:.2f} GB")
    return {
        "cap_gb": cap_gb,
        "measured_on": "a GPU under this cap" if on_gpu else "parts on a CPU",
        "environment": environment(),
        "stages": stages,
    }


def t4_job(folder: Path, stage: str, config: GPT2Config) -> Job:
    """The profile's settings as a job: one micro-batch on a CPU, whole steps on a GPU."""
    profile = load_profile("t4")
    on_gpu = torch.cuda.is_available()
    precision = profile.model.precision if on_gpu else "bf16"
    micro = getattr(profile, stage).micro_batch_size
    prompt, reply = profile.data.max_prompt_tokens, profile.data.max_response_tokens
    job = fixed_job(folder, config, 4 * micro, prompt, reply, precision)
    group = profile.grpo.group_size
    whole = {"ppo": profile.ppo.batch_size, "grpo": profile.grpo.prompts_per_update * group}
    samples = whole.get(stage, micro) if on_gpu else micro
    return replace(
        job,
        rows=job.rows if stage in whole else job.rows[:micro],
        batch_size=micro,
        samples=samples,
        samples_per_step=samples,
        group_size=group,
        max_new_tokens=reply,
        ppo_epochs=1,
        ppo_minibatch=micro,
    )


def capped_run(stage: str, job: Job) -> dict:
    """The peak of one real round; torch raises OutOfMemoryError where the cap does not hold it."""
    torch.cuda.reset_peak_memory_stats()
    library_worker.load(stage, job)(0)
    return {"total_gb": torch.cuda.max_memory_allocated() / 1e9}


def parts(stage: str, job: Job) -> dict:
    """Weights, gradients, optimizer, frozen models, saved activations, sampling: their sum."""
    run = library_worker.load(stage, job)
    # of every model that the stage holds, whoever holds it
    live = [value for value in gc.get_objects() if type(value) is torch.nn.Parameter]
    with watch(live) as kept:
        run(0)
    weights = job.sizes.trunk + job.sizes.head  # the output layer is the embedding
    passes = catalogue.record(stage).passes
    assert passes is not None, f"{stage}: its record does not say which models it holds"
    models = passes(as_dict(load_profile("t4")))
    # the backward pass makes a gradient of the largest saved tensor, the logits, beside it
    training = kept.peak + kept.largest
    sampling = sampling_bytes(stage, job)
    found = {
        "weights_gradients_adam_gb": models.learnt * TRAINED * weights / 1e9,
        "frozen_models_gb": models.read * HALF * weights / 1e9,
        "saved_activations_gb": kept.peak / 1e9,
        "gradient_of_logits_gb": kept.largest / 1e9,
        "sampling_gb": sampling / 1e9,
    }
    # nothing is saved for backward while sampling goes on: the larger of the two counts
    fixed = found["weights_gradients_adam_gb"] + found["frozen_models_gb"]
    return {**found, "total_gb": fixed + max(training, sampling) / 1e9}


def sampling_bytes(stage: str, job: Job) -> int:
    """Cache of keys and values, and the logits of one step, for a whole batch of the profile."""
    profile, shape = load_profile("t4"), GPT2Config()
    rows = {
        "ppo": profile.ppo.batch_size,
        "grpo": profile.grpo.prompts_per_update * profile.grpo.group_size,
        "dpo": profile.dpo.probe_prompts,  # it answers prompts now and then
    }.get(stage, 0)
    tokens = profile.data.max_prompt_tokens + profile.data.max_response_tokens
    cache = 2 * shape.n_layer * shape.n_embd * tokens * HALF
    return rows * (cache + shape.vocab_size * (FP32 + HALF))
