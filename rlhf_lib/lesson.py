"""What every notebook imports: how a study is opened, and how what it measured is shown.

The one module that hands names on. What a chapter teaches is imported from where it lies, so that
its path can be read there.
"""

# ruff: noqa: F401  (what is imported here is asked for by the notebooks)

from rlhf_lib.catalogue import color, label, policies, stages
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.measure.statistics import bootstrap, contrast, direction, holm, interval
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rewards import Reply
from rlhf_lib.models.generation import generate
from rlhf_lib.models.load import (
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    load_value_model,
    trainable,
)
from rlhf_lib.results.summary import load_results
from rlhf_lib.runs import training_minutes
from rlhf_lib.runtime import choose_precision, make_accelerator, seed_everything
from rlhf_lib.settings import numbers
from rlhf_lib.show import costs, figures, tables, widgets
from rlhf_lib.show.display import say, show, source, table
from rlhf_lib.show.exercises import check
from rlhf_lib.study.stages import Study, summarise
from rlhf_lib.world.grammar import last_request
from rlhf_lib.world.rewards import observe
