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
# # Take a model to PyTorch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/grit_jax/grit_jax/blob/v0.1.0/launch/colab/export.ipynb)
#
# A run becomes a Hugging Face folder that transformers and sentence-transformers open, with the numbers of the JAX
# model.
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
# `RUN` may be any run folder, such as one on a mounted Drive. Where there is none, a small model is trained first.

# %% tags=["parameters"]
RUN = "runs/quickstart"
PACKAGES = ["numpy", "scipy", "matplotlib"]  # whose docstrings the small model learns from
STEPS = 100

# %% [markdown]
# PyTorch and its libraries are extras. Colab's own PyTorch is kept.

# %%
if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "grit-jax[torch]"], check=True)

# %%
from pathlib import Path

from grit_jax.quickstart.job import run_quickstart

if not Path(RUN, "checkpoints").exists():
    run_quickstart(Path(RUN), packages=PACKAGES, overrides=[f"--train.steps={STEPS}"])

# %% [markdown]
# ## Export
#
# The folder is written in bfloat16, half the size of float32, and compared with PyTorch's numbers: tokens, logits,
# hidden states and vectors. These commands run on the CPU: this process has the accelerator.

# %% magic_args="-s \"$RUN\"" language="bash"
# JAX_PLATFORMS=cpu grit-jax export-hf "$1" my-model --dtype bfloat16 --prompt query="Find the documentation"
# ls -lh my-model

# %% [markdown]
# `grit-jax verify-export my-model` compares again, on any machine, and `grit-jax push-hf my-model my-name/my-model
# --private` uploads the folder.

# %% [markdown]
# ## sentence-transformers
#
# Pooling, normalisation and prompts are in the folder. `encode_query` puts the instruction before a query.

# %%
import torch
from sentence_transformers import SentenceTransformer

texts = [
    "Returns the sum of the elements along an axis.",
    "Draws a line on the axes.",
    "Computes the inverse of a matrix.",
]
sentences = SentenceTransformer("my-model", device="cpu", model_kwargs={"dtype": torch.float32})
documents = sentences.encode_document(texts)
query = sentences.encode_query("add up numbers")
print(sentences.similarity(query, documents))

# %% [markdown]
# The vectors are those of the JAX model, up to rounding: on an accelerator it computes in bfloat16.

# %%
import matplotlib.pyplot as plt
import numpy as np

from grit_jax import GritModel

model = GritModel.load("my-model")
ours = model.encode(texts)
cosines = np.sum(ours * documents, axis=1)
assert cosines.min() > 0.99, cosines

figure, panel = plt.subplots(figsize=(5, 4.4), layout="constrained")
panel.axline((0, 0), slope=1, color="#b9c4d0", linewidth=1)
for text, left, right in zip(texts, ours, documents, strict=True):
    panel.plot(left, right, ".", markersize=4, label=text)
panel.set(xlabel="grit_jax", ylabel="sentence-transformers", aspect="equal")
panel.set_title("every coordinate of three embeddings", loc="left", fontsize=11)
panel.legend(frameon=False, fontsize=8, markerscale=2)
panel.spines[["top", "right"]].set_visible(False)
panel.grid(alpha=0.25)
plt.show()

# %% [markdown]
# ## transformers
#
# The chat template is the GRIT format, and the model generates as any other.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("my-model")
writer = AutoModelForCausalLM.from_pretrained("my-model", dtype=torch.float32)
question = [{"role": "user", "content": f"What does `{PACKAGES[0]}` do?"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = writer.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

# %% [markdown]
# The same model embeds when its attention is told to look both ways: `is_causal=False`, and the mean over the tokens of
# the text, without those of the prompt.

# %%
prompt = "<|embed|>\n"
ids = tokenizer(prompt + texts[0], return_tensors="pt")
start = len(tokenizer(prompt)["input_ids"])
with torch.no_grad():
    hidden = writer.model(**ids, is_causal=False).last_hidden_state[0, start:]
vector = torch.nn.functional.normalize(hidden.mean(0), dim=0)
print(f"cosine with the JAX model's vector: {float(vector @ torch.tensor(ours[0])):.4f}")
