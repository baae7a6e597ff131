"""Start, watch and stop the ranks of a job. Part of the front column: never imports torch."""

from rlhf_cli.launch.devices import num_processes, visible_gpus
from rlhf_cli.launch.failure import Failure
from rlhf_cli.launch.job import JobResult, choose_launcher, run_job, world_size

__all__ = ["Failure", "JobResult", "choose_launcher", "num_processes", "run_job", "visible_gpus", "world_size"]
