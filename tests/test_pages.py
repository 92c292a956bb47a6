"""What benchmarks put into the documentation's pages."""

import json

import pages
import pytest
import rag

from grit_jax.errors import InputError
from tests.commands import ROOT


def test_tables_go_between_their_marks_and_files_beside_the_page(tmp_path):
    page, made = tmp_path / "page.md", tmp_path / "made"
    page.write_text("above\n<!-- one -->\n\nold\n\n<!-- end of one -->\nbetween\n<!-- two --><!-- end of two -->")
    (made / "folder").mkdir(parents=True)
    (made / "folder/file").write_text("inner")
    (made / "plot").write_text("drawn")
    for _ in range(2):  # again: in place of what was there
        pages.publish(page, {"one": "| 1 |\n", "two": "| 2 |\n"}, made / "folder", made / "plot")
        assert page.read_text() == (
            "above\n<!-- one -->\n\n| 1 |\n\n<!-- end of one -->\nbetween\n<!-- two -->\n\n| 2 |\n\n<!-- end of two -->"
        )
    assert (tmp_path / "page/folder/file").read_text() == "inner" and (tmp_path / "page/plot").read_text() == "drawn"


@pytest.mark.parametrize("text", ["", "<!-- two -->", "<!-- end of two -->\n<!-- two -->"])
def test_a_page_without_marks_is_refused_and_stays_as_it_is(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(whole := f"<!-- one -->\n<!-- end of one -->\n{text}")
    with pytest.raises(InputError, match=r"page\.md: has no marks for the table two; write <!-- two -->"):
        pages.publish(page, {"one": "| 1 |\n", "two": "| 2 |\n"})
    assert page.read_text() == whole and not (tmp_path / "page").exists()


@pytest.mark.parametrize("command", ["latency", "quality"])
def test_the_page_of_answers_has_the_tables_that_the_script_wrote(command):
    found = json.loads((ROOT / f"docs/rag/{command}.json").read_text())
    for name, table in rag.tables(command, found).items():
        assert f"<!-- {name} -->\n\n{table}\n<!-- end of {name} -->" in (ROOT / "docs/rag.md").read_text()
