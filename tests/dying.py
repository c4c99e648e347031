"""The command line, in a process that dies once it has logged a step: a program.

python -m tests.dying STEP ppo --profile smoke ...
"""

from __future__ import annotations

import os
import sys
from typing import Any

from rlhf_lib import __main__, processes
from rlhf_lib.runs import Work

if __name__ == "__main__":
    last, log = int(sys.argv.pop(1)), Work.log

    def log_and_die(work: Work, step: int, *rest: Any) -> None:
        log(work, step, *rest)
        if step == last:
            processes.told(lambda: None)  # the others have come as far
            os._exit(9)

    Work.log = log_and_die  # type: ignore[method-assign]
    __main__.main()
