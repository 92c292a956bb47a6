"""The same figures from the field's own harnesses: mteb, lm-eval and sentence-transformers' evaluators."""

import numpy as np
import pytest

from grit_jax.evaluation.retrieval import read_collection
from grit_jax.evaluation.suite import load_suite
from grit_jax.evaluation.task import Session
from grit_jax.hf.export import save_folder
from grit_jax.loading import open_model
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


def run_mteb(mteb, model, name, dataset):
    """The scores of one of mteb's tasks on other data."""
    from grit_jax.evaluation.mteb_encoder import MtebEncoder

    task = mteb.get_task(name)
    task.dataset, task.data_loaded = dataset, True
    encoder = MtebEncoder(model, instructions={name: FIND})
    (result,) = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False, co2_tracker=False).task_results
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
    scores = run_mteb(mteb, model, "SciFact", {"default": {"test": split}})
    assert scores["ndcg_at_10"] == pytest.approx(score(found), abs=1e-5)
    assert scores["recall_at_10"] == pytest.approx(found.figures["recall_at_10"], abs=1e-5)


def test_mteb_scores_a_similarity_task_as_we_do(mteb, model, folder):
    datasets = pytest.importorskip("datasets")
    found = ours(model, folder, {"name": "t", "type": "sts", "path": "sts.tsv", "instruction": FIND})
    lines = [line.split("\t") for line in (folder / "sts.tsv").read_text().splitlines()[1:]]
    rows = [{"score": float(one), "sentence1": left, "sentence2": right} for one, left, right in lines]
    scores = run_mteb(mteb, model, "STSBenchmark", {"test": datasets.Dataset.from_list(rows)})
    assert scores["cosine_spearman"] == pytest.approx(score(found), abs=1e-6)


def test_mteb_finds_a_registered_model_and_each_of_its_tasks_has_an_instruction(mteb, checkpoint):
    from mteb.types import PromptType

    from grit_jax.evaluation import mteb_encoder
    from grit_jax.evaluation.suite import packaged_instructions

    encoder = mteb.get_model(mteb_encoder.register(checkpoint, name="grit_jax/test"))
    assert encoder.mteb_model_meta.name == "grit_jax/test"
    for name, instruction in packaged_instructions().items():
        assert encoder.get_instruction(mteb.get_task(name).metadata, PromptType.query) == instruction


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval")


def run_lm_eval(lm_eval, model, folder, task, **options):
    """The scores of a task of its own format on local rows."""
    import yaml
    from lm_eval.tasks import TaskManager

    from grit_jax.evaluation.lm_eval_model import LMEvalModel

    given = {"task": "local", "dataset_path": "json", "test_split": "test", **task}
    (folder / "local.yaml").write_text(yaml.safe_dump(given))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    result = lm_eval.simple_evaluate(
        LMEvalModel(model), tasks=["local"], task_manager=manager, bootstrap_iters=0, **options
    )
    return result["results"]["local"], result["samples"]["local"]


def test_lm_eval_chooses_as_we_do(lm_eval, model, tmp_path):
    rows = [
        {"question": f"What is {word}?", "choices": ["color", "number", "animal"], "answer": "ABC"[n % 3]}
        for n, word in enumerate(WORDS)
    ]
    write_jsonl(tmp_path / "choices.jsonl", rows)
    found = ours(model, tmp_path, {"name": "t", "type": "multiple_choice", "path": "choices.jsonl"})
    scores, _ = run_lm_eval(
        lm_eval, model, tmp_path,
        {
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "choices.jsonl")}},
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nAnswer:",
            "doc_to_choice": ["A", "B", "C"], "doc_to_target": "answer", "gen_prefix": "The answer is",
            "metric_list": [{"metric": "acc"}],
        },
        apply_chat_template=True,
    )  # fmt: skip
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


def test_a_text_longer_than_the_model_is_scored_in_windows(lm_eval, model):
    from lm_eval.api.instance import Instance

    from grit_jax.evaluation.lm_eval_model import LMEvalModel

    short, longer = "a few words", "word " * 500
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (short, longer)]
    values = LMEvalModel(model).loglikelihood_rolling(requests)
    assert values[0] == pytest.approx(model.log_likelihoods([""], [short], raw=True).values[0], rel=1e-5)
    limit = model.architecture.max_length - 1
    first = model.log_likelihoods([""], [longer[:limit]], raw=True).values[0]
    assert values[1] < first < 0 and np.isclose(values[1] / len(longer), first / limit, rtol=0.1)


def test_the_export_gives_sentence_transformers_evaluators_our_figures(checkpoint, folder, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import evaluation

    from grit_jax.inference import GritModel

    model = GritModel.load(checkpoint)
    save_folder(tmp_path / "hf", open_model(checkpoint), weights(model.architecture))
    exported = sentence_transformers.SentenceTransformer(str(tmp_path / "hf"), device="cpu")
    found = ours(model, folder, {"name": "t", "type": "retrieval", "path": "retrieval", "instruction": FIND})
    collection = read_collection(folder / "retrieval", "test")
    relevant = {query: set(judged) for query, judged in collection.judgements.items()}
    prompts = {"query_prompt": f"<|user|>\n{FIND}\n<|embed|>\n", "corpus_prompt": "<|embed|>\n"}
    scores = evaluation.InformationRetrievalEvaluator(collection.queries, collection.documents, relevant, **prompts)(
        exported
    )
    assert scores["cosine_recall@10"] == pytest.approx(found.figures["recall_at_10"], abs=1e-6)
    assert scores["cosine_mrr@10"] == pytest.approx(found.figures["mrr_at_10"], abs=1e-6)
    similar = ours(model, folder, {"name": "t", "type": "sts", "path": "sts.tsv"})
    rows = [line.split("\t") for line in (folder / "sts.tsv").read_text().splitlines()[1:]]
    given, left, right = zip(*rows, strict=True)
    scores = evaluation.EmbeddingSimilarityEvaluator(left, right, [float(one) for one in given])(exported)
    assert scores["spearman_cosine"] == pytest.approx(score(similar), abs=1e-6)
