"""A suite with a task of every type, on data of a few words."""

import gzip
import json

import yaml

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "dog", "cat", "bird", "fish", "tree"]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_suite(folder, tasks, **settings):
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"tasks": tasks, **settings}))
    return path


def write_retrieval(folder):
    """Twelve documents, ten judged queries, graded, some with several documents."""
    documents = [{"_id": f"d{n}", "title": word.upper(), "text": f"{word} is a word"} for n, word in enumerate(WORDS)]
    queries = [{"_id": f"q{n}", "text": f"what is {word}"} for n, word in enumerate(WORDS)]
    write_jsonl(folder / "corpus.jsonl.gz", documents)
    write_jsonl(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir(exist_ok=True)
    judged = [(n, n, 2) for n in range(10)] + [(n, (n + 3) % 12, 1) for n in range(0, 10, 2)]
    lines = ["query-id\tcorpus-id\tscore", *(f"q{query}\td{document}\t{score}" for query, document, score in judged)]
    (folder / "qrels/test.tsv").write_text("\n".join(lines) + "\n")


def write_sts(path):
    lines = ["score\tsentence1\tsentence2"]
    lines += [f"{n % 6}\tthe {word}\ta {WORDS[n * 5 % 12]} {n}" for n, word in enumerate(WORDS)]
    path.write_text("\n".join(lines) + "\n")


def write_classification(folder):
    for split, copies in (("train", 12), ("test", 5)):
        rows = [
            {
                "text": f"{word} {split} {'!' * n}",
                "label": "color" if place < 3 else "number" if place < 7 else "animal",
            }
            for place, word in enumerate(WORDS)
            for n in range(copies)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)


def write_all(folder):
    """Data of every type, and the suite."""
    write_retrieval(folder / "retrieval")
    write_sts(folder / "sts.tsv")
    write_classification(folder / "classification")
    pairs = [{"sentence1": word, "sentence2": WORDS[n // 2], "label": n % 2} for n, word in enumerate(WORDS)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    summaries = [
        {
            "machine_summaries": WORDS[n : n + 4],
            "human_summaries": [f"a {w}" for w in WORDS[:3]],
            "relevance": [1, 4, 2, 3],
        }
        for n in range(4)
    ]
    write_jsonl(folder / "summaries.jsonl", summaries)
    candidates = [{"query": f"what is {w}", "positive": [f"a {w}"], "negative": WORDS[:3]} for w in WORDS[3:8]]
    write_jsonl(folder / "candidates.jsonl", candidates)
    kinds = ["color", "number", "animal", "plant"]
    choices = [{"question": f"What is {w}?", "choices": kinds, "answer": "ABBC"[n % 4], "subject": "ab"[n % 2]}
               for n, w in enumerate(WORDS)]  # fmt: skip
    write_jsonl(folder / "choices.jsonl.gz", choices)
    sums = [{"question": f"{n} + {n}?", "answer": str(2 * n), "solution": f"So it is {2 * n}."} for n in range(6)]
    write_jsonl(folder / "sums.jsonl", sums)
    write_jsonl(folder / "corpus.jsonl", [{"_id": "p", "text": "A dog is an animal."}])
    write_jsonl(
        folder / "spans.jsonl", [{"doc": "p", "question": "What is a dog?", "answers": ["an animal", "animal"]}]
    )
    problem = {"task_id": "0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1"}
    write_jsonl(folder / "problems.jsonl", [problem, problem | {"task_id": "1"}])
    write_jsonl(folder / "answers.jsonl.gz", [{"text": [f"say {w}", f"{w}!"]} for w in WORDS])
    (folder / "alpaca.json").write_text(json.dumps([{"instruction": "Say hello.", "dataset": "x"}]))
    short = {"max_new_tokens": 8}
    return write_suite(
        folder,
        [
            {"name": "search", "type": "retrieval", "path": "retrieval", "instruction": "find"},
            {"name": "similar", "type": "sts", "path": "sts.tsv", "instruction": "find"},
            {"name": "classes", "type": "classification", "path": "classification", "instruction": "find"},
            {"name": "clusters", "type": "clustering", "path": "classification/test.jsonl"},
            {"name": "pairs", "type": "pair_classification", "path": "pairs.jsonl"},
            {"name": "summaries", "type": "summarization", "path": "summaries.jsonl"},
            {"name": "order", "type": "reranking", "path": "candidates.jsonl"},
            {"name": "yes or no", "type": "reranking", "path": "candidates.jsonl", "method": "pointwise",
             "candidates": 3},
            {"name": "permuted", "type": "reranking", "path": "candidates.jsonl", "method": "permutation",
             "candidates": 2},
            {"name": "choice", "type": "multiple_choice", "path": "choices.jsonl", "group": "subject", "shots": 1,
             "shots_path": "choices.jsonl", "instruction": "About {subject}."},
            {"name": "sums", "type": "exact_match", "path": "sums.jsonl", "compare": "number", "shots": 2,
             "shots_path": "sums.jsonl", "example_key": "solution", **short},
            {"name": "span", "type": "exact_match", "path": "spans.jsonl", "compare": "span",
             "passages": "corpus.jsonl", "template": "{passage}\n\n{question}", "prefix": "The answer is",
             "answer_key": "answers", **short},
            {"name": "programs", "type": "code", "path": "problems.jsonl", "samples": 2, "k": [1, 2], **short},
            {"name": "loss", "type": "perplexity", "path": "answers.jsonl"},
            {"name": "alpaca", "type": "alpaca_eval", "path": "alpaca.json", **short},
        ],
    )  # fmt: skip
