"""A study: one durable run in a folder, killed at any instant and resumed to the same result.

`Study` has the loop and the record; `Serial` and `Processes` say where trials are evaluated.
"""

from espalier.study.executor import Executor, Job, Outcome, Pool
from espalier.study.processes import Processes
from espalier.study.serial import Serial
from espalier.study.study import Study
from espalier.study.trial import State, Trial

__all__ = ["Executor", "Job", "Outcome", "Pool", "Processes", "Serial", "State", "Study", "Trial"]
