"""The same figures from the field's own harnesses: mteb, lm-eval and sentence-transformers' evaluators."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml

from grit_jax.checkpoints.opening import open_model
from grit_jax.errors import InputError
from grit_jax.evaluation.retrieval import read_collection
from grit_jax.evaluation.suite import load_suite
from grit_jax.evaluation.task import Session
from grit_jax.hf.model_folder import save_folder
from tests.commands import environment
from tests.evaluation.conftest import save_checkpoint
from tests.evaluation.tasks import WORDS, write_all, write_jsonl, write_suite
from tests.models import weights

# The harnesses and what they import warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")

FIND = "find"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harnesses")
    write_all(folder)
    return folder


def ours(model, folder, task):
    """The outcome of one task."""
    suite = load_suite(write_suite(folder, [task]))
    return suite.tasks[0].evaluate(Session(model, suite.max_length, suite.seed))


def score(outcome):
    return outcome.score(outcome.examples)


@pytest.fixture(scope="module")
def mteb():
    return pytest.importorskip("mteb")


def on_data(mteb, name, dataset):
    """One of mteb's tasks on other data."""
    task = mteb.get_task(name)
    task.dataset, task.data_loaded = dataset, True
    return task


def run_mteb(mteb, model, task, *, cache=None):
    """The scores of a task; the model is one of mteb's, or ours."""
    from grit_jax.evaluation.mteb_encoder import MtebEncoder
    from grit_jax.inference.model import GritModel

    if isinstance(model, GritModel):
        model = MtebEncoder(model, instructions={task.metadata.name: FIND})
    (result,) = mteb.evaluate(model, task, cache=cache, show_progress_bar=False, co2_tracker=False).task_results
    return result.scores["test"][0]


def test_mteb_scores_a_retrieval_task_as_we_do(mteb, model, folder):
    datasets = pytest.importorskip("datasets")
    found = ours(model, folder, {"name": "t", "type": "retrieval", "path": "retrieval", "instruction": FIND})
    collection = read_collection(folder / "retrieval", "test")
    rows = [{"id": name, "title": "", "text": text} for name, text in collection.documents.items()]
    split = {
        "corpus": datasets.Dataset.from_list(rows),
        "queries": datasets.Dataset.from_list([{"id": n, "text": text} for n, text in collection.queries.items()]),
        "relevant_docs": {
            query: {name: int(value) for name, value in judged.items()}
            for query, judged in collection.judgements.items()
        },
        "top_ranked": None,
    }
    scores = run_mteb(mteb, model, on_data(mteb, "SciFact", {"default": {"test": split}}))
    assert scores["ndcg_at_10"] == pytest.approx(score(found), abs=1e-5)
    assert scores["recall_at_10"] == pytest.approx(found.scores["recall_at_10"], abs=1e-5)


def similarity(mteb, folder):
    """STSBenchmark on the rows of a file."""
    datasets = pytest.importorskip("datasets")
    lines = [line.split("\t") for line in (folder / "sts.tsv").read_text().splitlines()[1:]]
    rows = [{"score": float(one), "sentence1": left, "sentence2": right} for one, left, right in lines]
    return on_data(mteb, "STSBenchmark", {"test": datasets.Dataset.from_list(rows)})


def test_mteb_scores_a_similarity_task_as_we_do(mteb, model, folder):
    found = ours(model, folder, {"name": "t", "type": "sts", "path": "sts.tsv", "instruction": FIND})
    scores = run_mteb(mteb, model, similarity(mteb, folder))
    assert scores["cosine_spearman"] == pytest.approx(score(found), abs=1e-6)


def test_mteb_finds_a_registered_model_and_each_of_its_tasks_and_their_parts_has_an_instruction(mteb, checkpoint):
    from mteb.types import PromptType

    from grit_jax.evaluation import mteb_encoder
    from grit_jax.evaluation.suite import packaged_instructions

    encoder = mteb.get_model(mteb_encoder.register(checkpoint, name="grit_jax/test"))
    assert encoder.mteb_model_meta.name == "grit_jax/test"
    told, parts = packaged_instructions(), set()
    for task in mteb.get_benchmark("MTEB(eng, v1)").tasks:
        for part in getattr(task, "tasks", [task]):
            assert encoder.get_instruction(part.metadata, PromptType.query) == told[task.metadata.name]
            parts |= {task.metadata.name, part.metadata.name}
    assert parts == set(told)


def test_mteb_keeps_the_scores_of_each_checkpoint_and_each_setting_apart(mteb, checkpoint, folder, tmp_path):
    from grit_jax.evaluation import mteb_encoder

    other = save_checkpoint(tmp_path / "other", seed=1)
    cache = mteb.ResultCache(tmp_path / "cache")
    given = {"first": (checkpoint, {}), "second": (other, {}), "short": (checkpoint, {"max_length": 100}),
             "told": (checkpoint, {"instructions": {"STSBenchmark": FIND}})}  # fmt: skip
    found, metas = {}, {}
    for case, (path, options) in given.items():
        name = mteb_encoder.register(path, name="grit_jax/same", **options)
        for asked in (mteb.get_model_meta(name), mteb.get_model(name)):
            scores = run_mteb(mteb, asked, similarity(mteb, folder), cache=cache)
            value = round(scores["cosine_spearman"], 5)  # as mteb keeps it, nearly
            assert found.setdefault(case, value) == value
        metas[case] = mteb.get_model(name).mteb_model_meta
    assert len(set(found.values())) == len(given)
    assert metas["first"].revision == metas["short"].revision != metas["second"].revision


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval")


def write_task(folder, task):
    """A task of lm-eval's own format, `local`, on local rows."""
    given = {"task": "local", "dataset_path": "json", "test_split": "test", **task}
    (folder / "local.yaml").write_text(yaml.safe_dump(given))


def run_lm_eval(lm_eval, model, folder, task, **options):
    """Its scores and samples."""
    from lm_eval.tasks import TaskManager

    from grit_jax.evaluation.lm_eval_model import LMEvalModel

    write_task(folder, task)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    result = lm_eval.simple_evaluate(
        LMEvalModel(model), tasks=["local"], task_manager=manager, bootstrap_iters=0, **options
    )
    return result["results"]["local"], result["samples"]["local"]


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    """Rows of multiple choice, and lm-eval's task of them."""
    folder = tmp_path_factory.mktemp("choices")
    rows = [
        {"question": f"What is {word}?", "choices": ["color", "number", "animal"], "answer": "ABC"[n % 3]}
        for n, word in enumerate(WORDS)
    ]
    write_jsonl(folder / "choices.jsonl", rows)
    return folder, {
        "dataset_kwargs": {"data_files": {"test": str(folder / "choices.jsonl")}},
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C"], "doc_to_target": "answer", "gen_prefix": "The answer is",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip


def test_lm_eval_chooses_as_we_do(lm_eval, model, choices):
    folder, task = choices
    found = ours(model, folder, {"name": "t", "type": "multiple_choice", "path": "choices.jsonl"})
    scores, _ = run_lm_eval(lm_eval, model, folder, task, apply_chat_template=True)
    assert scores["acc,none"] == pytest.approx(score(found))


@pytest.mark.long
def test_lm_eval_s_command_knows_the_model_by_name(lm_eval, checkpoint, choices):
    from grit_jax.inference.model import GritModel

    folder, task = choices
    found = ours(GritModel.load(checkpoint), folder, {"name": "t", "type": "multiple_choice", "path": "choices.jsonl"})
    write_task(folder, task)
    command = [
        sys.executable, "-m", "grit_jax.evaluation.lm_eval_model", "--model", "grit_jax",
        "--model_args", f"pretrained={checkpoint}", "--include_path", folder, "--tasks", "local",
        "--apply_chat_template", "--output_path", folder / "scores.json",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = folder.rglob("scores*.json")
    scores = json.loads(path.read_text())["results"]["local"]
    assert scores["acc,none"] == pytest.approx(score(found))


def test_lm_eval_gets_our_answers_and_contexts_that_are_too_long_lose_their_beginning(lm_eval, model, tmp_path):
    questions = ["say red", "count: one two", "x" * 3000 + " say dog"]
    write_jsonl(tmp_path / "rows.jsonl", [{"question": text, "answer": "a"} for text in questions])
    _, samples = run_lm_eval(
        lm_eval, model, tmp_path,
        {
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
    )  # fmt: skip
    written = {sample["doc"]["question"]: sample["resps"][0][0] for sample in samples}
    longest = model.architecture.max_length - 12 - 1  # after BOS, of a tokenizer of bytes
    expected = model.generate([text[-longest:] for text in questions], raw=True, max_new_tokens=12, stop=["\n"])
    assert [written[text] for text in questions] == expected


def asked(kind, *arguments):
    """What the harness asks a model."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, 0) for given in arguments]


def test_answers_that_are_drawn_several_times_differ_and_come_again(lm_eval, model, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"question": text, "answer": "a"} for text in ("say red", "how many words")])

    def drawn(temperature):
        _, samples = run_lm_eval(
            lm_eval, model, tmp_path,
            {
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "repeats": 2,
                "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "answer",
                "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "temperature": temperature,
                                      "do_sample": temperature > 0},
                "metric_list": [{"metric": "exact_match"}],
            },
        )  # fmt: skip
        return [sample["resps"][0] for sample in samples]

    for one, other in drawn(0.0):
        assert one == other
    several = drawn(1.0)
    for one, other in several:
        assert one != other
    assert drawn(1.0) == several


def test_answers_as_long_as_the_model_are_refused_before_any_is_written(lm_eval, model):
    from grit_jax.evaluation.lm_eval_model import LMEvalModel

    requests = asked("generate_until", ("a", {"max_gen_toks": 4}), ("b", {"max_gen_toks": 1024}))
    with pytest.raises(InputError, match=r"max_gen_toks=1024 leaves no room for a context in the model's 1024 tokens"):
        LMEvalModel(model).generate_until(requests)


def test_a_context_of_characters_of_several_tokens_is_cut_until_it_fits(lm_eval, model):
    from grit_jax.evaluation.lm_eval_model import LMEvalModel

    (found,) = LMEvalModel(model).generate_until(
        asked("generate_until", ("\N{GRINNING FACE}" * 400, {"max_gen_toks": 8}))
    )
    kept = "\N{GRINNING FACE}" * ((model.architecture.max_length - 8 - 1) // 4)
    assert found == model.generate(kept, raw=True, max_new_tokens=8)


def test_white_space_between_context_and_continuation_is_scored_unless_an_answer_begins_there(lm_eval, model):
    from grit_jax.evaluation.lm_eval_model import LMEvalModel

    answered = LMEvalModel(model).apply_chat_template([{"role": "user", "content": "say"}])
    assert answered.endswith("\n")
    values = LMEvalModel(model).loglikelihood(asked("loglikelihood", ("say ", "red"), (answered, "red")))
    expected = model.log_likelihoods(["say", answered], [" red", "red"], raw=True).values
    assert np.allclose([value for value, _ in values], expected, rtol=1e-5)


def test_of_a_continuation_longer_than_the_model_the_last_tokens_are_scored(lm_eval, model):
    from grit_jax.evaluation.lm_eval_model import LMEvalModel

    text = "".join(WORDS) * 30
    longer = text, "\N{GRINNING FACE}" * 400
    (value, _), (other, _) = LMEvalModel(model).loglikelihood(asked("loglikelihood", *(("say", one) for one in longer)))
    assert other < 0
    most = model.architecture.max_length - 2  # after BOS and one token
    expected = model.log_likelihoods([text[-most - 1 : -most]], [text[-most:]], raw=True).values[0]
    assert value == pytest.approx(expected, rel=1e-5)


def test_a_text_longer_than_the_model_is_scored_in_windows(lm_eval, model):
    from grit_jax.evaluation.lm_eval_model import LMEvalModel

    short, longer = "a few words", "word " * 500
    values = LMEvalModel(model).loglikelihood_rolling(asked("loglikelihood_rolling", (short,), (longer,)))
    assert values[0] == pytest.approx(model.log_likelihoods([""], [short], raw=True).values[0], rel=1e-5)
    limit = model.architecture.max_length - 1
    first = model.log_likelihoods([""], [longer[:limit]], raw=True).values[0]
    assert values[1] < first < 0 and np.isclose(values[1] / len(longer), first / limit, rtol=0.1)


def test_the_export_gives_sentence_transformers_evaluators_our_figures(checkpoint, folder, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import evaluation

    from grit_jax.inference.model import GritModel

    model = GritModel.load(checkpoint)
    save_folder(tmp_path / "hf", open_model(checkpoint), weights(model.architecture))
    exported = sentence_transformers.SentenceTransformer(str(tmp_path / "hf"), device="cpu")
    # Its evaluator knows no degrees of relevance.
    shutil.copytree(folder / "retrieval", tmp_path / "retrieval")
    qrels = tmp_path / "retrieval/qrels/test.tsv"
    qrels.write_text(qrels.read_text().replace("\t2\n", "\t1\n"))
    found = ours(model, tmp_path, {"name": "t", "type": "retrieval", "path": "retrieval", "instruction": FIND})
    collection = read_collection(tmp_path / "retrieval", "test")
    relevant = {query: set(judged) for query, judged in collection.judgements.items()}
    prompts = {"query_prompt": f"<|user|>\n{FIND}\n<|embed|>\n", "corpus_prompt": "<|embed|>\n"}
    scores = evaluation.InformationRetrievalEvaluator(collection.queries, collection.documents, relevant, **prompts)(
        exported
    )
    assert scores["cosine_ndcg@10"] == pytest.approx(score(found), abs=1e-6)
    assert scores["cosine_recall@10"] == pytest.approx(found.scores["recall_at_10"], abs=1e-6)
    assert scores["cosine_mrr@10"] == pytest.approx(found.scores["mrr_at_10"], abs=1e-6)
    similar = ours(model, folder, {"name": "t", "type": "sts", "path": "sts.tsv"})
    rows = [line.split("\t") for line in (folder / "sts.tsv").read_text().splitlines()[1:]]
    given, left, right = zip(*rows, strict=True)
    scores = evaluation.EmbeddingSimilarityEvaluator(left, right, [float(one) for one in given])(exported)
    assert scores["spearman_cosine"] == pytest.approx(score(similar), abs=1e-6)
