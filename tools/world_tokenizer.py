"""The tokenizer of the bundled world: made from its words, so it follows every edit of them."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_lib.world import words
from rlhf_lib.world.grammar import ALL_DETAILS, ALL_FACTS, ASSISTANT, HUMAN, PIECE

MAX_LENGTH = 128  # positions of the bundled base model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level and lossless on the world's own text.

    A token is a turn marker, a word with its leading space, or one other character.
    """
    said = [*ALL_FACTS, *ALL_DETAILS, *words.FACTS, *words.EDGES]
    said += [*words.HARMS, *words.TIPS.values(), *words.GREETINGS, "really"]
    example = {"tips": "one tip", "topic": said[0], "wish": said[0], "claim": said[0]}
    for phrasings in words.PHRASINGS.values():
        said += [phrasing.format(**example) for phrasing in phrasings]
    said += [*words.OPENERS, *words.HEDGES, *words.STARTERS, *words.CONNECTORS, *words.REFUSALS]
    said += [*words.REDIRECTS, *words.VERDICTS.values(), *words.CLOSERS]
    # text after a marker or another word begins with a space; punctuation does not
    pieces = {piece for text in said for piece in PIECE.findall(f" {text}".replace("  ", " "))}
    pieces = {piece for piece in pieces if piece != " "}
    # 0 is not <pad>: `logprobs` fills with 0, and transformers would warn of padding without a mask
    vocabulary = ["<unk>", "<pad>", "<eos>", HUMAN, ASSISTANT, *sorted(pieces)]
    tokenizer = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE.pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of the text. Raises ValueError for a word that the world does not have."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.unk_token_id in ids:
        raise ValueError(f"not in the vocabulary of the bundled world: {text!r}")
    return ids
