"""The script that compares one model of both skills with one of each."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from grit_jax.config import InputError
from grit_jax.data.sources import find_files, open_source
from grit_jax.evaluation.compare import compare
from grit_jax.evaluation.suite import Suite
from tests.runs import ROOT, environment

spec = importlib.util.spec_from_file_location("claim", ROOT / "benchmarks/claim.py")
claim = importlib.util.module_from_spec(spec)
spec.loader.exec_module(claim)
SHARED = ROOT.parent / "shared/data"
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
    claim.split(SHARED / "train", tmp_path)
    for stream in ("embedding", "generative"):
        for path in find_files(str(tmp_path / "train" / stream)):
            train, held_out = (
                list(open_source(tmp_path / part / stream / path.name)) for part in ("train", "held_out")
            )
            assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.09
            keys = [{claim.key(record) for record in records} for records in (train, held_out)]
            assert not keys[0] & keys[1]


@pytest.fixture
def prepared(tmp_path):
    """A folder that was prepared from `data` beside it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "output/data").mkdir(parents=True)
    (tmp_path / "output/data/done").write_text(str((tmp_path / "data").resolve()))
    return tmp_path / "output"


def test_what_was_made_from_other_data_is_refused_and_an_old_mark_is_filled_in(prepared):
    data = prepared.parent / "data"
    claim.prepare(data, prepared)
    with pytest.raises(InputError, match=r"output was made from --data .*/data, not .*/other; choose another --output"):
        claim.prepare(data.parent / "other", prepared)
    (prepared / "data/done").write_text("")
    claim.prepare(data, prepared)
    assert (prepared / "data/done").read_text() == str(data.resolve())


def test_a_run_of_other_steps_is_refused(tmp_path):
    folder = tmp_path / "0/unified"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {steps: 200}\n")
    with pytest.raises(InputError, match=r"0/unified is a run of train.steps=200, not 20; give --train.steps=200, or"):
        claim.measure(claim.CONFIGS / "unified.yaml", tmp_path, "unified", 0, {"train.steps": 20}, Suite((), 8, 0))


def test_unknown_ablations_are_refused_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["claim.py", "--output", str(tmp_path), "--ablations", "baseline", "no_pack"])
    with pytest.raises(SystemExit, match="2"):
        claim.main()
    assert "--ablations: no no_pack; there are baseline, causal, last_token" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def measured(tmp_path):
    """Two seeds of reports and examples; of ablations, one that is whole and one that is not."""
    rng = np.random.default_rng(0)
    metrics = {claim.HELD_OUT: "loss_per_token", **dict.fromkeys(claim.PRIMARY, "ndcg_at_10"), "mmlu": "accuracy"}
    for seed in (0, 1):
        for name in ("untrained", *claim.MODELS, "ablation_no_packing", "ablation_causal"):
            folder = tmp_path / str(seed) / name
            (folder / "examples").mkdir(parents=True)
            tasks = {}
            for task, metric in metrics.items():
                shape = (50, 2) if task == claim.HELD_OUT else 50
                values = rng.uniform(0.3, 0.5, shape)
                np.save(folder / f"examples/{task}.npy", values)
                tasks[task] = {"metric": metric, "main_score": float(values.mean()), "interval": [0.3, 0.5]}
            if name == "ablation_causal":
                del tasks[claim.HELD_OUT]
            tasks["mmlu"]["chance"] = 0.6
            (folder / "report.json").write_text(json.dumps({"tasks": tasks}))
            if name != "untrained" or seed:
                (folder / "seconds.txt").write_text("10.0\n")
            (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "step_seconds": 2.0}\n')
            (folder / "config.yaml").write_text("train: {steps: 200}\n")
    return tmp_path


def test_every_ablation_that_is_whole_is_summed_up_and_seconds_where_all_are_known(measured):
    summary = claim.summarize(measured, [0, 1], Suite((), 8, 0))
    assert list(summary["ablations"]) == ["no_packing"] and "packing" not in summary
    assert "no_packing" in claim.tables(summary)["ablations"]
    assert summary["wall_seconds"] == {"1": 40.0}
    baseline = measured / "0/ablation_baseline"
    baseline.mkdir()
    (baseline / "report.json").write_text((measured / "0/unified/report.json").read_text())
    summary = claim.summarize(measured, [0, 1], Suite((), 8, 0))
    one, other = (summary["ablations"][name]["loss per token"] for name in ("baseline", "no_packing"))
    assert summary["packing"]["loss per token"] == pytest.approx(one / other - 1)
    assert f"{one / other - 1:+.1e}" in claim.tables(summary)["packing"]


def test_tables_of_several_seeds_say_what_their_brackets_are_and_have_both_intervals(measured):
    several = claim.summarize(measured, [0, 1], Suite((), 8, 0))
    found = claim.tables(several)
    assert found["tasks"].startswith("| task: mean (lowest to highest of 2 seeds) |")
    assert "of the seeds by t" in found["claim"]
    assert all(len(one["by_run"]) == 2 and one["run_interval"] for one in several["claim"].values())
    alone = claim.tables(claim.summarize(measured, [0], Suite((), 8, 0)))
    assert alone["tasks"].startswith("| task | metric | BM25 |") and "by t" not in alone["claim"]


@pytest.mark.parametrize(
    ("chance", "mark"), [(0.2, ""), (0.3, " at chance"), (0.4, " at chance"), (0.6, " below chance")]
)
def test_what_an_interval_says_of_chance_stands_behind_a_score(chance, mark):
    seeds = {str(seed): {"t": {"main_score": 0.4, "interval": bounds, "chance": chance}}
             for seed, bounds in enumerate(([0.25, 0.45], [0.35, 0.55]))}  # fmt: skip
    assert claim._cell(seeds, "t") == f"0.400 (0.400 to 0.400){mark}"


@pytest.mark.long
@needs_shared
def test_the_whole_comparison_at_toy_size_goes_on_where_it_was_and_its_tables_are_its_figures(tmp_path):
    command = [
        sys.executable, ROOT / "benchmarks/claim.py", "--output", tmp_path / "claim", "--docs", tmp_path / "docs",
        "--ablations", "baseline", "no_packing", "--model.architecture.embed_dim=32", "--train.steps=2",
        "--model.architecture.mlp_dim=48", "--model.architecture.num_layers=1", "--data.embedding_batch=8",
        "--data.generative_batch=4",
    ]  # fmt: skip
    for _ in range(2):
        variables = environment(optimized=True)
        done = subprocess.run(list(map(str, command)), env=variables, capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "kept, ndcg_at_10" in done.stderr and "step 1/" not in done.stderr + done.stdout
    summary = json.loads((tmp_path / "docs/claim.json").read_text())
    assert (tmp_path / "docs/claim.png").stat().st_size > 10_000
    assert all(abs(difference) < 1e-3 for difference in summary["packing"].values())
    for table in claim.tables(summary).values():
        assert table in done.stdout
    ours = summary["claim"]["mean nDCG@10"]
    scores = [summary["models"]["unified"]["0"][task]["main_score"] for task in claim.PRIMARY]
    assert np.isclose(ours["value"], np.mean(scores))


def test_the_page_has_the_tables_that_the_script_wrote():
    page = (ROOT / "docs/claim.md").read_text()
    summary = json.loads((ROOT / "docs/claim/claim.json").read_text())
    for table in claim.tables(summary).values():
        assert table in page
