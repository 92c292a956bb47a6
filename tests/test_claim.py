"""The script that compares one model of both skills with one of each."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from grit_jax.data.sources import find_files, open_source
from grit_jax.evaluation.compare import compare
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
    packed, single = (summary["ablations"][name] for name in ("baseline", "no_packing"))
    assert all(np.isclose(packed[name], single[name], rtol=1e-3) for name in single)
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
