"""What a store holds, how it grows, and what is refused."""

import gzip
import json
import shutil

import numpy as np
import pytest
import zstandard

from grit_jax.cli.main import main
from grit_jax.errors import InputError
from grit_jax.retrieval.documents import find_corpus
from grit_jax.retrieval.manifest import read_manifest
from grit_jax.retrieval.quantization import DTYPES, pack, unpack
from grit_jax.retrieval.retriever import Retriever
from grit_jax.retrieval.store import Store
from grit_jax.retrieval.store_files import data_file
from grit_jax.runs.lock import writer_lock
from tests.models import make
from tests.retrieval.stores import content, document, index, save_model, write_corpus

KEPT = [number for number in range(25) if number % 9 != 8 and number not in (5, 23)]


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """A store of every type, each of the same corpus; made once and not written to."""
    folder = tmp_path_factory.mktemp("stores")
    corpus = write_corpus(folder / "corpus.jsonl")
    for dtype in DTYPES:
        index(folder / dtype, model, corpus, dtype=dtype)
    return folder


@pytest.fixture
def grows(made, tmp_path):
    """A copy to write to."""
    return shutil.copytree(made / "float32", tmp_path / "store")


def test_a_row_is_a_text_in_its_order_with_its_vector(made, model):
    store = Store(made / "float32")
    documents = list(store.documents())
    assert [found.id for found in documents] == [f"d{number}" for number in KEPT]
    assert [store.document(row) for row in range(len(store))] == documents
    texts = [f"{found.title} {found.text}".strip() for found in documents]
    assert np.allclose(store.vectors[:], model.encode(texts), atol=1e-5)
    assert np.array_equal(store.vectors[5:11], store.vectors[:][5:11])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_found_is_what_numpy_finds_among_the_stored_values(made, model, dtype):
    store = Store(made / dtype)
    kept = unpack(store.vectors[:], store.scales[:] if store.scales else None)
    queries = ["Title 3 one", "green blue", "cloud"]
    scores = model.encode(queries, instruction="find") @ kept.T
    found = Retriever(model, store).find(queries, instruction="find", k=6)
    for hits, row in zip(found, scores):
        assert [hit.row for hit in hits] == np.argsort(-row, kind="stable")[:6].tolist()
        assert np.allclose([hit.score for hit in hits], np.sort(row)[::-1][:6], atol=1e-6)
        assert [hit.document for hit in hits] == [store.document(hit.row) for hit in hits]
    assert len(Retriever(model, store).find(["x"], k=500)[0]) == len(store)


def test_values_are_off_by_no_more_than_their_type_says(made):
    exact = Store(made / "float32").vectors[:]
    assert np.array_equal(exact.astype("bfloat16"), Store(made / "bfloat16").vectors[:])
    store = Store(made / "int8")
    largest = np.abs(exact).max(axis=1, keepdims=True)
    assert np.all(np.abs(unpack(store.vectors[:], store.scales[:]) - exact) <= largest / 254 * (1 + 1e-5))
    zeros = pack(np.zeros((2, 4), np.float32), "int8")
    assert np.array_equal(unpack(**zeros), np.zeros((2, 4)))


def test_a_text_is_embedded_once_and_its_other_ids_are_kept(made, model):
    (part,) = read_manifest(made / "float32").parts
    assert (part.documents, part.empty, part.repeated) == (25, 2, 2)
    store = Store(made / "float32")
    assert store.duplicates == {KEPT.index(2): ["d5"], KEPT.index(20): ["d23"]}
    query = "Title 2 " + document(2)["text"]
    assert Retriever(model, store).find([query], k=1)[0][0].duplicates == ["d5"]


def test_a_document_without_an_id_has_one_that_its_text_decides(model, tmp_path):
    rows = [{"text": "a b"}, {"title": "a", "text": "b"}, {"_id": "x", "title": None, "text": "a b "}, {"text": "c"}]
    for name, some in (("one", rows), ("two", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(map(json.dumps, some)))
        index(tmp_path / name, model, tmp_path / f"{name}.jsonl")
    one, two = (Store(tmp_path / name) for name in ("one", "two"))
    ids = [found.id for found in one.documents()]
    assert [len(name) for name in ids] == [32, 32]
    assert one.duplicates == {0: ["x"]}
    assert [found.id for found in two.documents()] == [ids[1], "x"]


def test_growing_adds_what_is_new_and_leaves_what_is_there(grows, made, model, tmp_path):
    before = content(grows)
    index(grows, model, made / "corpus.jsonl")
    assert content(grows) == before
    more = write_corpus(tmp_path / "more.jsonl", range(10, 40))
    manifest = index(grows, model, made / "corpus.jsonl", more)
    after = content(grows)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: before[name] for name in before if name != "manifest.json"
    }
    new = [number for number in range(25, 40) if number not in (26, 35)]  # the text of 29's is its title
    assert [found.id for found in Store(grows).documents()] == [f"d{number}" for number in KEPT + new]
    assert (manifest.parts[1].documents, len(manifest.parts)) == (30, 2)
    assert Store(grows).duplicates[KEPT.index(20)] == ["d23"]
    index(grows, model, shutil.copy(more, tmp_path / "moved.jsonl"))
    assert content(grows) == after


def test_packed_files_and_folders_hold_what_plain_ones_hold(made, model, tmp_path):
    plain = (made / "corpus.jsonl").read_bytes()
    (tmp_path / "beir").mkdir()
    (tmp_path / "beir/corpus.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "beir/queries.jsonl").write_text('{"_id": "q", "text": "a query"}\n')
    (tmp_path / "other").mkdir()
    (tmp_path / "other/part.jsonl.zst").write_bytes(zstandard.compress(plain))
    for name in ("beir", "other"):
        index(tmp_path / "stores" / name, model, tmp_path / name)
        found, expected = content(tmp_path / "stores" / name), content(made / "float32")
        assert found.pop("manifest.json") != expected.pop("manifest.json")
        assert found == expected
    (tmp_path / "x.array_record").touch()
    with pytest.raises(InputError, match=r"x.array_record: a corpus is .jsonl, .jsonl.gz or .jsonl.zst"):
        find_corpus([str(tmp_path / "x.array_record")])


def test_long_documents_are_cut_and_counted(made, model, tmp_path):
    manifest = index(tmp_path / "store", model, made / "corpus.jsonl", max_length=40, instruction="store")
    assert 0 < sum(shard.truncated for shard in manifest.shards) < 21
    texts = [found.embedded for found in Store(tmp_path / "store").documents()]
    encoded = model.encode_with_counts(texts, max_length=40, instruction="store")
    assert manifest.num_tokens == encoded.num_tokens
    assert np.allclose(Store(tmp_path / "store").vectors[:], encoded.vectors, atol=1e-5)


def test_settings_that_are_not_named_are_the_stores_and_others_are_refused(grows, made, model):
    index(grows, model, made / "corpus.jsonl", max_length=1000)  # as many as the model reads
    index(grows, model, made / "corpus.jsonl", instruction=" :\n")  # which says nothing
    before = content(grows)
    for wanted, message in (
        ({"dtype": "int8"}, "made with --dtype 'float32', not 'int8'; leave --dtype out, or name another folder"),
        ({"instruction": "x"}, "made with --instruction '', not 'x'"),
        ({"max_length": 64}, "made with --max-length 256, not 64"),
    ):
        with pytest.raises(InputError, match=message):
            index(grows, model, made / "corpus.jsonl", **wanted)
    with pytest.raises(InputError, match=r"made by tiny \(fingerprint .*, and tiny has other weights"):
        index(grows, make(seed=1), made / "corpus.jsonl")
    with pytest.raises(InputError, match=r"made by tiny \(fingerprint .*, and other has other weights"):
        Retriever(make(seed=1), Store(grows), name="other")
    assert content(grows) == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"text": "a"}', '{"txt": "b"}'], r"c.jsonl:2: 'text' is missing; there are txt; it must be a string"),
        (['{"text": ["a"]}'], r"c.jsonl:1: 'text' is \['a'\]; it must be a string"),
        (['{"_id": 3, "text": "a"}'], r"c.jsonl:1: '_id' is 3; it must be a string"),
        (["", '{"text": '], r"c.jsonl:2: not valid JSON"),
        (["[1]"], r"c.jsonl:1: found a JSON list; it must be an object"),
        (['{"_id": "a", "text": "a"}', '{"_id": "a", "text": "b"}'], r"c.jsonl:2: '_id' 'a' is another text's already"),
        (['{"_id": "d1", "text": "b"}'], r"c.jsonl:1: '_id' 'd1' is another text's already"),
        (['{"_id": "d5", "text": "b"}'], r"c.jsonl:1: '_id' 'd5' is another text's already"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_added(grows, model, tmp_path, rows, message):
    (tmp_path / "c.jsonl").write_text("\n".join(rows))
    before = content(grows)
    with pytest.raises(InputError, match=message):
        index(grows, model, tmp_path / "c.jsonl")
    assert content(grows) == before


def test_a_first_corpus_that_was_bad_binds_nothing(model, tmp_path):
    path, store = tmp_path / "c.jsonl", tmp_path / "store"
    path.write_text('{"text": " "}\n')
    with pytest.raises(InputError, match=r"c.jsonl: no document with a text"):
        index(store, model, path, dtype="int8")
    with pytest.raises(InputError, match="holds no documents; name a corpus to grit-jax index"):
        Store(store)
    with pytest.raises(InputError, match=r"instruction takes .* leaves no room"):
        index(store, model, path, instruction="long" * 100)
    path.write_text('{"text": "a"}\n')
    index(store, model, path)
    assert Store(store).settings.dtype == "float32"


def test_folders_that_are_no_stores_are_refused(grows, made, model, tmp_path):
    corpus = made / "corpus.jsonl"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/documents-00000.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match=r"holds documents-00000.jsonl and no manifest.json, so it is not a store"):
        index(tmp_path / "mine", model, corpus)
    with pytest.raises(InputError, match=r"corpus.jsonl: is a file; a store is a folder"):
        index(corpus, model, corpus)
    with pytest.raises(InputError, match="gs://b/s: a store is read in place, so it must be on a disk"):
        index("gs://b/s", model, corpus)
    with pytest.raises(InputError, match="gs://b/s: a store is read in place"):
        Store("gs://b/s")
    with pytest.raises(InputError, match=r"mine: no manifest.json, so it is not a store; make one with grit-jax index"):
        Store(tmp_path / "mine")
    with writer_lock(grows), pytest.raises(InputError, match="store is being written by process"):
        index(grows, model, corpus)


def test_damage_is_found_before_it_is_searched(grows):
    manifest = grows / "manifest.json"
    kept = manifest.read_text()
    for damaged, message in (
        (kept.replace('"format": 1', '"format": 2'), "has format 2, this version reads 1; update grit_jax"),
        (kept.replace('"rows"', '"lines"'), "manifest.json: damaged"),
        (kept[:-20], "manifest.json: damaged"),
        (kept.replace('"model": "t', '"model": "v', 1), r"manifest.json: damaged \(.*differs from its checksum"),
    ):
        manifest.write_text(damaged)
        with pytest.raises(InputError, match=message):
            Store(grows)
    without = {key: value for key, value in json.loads(kept).items() if key != "sha256"}
    for good in (json.dumps(without), kept):  # earlier versions wrote no checksum
        manifest.write_text(good)
        assert len(Store(grows))
    vectors = data_file(grows, "vectors", 2)
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"vectors-00002.safetensors: differs from its checksum"):
        Store(grows)
    vectors.unlink()
    with pytest.raises(InputError, match=r"vectors-00002.safetensors: cannot be read"):
        Store(grows)


def test_documents_that_changed_are_not_embedded(grows, model, tmp_path):
    data_file(grows, "documents", 0).write_text('{"_id": "a", "title": "", "text": "b"}\n')
    with pytest.raises(InputError, match=r"documents-00000.jsonl: differs from its checksum"):
        index(grows, model, write_corpus(tmp_path / "more.jsonl", range(30, 33)))


def test_the_commands_make_a_store_search_it_and_export_it(made, tmp_path, capsys):
    faiss = pytest.importorskip("faiss")
    model, store = str(save_model(tmp_path / "model")), str(tmp_path / "store")
    assert main(["index", model, str(made / "corpus.jsonl"), store, "--dtype", "int8", "--shard-rows", "8"]) == 0
    said = capsys.readouterr().out
    assert "21 documents in 3 shards, 32 x int8" in said
    assert "left out 2 with the text of another and 2 without text; 0 cut to" in said
    assert "embedded now: 21 documents" in said
    (tmp_path / "q.jsonl").write_text('{"_id": "q", "text": "Title 2 blue"}\n')
    queries = ["--query", "green", "--queries", str(tmp_path / "q.jsonl"), "--k", "21"]
    assert main(["search", model, store, *queries, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["query"] for row in found] == ["green", "Title 2 blue"]
    assert [hit["rank"] for hit in found[0]["documents"]] == list(range(1, 22))
    assert {"_id": "d2", "same_text": ["d5"]}.items() <= {hit["_id"]: hit for hit in found[0]["documents"]}[
        "d2"
    ].items()
    assert main(["search", model, store, *queries]) == 0
    lines = capsys.readouterr().out.splitlines()
    best = found[1]["documents"][0]
    assert lines[0] == "green" and lines[22] == "Title 2 blue"
    assert lines[23].split()[:3] == ["1", f"{best['score']:.4f}", best["_id"]]
    assert main(["index", model, str(made / "corpus.jsonl"), store]) == 0
    assert "embedded now: 0 documents, 0 tokens" in capsys.readouterr().out

    assert main(["export-faiss", store, str(tmp_path / "out.faiss")]) == 0
    ids = [json.loads(line) for line in (tmp_path / "out.faiss.ids.jsonl").read_text().splitlines()]
    exported, kept = faiss.read_index(str(tmp_path / "out.faiss")), Store(store)
    vectors = exported.reconstruct_n(0, exported.ntotal)
    assert np.array_equal(vectors, unpack(kept.vectors[:], kept.scales[:]))
    assert ids == [row.id for row in kept.documents()]


def test_faiss_finds_what_exact_search_finds(made, model, tmp_path):
    faiss = pytest.importorskip("faiss")
    from grit_jax.retrieval.faiss_export import export_faiss

    queries = ["Title 3 one", "green blue", "cloud"]
    for dtype in DTYPES:
        store = Store(made / dtype)
        export_faiss(store, tmp_path / "out.faiss")
        scores, rows = faiss.read_index(str(tmp_path / "out.faiss")).search(model.encode(queries), 8)
        hits = Retriever(model, store).find(queries, k=8)
        assert rows.tolist() == [[hit.row for hit in some] for some in hits]
        assert np.allclose(scores, [[hit.score for hit in some] for some in hits], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "m", "nowhere.jsonl", "s"], "nowhere.jsonl: no such file or folder"),
        (["index", "m", "c.txt", "s"], "c.txt: not a .jsonl"),
        (["index", "m", "c.jsonl", "gs://b/s"], "gs://b/s: a store is read in place, so it must be on a disk"),
        (["index", "m", "c.jsonl", "s", "--shard-rows", "0"], "--shard-rows=0 must be positive"),
        (["index", "m", "c.jsonl", "s", "--max-length", "0"], "--max-length=0 must be positive"),
        (["index", "m", "c.jsonl", "s", "--data.train=x"], "index does not know --data.train=x"),
        (["index", "m", "c.jsonl", "s"], "m: nothing there"),
        (["search", "m", "s", "--query", "x", "--k", "0"], "--k=0 must be positive"),
        (["search", "m", "s"], "there is nothing to search for; give --query or --queries"),
        (["search", "m", "s", "--query", " "], "query ' ' is empty; leave it out"),
        (["search", "m", "s", "--query", "x"], "s: no manifest.json, so it is not a store"),
        (["export-faiss", "s", "x.index"], "x.index: must end in .faiss"),
        (["export-faiss", "s", "x.faiss"], "s: no manifest.json, so it is not a store"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("c.jsonl", "c.txt"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
