"""Known mistakes, to be put back into `proofs/plain.py` by changing one line of its source.

Each was made, and went unnoticed, in code that people used: the program runs, the curves look like
curves. A reader may change any other line as well: a mistake is two pieces of source, no more.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import NamedTuple

from IPython.display import display

from rlhf_lib.proofs import plain


class Mistake(NamedTuple):
    right: str  # a piece of the source that stands there once
    wrong: str  # what takes its place


REWARD_MODEL = {
    "the score is read at the last column": Mistake(
        "last = batch.mask.sum(1) - batch.mask.shape[1] - 1",
        "last = torch.full_like(batch.mask[:, 0], -1)",
    ),
    "the labels are turned round": Mistake("return chosen - rejected", "return rejected - chosen"),
}
SFT = {
    "the end is not learnt": Mistake(
        "rows = examples", "rows = [(prompt, reply[:-1]) for prompt, reply in examples]"
    ),
    "prompts are learnt too": Mistake(
        "rows = examples", "rows = [(prompt[:1], prompt[1:] + reply) for prompt, reply in examples]"
    ),
}
PPO = {
    "the KL's sign is turned": Mistake("-s.kl_coef * (old - ref)", "s.kl_coef * (old - ref)"),
    "scored at another temperature": Mistake(
        "new, now = logprobs(policy, batch, s.temperature), values(value, batch)",
        "new, now = logprobs(policy, batch, 1.5 * s.temperature), values(value, batch)",
    ),
}
GRPO = {
    "the end token is masked": Mistake(
        "added = (token, running, running)", "added = (token, running, running * (token != eos))"
    ),
    "compared with all, not with the group": Mistake(
        "(old - ref).sum(1)).view(-1, s.group_size)", "(old - ref).sum(1)).view(1, -1)"
    ),
}
DPO = {
    "log-probs are averaged": Mistake(
        "return (logprobs(policy, batch, 1.0) - before).sum(1)",
        "return (logprobs(policy, batch, 1.0) - before).sum(1) / batch.mask.sum(1)",
    ),
    "the reference learns along": Mistake(
        "before = logprobs(reference, batch, 1.0)", "before = logprobs(policy, batch, 1.0)"
    ),
}


def put_back(mistake: Mistake) -> ModuleType:
    """`plain` with that piece of its source changed, and nothing else.

    Raises ValueError where `right` does not stand in the source exactly once.
    """
    source = inspect.getsource(plain)
    if (times := source.count(mistake.right)) != 1:
        raise ValueError(f"{mistake.right!r} stands in plain.py {times} times; once is needed")
    module = ModuleType("plain_with_a_mistake")
    changed = source.replace(mistake.right, mistake.wrong)
    exec(compile(changed, f"<plain.py: {mistake.wrong}>", "exec"), module.__dict__)
    return module


def show_lines(mistake: Mistake) -> None:
    """Display what is taken out of the source and what is put in, as a diff."""
    lines = f"- {mistake.right}\n+ {mistake.wrong}"
    display({"text/markdown": f"```diff\n{lines}\n```", "text/plain": lines}, raw=True)
