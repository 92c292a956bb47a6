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
from grit_jax.quickstart.sizing import Size, refuse_other_base, resolved_base, saved_size, size_of_run
from grit_jax.quickstart.summary import sampled, show_summary
from grit_jax.runs.logs import read_lines
from grit_jax.runs.plot import plot_losses
from grit_jax.text.tokenizer import train_bpe
from grit_jax.train.loop import Trainer

_VOCAB_SIZE = 8192
_HELD_OUT_LOSS = "validation/loss/generative"
_SEARCHES, _HITS = 3, 3
_PROMPTS = ("What does `collections.OrderedDict.move_to_end` do?", "What does `numpy.linalg.inverse` do?")
_BASE_PROMPTS = (*_PROMPTS, "Why do leaves change their color in autumn?")  # the last one says what it still knows


def run_quickstart(
    output: Path,
    *,
    base: str | None = None,
    packages: Sequence[str] | None = None,
    fresh: bool = False,
    overrides: list[str] | None = None,
) -> bool:
    """Runs the whole quickstart in `output`, or shows an earlier result.

    Args:
      output: Run folder.
      base: Pretrained model to train further, a folder or a name on the Hugging Face Hub; None trains from scratch.
      packages: Installed packages with the docstrings; None takes the standard library and the numeric packages.
      fresh: Whether to remove an earlier quickstart in `output` and start again.
      overrides: `--section.key=value` on top of configs/quickstart.yaml, or of configs/quickstart_base.yaml and what
        `sizing` chooses for the devices.

    Returns:
      False if a signal stopped training after a checkpoint, from which the next call resumes.

    Raises:
      InputError: `output` holds other files or the quickstart of another base, a package is not installed, or the base
        is not there, not supported, or too large for the devices.
    """
    console = rich.console.Console(highlight=False, soft_wrap=True)
    report_file = output / "report.json"
    base = base and resolved_base(base)
    if fresh and output.exists():
        _remove(output)
    refuse_other_base(output, base)
    if report_file.exists():
        show_summary(json.loads(report_file.read_text()))
        console.print(f"finished earlier; --fresh trains again in {output}")
        return True

    started = time.monotonic()
    paths = [
        f"--data.train={output / 'data/train'}",
        f"--data.validation={output / 'data/validation'}",
        f"--train.output={output}",
    ]
    if base is None:
        size, before = None, "untrained"
        paths = [f"--model.tokenizer={output / 'tokenizer'}", *paths]
        config = load_config(config_file("quickstart.yaml"), [*paths, *(overrides or [])])
    else:
        file, before = config_file("quickstart_base.yaml"), "base"
        paths = [f"--model.init={base}", *paths]
        size = size_of_run(output, base, load_config(file, [*paths, *(overrides or [])]))
        config = load_config(file, [*paths, *size.overrides, *(overrides or [])])
        console.print(size.line(config))
    counts = _corpus(output, packages, size, console)
    trainer = Trainer(config)
    task = read_task(output / "data/retrieval")
    bm25 = retrieval_scores(ranks_of(Bm25(task.documents).scores(task.queries), task.relevant))
    before_file = output / f"{before}.json"
    if trainer.step == 0:
        console.print(f"measuring the {before} model{sampled(counts)}")
        measured = _measured(trainer, task, _BASE_PROMPTS if base else ())
        _write_json(before_file, measured | {"loss_per_token": trainer.evaluate()[_HELD_OUT_LOSS]})
    earlier = json.loads(before_file.read_text())
    if not trainer.fit():
        return False

    console.print(f"measuring the trained model{sampled(counts)}")
    lines = read_lines(output / "metrics.jsonl")
    trained = _measured(trainer, task, _BASE_PROMPTS if base else _PROMPTS)
    plot_losses(output, output / "losses.png")
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
            name: {before: earlier[name], "trained": trained[name], "bm25": bm25[name]}
            for name in ("ndcg_at_10", "recall_at_10")
        },
        "generation": {
            "loss_per_token": {
                before: earlier["loss_per_token"],
                "trained": lines[-1][_HELD_OUT_LOSS],
                "unigram": unigram,
            }
        },
        "wall_seconds": time.monotonic() - started,
        "tokens_per_second": tokens / sum(line["step_seconds"] for line in lines),
        "tokens": tokens,
        "steps": trainer.step,
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(trainer.state.params)),
        "corpus": counts,
        "searches": trained["searches"],
        "answers": trained["answers"],
        "paths": {
            "checkpoint": str(output / "checkpoints" / str(trainer.step)),
            "export": str(output / "hf"),
            "plot": str(output / "losses.png"),
            "metrics": str(output / "metrics.jsonl"),
            "report": str(report_file),
        },
    }
    if base:
        report |= {"base": base, "base_searches": earlier["searches"], "base_answers": earlier["answers"]}
    _write_json(report_file, report)
    show_summary(report)
    return True


def config_file(name: str) -> Path:
    """A file of `configs/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(str(resources.files("grit_jax")))
    inside = package / "configs" / name
    return inside if inside.exists() else package.parent / "configs" / name


def _remove(output: Path) -> None:
    if not (output / "data/retrieval").exists() and saved_size(output) is None and any(output.iterdir()):
        raise InputError(f"{output} is not a quickstart folder; remove it yourself or choose another --output")
    shutil.rmtree(output)


def _corpus(
    output: Path, packages: Sequence[str] | None, size: Size | None, console: rich.console.Console
) -> dict[str, int]:
    """Writes the data, unless an interrupted run has done so, and returns their counts; from scratch a tokenizer too.

    Args:
      output: Run folder.
      packages: As in `run_quickstart`.
      size: Size of a run from a base; None from scratch.
      console: Where to say what is done.
    """
    counts_file = output / "data/counts.json"
    if not counts_file.exists():
        console.print(
            f"reading docstrings of {', '.join(packages or ['the standard library and the numeric packages'])}"
        )
        roots = None if packages is None else package_roots(packages)
        counts = write_corpus(output / "data", roots, most_queries=size and size.measured)
        if size is None:
            console.print("training the tokenizer")
            tokenizer = train_bpe(vocabulary_texts(str(output / "data/train")), _VOCAB_SIZE)
            (output / "tokenizer").mkdir(exist_ok=True)
            for name, content in tokenizer.files().items():
                (output / "tokenizer" / name).write_text(content)
        _write_json(counts_file, counts)
    return json.loads(counts_file.read_text())


def _measured(trainer: Trainer, task: RetrievalTask, prompts: Sequence[str]) -> dict[str, Any]:
    """Retrieval scores of the model as it is now, some of its searches, and its answers to prompts."""
    data, model = trainer.config.data, trainer.model()
    lengths = (data.query_max_length, data.passage_max_length)
    scores = model_scores(model, task, instruction=DESCRIBE, max_lengths=lengths)
    return {
        **retrieval_scores(ranks_of(scores, task.relevant)),
        "searches": list(_searches(task, scores)),
        "answers": [{"prompt": prompt, "answer": model.generate(prompt, max_new_tokens=48)} for prompt in prompts],
    }


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
