"""Names of what a run leaves in its folder, beside the lock of `watch.lock`."""

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
PARAMS = "params"
METRICS = "metrics.jsonl"
GOODPUT = "goodput.jsonl"
BAD_BATCHES = "bad_batches.jsonl"
PROFILE = "profile"
TENSORBOARD = "tensorboard"
PLOT = "plot.png"


def stacks(process: int) -> str:
    """The file for the stacks of a process that hangs."""
    return f"stacks-{process}.txt"
