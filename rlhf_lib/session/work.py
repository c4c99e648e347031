"""How much work a stage needs, counted from its settings and lengths, whoever does it.

Both sides of a comparison are credited with the same count, so a share of the roof says how much of
the machine went into the method itself: padding, a prompt computed twice, logits of prompt
positions and a second forward count as no work.
"""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Matrix weights (biases and norms left out) that each token meets."""

    trunk: int  # of all layers, embeddings left out
    head: int  # of the output layer: width times vocabulary


class Work(NamedTuple):
    items: int  # pairs, or samples
    tokens: int  # each prompt once, and every reply
    flops: float


class Passes(NamedTuple):
    """Forward passes; a backward pass counts as two. `epoch_*`: those that each epoch adds."""

    trunk: int
    head: int
    epoch_trunk: int = 0
    epoch_head: int = 0


PASSES = {
    "sft": Passes(3, 3),
    "reward_model": Passes(3, 0),
    "dpo": Passes(4, 4),  # the policy's forward and backward, the reference's forward
    "generation": Passes(1, 1),
    "scored_samples": Passes(2, 1),  # of a profile's evaluation: sampled, then scored
    "scored": Passes(1, 0),  # by a reward model
    # sample, reward model, reference; the log-probs of sampling serve as the old ones
    "grpo": Passes(3, 2, epoch_trunk=3, epoch_head=3),
    # the same and the values; then policy and value model, forward and backward
    "ppo": Passes(4, 2, epoch_trunk=6, epoch_head=3),
}


def count(
    stage: str, sizes: Sizes, items: int, prompt_tokens: int, reply_tokens: int, epochs: int = 1
) -> Work:
    """FLOPs = 2 * trunk weights * tokens * passes + 2 * head weights * reply tokens * passes.

    A matrix product takes 2 FLOPs for each weight and token, and a backward pass two of them: with
    three passes this is the usual 6 * parameters * tokens (Kaplan et al. 2020, arXiv:2001.08361,
    sec. 2.1). Attention's own products, element-wise work and the optimizer are left out.
    """
    passes = PASSES[stage]
    tokens = prompt_tokens + reply_tokens
    trunk = passes.trunk + epochs * passes.epoch_trunk
    head = passes.head + epochs * passes.epoch_head
    flops = 2.0 * (trunk * sizes.trunk * tokens + head * sizes.head * reply_tokens)
    return Work(items, tokens, flops)
