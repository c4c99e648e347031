"""Whole training steps by TRL's real trainers and by this library, on the same tiny model and rows.

Gradients are those that the optimizer is handed, unclipped.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

from rlhf_lib.data.encoding import Demonstration, Pair
from rlhf_lib.methods import dpo, reward_model, sft
from rlhf_lib.models.learner import Learner
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.proofs.parity_trl import bare_trainer, trl_class
from rlhf_lib.settings import DPOConfig

BETA, CENTER_COEF = 0.3, 0.02
MICRO_BATCH = 4  # ours goes in parts: 4 rows and 2
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, 32))]
# tokens of prompt, chosen and rejected reply; 1 ends a reply, and the third is cut off before it
TRIPLES = [
    ([5, 9, 4], [7, 8, 1], [6, 6, 12, 1]),
    ([11, 3], [21, 1], [22, 23, 24, 25, 1]),
    ([30, 31, 6, 7, 8], [9, 10, 11], [17, 18, 1]),
    ([4, 4], [19, 20, 1], [5, 1]),
    ([13, 14, 15, 16], [3, 27, 28, 1], [29, 1]),
    ([26, 25, 24], [18, 1], [15, 14, 1]),
]
# prompts of mixed lengths, so that padding on the left shifts most of them
PROMPTS = [[5, 9, 4, 13, 21, 7], [11], [30, 31, 6], [4, 8, 17, 19, 25, 3, 12, 10]]
RESPONSES = [[7, 8, 1], [21, 22, 23, 24, 1], [9, 1], [17, 18, 19, 1]]
MARGINS = [0.0, 0.5, 0.2, 1.0, 0.1, 0.3]


class Step(NamedTuple):
    loss: float
    gradient: Tensor  # of all parameters, one after the other


def tiny_model(kind: str, head: str = "lm", seed: int = 0) -> PreTrainedModel:
    """Random weights: "gpt2" has learnt absolute positions, "llama" rotary ones."""
    torch.manual_seed(seed)
    shared: dict[str, Any] = {
        "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
        "initializer_range": 0.3, "num_labels": 1,
    }  # fmt: skip
    if kind == "gpt2":
        config = GPT2Config(
            n_layer=2, n_head=2, n_embd=16, n_positions=48, attn_pdrop=0.0, embd_pdrop=0.0,
            resid_pdrop=0.0, **shared,
        )  # fmt: skip
        return (GPT2LMHeadModel if head == "lm" else GPT2ForSequenceClassification)(config).eval()
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, **shared,
    )  # fmt: skip
    return (LlamaForCausalLM if head == "lm" else LlamaForSequenceClassification)(config).eval()


# ------------------------------------------------------------------------------------------ TRL


def trl_dpo(kind: str) -> Step:
    """`DPOTrainer` tokenises itself: it gets words, and what it made of them is checked."""
    rows = [dict(zip(("prompt", "chosen", "rejected"), map(_words, t), strict=True))
            for t in TRIPLES]  # fmt: skip
    for row in rows:
        row["chosen"], row["rejected"] = " " + row["chosen"], " " + row["rejected"]
    model, reference = tiny_model(kind), tiny_model(kind, seed=1)
    step, prepared = _trl_step("DPO", model, rows, {"ref_model": reference}, beta=BETA)
    tokens = [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in prepared]
    if tokens != [(p, _ended(c), _ended(r)) for p, c, r in TRIPLES]:
        raise ValueError(f"TRL trained on other tokens than were meant: {tokens}")
    return step


def trl_reward(kind: str) -> Step:
    rows = [{"chosen_ids": p + c, "rejected_ids": p + r, "margin": margin}
            for (p, c, r), margin in zip(TRIPLES, MARGINS, strict=True)]  # fmt: skip
    model = tiny_model(kind, "score")
    return _trl_step("Reward", model, rows, {}, center_rewards_coefficient=CENTER_COEF)[0]


def trl_sft(kind: str) -> Step:
    rows = [{"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)}
            for p, c, _ in TRIPLES]  # fmt: skip
    return _trl_step("SFT", tiny_model(kind), rows, {}, completion_only_loss=True)[0]


def _trl_step(
    name: str, model: PreTrainedModel, rows: list[dict], models: dict[str, PreTrainedModel],
    **settings: Any,
) -> tuple[Step, list[dict]]:  # fmt: skip
    """One step of a trainer on all rows as one batch, and the rows as the trainer prepared them."""
    optimizer = torch.optim.SGD(model.parameters())
    gradients = _caught(optimizer)
    with tempfile.TemporaryDirectory() as folder:
        config = trl_class(f"{name}Config")(
            output_dir=folder, max_steps=1, per_device_train_batch_size=len(rows), use_cpu=True,
            bf16=False, max_grad_norm=0.0, lr_scheduler_type="constant", report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
            gradient_checkpointing=False, max_length=None, **settings,
        )  # fmt: skip
        trainer = trl_class(f"{name}Trainer")(
            model, args=config, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=_tokenizer(),
            optimizers=(optimizer, None), **models,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        prepared = trainer.train_dataset.to_list()
        loss = trainer.train().training_loss
    return Step(loss, gradients[0]), prepared


def _tokenizer() -> PreTrainedTokenizerFast:
    """32 words, `WORDS`, split at white space."""
    places = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(places, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _words(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def _ended(response: list[int]) -> list[int]:
    """`DPOTrainer` adds the end-of-sequence token where it is missing."""
    return response if response[-1] == 1 else [*response, 1]


# ----------------------------------------------------------------------------------- this library


def our_dpo(kind: str) -> Step:
    model, reference = tiny_model(kind), tiny_model(kind, seed=1)
    pairs = [Pair("", "", "", "", p, _ended(c), _ended(r)) for p, c, r in TRIPLES]
    table = dpo.reference_logprobs(reference, pairs, MICRO_BATCH)
    config = DPOConfig(beta=BETA, micro_batch_size=MICRO_BATCH)
    return _our_step(model, lambda learner: dpo.update(learner, pairs, table, config))


def our_reward(kind: str) -> Step:
    pairs = [Pair("", "", "", "", *triple, margin=margin)
             for triple, margin in zip(TRIPLES, MARGINS, strict=True)]  # fmt: skip
    return _our_step(
        tiny_model(kind, "score"),
        lambda learner: reward_model.update(learner, pairs, MICRO_BATCH, center_coef=CENTER_COEF),
    )


def our_sft(kind: str) -> Step:
    examples = [Demonstration("", "", p, c) for p, c, _ in TRIPLES]
    return _our_step(tiny_model(kind), lambda learner: sft.update(learner, examples, MICRO_BATCH))


def _our_step(model: PreTrainedModel, update: Callable[[Learner], dict[str, float]]) -> Step:
    learner = Learner(
        Accelerator(cpu=True), model, learning_rate=1e-3, steps=1, max_grad_norm=math.inf
    )
    gradients = _caught(learner.optimizer.optimizer)
    return Step(update(learner)["loss"], gradients[0])


def _caught(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """A list that will hold the gradients of each step of the optimizer."""
    caught: list[Tensor] = []

    def catch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        caught.append(torch.cat([p.grad.detach().flatten() for p in parameters]))

    optimizer.register_step_pre_hook(catch)
    return caught


# -------------------------------------------------------------------------------------- both


@torch.no_grad()
def padded_logprobs(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probs of `RESPONSES`, (B, T): ours, TRL's, and those of each row alone."""
    model = tiny_model(kind)
    ours, mask = response_logprobs(model, PROMPTS, RESPONSES)
    truth = torch.zeros_like(ours)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        table = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        predicting = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        truth[row, : len(response)] = table[predicting, response]
    return ours, trl_logprobs(model, PROMPTS, RESPONSES) * mask, truth


def trl_logprobs(
    model: PreTrainedModel, prompts: Sequence[list[int]], responses: Sequence[list[int]]
) -> Tensor:
    """Token log-probs (B, T) as `GRPOTrainer` computes them: prompts are padded on the left.

    `model` is changed: TRL gives it an output layer of its own.
    """
    pad = trl_class("pad", "trl.trainer.utils")
    trl_class("add_fused_lm_head", "trl.trainer.utils")(model)

    def padded(rows: Sequence[list[int]], side: str) -> tuple[Tensor, Tensor]:
        ids = [torch.tensor(row) for row in rows]
        return pad(ids, 0, side), pad([torch.ones_like(row) for row in ids], 0, side)

    (left, left_mask), (right, right_mask) = padded(prompts, "left"), padded(responses, "right")
    ids, mask = torch.cat((left, right), 1), torch.cat((left_mask, right_mask), 1)
    trainer = bare_trainer("GRPOTrainer")
    return trainer._get_per_token_logps_and_entropies(model, ids, mask, right.shape[1])[0]
