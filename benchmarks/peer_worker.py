"""The other side: TRL's trainers, transformers' generation, and bare torch.

python -m benchmarks.peer_worker JOB.json STAGE

It runs under an interpreter of its own, with the library's settings of the process: threads, and
the allocator, which alone makes TRL's SFT on a CPU up to a quarter faster. Of `rlhf_lib` it imports
these, and `proofs/plain.py`, which stands on torch alone. TRL gets the same token ids as the
library: its own tokenization is skipped, and its time does not count.

TRL as one would run it at its best here:
- fused AdamW, torch's fused attention ("sdpa"), fp32 weights under autocast: its defaults.
- Batches of one length in SFT, reward model and DPO: padding is what TRL loses most by. They are
  those that its `group_by_length` makes of thousands of rows; of the few of a round it would make
  none, so they come ready made (`Job.batches`). Its packing and `padding_free` ask for
  FlashAttention, which no CPU has.
- GRPO generates a whole step at once (its default), by `transformers`; vLLM needs a GPU of its own.
- DPO takes the reference's log-probs with each batch. `precompute_ref_log_probs` would do the same
  work once, before the first round: in one epoch nothing is saved, in measured rounds all of it.
- The KL coefficient and beta are the library's, so that both sides run the reference.
- Liger kernels on a GPU, where they install.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.job import Job, read_job
from benchmarks.plain_peer import load as load_plain
from benchmarks.plain_peer import sample
from benchmarks.protocol import Round, serve
from benchmarks.roof import DTYPES
from rlhf_lib.runtime import set_up_process
from rlhf_lib.session.work import Work


def load(stage: str, job: Job) -> Round:
    """Load models and rows of a stage; what comes back computes one round of it."""
    loaders = {
        "sft": _sft,
        "reward_model": _reward_model,
        "dpo": _dpo,
        "grpo": _grpo,
        "generation": _generation,
    }
    return loaders[stage](job) if stage in loaders else load_plain(stage, job)


def _settings(job: Job, batch_size: int) -> dict[str, Any]:
    """What every trainer is told: the library's settings in TRL's words, and no writing to disk."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 1,
        "learning_rate": job.learning_rate,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "bf16": job.precision == "bf16",
        "fp16": job.precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",  # rows come in batches, in the round's order
        "gradient_checkpointing": False,
        "use_liger_kernel": torch.cuda.is_available() and find_spec("liger_kernel") is not None,
    }


FP32 = {"dtype": "float32"}  # master weights; the forward runs in the job's precision


def _sft(job: Job) -> Round:
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rows = [
        {
            "input_ids": row.prompt + row.chosen,
            "completion_mask": [0] * len(row.prompt) + [1] * len(row.chosen),
        }
        for row in job.rows_of_round("sft")
    ]
    config = SFTConfig(
        max_length=job.max_length, model_init_kwargs=FP32, **_settings(job, job.batch_size)
    )
    trainer = SFTTrainer(job.model, args=config, train_dataset=Dataset.from_list(rows))
    return _epochs(trainer, job, "sft")


def _reward_model(job: Job) -> Round:
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    rows = [
        {
            "chosen_ids": row.prompt + row.chosen,
            "rejected_ids": row.prompt + row.rejected,
        }
        for row in job.rows_of_round("reward_model")
    ]
    config = RewardConfig(
        max_length=job.max_length, model_init_kwargs=FP32, **_settings(job, job.batch_size)
    )
    trainer = RewardTrainer(job.reward_model, args=config, train_dataset=Dataset.from_list(rows))
    return _epochs(trainer, job, "reward_model")


def _dpo(job: Job) -> Round:
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Tokenised(DPOTrainer):
        """DPO alone of TRL's trainers does not recognise rows that are token ids already."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = [
        {"prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected}
        for row in job.rows_of_round("dpo")
    ]
    config = DPOConfig(
        max_length=job.max_length,
        beta=job.beta,
        model_init_kwargs=FP32,
        **_settings(job, job.batch_size),
    )
    trainer = Tokenised(job.model, args=config, train_dataset=Dataset.from_list(rows))
    return _epochs(trainer, job, "dpo")


def _epochs(trainer: Any, job: Job, stage: str) -> Round:
    rows, size, work = trainer.train_dataset, job.batch_size, job.pair_work(stage)

    def run(number: int) -> Work:
        order = job.order(number, len(rows) // size)
        trainer.train_dataset = rows.select([size * b + i for b in order for i in range(size)])
        trainer.train()
        return work

    return run


def _grpo(job: Job) -> Round:
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    lengths: list[int] = []

    def count_tokens(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        """A second reward that is always 0: TRL tells rewards how long its completions are."""
        lengths.extend(map(len, completion_ids))
        return [0.0] * len(completion_ids)

    tokenizer = AutoTokenizer.from_pretrained(job.reward_model)
    score = AutoModelForSequenceClassification.from_pretrained(job.reward_model, dtype="float32")
    config = GRPOConfig(
        num_generations=job.group_size,
        max_completion_length=job.max_new_tokens,
        beta=job.kl_coef,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        model_init_kwargs=FP32,
        **_settings(job, job.samples_per_step),
    )
    trainer = GRPOTrainer(
        job.model,
        reward_funcs=[score, count_tokens],
        reward_processing_classes=[tokenizer, tokenizer],  # the second is not asked
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in job.prompt_texts]),
    )

    def run(number: int) -> Work:
        places = job.prompts_of_round(number, job.samples // job.group_size)
        trainer.train_dataset = Dataset.from_list([{"prompt": job.prompt_texts[i]} for i in places])
        lengths.clear()
        trainer.train()
        prompt_tokens = sum(len(job.rows[i].prompt) for i in places)
        return job.sample_work("grpo", prompt_tokens, list(lengths))

    return run


def _generation(job: Job) -> Round:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    # nothing is trained: the weights themselves are in the job's precision
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=DTYPES[job.precision])
    model = model.to(device).eval()  # type: ignore[arg-type]

    def run(number: int) -> Work:
        prompts = [job.rows[i].prompt for i in job.prompts_of_round(number, job.generation_batch)]
        replies = sample(model, tokenizer, prompts, job.max_new_tokens)
        lengths = [len(reply) for reply in replies]
        return job.sample_work("generation", sum(map(len, prompts)), lengths)

    return run


if __name__ == "__main__":
    wanted = read_job(sys.argv[1])
    set_up_process(wanted.threads)
    torch.manual_seed(0)
    serve(lambda: load(sys.argv[2], wanted))
