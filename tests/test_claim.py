"""The script that compares one model of both skills with one of each."""

import dataclasses
import gzip
import json
import shutil
import subprocess
import sys
import time

import claim
import claim_data
import claim_examples
import claim_gradients
import claim_report
import claim_results
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from claim_setup import CONFIGS, GSM8K, HELD_OUT, MERGE, MODELS, PRETRAINED, RANDOM, Figure

from grit_jax.checkpoints.opening import load_for_conversion
from grit_jax.data.sources import find_files, open_source
from grit_jax.errors import InputError
from grit_jax.evaluation.compare import compare
from grit_jax.evaluation.retrieval import Retrieval
from grit_jax.evaluation.suite import Suite
from tests.commands import ROOT, environment

SHARED = ROOT.parent / "shared/data"
PUBLISHED = ROOT / "docs/claim/results"
PRIMARY = RANDOM.main_figures[0].tasks
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data beside the checkout")


def noisy(seed, shift=0.0, noise=0.01):
    """Contributions of 400 examples to two tasks: one part of the example's own, one of the model."""
    own = np.random.default_rng(0).uniform(size=(2, 400))
    return [list(own + np.random.default_rng(seed).normal(0, noise, own.shape) + shift)]


def test_paired_draws_find_models_equivalent_that_differ_by_less_than_the_examples_do():
    same = compare(noisy(1), noisy(2))
    assert same.verdict(0.02) == "equivalent" and abs(same.difference) < 0.01
    assert same.interval[0] < same.difference < same.interval[1]
    better, worse = compare(noisy(1, 0.05), noisy(2)), compare(noisy(1, -0.05), noisy(2))
    assert (better.verdict(0.02), worse.verdict(0.02)) == ("better", "worse")
    assert (better.verdict(0.02, smaller_is_better=True), worse.verdict(0.02, smaller_is_better=True)) == (
        "worse", "better",
    )  # fmt: skip
    assert compare(noisy(1, noise=0.5), noisy(2, noise=0.5)).verdict(0.02) == "undecided"


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match="score both models on the same tasks"):
        compare([[np.ones(3)]], [[np.ones(4)]])
    with pytest.raises(InputError, match="score both models on the same tasks"):
        compare([[np.ones(3)]], [[np.ones(3)]] * 2)
    with pytest.raises(InputError, match="the reference scores 0 on all examples, or on those of a draw"):
        compare([[np.ones(3)]], [[np.array([0.0, 0, 1])]])


def test_several_training_runs_widen_the_interval_by_their_spread():
    runs = [noisy(1, shift)[0] for shift in (-0.05, 0.0, 0.05)]
    reference = [noisy(2)[0]] * 3
    one, several = compare(runs[1:2], reference[:1]), compare(runs, reference)
    assert np.isclose(one.difference, several.difference, atol=0.01)
    assert np.ptp(several.interval) > 3 * np.ptp(one.interval)
    assert several.verdict(0.02) == "undecided"


def test_few_training_runs_are_judged_by_the_wider_of_the_two_intervals():
    reference = [noisy(2, noise=0.001)[0]] * 3
    found = compare([noisy(1, shift, noise=0.001)[0] for shift in (0.02, 0.04, 0.06)], reference)
    low, high = found.run_interval
    expected = scipy.stats.ttest_1samp(found.by_run, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert low < 0 < found.interval[0] and found.interval[1] < high
    assert found.verdict(0.02) == "undecided"
    assert found._replace(run_interval=None).verdict(0.02) == "better"
    close = compare([noisy(1, shift, noise=0.001)[0] for shift in (-0.006, 0.0, 0.006)], reference)
    assert close.verdict(0.02) == "undecided" and close._replace(run_interval=None).verdict(0.02) == "equivalent"
    one = compare(noisy(1), noisy(2))
    assert one.run_interval is None and one.by_run == (one.difference,)


@needs_shared
def test_a_twentieth_of_each_source_is_held_out_and_no_query_or_prompt_is_on_both_sides(tmp_path):
    claim_data.split(RANDOM, SHARED / "train", tmp_path)
    for stream in ("embedding", "generative"):
        for path in find_files(str(tmp_path / "train" / stream)):
            train, held_out = (
                list(open_source(tmp_path / part / stream / path.name)) for part in ("train", "held_out")
            )
            assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.09
            keys = [{claim_data.key(record) for record in records} for records in (train, held_out)]
            assert not keys[0] & keys[1]


def write_collection(folder, documents, judgements):
    """A collection in BEIR layout."""
    queries = sorted({query for query, *_ in judgements})
    write(folder / "corpus.jsonl", [json.dumps({"_id": name, "text": f"text of {name}"}) + "\n" for name in documents])
    write(folder / "queries.jsonl", [json.dumps({"_id": name, "text": f"about {name}"}) + "\n" for name in queries])
    rows = ["\t".join(map(str, row)) + "\n" for row in judgements]
    write(folder / "qrels/test.tsv", ["query-id\tcorpus-id\tscore\n", *rows])


def test_a_sample_of_documents_has_all_relevant_ones_and_does_not_depend_on_their_order(tmp_path):
    names = [f"d{number}" for number in range(60)]
    judgements = [("q1", "d3", 1), ("q1", "d4", 0), ("q2", "d50", 2)]
    write_collection(tmp_path / "forward", names, judgements)
    write_collection(tmp_path / "backward", names[::-1], judgements)
    sampled = {}
    for order, number in (("forward", 10), ("backward", 10), ("forward", 30)):
        folder = tmp_path / f"{order} {number}"
        claim_data.sample_documents(tmp_path / order, folder, number)
        sampled[order, number] = claim_data.read_collection(folder, "test")
    found = sampled["forward", 10]
    assert found == sampled["backward", 10] and len(found.documents) == 10
    assert found.queries == {"q1": "about q1", "q2": "about q2"} and found.documents["d3"] == "text of d3"
    assert found.judgements["q1"]["d3"] == 1 and found.judgements["q2"] == {"d50": 2}
    assert found.documents.keys() < sampled["forward", 30].documents.keys()
    with pytest.raises(InputError, match="2 documents are relevant, more than the 1 to keep; keep more"):
        claim_data.sample_documents(tmp_path / "forward", tmp_path / "none", 1)


def scores(examples):
    """What is kept of a model with these scores."""
    return result({}, examples={"a": examples.tolist()})


def test_two_models_of_equal_quality_are_within_the_margin_four_times_in_five():
    correlation, rng, equivalent = 0.6, np.random.default_rng(0), 0
    figure = Figure("score", ("a",), "embedding", correlation=correlation)
    for _ in range(60):
        shared, *own = rng.normal(size=(3, 300))
        first, second = (0.5 + 0.2 * (correlation**0.5 * shared + (1 - correlation) ** 0.5 * part) for part in own)
        margin = figure.margin(scores(second))
        equivalent += figure.compare([scores(first)], [scores(second)]).verdict(margin) == "equivalent"
    assert 0.65 < equivalent / 60 < 0.95
    assert figure.margin(scores(0.5 + 0.001 * rng.normal(size=300))) == 0.02


def test_the_assumed_correlations_are_what_models_from_random_weights_have():
    ranges = []
    for figure in RANDOM.figures:
        pairs = [
            [claim_results.read_result(PUBLISHED, seed, name) for name in ("unified", figure.specialist)]
            for seed in (0, 1, 2)
        ]
        found = [figure.measured_correlation(*pair) for pair in pairs]
        ranges.append((min(found), max(found)))
    assert [tuple(round(bound, digits) for bound in bounds) for bounds, digits in zip(ranges, (1, 3), strict=True)] == [
        (0.5, 0.8), (0.994, 0.996),
    ]  # fmt: skip
    assumed = {figure.specialist: figure.correlation for figure in PRETRAINED.figures}
    assert ranges[0][0] < assumed["embedding"] <= ranges[0][1] and assumed["generative"] <= ranges[1][0]


@pytest.fixture
def prepared(tmp_path):
    """A folder that was prepared from `data` beside it."""
    for name in ("train/embedding/x.jsonl", "train/generative/x.jsonl", "eval/generative/gsm8k_test.jsonl.gz"):
        write(tmp_path / "data" / name, ["{}"])
    (tmp_path / "output/data").mkdir(parents=True)
    (tmp_path / "output/data/done").write_text(claim_data.digest(claim_data.sources(RANDOM, tmp_path / "data")))
    return tmp_path / "output"


def test_what_was_made_from_other_data_is_refused(prepared):
    data = prepared.parent / "data"
    claim_data.prepare(RANDOM, data, prepared)
    write(data / "train/embedding/x.jsonl", ['{"changed": 1}'])
    with pytest.raises(InputError, match=r"output was made from other data than --data .*/data; choose another"):
        claim_data.prepare(RANDOM, data, prepared)


MARK = "digest of a task"
PAIRED = (HELD_OUT, GSM8K, "stsb_test")  # their examples have two columns


def result(metrics, rng=np.random.default_rng(0), **fields):
    """What is kept of a model with random scores."""
    examples = {task: rng.uniform(0.3, 0.5, (50, 2) if task in PAIRED else 50) for task in metrics}
    tasks = {
        task: {"metric": metric, "main_score": float(examples[task].mean()), "interval": [0.3, 0.5]}
        for task, metric in metrics.items()
    }
    fields = {
        "marks": dict.fromkeys(metrics, MARK),
        "config": "train: {steps: 200}\n",
        "data": "d",
        "wall_seconds": 10.0,
    } | fields
    fields = {"examples": {task: values.tolist() for task, values in examples.items()}} | fields
    return claim_results.Result(
        devices="1 x cpu", tasks=tasks, losses={"embedding": [[1, 2], [3.0, 2.0]], "generative": [[1, 2], [9.0, 8.0]]},
        tokens=10, training_seconds=4.0, **fields,
    )  # fmt: skip


def test_a_run_of_other_steps_is_refused(tmp_path):
    folder = tmp_path / "0/unified"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {steps: 200}\n")
    study = claim.Study(RANDOM, CONFIGS / "unified.yaml", {"train.steps": 20}, tmp_path)
    with pytest.raises(InputError, match=r"0/unified is a run of train.steps=200, not 20; give --train.steps=200, or"):
        study.measure("unified", 0, Suite((), 8, 0), {})


def test_a_kept_result_stands_for_a_model_of_the_same_settings_data_and_tasks_only(tmp_path, monkeypatch):
    class Trained(Exception):
        pass

    def train(config):
        raise Trained

    def measure(*, steps=20, length=8, study=claim.Study, **more):
        settings = {"train.steps": steps, **{name.replace("__", "."): value for name, value in more.items()}}
        task = claim_data.Perplexity(HELD_OUT, str(tmp_path / "held_out.jsonl"))
        study(RANDOM, CONFIGS / "unified.yaml", settings, tmp_path).measure(
            "embedding", 3, Suite((task,), length, 0), {"train.mode": "embedding"}
        )

    monkeypatch.setattr(claim, "Trainer", train)
    write(tmp_path / "held_out.jsonl", ['{"text": ["a", "b"]}\n'])
    for stream in ("embedding", "generative"):
        write(tmp_path / "data/train" / stream / "a.jsonl", ['{"text": ["a", "b"]}\n'])
    with pytest.raises(Trained):
        measure()
    study = claim.Study(RANDOM, CONFIGS / "unified.yaml", {}, tmp_path)
    config = claim.load_config(study.config, ["--train.seed=3", "--train.mode=embedding", "--train.steps=20"])
    task = claim_data.Perplexity(HELD_OUT, str(tmp_path / "held_out.jsonl"))
    marks = {HELD_OUT: claim.fingerprint(task, Suite((task,), 8, 0), "")}
    kept = result({HELD_OUT: "loss_per_token"}, config=claim.dump_config(config), marks=marks,
                  data=study.data)  # fmt: skip
    claim_results.write_result(tmp_path / "results", 3, "embedding", kept)
    measure()
    measure(mesh__fsdp=2, checkpoint__every=7)
    with pytest.raises(Trained):
        measure(length=9)
    with pytest.raises(InputError, match=r"seed 3, embedding .*else \(loss.temperature: 0.05 -> 0.5\); put it"):
        measure(loss__temperature=0.5)
    with pytest.raises(InputError, match=r"train.steps: 20 -> 30"):
        measure(steps=30)
    write(tmp_path / "held_out.jsonl", ['{"text": ["a", "c"]}\n'])
    with pytest.raises(Trained):
        measure()
    write(tmp_path / "data/train/generative/a.jsonl", ['{"text": ["a", "c"]}\n'])
    with pytest.raises(InputError, match=r"data: [0-9a-f]{16} -> [0-9a-f]{16}"):
        measure()
    (tmp_path / "results/3/embedding.json").write_text("{}")
    with pytest.raises(InputError, match=r"results/3/embedding.json: is no result of this script; remove it"):
        measure()


def test_unknown_ablations_are_refused_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["claim.py", "--output", str(tmp_path), "--ablations", "baseline", "no_pack"])
    with pytest.raises(SystemExit, match="2"):
        claim.main()
    assert "--ablations: no no_pack; there are baseline, causal, last_token" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ablations_see_as_many_samples_as_the_baseline():
    batch_32, batch_512 = ({"train.steps": steps} for steps in (200, 13))
    assert [claim.ablation_steps(change, 100, 100) for change in ({}, batch_32, batch_512)] == [100, 200, 13]
    assert [claim.ablation_steps(change, 100, 20) for change in ({}, batch_32, batch_512)] == [20, 40, 2]
    assert claim.ablation_steps(batch_512, 100, 2) == 1


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--sedes 0", "--sedes 0: no option of the script"),
        ("--loss.temperature=0.1 --ablations temperature_0.02", "loss.temperature: ablations change these"),
        ("--train.seed=3", "train.seed: the script chooses these"),
        ("--models base", "--models: no base; there are unified, embedding, generative, untrained"),
        ("--base . --models base", "--base .: has no config.json; give a Hugging Face folder"),
        ("--gradients base", "--gradients: no base; there are unified, embedding, generative, untrained"),
        ("--examples", "--examples: shows a model beside its base; give --base"),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_work(option, told, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["claim.py", "--output", str(tmp_path), *option.split()])
    with pytest.raises(SystemExit, match="2"):
        claim.main()
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def measured(tmp_path):
    """Results of two seeds, of which one was stopped in between, and of an ablation."""
    rng = np.random.default_rng(0)
    metrics = {HELD_OUT: "loss_per_token", **dict.fromkeys(PRIMARY, "ndcg_at_10")}
    for seed in (0, 1):
        for name in ("untrained", *MODELS, "ablation_no_packing"):
            found = result(metrics | {"mmlu": "accuracy"}, rng)
            found.tasks["mmlu"]["chance"] = 0.6
            if name == "untrained" and not seed:
                found = dataclasses.replace(found, wall_seconds=None)
            claim_results.write_result(tmp_path, seed, name, found)
    scores = {"scifact": {"main_score": 0.6, "interval": [0.55, 0.65]}}
    claim_results.write_bm25(tmp_path, claim_results.KeywordSearch({"scifact": MARK}, scores))
    return tmp_path


def summary_of(results, seeds):
    return claim_report.summarize(RANDOM, results, seeds)


def test_seconds_are_told_of_seeds_that_were_not_stopped_in_between(measured):
    assert summary_of(measured, [0, 1])["wall_seconds"] == {"1": 40.0}


def test_ablations_that_were_measured_are_compared_with_the_baseline(measured, tmp_path):
    assert "ablations" not in summary_of(measured, [0, 1])
    unified = claim_results.read_result(measured, 0, "unified")
    stored = {f"{name} stored": values for name, values in unified.examples.items() if name in PRIMARY}
    baseline = dataclasses.replace(
        unified, examples=unified.examples | stored, tasks=unified.tasks | {name: {} for name in stored}
    )
    claim_results.write_result(measured, 0, "ablation_baseline", baseline)
    summary = summary_of(measured, [0, 1])
    assert list(summary["ablations"]) == ["baseline", "no_packing"]
    ours, theirs = (
        np.mean([claim_results.read_result(measured, 0, name).examples[task] for task in PRIMARY])
        for name in ("ablation_no_packing", "unified")
    )
    found = summary["ablations"]["no_packing"]["mean nDCG@10"]
    assert found["value"] == pytest.approx(ours) and found["difference"] == pytest.approx(ours / theirs - 1)
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    assert summary["variants"]["stored"]["mean nDCG@10"]["difference"] == 0
    table = claim_report.tables(RANDOM, summary)["ablations"]
    assert f"| no_packing | {ours:.4f} | {ours / theirs - 1:+.1%} (" in table
    assert f"| stored | {theirs:.4f} | +0% (+0.0% to +0.0%) |" in table
    plots = claim_report.plot(RANDOM, measured, summary, tmp_path)
    assert [path.name for path in plots] == ["claim.png", "ablations.png"]
    assert all(path.stat().st_size > 10_000 for path in plots)


def test_a_figure_is_compared_by_the_seeds_that_have_both_of_its_models(measured):
    (measured / "1/generative.json").unlink()
    found = summary_of(measured, [0, 1])["claim"]
    assert {name: one["seeds"] for name, one in found.items()} == {"mean nDCG@10": [0, 1], "loss per token": [0]}
    alone = summary_of(measured, [1])
    assert list(alone["claim"]) == ["mean nDCG@10"]
    assert "generative" not in claim_report.tables(RANDOM, alone)["tasks"]
    for name in (*MODELS, "untrained"):
        (measured / f"0/{name}.json").unlink()
    with pytest.raises(InputError, match="has no untrained model of seed 0; measure it first"):
        summary_of(measured, [0])


def test_models_that_were_measured_on_different_tasks_are_refused(measured):
    other = dataclasses.replace(claim_results.read_result(measured, 1, "untrained"), marks={"mmlu": "other"})
    claim_results.write_result(measured, 1, "untrained", other)
    with pytest.raises(
        InputError,
        match=r"1/untrained: started from .* on other data or tasks than 0/untr",
    ):
        summary_of(measured, [0, 1])


@pytest.mark.parametrize("changed", [{"data": "other"}, {"marks": {"scifact": "other"}}])
def test_ablations_that_were_measured_on_something_else_than_the_baseline_are_refused(measured, changed):
    ablation = claim_results.read_result(measured, 0, "ablation_no_packing")
    claim_results.write_result(measured, 0, "ablation_baseline", dataclasses.replace(ablation, **changed))
    with pytest.raises(
        InputError,
        match=r"0/no_packing: started from .* on other data or tasks than 0/",
    ):
        summary_of(measured, [0])


def test_keyword_search_on_other_tasks_is_refused(measured):
    claim_results.write_bm25(measured, claim_results.KeywordSearch({"scifact": "other"}, {}))
    with pytest.raises(InputError, match="keyword search was not measured on these tasks"):
        summary_of(measured, [0])


@pytest.fixture
def started(tmp_path):
    """Results of a base and of two of the three models of a seed that started from it."""
    metrics = {task: "loss_per_token" if task in PAIRED else "ndcg_at_10" for task in PRETRAINED.tasks}
    for seed, name in ((None, "base"), (0, "unified"), (0, "embedding")):
        claim_results.write_result(tmp_path, seed, name, result(metrics, base="weights"))
    claim_results.write_bm25(tmp_path, claim_results.KeywordSearch({"medquad": MARK}, {}))
    return tmp_path


def test_models_from_a_base_are_compared_as_they_are_measured_by_margins_of_the_base(started):
    (started / "0/embedding.json").rename(started / "0/later")
    before = claim_report.summarize(PRETRAINED, started, [0])
    (started / "0/later").rename(started / "0/embedding.json")
    after = claim_report.summarize(PRETRAINED, started, [0])
    base = claim_results.read_result(started, None, "base")
    assert before["claim"] == {} and before["margins"] == after["margins"]
    assert after["margins"] == {figure.name: figure.margin(base) for figure in PRETRAINED.figures}
    assert {name: one["margin"] for name, one in after["claim"].items()} == {
        figure.name: after["margins"][figure.name] for figure in PRETRAINED.figures if figure.specialist == "embedding"
    }
    assert list(claim_report.tables(PRETRAINED, before)) == ["pretrained margins", "pretrained tasks"]
    table = claim_report.tables(PRETRAINED, after)["pretrained margins"]
    assert "| Spearman on STS-B, against embedding-only | stsb_test | 50 | " in table
    assert f"| 0.75 | ±{after['margins']['Spearman on STS-B']:.1%} |" in table
    assert (
        f"(margin ±{100 * after['margins']['mean nDCG@10']:.3g} %)"
        in (claim_report.tables(PRETRAINED, after)["pretrained claim"])
    )


def test_further_runs_from_a_base_are_six_at_most_and_a_merged_one_is_made_of_models_of_the_claim():
    known = PRETRAINED.known_ablations()
    assert len(known) <= 6 and set(PRETRAINED.front) <= known.keys()
    assert known["merged"] == {MERGE: list(MODELS)}


def test_a_model_is_not_merged_from_others_that_are_not_there(tmp_path):
    study = claim.Study(PRETRAINED, CONFIGS / "pretrained.yaml", {"train.steps": 20}, tmp_path)
    told = r"ablation_merged is merged from unified, embedding, and .*0/{} holds no model of 20 steps .*--models {}, as"
    with pytest.raises(InputError, match=told.format("unified", "unified")):
        study.measure("ablation_merged", 0, Suite((), 8, 0), {}, parts=["unified", "embedding"])
    for stream in ("embedding", "generative"):
        write(tmp_path / f"data/train/{stream}/gsm8k.jsonl", ['{"text": ["a", "b"]}\n'])
    other = result({}, config="train: {steps: 20}\n")  # measured, and without its weights
    for name in ("unified", "embedding"):
        claim_results.write_result(study.results, 0, name, other)
    (tmp_path / "0/unified/checkpoints/10").mkdir(parents=True)
    with pytest.raises(InputError, match=told.format("unified", "unified")):
        study.measure("ablation_merged", 0, Suite((), 8, 0), {}, parts=["unified", "embedding"])
    (tmp_path / "0/unified/checkpoints/20").mkdir()
    with pytest.raises(InputError, match=r"unified was trained with something else \(.*loss.temperature: 0.02 -> 0.05"):
        study.measure("ablation_merged", 0, Suite((), 8, 0), {}, parts=["unified", "embedding"])
    with pytest.raises(InputError, match=r"0/unified/none: holds no checkpoint to measure gradients of; train it with"):
        study.measure_gradients("unified/none", 0)


class Pulls:
    """Two objectives whose losses pull every parameter in given directions."""

    names = ("embedding", "generative")

    def __init__(self, **directions):
        self.directions = directions

    def __call__(self, params, batch):
        (name,) = batch
        products = jax.tree.map(lambda x, y: jnp.sum(x * y), params, self.directions[name])
        return sum(jax.tree.leaves(products)) * batch[name], {}


def test_the_cosine_of_two_gradients_is_that_of_each_kind_of_weight_and_leaves_out_what_only_one_trains():
    def weights(attention, norm, final, mlp, table, head):
        layers = {"attention": {"out": {"kernel": attention}}, "mlp": {"up": mlp}, "mlp_norm": {"scale": norm}}
        return jax.tree.map(
            lambda x: jnp.array(x, float),
            {"embedding": table, "layers": layers, "final_norm": {"scale": final}, "head": head},
            is_leaf=lambda x: isinstance(x, list),
        )

    first = weights([1, 2], [1], [0], [3, 4], [1, 0], [5, 5])
    second = weights([2, 4], [1], [1], [-4, 3], [-2, 0], [0, 0])
    products = claim_gradients._products(
        Pulls(embedding=first, generative=second), first, {"embedding": 2.0, "generative": 3.0}
    )
    assert products.keys() | {claim_gradients.ALL} == set(claim_gradients.KINDS)
    cosines = {kind: product / (one * other) ** 0.5 for kind, (product, one, other) in products.items()}
    assert cosines == pytest.approx({"attention": 1, "mlp": 0, "norms": 0.5**0.5, "token table": -1}, abs=1e-6)


@pytest.fixture
def measured_twice(started):
    """`started`, with the third model, two further runs, and the gradients of the base and the unified model."""
    unified = claim_results.read_result(started, 0, "unified")
    rng = np.random.default_rng(3)
    for name in ("generative", "ablation_merged", "ablation_rate_2e-5"):
        examples = {
            task: (np.array(values) * rng.uniform(0.9, 1.1)).tolist() for task, values in unified.examples.items()
        }
        claim_results.write_result(started, 0, name, dataclasses.replace(unified, examples=examples))
    cosines = {kind: [0.1, 0.3] for kind in claim_gradients.KINDS}
    by_model = {"base": {"0": cosines}, "unified": {"20": cosines, "120": cosines | {"mlp": [-0.5, -0.5]}}}
    claim_results.write_gradients(started, 0, claim_results.Gradients("", "d", "weights", by_model))
    return started


def test_gradients_and_the_front_of_both_skills_are_shown_of_what_was_measured(measured_twice, tmp_path):
    summary = json.loads(json.dumps(claim_report.summarize(PRETRAINED, measured_twice, [0])))
    table = claim_report.tables(PRETRAINED, summary)["pretrained gradients"].splitlines()
    assert table[2].startswith("| base | +0.200 ± 0.100 | +0.200")
    assert (
        table[4] == "| unified, step 120 | +0.200 ± 0.100 | +0.200 ± 0.100 | -0.500 ± 0.000 |" + 2 * " +0.200 ± 0.100 |"
    )
    assert list(summary["front"]) == ["base", *MODELS, "merged"]  # of the ablations only those of the front
    merged = claim_results.read_result(measured_twice, 0, "ablation_merged")
    for figure in PRETRAINED.main_figures:
        found = summary["front"]["merged"][figure.name]
        assert found["value"] == pytest.approx(summary["ablations"]["merged"][figure.name]["value"])
        assert found["interval"][0] < found["value"] < found["interval"][1]
        assert found == json.loads(json.dumps(figure.estimate(merged)))
    plots = claim_report.plot(PRETRAINED, measured_twice, summary, tmp_path)
    assert [path.name for path in plots] == ["pretrained.png", "pretrained_ablations.png", "pretrained_front.png"]
    others = claim_results.Gradients("", "d", "other weights", {})
    claim_results.write_gradients(measured_twice, 0, others)
    with pytest.raises(InputError, match="gradients of seed 0 are those of another base or of other data; remove"):
        claim_report.summarize(PRETRAINED, measured_twice, [0])
    (measured_twice / "0/gradients.json").unlink()
    (measured_twice / "0/unified.json").unlink()  # without a baseline further runs are not compared
    assert list(claim_report.summarize(PRETRAINED, measured_twice, [0])["front"]) == ["base", "embedding", "generative"]


def test_examples_are_chosen_by_hash_spread_over_tasks_and_shown_as_they_are_in_a_line(tmp_path, monkeypatch):
    class Fake:
        """A model that finds a query's own document and repeats its name, or that finds the last one."""

        def __init__(self, model, max_length):
            self.name = model

        def directions(self, texts, instruction):
            which = [int(text.rpartition("d")[2]) % 8 if self.name == "good" else "about" in text for text in texts]
            return np.eye(8, dtype=np.float32)[np.array(which, int)]

        def completions(self, prompts, max_new_tokens):
            return [None if prompt == "p3" else f"{self.name} | <b>*{prompt}*" for prompt in prompts]

    monkeypatch.setattr(claim_examples, "Session", Fake)
    monkeypatch.setattr(claim_examples.GritModel, "load", lambda path: path)
    tasks = []
    for name in ("medquad", "wordnet_wsd", "xquad_en"):
        write_collection(tmp_path / name, [f"d{i}" for i in range(8)], [(f"d{i}", f"d{i}", 1) for i in range(8)])
        tasks.append(Retrieval(name, str(tmp_path / name)))
    records = [json.dumps({"text": [f"p{i}", "answer"]}) + "\n" for i in range(40)]
    for order, rows in (("forward", records), ("backward", [*records[::-1], records[3]])):
        write(tmp_path / order / "data/held_out/generative/a.jsonl", rows)

    def written(order, tasks):
        page = claim_examples.write_examples(
            PRETRAINED, Suite(tuple(tasks), 8, 0), tmp_path / order, {"bad": "bad", "good": "good"}
        )
        return page, (tmp_path / order / "examples.md").read_text()

    page, whole = written("forward", [*tasks, dataclasses.replace(tasks[0], name="another")])
    assert (page, whole) == written("backward", tasks)
    search, completions = whole.split("\n\n")
    rows = search.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows[:4]] == ["| medquad", "| wordnet_wsd", "| xquad_en", "| medquad"]
    assert len(rows) == len(set(rows)) == 20 and all("✓ text of d" in row for row in rows)
    assert len(completions.splitlines()[2:]) == 20 and "good \\| &lt;b&gt;\\*p" in completions
    assert list(page) == ["pretrained examples"]
    shown = page["pretrained examples"].split("\n\n")
    assert [part.splitlines() for part in shown] == [part.splitlines()[:12] for part in (search, completions)]
    assert claim_examples._line("a\n b" * 100) == ("a b" * 100)[:159] + "…"


def test_models_from_another_base_are_refused(started):
    other = dataclasses.replace(claim_results.read_result(started, 0, "embedding"), base="other")
    claim_results.write_result(started, 0, "embedding", other)
    with pytest.raises(InputError, match="0/embedding: started from another base, or trained or measured on other"):
        claim_report.summarize(PRETRAINED, started, [0])
    (started / "base.json").unlink()
    with pytest.raises(InputError, match="has no base model of seed 0; measure it first"):
        claim_report.summarize(PRETRAINED, started, [0])


def test_tables_of_several_seeds_say_what_their_brackets_are_and_have_both_intervals(measured):
    several = summary_of(measured, [0, 1])
    found = claim_report.tables(RANDOM, several)
    assert found["tasks"].startswith("| task: mean of 2 seeds (95 % interval over examples) |")
    assert "| 0.600 (0.550 to 0.650) |" in found["tasks"]
    assert "of the seeds by t" in found["claim"]
    assert all(len(one["by_run"]) == 2 and one["run_interval"] for one in several["claim"].values())
    alone = claim_report.tables(RANDOM, summary_of(measured, [0]))
    assert alone["tasks"].startswith("| task (95 % interval over examples) |") and "by t" not in alone["claim"]


@pytest.mark.parametrize(
    ("chance", "mark"), [(0.2, ""), (0.3, " at chance"), (0.4, " at chance"), (0.6, " below chance")]
)
def test_what_an_interval_says_of_chance_stands_behind_a_score(chance, mark):
    seeds = [{"main_score": 0.4, "interval": bounds, "chance": chance} for bounds in ([0.25, 0.45], [0.35, 0.55])]
    assert claim_report._cell(seeds) == f"0.400 (0.300 to 0.500){mark}"


def smaller(source, target):
    """Every twentieth line of each file of training and evaluation data; of a collection all that some queries need."""
    for path in source.glob("train/lm/*.gz"):
        write(target / path.relative_to(source), lines(path)[:2000])
    for path in (*source.glob("train/*/*.jsonl*"), *source.glob("eval/**/*.jsonl*"), *source.glob("eval/sts/*.tsv")):
        if path.parent.parent.name != "retrieval":
            write(target / path.relative_to(source), lines(path)[::20])
    for qrels in source.glob("eval/retrieval/*/qrels/test.tsv"):
        folder = qrels.parents[1]
        head, *judgements = lines(qrels)
        judged = set().union(*(row.split()[:2] for row in judgements[:30]))
        write(target / qrels.relative_to(source), [head, *(row for row in judgements if row.split()[0] in judged)])
        for path in folder.glob("*.jsonl*"):
            wanted = judged | {row.split()[1] for row in judgements if row.split()[0] in judged}
            rows = [row for row in lines(path) if json.loads(row)["_id"] in wanted]
            write(target / path.relative_to(source), rows)


def lines(path):
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return list(file)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.long
@needs_shared
def test_the_whole_comparison_at_toy_size_goes_on_where_it_was_and_its_tables_are_its_figures(tmp_path):
    smaller(SHARED, tmp_path / "data")
    page = tmp_path / "claim.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in ("claim", "tasks", "ablations")))
    published = tmp_path / "claim"

    def run(output):
        command = [
            sys.executable, ROOT / "benchmarks/claim.py", "--data", tmp_path / "data", "--output", output,
            "--page", page, "--ablations", "baseline", "no_packing", "one_file", "--train.steps=2",
            "--model.architecture.embed_dim=32", "--model.architecture.mlp_dim=48", "--model.architecture.num_layers=1",
            "--data.embedding_batch=8", "--data.generative_batch=4",
        ]  # fmt: skip
        done = subprocess.run(
            list(map(str, command)), env=environment(optimized=True), capture_output=True, text=True, timeout=3000
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    tables = run(tmp_path / "output").split("\nclaim\n")[1]
    summary = json.loads((published / "claim.json").read_text())
    assert all((published / f"{name}.png").stat().st_size > 10_000 for name in ("claim", "ablations"))
    packing = summary["ablations"]["no_packing"]
    assert all(abs(packing[name]["difference"]) < 1e-3 for name in ("mean nDCG@10", "loss per token"))
    for table in claim_report.tables(RANDOM, summary).values():
        assert table in tables and table in page.read_text()
    ours = summary["claim"]["mean nDCG@10"]
    scores = [summary["models"]["unified"]["0"][task]["main_score"] for task in PRIMARY]
    assert np.isclose(ours["value"], np.mean(scores))

    # A kept result is enough; without one the run's checkpoint and report are.
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(published / "results", tmp_path / "elsewhere/results")
    elsewhere = run(tmp_path / "elsewhere")
    assert elsewhere.count(": kept\n") == 7 and elsewhere.endswith(tables)
    assert json.loads((published / "claim.json").read_text()) == summary
    (tmp_path / "output/results/0/embedding.json").unlink()
    again = run(tmp_path / "output")
    assert again.count(": kept\n") == 6 and "step 1/" not in again and again.endswith(tables)


@pytest.mark.long
@needs_shared
def test_the_comparison_from_a_base_goes_model_by_model_and_a_killed_one_ends_as_if_it_had_not_been(tmp_path):
    smaller(SHARED, tmp_path / "data")
    page = tmp_path / "claim.md"
    names = ("margins", "claim", "tasks", "ablations", "gradients", "examples")
    page.write_text("".join(f"<!-- pretrained {name} -->\n<!-- end of pretrained {name} -->\n" for name in names))
    steps, results = 40, "results/pretrained"

    def start(output, *more):
        command = [
            sys.executable, ROOT / "benchmarks/claim.py", "--base", SHARED / "models/stories260K", "--output", output,
            "--data", tmp_path / "data", "--page", page, f"--train.steps={steps}", "--data.embedding_batch=8",
            "--checkpoint.every=5", *more,
        ]  # fmt: skip
        return subprocess.Popen(
            list(map(str, command)), env=environment(optimized=True), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def run(output, *more):
        process = start(output, *more)
        printed, errors = process.communicate(timeout=3000)
        assert process.returncode == 0, errors[-3000:]
        return printed

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    first = run(killed, "--models", "base")
    assert "pretrained margins" in first and "pretrained claim" not in first
    (whole / "results").mkdir(parents=True)
    shutil.copytree(killed / results, whole / results)

    process, metrics = start(killed, "--models", "unified"), killed / "0/unified/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 12):
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert process.returncode < 0 and not (killed / results / "0/unified.json").exists()
    run(killed, "--models", "unified")
    run(whole, "--models", "unified")
    again, once = (claim_results.read_result(output / results, 0, "unified") for output in (killed, whole))
    assert (again.losses, again.examples, again.base) == (once.losses, once.examples, once.base)
    assert len(once.losses["embedding"][0]) == steps and once.base

    more = ("--gradients", "base", "unified", "--examples")
    tables = run(killed, "--ablations", "generative_weight_4", "merged", *more).split("\npretrained margins\n")[1]
    summary = json.loads((tmp_path / "claim/pretrained.json").read_text())
    assert set(summary["claim"]) == {figure.name for figure in PRETRAINED.figures}
    assert list(summary["ablations"]) == ["unified", "generative_weight_4", "merged"]
    assert list(summary["front"]) == ["base", *MODELS, "generative_weight_4", "merged"]
    assert (tmp_path / "claim/pretrained_front.png").stat().st_size > 10_000
    cosines = claim_results.read_gradients(tmp_path / "claim" / results, 0).cosines
    assert {name: list(by_step) for name, by_step in cosines.items()} == {"base": ["0"], "unified": [str(steps)]}
    everywhere = [one for by_step in cosines.values() for kinds in by_step.values() for one in kinds.values()]
    assert all(len(one) == claim_gradients.BATCHES and max(map(abs, one)) < 1 for one in everywhere)
    runs = [load_for_conversion(killed / f"0/{name}")[1] for name in MODELS]
    merged = load_for_conversion(killed / "0/ablation_merged/merged")[1]
    jax.tree.map(lambda found, *x: np.testing.assert_allclose(found, sum(x) / 3, rtol=1e-5, atol=1e-7), merged, *runs)
    assert claim_results.read_result(killed / results, 0, "ablation_merged").tokens == 0
    assert page.read_text().count("✓ relevant") == 2 and (killed / "examples.md").read_text().count("\n| ") == 43
    for table in claim_report.tables(PRETRAINED, summary).values():
        assert table in f"\n{tables}" and table in page.read_text()
    assert (tmp_path / "claim" / results / "0/generative.json").exists()


def test_the_page_has_the_tables_that_the_script_wrote_and_they_follow_from_the_results():
    page = (ROOT / "docs/claim.md").read_text()
    summary = json.loads((ROOT / "docs/claim/claim.json").read_text())
    for table in claim_report.tables(RANDOM, summary).values():
        assert table in page
    again = json.loads(json.dumps(summary_of(PUBLISHED, summary["seeds"])))
    for name, one in summary.pop("claim").items():
        assert again["claim"][name].pop("verdict") == one.pop("verdict")
        assert again["claim"][name].pop("against") == one.pop("against")
        for value, other in zip(one.values(), again["claim"][name].values(), strict=True):
            np.testing.assert_allclose(np.array(value, float), np.array(other, float), rtol=1e-9)
    del again["claim"]
    assert again == summary
