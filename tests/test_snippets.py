"""What README.md, docs/ and the docstrings show is run.

The ```python blocks of a page run in order, in one namespace, in a directory of their own; those in HTML comments too,
which prepare what a page takes for granted. So do the lines of ```sh blocks that begin with ``statedict-io``. A block
that cannot run here comes after ``<!-- snippet: not run: WHY -->``.
"""

import doctest
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import statedict_io as sio
from statedict_io.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- snippet: not run: (?P<why>[^>]+) -->\s*\n)?^```(?P<language>python|sh)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
OTHER_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
REFERENCE = ROOT / "docs" / "api.md"
MAX_NOT_RUN = 4
MAX_COLUMNS, MAX_WORDS_IN_A_CELL = 7, 60
LANGUAGES = {"python", "sh", "text", "toml", "{toctree}", "{eval-rst}"}
#: Beyond the requirements of the tests.
NEEDS = {"migrate.md": "safetensors"}
#: Change the process they run in.
ALONE = {"integrations.md"}

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the source tree")


def blocks(page):
    return list(BLOCK.finditer(page.read_text()))


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = torch.get_rng_state()
    yield
    torch.set_rng_state(rng)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sio.wait_all()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_page(page):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    if page.name in ALONE:
        program = f"import pathlib, test_snippets as t; t.run_page(pathlib.Path({str(page)!r}))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        run_page(page)


def run_page(page):
    names = {"__name__": "__main__"}
    for block in blocks(page):
        if block["why"]:
            continue
        # As many empty lines before it as there are in the page: a traceback names the page's line.
        first_line = page.read_text().count("\n", 0, block.start("code"))
        if block["language"] == "python":
            exec(compile("\n" * first_line + block["code"], str(page), "exec"), names)
        else:
            for line in block["code"].splitlines():
                if line.startswith("statedict-io "):
                    assert main(shlex.split(line, comments=True)[1:]) == 0, f"{page}:{first_line}: {line}"


def test_few_blocks_are_not_run():
    not_run = [f"{page.name}: {block['why']}" for page in PAGES for block in blocks(page) if block["why"]]
    assert len(not_run) <= MAX_NOT_RUN, not_run


def test_no_block_is_overlooked():
    """Each fence has a language, so that what is Python says so; and the expression above finds all that do."""
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0, page
        opening = fences[::2]
        assert set(opening) <= LANGUAGES, (page, opening)
        assert sum(language in ("python", "sh") for language in opening) == len(blocks(page)), page
    assert sum(len(blocks(page)) for page in PAGES) > 20


def test_tables_can_be_read():
    for page in [*PAGES, *OTHER_PAGES]:
        for line in page.read_text().splitlines():
            if not line.startswith("| ") and not line.startswith("|  |"):
                continue
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            assert len(cells) <= MAX_COLUMNS, (page, line)
            longest = max(cells, key=lambda cell: len(cell.split()))
            assert len(longest.split()) <= MAX_WORDS_IN_A_CELL, (page, longest)


def test_links_lead_somewhere():
    pages = [*PAGES, *OTHER_PAGES]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not re.match(r"https?://", link)
    ]
    assert len(links) > 20
    for page, link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), (page, link)
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], (
                page,
                link,
            )


def docstrings():
    dcp = importlib.import_module("statedict_io.dcp")
    for module in (sio, dcp):
        for name in module.__all__:
            yield f"{module.__name__}.{name}", getattr(module, name)


@pytest.mark.parametrize("name, thing", list(docstrings()), ids=lambda value: value if isinstance(value, str) else "")
def test_docstring_examples(name, thing):
    module = inspect.getmodule(thing)
    names = {"torch": torch, "sio": sio, "model": torch.nn.Linear(4, 3)}
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(thing, name, module, globs=names):
        runner.run(example)
    assert runner.summarize().failed == 0


def test_docstrings_have_examples():
    shown = {name for name, thing in docstrings() if ">>>" in (thing.__doc__ or "")}
    assert {f"statedict_io.{name}" for name in ("save", "fastsave", "save_async", "load", "open_checkpoint")} <= shown


@pytest.mark.parametrize("name, thing", list(docstrings()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_parameter_is_documented(name, thing):
    """In the docstring of a function, or of the class whose constructor takes it."""
    if not (thing.__doc__ or "").strip():
        pytest.fail(f"{name} has no docstring")
    if re.search(
        rf"::.*\b{thing.__name__}\(\)$|autoexception:: {thing.__name__}$", REFERENCE.read_text(), re.MULTILINE
    ):
        return  # not made by callers
    documented = set(re.findall(r"\w+", " ".join(re.findall(r"^ +([\w, ]+):(?: |$)", thing.__doc__, re.MULTILINE))))
    parameters = {parameter for parameter in inspect.signature(thing).parameters if not parameter.startswith("_")}
    assert parameters - documented == set()


def test_the_reference_names_everything_public():
    text = REFERENCE.read_text()
    missing = [name for name, _ in docstrings() if not re.search(rf":: {name.rpartition('.')[2]}\b", text)]
    assert missing == []
