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
# # Train a model that searches and writes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/grit_jax/grit_jax/blob/v0.1.0/launch/colab/quickstart.ipynb)
#
# A small transformer learns two jobs with the same weights: with bidirectional attention it turns a text into an
# embedding, with causal attention it writes. Its data are the docstrings of the installed Python packages, so nothing
# is downloaded. Then you search with it and chat with it. The method is GRIT ([arXiv
# 2402.09906](https://arxiv.org/abs/2402.09906)).
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
# 260 steps take minutes on two CPU cores. On an accelerator more steps, such as 2000, make a better model.

# %% tags=["parameters"]
PACKAGES = None  # a list of installed packages; None is the standard library and the numeric packages
STEPS = 260
WIDTH = 256  # of the residual stream
BATCH = 64  # queries in a step, each of which has the documents of all others as negatives
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of the last section: a name on the Hub, or a folder; None leaves it out
BASE_OPTIONS = []  # of its config, such as "--train.steps=100"; what they leave open is sized for the device

# %% [markdown]
# ## Train
#
# The run reads the docstrings, trains a tokenizer, measures the untrained model, trains, measures again and exports. A
# second call shows the report that is there.

# %%
from pathlib import Path

from grit_jax.quickstart.job import run_quickstart

RUN = Path("runs/quickstart")
run_quickstart(
    RUN,
    packages=PACKAGES,
    overrides=[
        f"--train.steps={STEPS}",
        f"--data.embedding_batch={BATCH}",
        f"--model.architecture.embed_dim={WIDTH}",
    ],
)

# %% [markdown]
# Both losses fall together. The held-out ones are of objects that training never sees.

# %%
from IPython.display import Image

Image(RUN / "losses.png", width=900)

# %% [markdown]
# ## Search
#
# The documents are embedded once. A query carries an instruction, which the model reads but does not pool; the product
# of unit vectors is the cosine.

# %%
from grit_jax import GritModel
from grit_jax.quickstart.docstrings import DESCRIBE
from grit_jax.quickstart.measuring import read_task

model = GritModel.load(RUN)
task = read_task(RUN / "data/retrieval")
documents = model.encode(task.documents)


def search(query, count=3):
    """Prints the best documents."""
    scores = documents @ model.encode([query], instruction=DESCRIBE)[0]
    print(query)
    for place in scores.argsort()[::-1][:count]:
        print(f"  {scores[place]:.3f}  {task.documents[place].splitlines()[0]}")


search("Sort a sequence and return the order")
search("Send a message to a server over the network")

# %% [markdown]
# The table holds the cosines of held-out queries with their own documents, on the diagonal, and with each other's.

# %%
import matplotlib.pyplot as plt
import numpy as np

shown = np.unique(np.linspace(0, len(task.queries) - 1, 8).astype(int))
queries = model.encode([task.queries[place] for place in shown], instruction=DESCRIBE)
cosines = queries @ documents[task.relevant[shown]].T


def clipped(text, length):
    """The first line, shortened."""
    line = text.splitlines()[0]
    return line if len(line) <= length else f"{line[: length - 1]}…"


figure, panel = plt.subplots(figsize=(10, 5.6), layout="constrained")
image = panel.imshow(cosines, cmap="Blues", vmin=min(0, cosines.min()), vmax=1, aspect="auto")
for (row, column), cosine in np.ndenumerate(cosines):
    weight = "bold" if row == column else "normal"
    panel.text(
        column,
        row,
        f"{cosine:.2f}",
        ha="center",
        va="center",
        weight=weight,
        color="white" if cosine > 0.6 else "black",
    )
names = [clipped(task.documents[place].split("(")[0], 34) for place in task.relevant[shown]]
panel.set_xticks(range(len(shown)), names, rotation=30, ha="right", fontsize=8)
panel.set_yticks(range(len(shown)), [clipped(task.queries[place], 52) for place in shown], fontsize=8)
panel.set_title("cosine of a query (row) and a document (column)", loc="left", fontsize=11)
panel.spines[:].set_visible(False)
figure.colorbar(image, pad=0.01)
plt.show()

# %% [markdown]
# ## Chat
#
# The same weights write. This model has seen a few million tokens: its sentences sound like docstrings and are rarely
# right. Larger models are a matter of the config
# ([training](https://github.com/grit_jax/grit_jax/blob/v0.1.0/docs/training.md)).

# %%
print(model.generate("What does `json.dumps` do?", max_new_tokens=40))

# %% [markdown]
# A conversation is a list of messages; the answer comes piece by piece.

# %%
question = {"role": "user", "content": "What does `os.path.join` do?"}
answer = {"role": "assistant", "content": model.generate([question], max_new_tokens=40)}
follow_up = {"role": "user", "content": "What does `os.path.split` do?"}
for piece in model.stream([question, answer, follow_up], max_new_tokens=40, temperature=0.7, top_p=0.9, seed=1):
    print(piece, end="", flush=True)

# %% [markdown]
# The run folder holds a Hugging Face folder of the model too, `runs/quickstart/hf`: the notebook *export* uses one from
# PyTorch.
#
# ## From a pretrained model
#
# A model that has read the web before knows what the docstrings are about. This fetches one from the Hugging Face Hub and
# fine-tunes it on the same data, with batch and steps chosen for the device; the first line says which. It measures the
# model before and after, and shows both side by side.

# %%
if BASE:
    model = None  # makes room
    BASE_RUN = Path("runs/quickstart_base")
    run_quickstart(BASE_RUN, base=BASE, packages=PACKAGES, overrides=BASE_OPTIONS)

# %% [markdown]
# Now search and ask for yourself.

# %%
if BASE:
    model, task = GritModel.load(BASE_RUN), read_task(BASE_RUN / "data/retrieval")
    documents = model.encode(task.documents)
    search("Sort a sequence and return the order")
    print(model.generate("How do I join two paths in Python?", max_new_tokens=60))
