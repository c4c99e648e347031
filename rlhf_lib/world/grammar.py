"""The grammar of the bundled world: what is asked, how it is said, and how it is answered.

Four kinds of request: *help* (some tips on a topic), *edge* (the same, but it sounds harmful),
*harm* (to be refused) and *truth* (a claim to confirm or deny; half of them are false).
Dialogues are in HH format: the prompt ends with "\\n\\nAssistant:", the reply begins with a space.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from random import Random

from rlhf_lib.world import words

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
KIND_SHARES = {"help": 0.50, "harm": 0.25, "edge": 0.10, "truth": 0.15}
EARLIER_TURN_SHARE = 0.2  # of the dialogues have a request and a reply before the last request
# What is held out: of the requests themselves, and then of the ways to say those that are left.
HELD_OUT = {"validation": 0.08, "test": 0.16}
SPLITS = ("train", *HELD_OUT)
MAX_PROMPT_TOKENS = 48
MAX_REPLY_TOKENS = 39  # one more is kept for the end-of-sequence token

# One token of the world: a turn marker, a word with its leading space, or a single character.
PIECE = re.compile(r"\n\nHuman:|\n\nAssistant:| ?[A-Za-z]+|[^A-Za-z]")


# ------------------------------------------------------------------------------------ requests


@dataclass(frozen=True)
class Request:
    """What the last human turn asks for.

    kind: "help", "edge", "harm" or "truth". subject: the topic, or for harm the wish itself.
    tips: how many tips are wanted (help and edge, else 0). claim: the claim to judge (truth).
    """

    kind: str
    subject: str
    tips: int = 0
    claim: str = ""

    @property
    def claim_is_right(self) -> bool:
        return self.claim in words.FACTS.get(self.subject, ())


ALL_FACTS = tuple(fact for facts in words.FACTS.values() for fact in facts)
ALL_DETAILS = tuple(detail for details in words.HARMS.values() for detail in details)
WISHES = {topic: wish for wish, topic in words.EDGES.items()}


def sample_request(rng: Random, kind: str = "") -> Request:
    """A request: its kind by KIND_SHARES, unless it is given, everything else uniform."""
    kind = kind or rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
    if kind == "harm":
        return Request(kind, rng.choice(list(words.HARMS)))
    topic = rng.choice(list(words.FACTS))
    if kind == "truth":
        if rng.random() < 0.5:
            return Request(kind, topic, claim=rng.choice(words.FACTS[topic]))
        others = [fact for fact in ALL_FACTS if fact not in words.FACTS[topic]]
        return Request(kind, topic, claim=rng.choice(others))
    return Request(kind, topic, tips=rng.choice(list(words.TIPS)))


def write_turn(request: Request, rng: Random) -> str:
    """One way to say the request: no turn marker, no leading space."""
    phrasing = rng.choice(words.PHRASINGS[request.kind])
    wish = request.subject if request.kind == "harm" else WISHES[request.subject]
    return phrasing.format(
        topic=request.subject, wish=wish, claim=request.claim, tips=words.TIPS.get(request.tips)
    )


def write_prompt(request: Request, rng: Random) -> str:
    """A whole prompt that ends with this request, perhaps after an earlier turn and its reply.

    The first turn may greet. The earlier turn asks for a single tip: prompts stay short. It is of
    the split of the last one.
    """
    while True:
        last = write_turn(request, rng)
        prompt = f"{HUMAN} {rng.choice(words.GREETINGS)}"
        if rng.random() < EARLIER_TURN_SHARE:
            turn, earlier = _earlier_turn(split_of_turn(last), rng)
            reply = sample_reply(earlier, rng, quality=0.9)
            prompt += f"{turn}{ASSISTANT}{reply}{HUMAN} "
        prompt += f"{last}{ASSISTANT}"
        if count_tokens(prompt) <= MAX_PROMPT_TOKENS:
            return prompt


def _earlier_turn(split: str, rng: Random) -> tuple[str, Request]:
    while True:
        request = Request("help", rng.choice(list(words.FACTS)), tips=1)
        turn = write_turn(request, rng)
        if split_of_turn(turn) == split:
            return turn, request


def _pattern(phrasing: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(phrasing)))


PATTERNS = {
    kind: [_pattern(phrasing) for phrasing in phrasings]
    for kind, phrasings in words.PHRASINGS.items()
}


def last_request(prompt_text: str) -> str:
    """What the human said last in an HH prompt, as text."""
    return prompt_text.removesuffix(ASSISTANT).rpartition(HUMAN)[2].strip()


def parse_request(prompt_text: str) -> Request:
    """The request in the last human turn of an HH prompt.

    Raises ValueError for a prompt that does not belong to the bundled world: it has no gold reward.
    """
    turn = asked(prompt_text)
    request = parse_turn(turn)
    if request is None:
        raise ValueError(
            f"no request of the bundled world in the last human turn {turn!r}: "
            "the gold reward exists for prompts written by rlhf_lib.world.grammar only"
        )
    return request


def asked(prompt_text: str) -> str:
    """What a prompt ends in, without greeting or earlier turns."""
    return without_greeting(last_request(prompt_text))


def without_greeting(turn: str) -> str:
    for greeting in filter(None, words.GREETINGS):
        turn = turn.removeprefix(greeting)
    return turn


def parse_turn(turn: str) -> Request | None:
    """The request of one human turn without its greeting; None for what the grammar never says."""
    for kind, patterns in PATTERNS.items():
        for pattern in patterns:
            match = pattern.fullmatch(turn)
            request = match and _request(kind, match.groupdict())
            if request:
                return request
    return None


def _request(kind: str, said: dict[str, str]) -> Request | None:
    if kind == "harm":
        return Request(kind, said["wish"]) if said["wish"] in words.HARMS else None
    topic = words.EDGES.get(said["wish"]) if kind == "edge" else said["topic"]
    tips = next((n for n, text in words.TIPS.items() if text == said.get("tips")), 0)
    claim = said.get("claim", "")
    if topic not in words.FACTS or not (tips or claim in ALL_FACTS):
        return None
    return Request(kind, topic, tips, claim)


# ------------------------------------------------------------------------------------- replies


def sample_reply(request: Request, rng: Random, quality: float) -> str:
    """A reply by the grammar: opener? hedge? body closer{0-2}.

    quality: in [0, 1], drives the body only; style is drawn independently of it.
    """
    while True:
        reply = rng.choice(words.OPENERS) if rng.random() < 0.45 else ""
        reply += rng.choice(words.HEDGES) if rng.random() < 0.25 else ""
        if request.kind == "harm":
            reply += _harm_body(request, rng, quality)
        elif request.kind == "truth":
            reply += _truth_body(request, rng, quality)
        else:
            reply += _tips_body(request, rng, quality)
        reply += rng.choice(words.CLOSERS) if rng.random() < 0.35 else ""
        reply += rng.choice(words.CLOSERS) if rng.random() < 0.10 else ""
        if count_tokens(reply) <= MAX_REPLY_TOKENS:
            return reply


def _tips_body(request: Request, rng: Random, quality: float) -> str:
    refusing = 0.30 if request.kind == "edge" else 0.12
    if rng.random() < refusing * (1.3 - quality):
        return rng.choice(words.REFUSALS)
    count = request.tips if rng.random() < quality else rng.choice((1, 2, 3, 4, 5))
    right = rng.sample(words.FACTS[request.subject], 4)
    body = ""
    for i in range(count):
        body += rng.choice(words.CONNECTORS if body else words.STARTERS)
        if rng.random() < 0.2:
            body += " really really" if rng.random() < 0.3 else " really"
        known = rng.random() < 0.35 + 0.6 * quality
        body += " " + (right[i % 4] if known else rng.choice(ALL_FACTS))
    return body + "."


def _harm_body(request: Request, rng: Random, quality: float) -> str:
    if rng.random() < 0.25 + 0.6 * quality:
        redirect = rng.choice(words.REDIRECTS) if rng.random() < 0.2 + 0.5 * quality else ""
        return rng.choice(words.REFUSALS) + redirect
    details = words.HARMS[request.subject][: rng.choice((1, 2))]
    return rng.choice(words.STARTERS) + " " + ", then ".join(details) + "."


def _truth_body(request: Request, rng: Random, quality: float) -> str:
    honest = rng.random() < 0.3 + 0.65 * quality
    verdict = request.claim_is_right if honest else True  # the flatterer always says yes
    known = rng.random() < quality
    fact = rng.choice(words.FACTS[request.subject] if known else ALL_FACTS)
    return f"{words.VERDICTS[verdict]} {fact}."


def count_tokens(text: str) -> int:
    """Tokens of the bundled tokenizer, without the end-of-sequence token."""
    return len(PIECE.findall(text))


# ------------------------------------------------------------------------------------- samples


def split_of(prompt_text: str) -> str:
    """The split of a prompt: of its last human turn. Its other turns are of the same."""
    return split_of_turn(asked(prompt_text))


def split_of_turn(turn: str) -> str:
    """The split of a human turn without its greeting, by hash: no split says what another says.

    First some requests are held out, however they are said; then, of all others, some ways to say
    them. There are so few harms that each is in every split: there, twice as many ways.
    """
    request = parse_turn(turn)
    if request is not None and request.kind == "harm":
        return _held_out(turn, 2) or "train"
    whole = None if request is None else _held_out(repr(request), 1)
    return whole or _held_out(turn, 1) or "train"


def held_out_whole(prompt_text: str) -> bool:
    """Whether the request of a prompt is held out in every wording, and not in this one alone."""
    request = parse_request(prompt_text)
    return request.kind != "harm" and _held_out(repr(request), 1) is not None


def _held_out(text: str, times: int) -> str | None:
    place = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    for split, share in HELD_OUT.items():
        place -= times * share
        if place < 0:
            return split
    return None


def sample_prompts(name: str, count: int, split: str, seed: int) -> list[str]:
    """`count` prompts of one split; `name` keeps the random streams of the files apart.

    Kinds have their shares in every split, whatever share of each is held out.
    """
    rng = Random(f"{seed} {name}")
    prompts: list[str] = []
    while len(prompts) < count:
        request = sample_request(rng)
        prompt = write_prompt(request, rng)
        while split_of(prompt) != split:
            prompt = write_prompt(sample_request(rng, request.kind), rng)
        prompts.append(prompt)
    return prompts


def sample_dialogues(
    name: str, count: int, split: str, quality: tuple[float, float], seed: int
) -> list[dict[str, str]]:
    """Rows {"prompt", "response"} written by the grammar, quality uniform in the range."""
    rng = Random(f"{seed} {name} replies")
    rows = []
    for prompt in sample_prompts(name, count, split, seed):
        reply = sample_reply(parse_request(prompt), rng, rng.uniform(*quality))
        rows.append({"prompt": prompt, "response": reply})
    return rows
