"""A second reward model's opinion: a warning of over-optimisation that needs no gold reward.

Two reward models that differ in their seed alone share what the data taught them, and not the
accidents of their training. A policy that learned to please one of them by such an accident gains
less in the other's eyes (Coste et al. 2023, arXiv:2310.02743).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_lib import catalogue
from rlhf_lib.data.encoding import Encoder, Prompt
from rlhf_lib.files import read_jsonl
from rlhf_lib.methods.rewards import Reward, read_replies
from rlhf_lib.runs import Stage, Work


def measure(
    work: Work,
    needed: Mapping[str, Stage],
    rater: Callable[[str], Reward],
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
) -> dict:
    """Score the replies of the stage `evaluate`, one a prompt, by two reward models.

    The first is the one that the policies of this seed were trained on, the other another seed's
    (`rival`). Both read the reply's text, tokenised again. `samples.jsonl` has a row for each
    reply: policy, prompt and the normalised rewards, `own` and the `other`.
    """
    raters = {"own": rater("reward_model"), "other": rater("rival")}
    rows = []
    for policy in watched():
        path = needed["evaluate"].path / "samples" / f"{policy}.jsonl"
        if not path.exists():  # of the first seed alone
            continue
        sampled = [row for row in read_jsonl(path) if row["reply"] == 0 and "proxy" in row]
        texts = encoder.demonstrations([(row["prompt"], row["response"]) for row in sampled])
        prompts = [Prompt(text.prompt_text, text.prompt) for text in texts]
        replies = read_replies(tokenizer, [text.response for text in texts])
        scores = {name: torch.as_tensor(rate(prompts, replies)) for name, rate in raters.items()}
        work.num_tokens += 2 * sum(len(text.prompt) + len(text.response) for text in texts)
        columns = {"policy": policy, "prompt": [row["prompt"] for row in sampled]}
        columns |= {name: values.tolist() for name, values in scores.items()}
        rows += pd.DataFrame(columns).to_dict("records")
    work.write_samples(rows)
    return {"replies": len(rows)}


def watched() -> list[str]:
    """Every policy that is evaluated but the base model: SFT, its second draw, and the trained."""
    return [r.name for r in catalogue.CATALOGUE.values() if r.role and r.role != "base"]
