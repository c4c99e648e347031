"""How a model has to be read so that the numbers are its own, tried out when it is loaded.

transformers has hundreds of model classes. They differ in what their attention does, in how they
are told positions and what may see what, and in what stands between the last hidden states and the
logits. No list of names keeps up with them, so the ways of reading a model are tried on a few
tokens, beside the model's own forward pass of one row at a time, and the fastest that agrees is
taken. A model that none agrees with is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, chain, product
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_lib.models import kernels
from rlhf_lib.models.generation import next_logits, prefill, roomy_cache
from rlhf_lib.models.graphs import last_hidden
from rlhf_lib.models.logprobs import output_logits
from rlhf_lib.models.packing import Reading, lay_out_for
from rlhf_lib.settings import SettingsError

EAGER = "eager"  # every model of transformers has this attention; it keeps to what its paper says
TOLERANCE = 1e-3  # of the numbers' standard deviation: rounding stays far below, mistakes far above
PROMPTS, RESPONSES = (6, 6, 4), (5, 3, 7)  # tokens: two responses share a prompt
POSITIONS = ("n_positions", "max_position_embeddings", "max_seq_len")  # what configs call these,
FIRST = "original_max_position_embeddings"  # up to which such a model reads as it did at first
WINDOWS = ("window", "window_size", "attention_chunk_size", FIRST)  # how names for those end
CAP = "softcap"  # in a setting's name: what keeps logits small, and shows in large ones alone
FAILS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
Rows = list[list[int]]


@torch.no_grad()
def find_reading(model: PreTrainedModel) -> None:
    """Set the model's attention and its `reading` to the fastest that give its own numbers.

    A language model's are the logits of responses, a sequence classifier's the scores of whole
    rows. Raises SettingsError, with the model's class and what is wrong, where nothing does.
    """
    prompts, responses = _rows(model)
    model.set_attn_implementation(EAGER)
    try:
        own = _own(model, prompts, responses)
    except FAILS as error:
        raise SettingsError(f"{_name(model)} fails in its own forward pass: {error}") from error
    causal = model.can_generate()
    if causal and not _agrees(own[:4], _own(model, prompts[:1], [responses[0][:-1]])):
        raise SettingsError(
            f"{_name(model)} looks at the tokens that it is to predict: it is no causal language "
            "model. Take one that is, such as gpt2"
        )
    found: object = "its numbers differ from those of its own forward pass"
    for attention, reading in _ways(model):
        model.set_attn_implementation(attention)
        model.reading = reading  # type: ignore[assignment]
        try:
            if _agrees(own, _read(model, prompts, responses)):
                break
        except FAILS as error:
            found = error
    else:
        raise SettingsError(
            f"{_name(model)} cannot be read by this library, in packed rows or alone: {found}. "
            "Take another model, such as gpt2"
        )
    _check_training(model, own, prompts, responses)
    if causal:
        _check_generation(model, own, prompts, responses)


def _ways(model: PreTrainedModel) -> Iterator[tuple[str, Reading]]:
    """From the fastest on."""
    widest = widest_row(model)
    caps = [key for key, value in _settings(model.config) if CAP in key and value]
    capped = {"attn" in key for key in caps}  # a small model's numbers would not show it
    attentions = (EAGER,) if True in capped else (kernels.NAME, EAGER)
    ends = (True,) if False in capped and model.can_generate() else (False, True)
    for packed, attention, own_end in product((True, False), attentions, ends):
        if not own_end or model.can_generate():
            yield attention, Reading(packed, widest, own_end)


def _settings(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    """Every setting of the language model, those inside others as well."""
    open_ones = [config.get_text_config().to_dict()]
    for settings in open_ones:
        open_ones += [value for value in settings.values() if isinstance(value, dict)]
        yield from ((str(key), value) for key, value in settings.items())


def widest_row(model: PreTrainedModel) -> int | None:
    """Places up to which a row shows the model nothing but itself: its positions, and its windows.

    What a token may see is told outright in a packed row, and a window of the model's own is not
    heard then: in so few places it would hide nothing.
    """
    windows = [value for key, value in _settings(model.config) if key.endswith(WINDOWS)]
    limits = [value for value in windows if type(value) is int and value > 0]
    return min(chain(limits, positions_of(model.config)), default=None)


def positions_of(config: PretrainedConfig) -> list[int]:
    """How many tokens a model has positions for, where its settings say so."""
    settings = dict(_settings(config))
    # one that goes over to other rotations beyond these would change them within a reply
    switches = (FIRST,) if "longrope" in (settings.get("rope_type"), settings.get("type")) else ()
    found = (settings.get(name) for name in (*POSITIONS, *switches))
    return [value for value in found if isinstance(value, int) and value > 0]


def _rows(model: PreTrainedModel) -> tuple[Rows, Rows]:
    """Prompts and responses of ordinary tokens."""
    settings = model.config.get_text_config()
    special = [getattr(settings, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")]
    named = chain.from_iterable(one if isinstance(one, list) else [one] for one in special)
    ids = sorted(set(range(settings.vocab_size)) - set(named))
    generator = torch.Generator().manual_seed(0)

    def some(length: int) -> list[int]:
        return [ids[torch.randint(len(ids), (), generator=generator)] for _ in range(length)]

    shared, other, *_ = some(PROMPTS[0]), some(PROMPTS[2])
    return [shared, shared, other], [some(length) for length in RESPONSES]


def _own(model: PreTrainedModel, prompts: Rows, responses: Rows) -> Tensor:
    """The model's own numbers, one row at a time: log-probs (N, V), or scores (B, 1)."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        if model.can_generate():
            logits = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(logits.reshape(-1, logits.shape[-1]))
    return torch.cat(found)


def _read(model: PreTrainedModel, prompts: Rows, responses: Rows) -> Tensor:
    """The same numbers by this library's passes."""
    layout = lay_out_for(model, prompts, responses)
    hidden = last_hidden(model, layout.ids, layout.visible, layout.positions)
    if model.can_generate():
        return output_logits(model, hidden[layout.predicted_at]).log_softmax(-1)
    return model.score(hidden[layout.ends])  # type: ignore[operator]


def _agrees(own: Tensor, found: Tensor) -> bool:
    apart = (own - found).abs().max()
    return bool(apart <= TOLERANCE * own.std())


def _check_training(model: PreTrainedModel, own: Tensor, prompts: Rows, responses: Rows) -> None:
    """A model that trains is the one that is read: nothing random is left on."""
    model.train()
    noisy = not _agrees(own, _read(model, prompts, responses))
    model.eval()
    if noisy:
        raise SettingsError(
            f"{_name(model)} gives other numbers while it trains than when it is read: something "
            "random in its settings stays on. Take another model, such as gpt2"
        )


def _check_generation(model: PreTrainedModel, own: Tensor, prompts: Rows, responses: Rows) -> None:
    """Sampling step by step, from prompts padded on the left, has to see the same numbers."""
    steps = min(map(len, responses))
    ends = list(accumulate(map(len, responses)))
    wanted = [own[end - len(said) :][:steps] for end, said in zip(ends, responses, strict=True)]
    rows = [0, 1, 2]  # two share a prompt, which is computed once; one leaves on the way
    try:
        cache = roomy_cache(model, steps)
        mask, logits = prefill(model, prompts, 0, cache)
        pairs = [(wanted[row][0], logits[row]) for row in rows]
        for place in range(1, steps):
            if place == 2:
                rows = [2, 0]
                cache.batch_select_indices(torch.tensor(rows))
                mask = mask[rows]
            tokens = torch.tensor([[responses[row][place - 1]] for row in rows])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            logits = next_logits(model, tokens, mask, mask.sum(1, keepdim=True) - 1, cache)
            pairs += [(wanted[row][place], logits[at]) for at, row in enumerate(rows)]
        wrong: object = "its numbers differ from those of its own forward pass"
        expected, found = map(torch.stack, zip(*pairs, strict=True))
        if _agrees(expected, found.float().log_softmax(-1)):
            return
    except FAILS as error:
        wrong = error
    raise SettingsError(
        f"{_name(model)} cannot sample with a cache from prompts of different lengths: {wrong}. "
        "Take another model, such as gpt2"
    )


def _name(model: PreTrainedModel) -> str:
    where = model.config.name_or_path
    return f"model {where!r} ({type(model).__name__})" if where else type(model).__name__
