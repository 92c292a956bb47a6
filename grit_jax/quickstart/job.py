"""The whole quickstart: corpus, tokenizer, training, measurements and report, in one folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console

from grit_jax import files
from grit_jax.checkpoints.opening import open_model
from grit_jax.config import load_config
from grit_jax.data.sources import vocabulary_texts
from grit_jax.errors import InputError
from grit_jax.evaluation.bm25 import Bm25
from grit_jax.hf.model_folder import save_folder
from grit_jax.quickstart.docstrings import DESCRIBE, package_roots, write_corpus
from grit_jax.quickstart.measuring import (
    RetrievalTask,
    model_scores,
    ranks_of,
    read_task,
    retrieval_scores,
    unigram_loss,
)
from grit_jax.quickstart.summary import show_summary
from grit_jax.runs.logs import read_lines
from grit_jax.runs.plot import plot_losses
from grit_jax.text.tokenizer import train_bpe
from grit_jax.train.loop import Trainer

_VOCAB_SIZE = 8192
_HELD_OUT_LOSS = "validation/loss/generative"
_SEARCHES, _HITS = 3, 3
_PROMPTS = ("What does `collections.OrderedDict.move_to_end` do?", "What does `numpy.linalg.inverse` do?")


def run_quickstart(
    output: Path,
    *,
    packages: Sequence[str] | None = None,
    fresh: bool = False,
    overrides: list[str] | None = None,
) -> bool:
    """Runs the whole quickstart in `output`, or shows an earlier result.

    Args:
      output: Run folder.
      packages: Installed packages with the docstrings; None takes the standard library and the numeric packages.
      fresh: Whether to remove an earlier quickstart in `output` and start again.
      overrides: `--section.key=value` on top of configs/quickstart.yaml.

    Returns:
      False if a signal stopped training after a checkpoint, from which the next call resumes.

    Raises:
      InputError: `output` holds other files, or a package is not installed.
    """
    console = rich.console.Console(highlight=False, soft_wrap=True)
    report_file = output / "report.json"
    if fresh and output.exists():
        _remove(output)
    if report_file.exists():
        show_summary(json.loads(report_file.read_text()))
        console.print(f"finished earlier; --fresh trains again in {output}")
        return True

    started = time.monotonic()
    tokenizer_folder = output / "tokenizer"
    config = load_config(
        config_file("quickstart.yaml"),
        [
            f"--model.tokenizer={tokenizer_folder}",
            f"--data.train={output / 'data/train'}",
            f"--data.validation={output / 'data/validation'}",
            f"--train.output={output}",
            *(overrides or []),
        ],
    )
    counts = _corpus(output, packages, console)
    trainer = Trainer(config)
    task = read_task(output / "data/retrieval")
    bm25 = retrieval_scores(ranks_of(Bm25(task.documents).scores(task.queries), task.relevant))
    untrained_file = output / "untrained.json"
    if trainer.step == 0:
        console.print("measuring the untrained model")
        scores = retrieval_scores(ranks_of(_scores(trainer, task), task.relevant))
        _write_json(untrained_file, scores | {"loss_per_token": trainer.evaluate()[_HELD_OUT_LOSS]})
    untrained = json.loads(untrained_file.read_text())
    if not trainer.fit():
        return False

    console.print("measuring the trained model")
    scores = _scores(trainer, task)
    lines = read_lines(output / "metrics.jsonl")
    trained = retrieval_scores(ranks_of(scores, task.relevant)) | {"loss_per_token": lines[-1][_HELD_OUT_LOSS]}
    plot_losses(output, output / "losses.png")
    model = trainer.model()
    save_folder(output / "hf", open_model(output), jax.device_get(trainer.state.params))
    tokens = sum(line["tokens"] for line in lines)
    unigram = unigram_loss(
        output / "data/train/generative",
        output / "data/validation/generative",
        trainer.tokenizer,
        max_length=config.data.generative_max_length,
    )
    report = {
        "retrieval": {
            name: {"untrained": untrained[name], "trained": trained[name], "bm25": bm25[name]}
            for name in ("ndcg_at_10", "recall_at_10")
        },
        "generation": {
            "loss_per_token": {
                "untrained": untrained["loss_per_token"],
                "trained": trained["loss_per_token"],
                "unigram": unigram,
            }
        },
        "wall_seconds": time.monotonic() - started,
        "tokens_per_second": tokens / sum(line["step_seconds"] for line in lines),
        "tokens": tokens,
        "steps": trainer.step,
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(trainer.state.params)),
        "corpus": counts,
        "searches": list(_searches(task, scores)),
        "answers": [{"prompt": prompt, "answer": model.generate(prompt, max_new_tokens=48)} for prompt in _PROMPTS],
        "paths": {
            "checkpoint": str(output / "checkpoints" / str(trainer.step)),
            "export": str(output / "hf"),
            "plot": str(output / "losses.png"),
            "metrics": str(output / "metrics.jsonl"),
            "report": str(report_file),
        },
    }
    _write_json(report_file, report)
    show_summary(report)
    return True


def config_file(name: str) -> Path:
    """A file of `configs/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(str(resources.files("grit_jax")))
    inside = package / "configs" / name
    return inside if inside.exists() else package.parent / "configs" / name


def _remove(output: Path) -> None:
    if not (output / "data/retrieval").exists() and any(output.iterdir()):
        raise InputError(f"{output} is not a quickstart folder; remove it yourself or choose another --output")
    shutil.rmtree(output)


def _corpus(output: Path, packages: Sequence[str] | None, console: rich.console.Console) -> dict[str, int]:
    """Writes data and tokenizer, unless an interrupted run has done so; returns the counts of the data."""
    counts_file = output / "data/counts.json"
    if not counts_file.exists():
        console.print(
            f"reading docstrings of {', '.join(packages or ['the standard library and the numeric packages'])}"
        )
        counts = write_corpus(output / "data", None if packages is None else package_roots(packages))
        console.print("training the tokenizer")
        tokenizer = train_bpe(vocabulary_texts(str(output / "data/train")), _VOCAB_SIZE)
        (output / "tokenizer").mkdir(exist_ok=True)
        for name, content in tokenizer.files().items():
            (output / "tokenizer" / name).write_text(content)
        _write_json(counts_file, counts)
    return json.loads(counts_file.read_text())


def _scores(trainer: Trainer, task: RetrievalTask) -> np.ndarray:
    data = trainer.config.data
    lengths = (data.query_max_length, data.passage_max_length)
    return model_scores(trainer.model(), task, instruction=DESCRIBE, max_lengths=lengths)


def _searches(task: RetrievalTask, scores: np.ndarray) -> Iterator[dict[str, Any]]:
    """A few queries, evenly spread, with their best documents."""
    for query in np.linspace(0, len(task.queries) - 1, _SEARCHES + 2)[1:-1].astype(int).tolist():
        best = np.argsort(-scores[query])[:_HITS].tolist()
        hits = [
            {
                "document": task.documents[i],
                "score": float(scores[query, i]),
                "relevant": i == int(task.relevant[query]),
            }
            for i in best
        ]
        yield {"query": task.queries[query], "hits": hits}


def _write_json(path: Path, value: Any) -> None:
    files.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
