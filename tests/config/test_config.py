import dataclasses
import math
import random
import re
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import yaml

from grit_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedConfig,
    EmbeddingConfig,
    LoggingConfig,
    LoRAConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    ScorecardConfig,
    StageConfig,
    TrainConfig,
    TransformerConfig,
    config_differences,
    dump_config,
    parse_config,
)
from grit_jax.errors import InputError
from tests import damage

SECONDS = 5.0  # of a config, at most
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads_and_survives_a_round_trip(path):
    config = parse_config(path.read_text(), source=str(path))
    assert parse_config(dump_config(config)) == config


def test_command_line_wins_over_file_wins_over_defaults():
    config = parse_config("train: {steps: 5, seed: 3}\noptimizer: {learning_rate: 1e-4}", ["--train.steps=7"])
    assert (config.train.steps, config.train.seed, config.optimizer.learning_rate) == (7, 3, 1e-4)
    assert config.data == Config().data


def test_a_curriculum_survives_a_round_trip():
    config = parse_config("data: {curriculum: [{steps: 5, files: [a.jsonl, 'b-*']}, {num_samples: {a.jsonl: 3}}]}")
    assert config.data.curriculum == [StageConfig(5, ["a.jsonl", "b-*"]), StageConfig(num_samples={"a.jsonl": 3})]
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("optimizer: {b: 1}", [], "f.yaml: unknown key 'optimizer.b'; did you mean 'optimizer.b2'|'optimizer.b1'"),
        ("model: {architecture: {embed: 1}}", [], r"'model.architecture.embed'; did you mean '.*embed_dim'\?"),
        ("nothing: 1", [], "unknown key 'nothing'; known here: model, data, loss"),
        ("", ["--train.step=5"], r"command line: unknown key 'train.step'; did you mean 'train.steps'\?"),
        ("train: {steps: 5}", ["--train.steps=ten"], "^command line: .*train.steps"),
        ("train: {steps: ten}", ["--train.seed=3"], "^f.yaml: .*train.steps"),
        ("", ["train.steps=5"], "write overrides as --section.key=value"),
        ("train: {steps: many}", [], "f.yaml: Parser key \"train.steps\": .*int.*many"),
        ("train: {steps: 1.5}", [], "train.steps.*1.5"),
        ("loss: {type: sum}", [], "loss.type.*sum"),
        ("data: {train: 5}", [], "data.train"),
        ("train: [1, 2", [], "f.yaml:1: not valid YAML"),
        ("- train", [], "f.yaml: expected a mapping of sections, found list"),
        ("train: {steps: 0}", [], "train.steps=0 must be positive"),
        ("train: {seed: -1}", [], "train.seed=-1 must be from 0 to 4294967295"),
        ("data: {curriculum: [{step: 3}]}", [], r"'data.curriculum\[0\].step'; did you mean '.*steps'"),
        ("data: {curriculum: [{files: [a]}, {files: [b]}]}", [], r"data.curriculum\[0\] has no steps; only the last"),
        ("data: {curriculum: [{steps: 2}, {}]}", [], r"data.curriculum\[1\] is {}; .* one of steps, files, num"),
        ("data: {curriculum: [{steps: many}, {steps: null}]}", [], "data.curriculum"),
        ("data: {curriculum: [{steps: 3}]}", [], r"data.curriculum\[0\] runs to the end: leave its steps out"),
        ("data: {curriculum: [{steps: 0}, {steps: null}]}", [], r"data.curriculum\[0\].steps=0 must be positive"),
        ("model: {architecture: {num_heads: 3}}", [], "num_heads=3 is not a multiple of num_kv_heads=2"),
        ("optimizer: {b1: 1}", [], "optimizer.b1=1.0 must be 0 or more, and less than 1"),
        ("optimizer: {b2: 1}", [], "optimizer.b2=1.0 must be 0 or more, and less than 1"),
        ("optimizer: {b2: -0.1}", [], "optimizer.b2=-0.1 must be 0 or more, and less than 1"),
        ("optimizer: {clip_norm: 0}", [], "optimizer.clip_norm=0.0 must be positive; null is allowed too"),
        ("optimizer: {learning_rate: -1e-4}", [], "optimizer.learning_rate=-0.0001 must be 0 or more"),
        ("optimizer: {weight_decay: -1}", [], "optimizer.weight_decay=-1.0 must be 0 or more"),
        ("optimizer: {epsilon: -1}", [], "optimizer.epsilon=-1.0 must be 0 or more"),
        ("optimizer: {warmup_ratio: 3}", [], "optimizer.warmup_ratio=3.0 must be from 0 to 1"),
        ("optimizer: {warmup_steps: -1}", [], "optimizer.warmup_steps=-1 must be 0 or more; null is allowed too"),
        ("optimizer: {warmup_steps: 9}", ["--train.steps=8"], "optimizer.warmup_steps=9 is over train.steps=8; lower"),
        ("train: {seed: 4294967296}", [], "train.seed=4294967296 must be from 0 to 4294967295"),
        ("train: {watchdog_seconds: 1e10}", [], "train.watchdog_seconds=10000000000.0 must be positive and at most"),
        ("loss: {embedding_weight: -1}", [], "loss.embedding_weight=-1.0 must be 0 or more"),
        ("loss: {embedding_weight: 0, generative_weight: 0}", [], "_weight=0.0 and loss.generative_weight=0.0"),
        ("loss: {generative_weight: 0}", ["--train.mode=generative"], "generative: nothing would be trained"),
        ("loss: {temperature: -.inf}", [], "loss.temperature=-inf must be a finite number"),
        ("logging: {spike_threshold: .nan}", [], "logging.spike_threshold=nan must be a finite number; null is"),
        ("model: {embedding: {projection_dim: 0}}", [], "model.embedding.projection_dim=0 must be positive"),
        ("model: {architecture: {rope_scaling: {factor: 0}}}", [], "rope_scaling.factor=0.0 must be positive"),
        ("model: {architecture: {rope_scaling: {kind: llama3, low_frequency_factor: 4}}}", [],
         "low_frequency_factor=4.0 must be less than high_frequency_factor=4.0"),
        ("model: {architecture: {norm_epsilon: 0}}", [], "model.architecture.norm_epsilon=0.0 must be positive"),
        ("model: {architecture: {sliding_window: 0}}", [], "model.architecture.sliding_window=0 must be positive"),
        ("data: {num_samples: {a.jsonl: -1}}", [], "data.num_samples.a.jsonl=-1 must be 0 or more; use 0 to leave"),
        ("data: {curriculum: [{num_samples: {a.jsonl: -1}}]}", [], r"data.curriculum\[0\].num_samples.a.jsonl=-1 must"),
        ("lora: {alpha: 16}", [], "lora.alpha=16.0 without lora.r; set lora.r, or remove the key"),
        ("lora: {target_modules: [q_proj]}", [], r"lora.target_modules=\['q_proj'\] without lora.r; set lora.r"),
        ("lora: {r: 0}", ["--model.init=base"], "lora.r=0 must be positive; null is allowed too"),
        ("lora: {r: 8}", [], "lora.r=8 without model.init: adapters need a base; name it, or remove lora.r"),
        ("lora: {r: 8, dropout: 1}", [], "lora.dropout=1.0 must be 0 or more, and less than 1"),
        ("lora: {r: 8, alpha: -1}", [], "lora.alpha=-1.0 must be positive"),
        ("lora: {r: 8, target_modules: q_proj}", [],
         r"lora.target_modules='q_proj' is neither all-linear nor a list; write \[q_proj\]"),
        ("lora: {r: 8, target_modules: []}", [], r"lora.target_modules=\[\] adapts nothing; name modules, or use all-"),
        ("lora: {rank: 8}", [], "unknown key 'lora.rank'"),
        ("scorecard: {embedding_weight: 2}", [], "scorecard.embedding_weight=2.0 must be from 0 to 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_key_value_and_remedy(text, overrides, message):
    with pytest.raises(InputError, match=message):
        parse_config(text, overrides, source="f.yaml")


SECTIONS = {
    "model": ModelConfig, "model.architecture": TransformerConfig, "model.architecture.rope_scaling": RopeScaling,
    "model.embedding": EmbeddingConfig, "data": DataConfig, "loss": LossConfig, "optimizer": OptimizerConfig,
    "train": TrainConfig, "lora": LoRAConfig, "scorecard": ScorecardConfig, "checkpoint": CheckpointConfig,
    "logging": LoggingConfig, "distributed": DistributedConfig,
}  # fmt: skip


def numbers(kind):
    """Every number of the sections: its key, its section and its name."""
    for key, section in SECTIONS.items():
        for name, hint in typing.get_type_hints(section).items():
            if hint in (kind, kind | None):
                yield pytest.param(key, section, name, id=f"{key}.{name}")


@pytest.mark.parametrize(("key", "section", "name"), [*numbers(float)])
def test_no_setting_takes_what_is_not_a_finite_number(key, section, name):
    for value in (math.nan, math.inf):
        with pytest.raises(InputError, match=rf"^{key}.{name}={value} must be a finite number"):
            section(**{name: value})


@pytest.mark.parametrize(("key", "section", "name"), [*numbers(int), *numbers(float)])
def test_no_setting_but_the_norms_offset_is_negative(key, section, name):
    more = {"coordinator": "host:1", "num_processes": 1, "process_id": 0} if section is DistributedConfig else {}
    if name == "norm_offset":
        assert section(norm_offset=-7).norm_offset == -7
    else:
        with pytest.raises(InputError, match=f"{key}.{name}=-7"):
            section(**more | {name: -7})


def test_settings_made_in_python_take_only_the_words_that_yaml_takes():
    for section, settings, told in (
        (
            TransformerConfig,
            {"family": "x"},
            "model.architecture.family='x' is not one of llama, mistral, mixtral, qwen2",
        ),
        (RopeScaling, {"kind": "x"}, "model.architecture.rope_scaling.kind='x' is not one of linear, llama3"),
        (EmbeddingConfig, {"pooling": "max"}, "model.embedding.pooling='max' is not one of mean, weighted_mean, cls"),
        (ModelConfig, {"expert_kernel": None}, "model.expert_kernel=None is not one of auto, ragged_dot, megablox"),
    ):
        with pytest.raises(InputError, match=f"^{told}"):
            section(**settings)


@pytest.mark.parametrize(
    "earlier",
    ["model: {generative_attention: causal, init: a}", "model: {init: a}", "{model: {init: a}, data: {workers: 3}}"],
)
def test_configs_of_earlier_runs_load_without_the_keys_that_are_gone(earlier):
    assert parse_config(earlier) == parse_config(
        "", ["--model.generative_attention=causal", "--data.workers=2", "--model.init=a"]
    )
    assert not {"generative_attention", "workers"} & set(re.findall(r"\w+", dump_config(parse_config(earlier))))


@pytest.mark.parametrize(
    ("text", "overrides", "source"),
    [
        ("model: {generative_attention: bidirectional}", [], "f.yaml"),
        ("", ["--model.generative_attention=bidirectional"], "command line"),
    ],
)
def test_what_a_key_that_is_gone_could_do_is_refused(text, overrides, source):
    with pytest.raises(InputError) as error:
        parse_config(text, overrides, source="f.yaml")
    assert str(error.value) == (
        f"{source}: model.generative_attention=bidirectional is no longer possible: the generative pass is causal, "
        "or a token would see its own target; remove the key"
    )


def test_differences_name_key_old_and_new_value():
    old, new = Config(), parse_config("train: {steps: 9, seed: 1}\nmesh: {data: 2}")
    assert config_differences(old, new, ignore=("train.steps", "mesh.")) == ["train.seed: 0 -> 1"]


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(InputError, match="vocab_size=10 is smaller than the tokenizer's 258 tokens"):
        TransformerConfig(vocab_size=10).resolve(258)


def test_light_modules_import_without_jax():
    modules = (
        "config, text.tokenizer, text.prompts, runs.status, data.batch, data.derived, data.records, data.sources, "
        "data.tokenizing, data.index_builder, data.pipeline, data.token_index, data.shuffle, data.packing, "
        "data.schedule, cli.main"
    )
    names = ", ".join(f"grit_jax.{name}" for name in modules.split(", "))
    code = f"import sys, {names}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def is_meant(given, read):
    """Whether settings are what a text says: the same values, or the number that a string of it says."""
    if isinstance(given, dict) and isinstance(read, dict):
        return all(key in read and is_meant(value, read[key]) for key, value in given.items())
    if isinstance(given, list) and isinstance(read, list | tuple):
        return len(given) == len(read) and all(map(is_meant, given, read))
    if isinstance(given, str) and not isinstance(read, str):
        given = yaml.safe_load(given)
        given = float(given) if isinstance(read, float) else given  # YAML reads 1e-5 as a text
    return given == read and isinstance(given, bool) == isinstance(read, bool)


def check_configs(number):
    """Configs of runs with damage: refused in a line that begins with the file, or read as the text says, each key."""
    rng = random.Random(0)
    originals = [yaml.safe_load(path.read_text()) for path in CONFIGS] + [yaml.safe_load(dump_config(Config()))]
    refused = 0
    for trial in range(number):
        text = yaml.safe_dump(damage.mutate(rng, rng.choice(originals), ["steps", *SECTIONS]), allow_unicode=True)
        if trial % 3 == 0:
            text = damage.damage_bytes(rng, text.encode(errors="replace")).decode(errors="replace")
        begun = time.process_time()
        try:
            config = parse_config(text, source="here.yaml")
        except InputError as error:
            refused += 1
            assert re.match(r"here\.yaml(:\d+)?: ", str(error)), text
            assert "\n" not in str(error)
            assert len(str(error)) < 700, text
            continue
        finally:
            assert time.process_time() - begun < SECONDS, text
        assert is_meant(yaml.safe_load(text) or {}, dataclasses.asdict(config)), text
        assert parse_config(dump_config(config)) == config, text
    assert number / 3 < refused < number


def test_a_damaged_config_is_refused_or_read_as_it_is_written():
    check_configs(100)


@pytest.mark.long
def test_ten_thousand_damaged_configs_are_refused_or_read_as_they_are_written():
    check_configs(10_000)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("model: {compiler_options: {xla_number: 98304, xla_flag: true, xla_word: fast}}", []),
        ("", ["--model.compiler_options={xla_number: 98304, xla_flag: true, xla_word: fast}"]),
        ("model: {compiler_options: {xla_number: 98304, xla_flag: true}}", ["--model.compiler_options.xla_word=fast"]),
    ],
)
def test_compiler_options_have_the_values_that_yaml_gives_them(text, overrides):
    config = parse_config(text, overrides)
    assert repr(config.model.compiler_options) == "{'xla_number': 98304, 'xla_flag': True, 'xla_word': 'fast'}"
    assert parse_config(dump_config(config)) == config


def test_a_compiler_option_without_a_value_is_refused():
    with pytest.raises(InputError, match=r"here\.yaml: .*model\.compiler_options"):
        parse_config("model: {compiler_options: {xla_flag: }}", source="here.yaml")
