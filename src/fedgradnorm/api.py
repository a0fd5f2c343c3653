"""Train, run and resume from Python."""

import fedgradnorm
from fedgradnorm.run import Result, resume, run, train

__all__ = ["Result", "resume", "run", "train"]

fedgradnorm.run = run  # the module of this name has taken its place in the package
