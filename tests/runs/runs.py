"""Run folders written by hand."""

import json
import time


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder, *, steps=100, done=60, now=None):
    """A run of two sessions, the second one at two seconds a step."""
    now = time.time() if now is None else now
    start = now - 2 * done
    lines = []
    for step in range(1, done + 1):
        name = ("nli", "msmarco")[step % 2]
        values = {"nli": 1.0, "msmarco": 2.0}
        lines.append(
            {
                "step": step, "time": start + 2 * step, "loss": 3.0 + values[name], "loss/generative": 3.0,
                "loss/embedding": values[name], f"loss/embedding/{name}": values[name], "grad_norm": 0.5,
                "learning_rate": 1e-3 * (1 - step / steps), "skipped": float(step == 30), "tokens": 1000,
                "step_seconds": 1.5, "tokens_per_second": 1000 / 1.5, "goodput": 0.5,
                **({"embedding/effective_rank": step, "scorecard/embedding": step / 100, "scorecard/search": 0.5}
                   if step % 10 == 0 else {}),
                "embedding/alignment": 0.4,
            }
        )  # fmt: skip
    write_lines(folder / "metrics.jsonl", lines)
    sessions = [
        {"session": start - 100, "time": start - 20, "from_step": 0, "step": 0, "seconds": {"startup": 80.0}},
        {
            "session": start, "time": now, "from_step": 0, "step": done,
            "seconds": {"useful": 1.8 * done, "compile": 0.2 * done},
        },
    ]  # fmt: skip
    write_lines(folder / "goodput.jsonl", sessions)
    bad = [
        {"step": 30, "reason": "not finite", "text": "loss is nan", "samples": []},
        {
            "step": 40,
            "reason": "spike",
            "text": "loss/generative is 9, 12.0 deviations above the recent",
            "samples": [],
        },
    ]
    write_lines(folder / "bad_batches.jsonl", bad)
    (folder / "config.yaml").write_text(f"train:\n  steps: {steps}\n")
    for name in ("20", "40", "60.orbax-checkpoint-tmp"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    return folder
