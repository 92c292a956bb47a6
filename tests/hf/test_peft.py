"""Adapters here and in PEFT: each opens the other's, with equal numbers."""

import json

import numpy as np
import pytest

from grit_jax.checkpoints.opening import load_adapters
from grit_jax.hf import adapter_folder
from grit_jax.inference.model import GritModel
from tests.hf import families

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

TEXT = "a red fox"
TOLERANCE = 1e-5


def adapted(case, folder):
    """PEFT's adapters on a random model, whose folder and own folder are written."""
    model = families.make(*families.CASES[case])
    families.save(model, folder / "base")
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder / "theirs")
    path = folder / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(folder / "base")}))
    return wrapped


def outputs(model, ours):
    """Causal logits, [tokens, vocab], and the vector of a text, both from a transformers model."""
    tokens, prompt = ours.prompt_tokens([TEXT], raw=True)[0], ours.embedding_prompts([TEXT])[0]
    logits, _ = families.run(model, tokens[None], is_causal=True)
    _, hidden = families.run(model, prompt.tokens[None], is_causal=False)
    vector = hidden[0, slice(*prompt.spans[0])].mean(axis=0)
    return logits[0], vector / np.linalg.norm(vector)


def close(actual, expected):
    return all(np.max(np.abs(a - b)) < TOLERANCE * np.max(np.abs(b)) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("case", ["mistral", "gemma 3"])
def test_each_opens_the_others_adapters_with_equal_logits_and_vectors(case, tmp_path):
    theirs = adapted(case, tmp_path)
    ours = GritModel.load(tmp_path / "theirs")
    numbers = ours.logits([TEXT])[0], ours.encode(TEXT)
    assert close(numbers, outputs(theirs.base_model.model, ours))

    pretrained, own = load_adapters(tmp_path / "theirs")
    adapter_folder.save_folder(tmp_path / "ours", pretrained, own, dtype="float32")
    base = families.make(*families.CASES[case])
    assert not close(outputs(base, ours), numbers)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert close(outputs(again.base_model.model, ours), numbers)
