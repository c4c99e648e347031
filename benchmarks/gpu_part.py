"""One part of `benchmarks.gpu`: python -m benchmarks.gpu_part NAME FOLDER [small]."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from benchmarks.plain_peer import sample
from benchmarks.prepare import drawn_rows, random_policy
from benchmarks.protocol import timed
from benchmarks.stream import write_rows
from rlhf_lib.models import generation, graphs
from rlhf_lib.models.load import freeze, load_policy, load_tokenizer, save_model
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.runtime import make_accelerator, set_up_process
from rlhf_lib.study.stages import Study

CAP_GB = 15.0  # what a T4 has to give
SMOKE = ("reward_model", "sft", "ppo", "grpo", "dpo", "rejection_sft", "evaluate")
# the profile's batches and lengths, on few rows
FEW = (
    "data.train_pairs=512 data.validation_pairs=64 data.test_pairs=64 data.demonstrations=512 "
    "data.rl_prompts=512 data.evaluation_prompts=64 data.judge_pairs=0 ppo.updates=3 "
    "grpo.updates=3 reward_model.epochs=1 sft.epochs=1 dpo.epochs=1 dpo.probes=1 "
    "dpo.probe_prompts=16"
)
FEWER = (
    " data.train_pairs=64 data.demonstrations=64 ppo.updates=1 grpo.updates=1 ppo.batch_size=16 "
    "ppo.minibatch_size=8 grpo.prompts_per_update=2"
)
TINY = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=512)


class Part:
    """Where a part works, and the record that it adds to as it goes."""

    def __init__(self, name: str, folder: Path, small: bool) -> None:
        self.name, self.folder, self.small = name, folder, small
        self.runs = folder / "runs"
        self.found: dict = {}
        # without a GPU it is the lines that are tried, not the precision
        self.precision = name.partition("-")[2] or "bf16" if torch.cuda.is_available() else "fp32"

    def add(self, key: str, value: object) -> None:
        self.found[key] = value
        (self.folder / f"{self.name}.json").write_text(json.dumps(self.found, indent=1) + "\n")

    def stages(self, profile: str, names: tuple[str, ...], overrides: str) -> None:
        """Each stage's seconds and memory, or the error that it ended with; the rest goes on."""
        for name in names:
            try:
                stage = Study.open(profile, 0, self.runs / self.name, overrides).stage(name)
            except Exception:  # of any kind: it is the finding
                self.add(name, {"error": traceback.format_exc()[-3000:]})
                continue
            self.add(name, record_of(stage))


def record_of(stage) -> dict:  # type: ignore[no-untyped-def]
    """Seconds, memory and the last step's metrics of a finished stage; whether all are finite."""
    result = stage.result()
    steps = stage.metrics() if (stage.path / "metrics.jsonl").exists() else []
    bad = [key for row in steps for key, value in row.items() if value is None]
    kept = ("seconds", "peak_memory_gb", "num_tokens", "phases")
    return {
        **{key: result[key] for key in kept},
        "steps": len(steps),
        "not_finite": sorted(set(bad)),
        "skipped": sum(row.get("skipped", 0.0) for row in steps),
        "last": steps[-1] if steps else {},
    }


def smoke(part: Part) -> None:
    part.stages("smoke", SMOKE, f"model.precision={part.precision}")


def t4(part: Part) -> None:
    """The profile `t4` at GPT-2's size with random weights, under a T4's memory."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GB * 1e9 / total))
    model, rows = part.folder / f"{part.name}-gpt2", part.folder / f"{part.name}-pairs.jsonl.gz"
    config = TINY if part.small else GPT2Config()
    config.n_positions = 1024
    tokenizer = load_tokenizer("tiny")
    tokenizer.model_max_length = config.n_positions
    save_model(random_policy(config), tokenizer, model)
    write_rows(rows, 3000)
    few = FEW + (FEWER if part.small else "")
    where = f"model.name={model} data.source=path:{rows} model.precision={part.precision}"
    part.stages("t4", ("reward_model", "sft", "ppo", "grpo", "dpo"), f"{few} {where}")
    shutil.rmtree(model)
    rows.unlink()


def resume(part: Part) -> None:
    """PPO killed after a checkpoint and resumed, beside the run that nothing stopped."""
    shutil.copytree(part.runs / "smoke-bf16", part.runs / "resume")
    overrides = f"model.precision={part.precision}"
    whole = Study.open("smoke", 0, part.runs / "smoke-bf16", overrides).stage("ppo")
    folder = part.runs / "resume" / whole.path.relative_to(part.runs / "smoke-bf16")
    shutil.rmtree(folder)
    often = f"{overrides} checkpoint_minutes=0.0001"
    code = (
        "import sys; from rlhf_lib.study.stages import Study; "
        "Study.open('smoke', 0, sys.argv[1], sys.argv[2]).stage('ppo')"
    )
    arguments = [sys.executable, "-c", code, str(part.runs / "resume"), often]
    process = subprocess.Popen(arguments)
    progress = folder.with_name(f"{folder.name}.partial") / "checkpoint-a" / "progress.json"
    while process.poll() is None and not progress.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    part.add("killed_at_step", json.loads(progress.read_text())["step"])
    resumed = Study.open("smoke", 0, part.runs / "resume", overrides).stage("ppo")
    pairs = [load_file(s.model_path / "model.safetensors") for s in (whole, resumed)]
    apart = max(float((pairs[0][k] - pairs[1][k]).abs().max()) for k in pairs[0])
    part.add("largest_difference_of_weights", apart)
    part.add("steps", [len(s.metrics()) for s in (whole, resumed)])


def passes(part: Part) -> None:
    """Gradients of recorded passes beside those of plain ones, and the memory that both keep."""
    if not torch.cuda.is_available():
        return
    tokenizer = load_tokenizer("tiny")
    rows = drawn_rows(tokenizer, 24)
    for precision in ("fp32", "bf16", "fp16"):
        accelerator = make_accelerator(precision)
        model = random_policy(TINY if part.small else GPT2Config()).to(accelerator.device)

        def gradient(model: PreTrainedModel, accelerator: Accelerator) -> Tensor:
            """Over micro-batches of two shapes, each of which comes twice."""
            model.zero_grad()
            for start in (0, 8, 0, 8):
                batch = rows[start : start + 8]
                replies = [r.prompt for r in batch], [r.chosen for r in batch]
                with accelerator.autocast():
                    logprobs, _ = response_logprobs(model, *replies)
                (-logprobs.sum() / 100).backward()
            return torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])

        found, reserved = [], []
        for sights in (sys.maxsize, graphs.SIGHTS):
            graphs.SIGHTS = sights
            graphs.RECORDERS.pop(model, None)  # it counts sights, and records at one number of them
            found.append([gradient(model, accelerator) for _ in range(4)][-1])
            reserved.append(torch.cuda.memory_reserved() / 1e9)
        part.add(precision, {
            "recordings": len(graphs.RECORDERS[model].recordings),
            "largest_difference": float((found[1] - found[0]).abs().max()),
            "largest_gradient": float(found[0].abs().max()),
            "reserved_gb": {"plain": reserved[0], "recorded": reserved[1]},
        })  # fmt: skip


def decoding(part: Part) -> None:
    """Tokens a second of decoding, and of transformers, eager and compiled.

    Recorded and step by step it says the same in fp32, but for ties that rounding breaks.
    """
    on_gpu = torch.cuda.is_available()
    accelerator = make_accelerator("bf16" if on_gpu else "fp32")
    tokenizer, folder = load_tokenizer("tiny"), part.folder / "decoding-gpt2"
    save_model(random_policy(TINY if part.small else GPT2Config()), tokenizer, folder)
    ours = freeze(accelerator, load_policy(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.to(accelerator.device, torch.bfloat16 if on_gpu else torch.float32).eval()
    longest, recorded = 16 if part.small else 128, generation.decode_recorded
    luck = torch.rand(256, longest, dtype=torch.float64, generator=torch.manual_seed(0))

    def library(model: PreTrainedModel, prompts: list, decode: Callable) -> list[list[int]]:
        generation.decode_recorded = decode
        with accelerator.autocast():
            return generation.generate(
                model, tokenizer, prompts, longest, uniforms=luck[: len(prompts)]
            )

    for rows in (4, 8) if part.small else (64, 256):
        prompts = [row.prompt for row in drawn_rows(tokenizer, rows)]
        sides = {
            "library": partial(library, ours, prompts, recorded),
            "transformers": partial(sample, theirs, tokenizer, prompts, longest),
        }
        if not part.small:
            compiled = partial(sample, cache_implementation="static")
            sides["transformers, compiled"] = partial(compiled, theirs, tokenizer, prompts, longest)
        for name, side in sides.items():
            part.add(f"{rows} rows, {name}", rates(side, 1 if part.small else 4))
    if on_gpu:
        part.add("peak_memory_gb", torch.cuda.max_memory_allocated() / 1e9)
    exact, accelerator = load_policy(folder).to(accelerator.device).eval(), make_accelerator("fp32")
    said = [library(exact, prompts, decode) for decode in (recorded, generation._decode)]
    part.add("equal_in_fp32", _equal_tokens(*said))


def rates(side: Callable[[], list[list[int]]], rounds: int) -> dict:
    """Seconds of the first call, which sets things up, and tokens a second of each later one."""
    first, found = timed(side)[0], []
    for _ in range(rounds):
        seconds, replies = timed(side)
        found.append(sum(map(len, replies)) / seconds)
    return {"first_seconds": first, "tokens_per_second": found}


def _equal_tokens(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Mean over replies of the share that is equal up to the first difference."""
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        pairs = list(zip(a, b, strict=False))
        same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
        shares.append(same / max(len(a), len(b)))
    return math.fsum(shares) / len(shares)


PARTS = {"passes": passes, "smoke": smoke, "t4": t4, "resume": resume, "decoding": decoding}

if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    set_up_process()
    PARTS[name.partition("-")[0]](Part(name, folder, small=len(sys.argv) > 3))
