"""The documentation against the repository: links, commands, config keys, files, tests and figures that it names."""

import ast
import functools
import re
import shlex
import tomllib

import markdown
import pytest
import yaml

from grit_jax.cli.main import COMMANDS, make_parser
from grit_jax.config import parse_config
from tests.commands import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*\n| {0,3}\n)+", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
SHELL = ("", "bash", "sh", "console", "text")
PARSER = make_parser()

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text, *languages):
    """Contents of the fenced blocks in these languages; indented ones have none."""
    found = [match[3] for match in FENCE.finditer(text) if match[2] in languages]
    return found + (INDENTED.findall(FENCE.sub("", text)) if "" in languages else [])


def anchors(page):
    """What links to a page may name, as mkdocs and code hosts write it."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def commands(text, program):
    """Words of every command in the lines of a block of shell that name a program."""
    for line in text.replace("\\\n", " ").splitlines():
        if program not in line:
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        try:
            words = list(lexer)
        except ValueError:
            continue  # prose, or one line of a document in quotes
        command = []
        for word in [*words, "&&"]:
            if set(word) <= set("|&;<>"):
                yield command
                command = []
            else:
                command.append(word)
        for word in words:
            if f"{program} " in word:  # a command inside a command, for ssh and the like
                yield from commands(word.partition("=")[2] or word, program)


def of_program(text, program):
    """Arguments of every call of a program, in its own folder or on the path."""
    for words in commands(text, program):
        at = [place for place, word in enumerate(words) if word == program or word.endswith(f"/{program}")]
        if at and all("=" in word for word in words[: at[0]]):  # nothing but environment variables before
            yield [word for word in words[at[0] + 1 :] if word != "..."]


def check_grit_jax(arguments):
    """Parses a command as it is and its overrides as config keys; nothing is run."""
    try:
        args, overrides = PARSER.parse_known_args(arguments)
    except SystemExit as stopped:
        assert stopped.code == 0, f"grit-jax {shlex.join(arguments)}"
        return
    command = COMMANDS[args.command]
    command = command.tools[args.tool] if command.tools else command
    assert not overrides or command.overrides is not None, overrides
    check_overrides(tuple(overrides))


@functools.cache
def check_overrides(overrides):
    """Config keys and the types of their values."""
    if overrides:
        parse_config("", list(overrides))


@each_page
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@each_page
def test_every_command_of_the_package_can_be_parsed(page):
    for block in blocks(page.read_text(), *SHELL):
        for arguments in of_program(block, "grit-jax"):
            check_grit_jax(arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_of_the_help_can_be_parsed(command):
    examples = list(of_program(COMMANDS[command].examples, "grit-jax"))
    assert examples
    for arguments in examples:
        check_grit_jax(arguments)


def test_commands_are_found_where_readers_see_them():
    """The checks above are worth what this finds: fenced, indented, continued, piped and quoted."""
    text = (
        "Text\n\n    A=1 grit-jax status runs/a | tee log  # why\n    x && bin/grit-jax plot \\\n      runs/b\n\n"
        "```bash\nssh --command='cd a && grit-jax doctor --selftest'\n```\n\nthe grit-jax train that is prose\n"
    )
    found = [arguments for block in blocks(text, *SHELL) for arguments in of_program(block, "grit-jax")]
    assert sorted(found) == [["doctor", "--selftest"], ["plot", "runs/b"], ["status", "runs/a"]]
    number = sum(
        len(list(of_program(block, "grit-jax"))) for page in PAGES for block in blocks(page.read_text(), *SHELL)
    )
    assert number > 50


@each_page
def test_launch_scripts_have_the_options_that_are_named(page):
    library = (ROOT / "launch/lib.sh").read_text()
    for block in blocks(page.read_text(), *SHELL):
        for script in ("run.sh", "pod.sh"):
            for arguments in of_program(block, script):
                end = arguments.index("--") if "--" in arguments else len(arguments)
                own, rest = arguments[:end], arguments[end + 1 :]
                options = [word.partition("=")[0] for word in own if word.startswith("--")]
                known = (ROOT / "launch" / script).read_text() + library
                assert [option for option in options if not re.search(rf"{option}\b", known)] == []
                if script == "run.sh":
                    check_overrides(tuple(rest))


def rendered(page):
    """A page as the site shows it."""
    extensions = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["markdown_extensions"]
    configs = {name: options for each in extensions if isinstance(each, dict) for name, options in each.items()}
    names = [each if isinstance(each, str) else next(iter(each)) for each in extensions]
    return markdown.markdown(page.read_text(), extensions=names, extension_configs=configs)


def paragraphs_of_steps(text):
    """What belongs to the items of numbered lists, after their first paragraphs; fenced code is left out."""
    inside = False
    for paragraph in re.split(r"\n\n+", FENCE.sub("", text)):
        if re.match(r"\d+\. ", paragraph):
            inside = True
        elif inside and paragraph.startswith(" "):
            yield paragraph
        elif paragraph:
            inside = False


@each_page
def test_numbered_steps_are_one_list_with_their_commands_as_blocks(page):
    text, html = page.read_text(), rendered(page)
    assert html.count("<ol>") == len(re.findall(r"^1\. ", FENCE.sub("", text), re.MULTILINE))
    assert "```" not in html, "a fence in the midst of prose"
    assert html.count("<pre>") >= len(FENCE.findall(text))
    wrong = [each for each in paragraphs_of_steps(text) if not re.match(r" {4}\S", each)]
    assert wrong == [], "indent by 4 what belongs to a step, and fence its code"


@each_page
def test_commands_are_called_in_one_way_and_extras_are_those_of_the_clone(page):
    text = page.read_text()
    assert ".venv/bin/grit-jax" not in text, "call it grit-jax: pages take the environment as activated"
    assert "grit-jax[" not in text, "the package is not on PyPI: name the clone's extra, '.[EXTRA]'"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"'\.\[(\w+)\]'", text)) <= set(extras)
    for call in re.findall(r"pip install [^`\n]*\.\[", text):
        assert "-c constraints.txt -e" in call, "would install a frozen copy, or another release of jax"


@each_page
def test_every_make_target_is_one(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    inline = " ; ".join(re.findall(r"`(make [^`]+)`", text))
    for block in [*blocks(text, *SHELL), inline]:
        for words in of_program(block, "make"):
            assert {word for word in words if "=" not in word and not word.startswith("-")} <= targets, words


@each_page
def test_every_file_that_is_named_is_there(page):
    text = page.read_text()
    named = re.findall(
        r"(?<![\w./-])((?:configs|benchmarks|launch|tests|docs|grit_jax)/[\w./-]*\w\.(?:py|yaml|md|sh|json))\b", text
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@each_page
def test_every_test_that_is_named_is_there(page):
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    written = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert named <= written, named - written


@each_page
def test_every_config_that_is_shown_loads(page):
    for block in blocks(page.read_text(), "yaml"):
        parse_config(block, source=str(page))


def test_the_walk_through_the_families_shows_the_code_as_it_is():
    folders = (ROOT / "grit_jax", ROOT / "tests/hf")
    code = {
        " ".join(line.split())
        for folder in folders
        for path in folder.rglob("*.py")
        for line in path.read_text().splitlines()
    }
    for block in blocks((ROOT / "docs/adding-a-family.md").read_text(), "python"):
        for line in block.splitlines():
            shown = " ".join(line.partition("  #")[0].split())
            assert shown in code | {"", "...,"}, line


def test_programs_that_are_shown_are_python():
    for page in (ROOT / "README.md", ROOT / "docs/index.md"):
        for block in blocks(page.read_text(), "python"):
            ast.parse(block)


def test_planned_figures_are_those_of_the_configs():
    page = (ROOT / "docs/planning.md").read_text()
    rows = re.findall(r"^\| `(gritlm_\w+)` \| (.*) \|$", page, re.MULTILINE)
    assert {name for name, _ in rows} == {path.stem for path in (ROOT / "configs").glob("gritlm_*.yaml")}
    for name, row in rows:
        head = (ROOT / f"configs/{name}.yaml").read_text().partition("\nmodel:")[0]
        comment = " ".join(head.replace("#", " ").split())
        _, peak, seconds, mfu, factor = row.split(" | ")
        for figure in (f"peak {peak} GiB", f"predicted {seconds} s", f"MFU {mfu}", f"recompute factor {factor}"):
            assert figure in comment, (name, figure)


def test_the_page_of_figures_has_none_of_its_own():
    """A figure is measured in one place; the page that collects them must not be left behind."""
    figure = re.compile(r"\d[\d,]*\.\d+(?:e-\d+)?|\d{1,3}(?:,\d{3})+")
    results = ROOT / "docs/results.md"
    elsewhere = " ".join(page.read_text() for page in PAGES if page != results)
    assert set(figure.findall(results.read_text())) <= set(figure.findall(elsewhere))


def test_the_citation_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
