# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Look inside
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/grit_jax/grit_jax/blob/v0.1.0/launch/colab/look_inside.ipynb)
#
# Three pictures of one small model: what a token sees in each of its two modes, how texts arrange themselves while it
# trains, and what batch size and temperature do to its search.
#
# In Colab, choose a TPU or a GPU under *Runtime > Change runtime type*; without one everything runs on the CPU, slowly.

# %%
import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from glob import glob
from pathlib import Path

REPOSITORY, REF = "https://github.com/grit_jax/grit_jax", "v0.1.0"

assert sys.version_info >= (3, 11), (
    f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: choose another under Runtime > Change runtime type"
)

if "google.colab" in sys.modules and not importlib.util.find_spec("grit_jax"):
    tpu, gpu = glob("/dev/accel*") + glob("/dev/vfio/[0-9]*"), glob("/dev/nvidia[0-9]*")
    uploaded = Path("grit_jax.zip")
    if uploaded.exists():
        source = uploaded.absolute().as_uri()
        constraints = zipfile.ZipFile(uploaded).extract("grit_jax/constraints.txt", "uploaded")
    else:
        source = f"git+{REPOSITORY}@{REF}"
        constraints = f"{REPOSITORY.replace('github.com', 'raw.githubusercontent.com')}/{REF}/constraints.txt"
    package = f"grit-jax{'[tpu]' if tpu else '[cuda12]' if gpu else ''} @ {source}"
    pip = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-c", constraints, package], check=False)
    assert pip.returncode == 0, (
        f"grit_jax was not installed from {source}; pip's lines above say why. Where you cannot reach that address: run "
        "`git archive --prefix=grit_jax/ --output=grit_jax.zip HEAD` in a clone, upload grit_jax.zip with the folder icon "
        "at the left, and run this cell again"
    )

for name in ("jax", "flax", "numpy", "matplotlib"):
    loaded, installed = sys.modules.get(name), importlib.metadata.version(name)
    assert not loaded or loaded.__version__ == installed, (
        f"{name} {loaded.__version__} was loaded before {installed} was installed: "
        "choose Runtime > Restart session and run this cell again"
    )

from grit_jax.cli.main import main

assert main(["doctor"]) == 0, "the lines above say what is wrong with the installation or the devices, and the remedy"

# %% [markdown]
# ## Settings
#
# The third picture alone trains twelve models: on a CPU begin with fewer packages and steps.

# %% tags=["parameters"]
PACKAGES = None  # a list of installed packages; None is the standard library and the numeric packages
STEPS = 260
WIDTH = 256  # of the residual stream
SNAPSHOT_EVERY = 20  # steps between the snapshots of which the second picture shows four
BATCHES = (8, 32, 128)  # the third picture trains one model for each of these
TEMPERATURES = (0.01, 0.05, 0.2, 1.0)  # and each of these,
GRID_STEPS = 60  # for as many steps
GROUPS = 6  # packages that have a colour of their own

# %% [markdown]
# ## A model and its snapshots
#
# The quickstart's run, which also writes the parameters every few steps.

# %%
from pathlib import Path

from grit_jax.quickstart.job import run_quickstart

RUN = Path("runs/look_inside")
run_quickstart(
    RUN,
    packages=PACKAGES,
    overrides=[
        f"--train.steps={STEPS}",
        f"--model.architecture.embed_dim={WIDTH}",
        f"--checkpoint.params_every={SNAPSHOT_EVERY}",
    ],
)

# %% [markdown]
# ## Who sees whom
#
# A row of the picture is a token that reads, a column a token that is read. Texts share a row of the batch and do not
# see each other. To embed, every token of a text sees all of it, and the text without its prompt is averaged. To write,
# a token sees what came before, and the answer is scored.

# %%
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from grit_jax import GritModel
from grit_jax.model.attention import AttentionMask
from grit_jax.text import prompts

HIDDEN, SEEN, USED = "#f1f3f5", "#a9cbe8", "#1f5f9f"
model = GritModel.load(RUN)
tokenizer = model.tokenizer


def draw_mask(panel, row, *, causal, ahead, title):
    """The mask of prompts that share a row; darker are the readers `ahead` tokens before those of the prompts' spans."""
    tokenized = prompts.tokenize(row, tokenizer)
    segments = np.concatenate([np.full(len(one.tokens), 1 + place) for place, one in enumerate(tokenized)])
    positions = np.concatenate([np.arange(len(one.tokens)) for one in tokenized])
    mask = AttentionMask.of_rows(segments[None], positions[None], causal=causal, window=None)
    readers = np.zeros(len(segments), int)
    first = 0
    for one in tokenized:
        for start, end in one.spans:
            readers[first + start - ahead : first + end - ahead] = 1
        first += len(one.tokens)
    visible = np.asarray(mask.materialize()[0])
    panel.imshow(visible * (1 + readers[:, None]), cmap=ListedColormap([HIDDEN, SEEN, USED]), vmin=0, vmax=2)
    pieces = [
        tokenizer.decode([token], skip_special_tokens=False) for one in tokenized for token in one.tokens.tolist()
    ]
    labels = [piece.replace("\n", "↵") for piece in pieces]
    panel.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, family="monospace")
    panel.set_yticks(range(len(labels)), labels, fontsize=7, family="monospace")
    panel.set_xticks(np.arange(len(labels)) - 0.5, minor=True)
    panel.set_yticks(np.arange(len(labels)) - 0.5, minor=True)
    panel.grid(which="minor", color="white", linewidth=0.8)
    panel.tick_params(which="both", length=0)
    panel.spines[:].set_visible(False)
    panel.set_title(title, loc="left", fontsize=11)
    panel.set(xlabel="token that is read", ylabel="token that reads")


special = {"bos": tokenizer.bos, "eos": tokenizer.eos}
texts = [
    prompts.embedding("sorts the values", "find the function", bos=tokenizer.bos),
    prompts.embedding("opens a file", bos=tokenizer.bos),
]
conversation = prompts.conversation(["what does sort do?", "sorts the values"], **special)
figure, panels = plt.subplots(1, 2, figsize=(14, 7.4), layout="constrained")
draw_mask(panels[0], texts, causal=False, ahead=0, title="embed: bidirectional, two texts in one row")
draw_mask(panels[1], [conversation], causal=True, ahead=1, title="write: causal, one conversation")
figure.legend(
    [Patch(color=SEEN), Patch(color=USED), Patch(color=HIDDEN)],
    ["sees", "sees, and is pooled (left) or predicts a scored token (right)", "does not see"],
    ncols=3, frameon=False, loc="outside lower center",
)  # fmt: skip
plt.show()

# %% [markdown]
# ## The space while it trains
#
# Held-out documents on the first two principal components of their embeddings, coloured by package, and a few queries,
# each tied to its own document. The first panel is the model before its first step.

# %%
from collections import Counter

from grit_jax import Trainer
from grit_jax.config import load_config
from grit_jax.quickstart.docstrings import DESCRIBE
from grit_jax.quickstart.measuring import model_scores, ranks_of, read_task, retrieval_scores

task = read_task(RUN / "data/retrieval")
packages = np.array([document.split("(")[0].split(".")[0].split()[0] for document in task.documents])
groups = [name for name, _ in Counter(packages.tolist()).most_common(GROUPS)]
COLOURS = ["#2563a8", "#d97706", "#3f8f5f", "#c0392b", "#7d5ba6", "#8c6d46"]


def config(output, *overrides):
    """The run's config with changes."""
    return load_config(RUN / "config.yaml", [f"--train.output={output}", *overrides])


def ndcg(model):
    """nDCG@10 of held-out queries over held-out documents."""
    data = config(RUN).data
    lengths = data.query_max_length, data.passage_max_length
    scores = model_scores(model, task, instruction=DESCRIBE, max_lengths=lengths)
    return retrieval_scores(ranks_of(scores, task.relevant))["ndcg_at_10"]


snapshots = range(SNAPSHOT_EVERY, STEPS + 1, SNAPSHOT_EVERY)
steps = [snapshots[place] for place in (0, len(snapshots) // 4, -1)]
models = {0: Trainer(config("runs/untrained")).model()}
models |= {step: GritModel.load(RUN / "params", step=step) for step in steps}
tied = np.linspace(0, len(task.queries) - 1, 10).astype(int)

figure, panels = plt.subplots(1, len(models), figsize=(16, 4.6), layout="constrained")
for panel, (step, snapshot) in zip(panels, models.items(), strict=True):
    documents = snapshot.encode(task.documents)
    queries = snapshot.encode([task.queries[place] for place in tied], instruction=DESCRIBE)
    centre = documents.mean(0)
    _, sizes, axes = np.linalg.svd(documents - centre, full_matrices=False)
    points, query_points = (documents - centre) @ axes[:2].T, (queries - centre) @ axes[:2].T
    other = ~np.isin(packages, groups)
    panel.scatter(*points[other].T, s=6, color="#d5dae0", linewidths=0)
    for name, colour in zip(groups, COLOURS):
        panel.scatter(*points[packages == name].T, s=9, color=colour, alpha=0.75, linewidths=0, label=name)
    for query, document in zip(query_points, points[task.relevant[tied]], strict=True):
        panel.plot(*zip(query, document), color="#555555", linewidth=0.7)
    panel.scatter(
        *query_points.T, s=34, marker="^", color="white", edgecolors="black", linewidths=1, zorder=3, label="query"
    )
    share = np.sum(sizes[:2] ** 2) / np.sum(sizes**2)
    panel.set_title(f"step {step}   nDCG@10 {ndcg(snapshot):.3f}", loc="left", fontsize=11)
    panel.set_xlabel(f"{share:.0%} of the variance", fontsize=9)
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_color("#c8ced6")
figure.legend(
    *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=GROUPS + 1, frameon=False, markerscale=1.6
)
plt.show()

# %% [markdown]
# ## Batch size and temperature
#
# One model for each pair, trained to embed alone, for the same number of steps. A larger batch gives every query more
# negatives, and the model more text. A low temperature makes the loss look at the hardest negatives only, a high one at
# all alike.

# %%
figures = np.zeros((len(TEMPERATURES), len(BATCHES)))
for (row, column), _ in np.ndenumerate(figures):
    temperature, batch = TEMPERATURES[row], BATCHES[column]
    trainer = Trainer(
        config(
            f"runs/grid/batch-{batch}-temperature-{temperature}",
            f"--data.embedding_batch={batch}",
            f"--loss.temperature={temperature}",
            f"--train.steps={GRID_STEPS}",
            "--train.mode=embedding",
            "--data.validation=[]",
            "--checkpoint.params_every=null",
            "--logging.every=1000",
        )
    )
    assert trainer.fit()
    figures[row, column] = ndcg(trainer.model())

# %%
figure, panels = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", width_ratios=[1.2, 1])
for temperature, line, colour in zip(TEMPERATURES, figures, COLOURS):
    panels[0].plot(BATCHES, line, "o-", color=colour, label=f"temperature {temperature:g}")
panels[0].set_xscale("log", base=2)
panels[0].set_xticks(BATCHES, [f"{batch}" for batch in BATCHES])
panels[0].set(xlabel="queries in a batch", ylabel="nDCG@10", ylim=(0, 1.15 * figures.max()))
panels[0].set_title(f"after {GRID_STEPS} steps", loc="left", fontsize=11)
panels[0].grid(alpha=0.25)
panels[0].spines[["top", "right"]].set_visible(False)
panels[0].legend(frameon=False, fontsize=9)
panels[1].imshow(figures, cmap="Blues", vmin=0, vmax=1.3 * figures.max(), aspect="auto")
for (row, column), value in np.ndenumerate(figures):
    weight = "bold" if value == figures.max() else "normal"
    colour = "white" if value > 0.8 * figures.max() else "black"
    panels[1].text(column, row, f"{value:.3f}", ha="center", va="center", weight=weight, color=colour)
panels[1].set_xticks(range(len(BATCHES)), BATCHES)
panels[1].set_yticks(range(len(TEMPERATURES)), TEMPERATURES)
panels[1].set(xlabel="queries in a batch", ylabel="temperature")
panels[1].set_title("the same, the best in bold", loc="left", fontsize=11)
panels[1].spines[:].set_visible(False)
panels[1].tick_params(length=0)
plt.show()
