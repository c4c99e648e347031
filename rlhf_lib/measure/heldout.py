"""What a policy is measured against beside its own replies: held-out texts and chosen replies."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lib.data.dialogues import read_demonstration
from rlhf_lib.data.encoding import Demonstration, Encoder, Pair, Prompt
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.data.sources import read_source
from rlhf_lib.methods.dpo import sequence_logprobs
from rlhf_lib.runtime import bundled_folder
from rlhf_lib.settings import DataConfig

BUNDLED = "dialogues like those of the base model's pretraining, from the test split"
REAL = "the chosen replies of the test pairs, given their prompts"


def heldout_texts(
    config: DataConfig, data: PreferenceData, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Demonstration], str]:
    """Texts that nothing was trained on, without repeats, and what they are in words.

    The bundled world has some of its own; of real data they are the test pairs' chosen replies.
    """
    if not config.source.startswith("bundled"):
        texts = [
            Demonstration(p.prompt_text, p.chosen_text, p.prompt, p.chosen)
            for p in data.pairs["test"]
        ]
        what = REAL
    else:
        rows = read_source(f"path:{bundled_folder() / 'heldout.jsonl.gz'}").splits["train"]
        encoder = Encoder(tokenizer, config.max_prompt_tokens, config.max_response_tokens)
        texts = encoder.demonstrations([read_demonstration(row) for row in rows])
        what = BUNDLED
    distinct = {(tuple(t.prompt), tuple(t.response)): t for t in texts}
    return list(distinct.values())[:limit], what


def negative_logprobs(
    model: PreTrainedModel, texts: Sequence[Demonstration], batch_size: int
) -> list[float]:
    """-log p(reply | prompt) of each text in nats, summed over its tokens, at temperature 1."""
    sides = [t.prompt for t in texts], [t.response for t in texts]
    return (-sequence_logprobs(model, *sides, batch_size)).tolist()


def chosen_replies(prompts: Sequence[Prompt], pairs: Sequence[Pair]) -> dict[str, Pair]:
    """The text of each prompt that some pair shares -> the first such pair.

    Prompts are compared by their tokens: equal once cut is equal to the model.
    """
    first = {tuple(p.prompt): p for p in reversed(pairs)}
    return {p.text: first[tuple(p.ids)] for p in prompts if tuple(p.ids) in first}
