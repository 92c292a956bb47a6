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
# # Your own model, your own data
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/grit_jax/grit_jax/blob/v0.1.0/launch/colab/bring_your_own.ipynb)
#
# A pretrained language model learns to embed, and keeps writing. Here the model is a small one from the Hugging Face
# Hub and the data are the docstrings of packages that you name; both are replaced by yours in the settings.
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
# Llama, Mistral, Mixtral, Qwen2, Qwen2.5, Qwen3, Gemma 2 and Gemma 3 (text) can be trained further
# ([families](https://github.com/grit_jax/grit_jax/blob/v0.1.0/docs/families.md)). Training takes 16 bytes a parameter
# (weights, gradients, two moments of AdamW) beside activations.

# %% tags=["parameters"]
BASE = "HuggingFaceTB/SmolLM2-135M"  # a name on the Hub, or a Hugging Face folder of your own
DATA = None  # a folder with train/ and validation/ of your own; None is the docstrings of PACKAGES
PACKAGES = ["numpy", "scipy", "matplotlib"]
INSTRUCTION = "Given a description, find the documentation of the Python object that it describes"
QUERY = "Draw a line between two points"
QUESTION = "What does `matplotlib.pyplot.plot` do?"
STEPS = 200
BATCH = 32
MAX_LENGTH = 128  # tokens of a text; a multiple of 128 suits a TPU's attention kernel
LEARNING_RATE = 5e-5

# %% [markdown]
# ## The data
#
# A folder of JSONL files. The keys of a file's first row tell what it trains:
#
# ```
# {"query": ["Find the answer", "who wrote it?"], "pos": [["", "She wrote it."]], "neg": [["", "It rained."]]}
# {"text": ["Say hello.", "Hello!"]}
# ```
#
# An entry of `query`, `pos` and `neg` is an instruction and a text. `grit-jax data convert` makes such rows of BEIR,
# MS MARCO, sentence-transformers, Alpaca, ShareGPT and OpenAI files.

# %%
from pathlib import Path

from grit_jax.quickstart.docstrings import package_roots, write_corpus

data = DATA or "my-data"
if DATA is None:
    write_corpus(Path(data), package_roots(PACKAGES))

# %% [markdown]
# Every row is checked. Such commands leave the accelerator alone: this process has it.

# %% magic_args="-s \"$data\"" language="bash"
# grit-jax data validate "$1/train"

# %% [markdown]
# ## The model
#
# `fetch_model` is `grit-jax fetch model` in Python: it downloads, checks the Hub's checksums and imports. A folder is
# imported where it is.

# %%
from grit_jax.datatools.fetch import fetch_model

base = BASE
if not Path(BASE).is_dir():
    base = "checkpoints/base"
    fetch_model(BASE, base, downloads=Path("downloads"))

# %% [markdown]
# A few rows as this model reads them, with its own tokenizer; marks show what is pooled or scored.

# %% magic_args="-s \"$data\" \"$base\"" language="bash"
# grit-jax data sample "$1/train" --tokenizer "$2" --count 2

# %% [markdown]
# ## Train
#
# The file names everything that differs from the defaults. `grit-jax train FILE` does the same from a shell, and
# `--dry-run` checks data, model and memory first.

# %%
from grit_jax import Trainer
from grit_jax.config import parse_config
from grit_jax.runs.checks import print_checks
from grit_jax.train.dry_run import dry_run

config = parse_config(f"""
model: {{init: {base}, remat: full}}
data:
  train: {data}/train
  validation: {data}/validation
  query_max_length: {MAX_LENGTH}
  passage_max_length: {MAX_LENGTH}
  generative_max_length: {MAX_LENGTH}
  group_size: 2
  embedding_batch: {BATCH}
  generative_batch: 8
  row_buckets: 1
  exclude_duplicates: true
loss: {{type: token_mean, temperature: 0.05}}
optimizer: {{learning_rate: {LEARNING_RATE:f}, schedule: cosine, warmup_ratio: 0.1}}
train: {{steps: {STEPS}, output: runs/mine}}
""")
assert not print_checks(dry_run(config))

# %%
from grit_jax.evaluation.bm25 import Bm25
from grit_jax.quickstart.measuring import model_scores, ranks_of, retrieval_scores, task_of_records

task = task_of_records(f"{data}/validation")


def ndcg(scores):
    """nDCG@10 of scores [queries, documents]."""
    return retrieval_scores(ranks_of(scores, task.relevant))["ndcg_at_10"]


def measure(model):
    """nDCG@10 of a model's own search over the held-out documents."""
    return ndcg(model_scores(model, task, instruction=INSTRUCTION, max_lengths=(MAX_LENGTH, MAX_LENGTH)))


trainer = Trainer(config)
before = measure(trainer.model())
assert trainer.fit()

# %% [markdown]
# ## What it learned

# %%
import matplotlib.pyplot as plt

model = trainer.model()
names = ["base model", "after training", "BM25, keyword search"]
values = [before, measure(model), ndcg(Bm25(task.documents).scores(task.queries))]
figure, panel = plt.subplots(figsize=(7, 2.4), layout="constrained")
bars = panel.barh(names, values, color=["#b9c4d0", "#2563a8", "#d97706"], height=0.62)
panel.bar_label(bars, fmt="%.3f", padding=4)
panel.invert_yaxis()
panel.set_xlim(0, 1)
panel.set_title(
    f"nDCG@10 of {len(task.queries):,} held-out queries over {len(task.documents):,} documents", loc="left", fontsize=11
)
panel.spines[["top", "right", "left"]].set_visible(False)
panel.tick_params(left=False)
plt.show()

# %%
documents = model.encode(task.documents, max_length=MAX_LENGTH)
scores = documents @ model.encode([QUERY], instruction=INSTRUCTION)[0]
print(QUERY)
for place in scores.argsort()[::-1][:3]:
    print(f"  {scores[place]:.3f}  {task.documents[place].splitlines()[0]}")
print()
print(QUESTION)
print(model.generate(QUESTION, max_new_tokens=60, temperature=0.7, top_p=0.9, seed=1))

# %% [markdown]
# `GritModel.load("runs/mine")` opens the model in another process, and more `STEPS` go on from there. The notebook *export*
# takes a run to PyTorch. All that was logged as one picture:

# %% language="bash"
# grit-jax plot runs/mine

# %%
from IPython.display import Image

Image("runs/mine/plot.png", width=1100)
