import dataclasses

import pytest

from grit_jax.errors import InputError
from grit_jax.evaluation.code import Code, program_test
from grit_jax.evaluation.generation import ExactMatch, contains, f1, is_right
from grit_jax.evaluation.likelihood import MultipleChoice
from grit_jax.evaluation.reading import EvaluationRecord
from tests.evaluation.fake import session
from tests.evaluation.tasks import write_jsonl


@pytest.mark.parametrize(
    ("answer", "target", "comparison", "right"),
    [
        ("So 3 + 4 = 7 and then 1,234.50 dollars.", "1234.5", "number", True),
        ("It is 12 of 20.", "12", "number", False),
        ("none", "12", "number", False),
        ("-3", "3", "number", False),
        ("We see that. So the answer is (A).\n\nQ: next", "(A)", "text", True),
        ("the answer is ] )", "] )", "text", True),
        ("The answer is yes. No, the answer is no", "no", "text", True),
        ("no", "No", "text", False),
        (" The Panthers!\nmore", "panthers", "span", True),
        ("a panther", "panthers", "span", False),
    ],
)
def test_answers_are_compared_as_their_task_says(answer, target, comparison, right):
    assert is_right(answer, [target, "something else 99"], comparison) == right


@pytest.mark.parametrize("comparison", ["number", "text", "span"])
def test_nothing_is_never_right(comparison):
    assert not is_right("", [""], comparison)


def test_f1_is_the_overlap_of_words():
    assert f1("the black cat sat", ["cat", "black cat"]) == pytest.approx(2 * 2 / 5)
    assert f1("dog", ["cat"]) == 0


SUMS = [
    {"question": f"{n} + 1?", "answer": str(n + 1), "why": f"It is {n + 1}.", "kind": "ab"[n % 2]} for n in range(8)
]


def test_a_prompt_is_instruction_examples_and_question(tmp_path):
    write_jsonl(tmp_path / "sums.jsonl", SUMS)
    path = str(tmp_path / "sums.jsonl")
    task = ExactMatch("x", path, instruction="Add ({kind}).", template="Q: {question}\nA:", compare="number", shots=1,
                      shots_path=path, example_key="why", group="kind", prefix="Well:", limit=2)  # fmt: skip
    one = session(answer=lambda prompt: str(int(prompt.rpartition("Q: ")[2].partition(" ")[0]) + 1))
    found = task.evaluate(one)
    assert found.examples.tolist() == [1] * 4  # two of each group; the examples themselves are not asked
    chance = 0.5  # of two different answers in each group, always giving one is right once
    assert found.scores == {"num_too_long": 0, "mean_shots": 1, "mean_over_groups": 1, "chance": chance}
    assert all(prefix == "Well:" for _, prefix in one.model.asked)
    for prompt, _ in one.model.asked:
        kind = "ab"[int(prompt.rpartition("Q: ")[2][0]) % 2]
        example = "Q: 0 + 1?\nA:\nWell: It is 1." if kind == "a" else "Q: 1 + 1?\nA:\nWell: It is 2."
        assert prompt.startswith(f"Add ({kind}).\n\n{example}\n\nQ: ")


def test_examples_that_do_not_fit_are_left_out_and_questions_that_do_not_are_wrong(tmp_path):
    write_jsonl(tmp_path / "sums.jsonl", [*SUMS, {"question": "x" * 300, "answer": "1"}])
    write_jsonl(tmp_path / "shots.jsonl", [{"text": ["How much? " + "y" * 40, "Two."]}] * 5)
    task = ExactMatch("x", str(tmp_path / "sums.jsonl"), compare="number", shots_path=str(tmp_path / "shots.jsonl"),
                      max_new_tokens=50)  # fmt: skip
    one = session(answer=lambda _: "1", max_length=250)
    found = task.evaluate(one)
    assert found.examples.tolist() == [1] + [0] * 8
    assert found.scores["num_too_long"] == 1
    assert found.scores["mean_shots"] == pytest.approx(8 * 3 / 9)
    assert one.model.asked[0][0].count("How much?") == 3


def test_examples_come_written_out_and_passages_from_a_corpus(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"input": "1 and 1", "target": "two", "task": "adding", "doc": "d"}])
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "d", "title": "Sums", "text": "are sums."}])
    (tmp_path / "shots").mkdir()
    examples = "\ufeffa head\r\n-----\r\nAdd.\r\n\r\nQ: 0 and 0\r\nA: the answer is zero.\r\n"
    (tmp_path / "shots/adding.txt").write_bytes(examples.encode())
    (tmp_path / "shots/.adding.txt").write_bytes(b"\xff")  # hidden
    task = ExactMatch(
        "x",
        str(tmp_path / "rows.jsonl"),
        template="{passage}\nQ: {input}\nA:",
        answer_key="target",
        group="task",
        shots_path=str(tmp_path / "shots"),
        passages=str(tmp_path / "corpus.jsonl"),
    )
    one = session(answer=lambda _: "the answer is two.")
    assert task.evaluate(one).examples.tolist() == [1]
    asked = "Add.\n\nQ: 0 and 0\nA: the answer is zero.\n\nSums are sums.\nQ: 1 and 1\nA:"
    assert one.model.asked == [(asked, "")]
    assert {path.name for path in task.files()} == {"rows.jsonl", "adding.txt", "corpus.jsonl"}
    (tmp_path / "shots/adding.txt").rename(tmp_path / "shots/dividing.txt")
    with pytest.raises(InputError, match=r"shots: has no examples of task adding; add them"):
        task.evaluate(one)
    (tmp_path / "shots/dividing.txt").rename(tmp_path / "shots/adding.txt")
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "e", "text": "x"}])
    with pytest.raises(InputError, match=r"rows\.jsonl:1: 'doc' 'd' is not in .*corpus\.jsonl"):
        task.evaluate(one)
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "1", "target": "two", "task": "adding", "doc": "e"}])
    with pytest.raises(InputError, match=r"rows\.jsonl:1: 'input' is missing; there are question, target"):
        task.evaluate(one)


def test_the_likeliest_letter_is_chosen(tmp_path):
    rows = [{"question": "Which?", "choices": ["no", "yes", "no"], "answer": answer} for answer in ("B", 1, "A")]
    write_jsonl(tmp_path / "c.jsonl", rows)

    def score(context, continuation):
        assert context == "Which?\nA. no\nB. yes\nC. no\nAnswer:"
        return {" A": -2, " B": -1, " C": -3}[continuation]

    one = session(score=score)
    found = MultipleChoice("x", str(tmp_path / "c.jsonl")).evaluate(one)
    assert found.examples.tolist() == [1, 1, 0]
    assert found.scores["chance"] == pytest.approx(1 / 3)
    assert one.model.asked[0][1] == "The answer is"
    write_jsonl(tmp_path / "c.jsonl", [rows[0] | {"answer": "D"}])
    with pytest.raises(InputError, match=r"c\.jsonl:1: 'answer' is 'D'; it must be one of A, B, C, or its number"):
        MultipleChoice("x", str(tmp_path / "c.jsonl")).evaluate(one)


def test_programs_are_tested_in_both_forms(confined, tmp_path):
    problem = {
        "task_id": "0",
        "prompt": "def one():\n    '''One.'''\n",
        "declaration": "def one():\n",
        "instruction": "Write one.",
        "entry_point": "one",
        "test": "def check(f):\n    assert f() == 1",
    }
    write_jsonl(tmp_path / "p.jsonl", [problem, problem | {"test": problem["test"].replace("1", "2")}])
    for form, asked in (("complete", (problem["prompt"], "")), ("synthesize", ("Write one.", "def one():\n"))):
        one = session(answer=lambda _: "    return 1")
        task = Code("x", str(tmp_path / "p.jsonl"), form=form, samples=2, k=[1, 2])
        found = task.evaluate(one)
        assert found.examples.tolist() == [1, 0]
        assert found.scores["pass_at_2"] == 0.5
        assert one.model.asked[0] == asked
        assert [answer["status"] for answer in found.completions] == ["passed", "failed"] * 2


@pytest.mark.parametrize(
    "answer",
    [
        "    return 1\n\nThis returns one.",
        "    return 1\n```\n\nIt is used so:\n",
        "    return math.floor(statistics.mean([Counter('a')['a'], len(hashlib.sha256(b'').digest()) - 31]))",
        "\tx: List[int] = [1]\n\n\treturn x[0]",
    ],
)
def test_an_asked_program_may_end_in_prose_and_use_common_imports(confined, answer, tmp_path):
    problem = {"declaration": "def one():\n", "instruction": "Write one.", "entry_point": "one",
               "test": "def check(f):\n    assert f() == 1"}  # fmt: skip
    write_jsonl(tmp_path / "p.jsonl", [problem])
    task = Code("x", str(tmp_path / "p.jsonl"), form="synthesize", samples=1)
    assert task.evaluate(session(answer=lambda _: answer)).examples.tolist() == [1]


def test_a_completed_program_is_run_as_it_is(confined, tmp_path):
    problem = {"prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f() == 1"}
    write_jsonl(tmp_path / "p.jsonl", [problem])
    for answer, passes in (("    return g()\ng = lambda: 1", 1), ("    return math.floor(1.5)", 0)):
        task = Code("x", str(tmp_path / "p.jsonl"), samples=1)
        assert task.evaluate(session(answer=lambda _, answer=answer: answer)).examples.tolist() == [passes]


def test_a_test_is_called_once():
    row = EvaluationRecord(
        "x:1", {"prompt": "def g():\n", "test": "def check(f): pass\n\ncheck(g)", "entry_point": "g"}
    )
    assert program_test(row, "prompt").code.count("check(") == 2
    row.values["test"] = "def check(f): pass"
    assert program_test(row, "prompt").code.endswith("\ncheck(g)\n")


def test_a_prompt_that_begins_no_function_is_refused():
    row = EvaluationRecord("x:1", {"prompt": "Write one.", "test": "", "entry_point": "g"})
    with pytest.raises(InputError, match=r"x:1: 'prompt' does not begin a function .*; it must end where"):
        program_test(row, "prompt")


def test_shared_sets_are_read_as_the_shipped_suites_name_them(shared):
    from grit_jax.evaluation.retrieval import read_collection
    from grit_jax.evaluation.suite import load_suite
    from tests.commands import ROOT

    data = shared / "data/eval"
    for suite in ("embedding", "generative"):
        for task in load_suite(ROOT / f"configs/suites/{suite}.yaml", data=data).tasks:
            for path in task.files():
                assert path.exists() or path.with_name(f"{path.name}.gz").exists(), path
    collection = read_collection(data / "retrieval/scifact", "test")
    assert (len(collection.queries), len(collection.documents)) == (300, 5183)
    one = session(answer=lambda _: "1", score=lambda *_: 0.0, max_length=10**6)
    tasks = {task.name: task for task in load_suite(ROOT / "configs/suites/generative.yaml", data=data).tasks}
    assert len(tasks["bbh"].selected(one)) == 27 * 40
    for name in ("gsm8k", "bbh", "xquad_en", "mmlu"):
        rows = tasks[name].selected(one)[:50]
        prompts = tasks[name].prompts(rows, one, room=10)
        assert set(prompts.shots) <= {"gsm8k": {8}, "bbh": {3, 4, 5}, "xquad_en": {1}, "mmlu": {0}}[name]
    few = dataclasses.replace(tasks["mmlu"], limit=1)
    first = [row.get("answer") == "A" for row in few.selected(one)]  # of equal letters the first is taken
    assert len(first) == 57
    assert few.evaluate(one).examples.tolist() == first


@pytest.mark.parametrize(
    ("answer", "targets", "right"),
    [
        ("It was the Kawann Short.", ["Jared Allen", "kawann short"], True),
        ("one line\nand 308, another", ["308"], True),
        ("3081", ["308"], False),
        ("", ["308"], False),
        ("", ["the"], False),
        ("four of\nthem", ["of them"], True),
    ],
)
def test_an_answer_that_contains_a_target_word_by_word_matches(answer, targets, right):
    assert contains(answer, targets) == right
