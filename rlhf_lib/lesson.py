"""What every notebook imports: how a study is opened, and how what it measured is shown.

The one module that hands names on. What a chapter teaches is imported from where it lies, so that
its path can be read there.
"""

# ruff: noqa: F401  (what is imported here is asked for by the notebooks)

from rlhf_lib.catalogue import color, policies, stages
from rlhf_lib.course import mistakes, pictures, twins
from rlhf_lib.course.annotator import Annotator
from rlhf_lib.course.exercises import check, score
from rlhf_lib.course.small import Small
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.measure.statistics import (
    bootstrap,
    direction,
    estimate,
    holm,
    interval,
    minus,
)
from rlhf_lib.methods import rewards
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rewards import Reply
from rlhf_lib.models.load import (
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    trainable,
)
from rlhf_lib.results.requests import rewarded
from rlhf_lib.results.summary import load_results
from rlhf_lib.review import reader
from rlhf_lib.runs import training_minutes
from rlhf_lib.runtime import choose_precision, make_accelerator, seed_everything
from rlhf_lib.settings import numbers
from rlhf_lib.show import costs, figures, findings, judges, tables, training, widgets
from rlhf_lib.show.display import say, show, source, table
from rlhf_lib.study.stages import Study, summarise
from rlhf_lib.world.rewards import observe
