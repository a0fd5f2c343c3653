"""A trace of where a run's time goes, for TensorBoard or Perfetto."""

from pathlib import Path

from torch.profiler import profile, schedule, tensorboard_trace_handler

from fedgradnorm.runs.entries import PROFILE


def profiler_of(folder: Path, num_rounds: int) -> profile:
    """A profiler that writes a trace of two rounds to ``profile/`` in a run's folder.

    Where a run has more than one round, the first one warms up and is not in the trace.
    """
    from torch._C._profiler import _ExperimentalConfig  # no public way to trace all threads

    return profile(
        schedule=schedule(wait=0, warmup=min(1, num_rounds - 1), active=2, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(folder / PROFILE), use_gzip=True),
        experimental_config=_ExperimentalConfig(profile_all_threads=True),
    )
