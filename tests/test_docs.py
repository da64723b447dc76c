"""README and docs: their examples run, their links lead somewhere, and the reference is complete.

A page is a story: its blocks run in order, in one folder that looks like a fresh checkout. A block
with `title="FILE"` writes that file. Blocks of bash and Python run, blocks of YAML must be recipes.
A comment before a block says otherwise:

<!-- not run: REASON -->    it is neither run nor validated
<!-- slow -->               it runs in the slow tests only
<!-- prints -->             it prints the lines of the text blocks after it; ... stands for anything
<!-- prints figures -->     the same, and any number stands for any other
<!-- search space -->       it is a search space, not a recipe
"""

import csv
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic_settings import BaseSettings

from benchmarks import code_shape
from distillery.data.rows import RowReader, to_example
from distillery.recipe import Recipe, SearchRecipe, parse_recipe
from distillery.settings import AzureMLSettings, LocalSettings, TeacherSettings

PROJECT = Path(__file__).resolve().parent.parent
DOCS = PROJECT / "docs"
PAGES = [
    PROJECT / "README.md",
    PROJECT / "CONTRIBUTING.md",
    PROJECT / "SECURITY.md",
    *sorted(DOCS.rglob("*.md")),
]
CHECKED = ("bash", "python", "yaml")
LANGUAGES = (*CHECKED, "csv", "ini", "text")
BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>[^\n]+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Block:
    """A fenced block; `printed` are the lines that the text blocks after it show."""

    language: str
    text: str
    title: str
    mark: str
    printed: list[str] = field(default_factory=list)

    @property
    def is_exempt(self) -> bool:
        return self.mark.startswith("not run: ")

    @property
    def is_slow(self) -> bool:
        return self.mark.startswith("slow")


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page; those of text belong to the last one that is run."""
    found: list[Block] = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        if match["language"] == "text" and found:
            found[-1].printed += text.splitlines()
        else:
            mark = match["mark"] or ""
            found.append(Block(match["language"], text, match["title"] or "", mark))
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(PROJECT))


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text(encoding="utf-8")) <= 8000


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_language_and_every_mark_is_known(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    fences = len(re.findall(r"^ *```", text, re.MULTILINE))
    assert fences == 2 * len(BLOCK.findall(text))
    for block in blocks(page):
        assert block.language in LANGUAGES, block.text
        known = r"not run: \S.*|search space|(slow)?(, )?(prints( figures)?)?"
        assert re.fullmatch(known, block.mark), block.mark
        assert "prints" not in block.mark or block.printed


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_registry: None) -> Path:
    """A folder with links to what a checkout holds, and to the environment of these tests."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "sample.env", "prefect.yaml", "flows", "tasks", "distillery"):
        (folder / name).symlink_to(PROJECT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("NAME", "ENDPOINT", "KEY"):
        monkeypatch.delenv(f"TEACHER_MODEL_{name}", raising=False)
    return folder


def run_page(page: Path, checkout: Path, slow: bool) -> None:
    """Run the blocks of a page; without `slow`, those that are not slow."""
    for block in blocks(page):
        if block.is_exempt:
            continue
        if block.language == "yaml":
            check_yaml(block, name_of(page))
        if block.title:
            (checkout / block.title).write_text(block.text, encoding="utf-8")
        elif block.language in ("bash", "python") and (slow or not block.is_slow):
            check_printed(block, run_block(block, checkout))


def check_yaml(block: Block, place: str) -> None:
    """Raise RecipeError or ValidationError where the block is no recipe or search space."""
    values = yaml.safe_load(block.text)
    if block.mark == "search space":
        SearchRecipe.model_validate(values)
    else:
        parse_recipe(values, place)


def run_block(block: Block, checkout: Path) -> str:
    """Return what the block prints; it must exit with 0."""
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    if block.language == "python":
        command = [sys.executable, "-c", block.text]
    done = subprocess.run(
        command, cwd=checkout, env=environment(checkout), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def environment(checkout: Path) -> dict[str, str]:
    """The tests' own environment, with a home for Prefect beside the checkout."""
    return os.environ | {"PREFECT_HOME": str(checkout.parent / "prefect")}


def check_printed(block: Block, printed: str) -> None:
    """Each line that the page shows must be printed, in this order."""
    if "prints" not in block.mark:
        return
    lines = iter(printed.splitlines())
    for wanted in filter(None, block.printed):
        pattern = as_pattern(wanted, figures="figures" in block.mark)
        assert any(re.fullmatch(pattern, " ".join(line.split())) for line in lines), (
            f"{wanted!r} is not printed, or not in this order, by:\n{block.text}\n{printed}"
        )


def as_pattern(line: str, figures: bool) -> str:
    """Return a pattern for a line as printed, its blanks folded."""
    pattern = re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*")
    if figures:
        # A wider figure in the scoreboard makes this name wrap.
        pattern = pattern.replace(r"logistic\ regression", r"logistic(\ regression)?")
        pattern = re.sub(r"(\\[+-]|\+)?\d+((,|\\\.)\d+)*", r"[-+]?[\\d.,]*\\d", pattern)
    return pattern


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_examples_work(page: Path, checkout: Path) -> None:
    run_page(page, checkout, slow=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.is_slow for block in blocks(page))], ids=name_of
)
def test_the_slow_examples_work(page: Path, checkout: Path) -> None:
    run_page(page, checkout, slow=True)


def test_a_line_that_is_not_printed_is_found() -> None:
    block = Block("bash", "", "", "prints figures", ["loss 0.5, ...", "done"])
    check_printed(block, "loss  0.25, step 3\nmore\ndone\n")
    with pytest.raises(AssertionError, match="'done' is not printed"):
        check_printed(block, "done\nloss 0.25, step 3\n")


def test_the_tests_that_the_security_page_names_are_run_by_make_test_security() -> None:
    page = (PROJECT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/\w[\w/]*\.py)`", page))
    assert named
    for name in sorted(named):
        assert "pytest.mark.security" in (PROJECT / name).read_text(encoding="utf-8"), name
    marked = set()
    for path in (PROJECT / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(re.findall(r"^pytestmark\b", text, re.MULTILINE)) < 2, "the last one counts"
        if "pytest.mark.security" in text:
            marked.add(str(path.relative_to(PROJECT)))
    marked.discard("tests/test_docs.py")
    assert marked - named == set()


def test_the_readmes_csv_is_what_its_recipe_reads() -> None:
    (table,) = [block for block in blocks(PROJECT / "README.md") if block.language == "csv"]
    (recipe,) = [block for block in blocks(PROJECT / "README.md") if block.language == "yaml"]
    columns = parse_recipe(yaml.safe_load(recipe.text), "README.md").dataset.columns
    reader = RowReader(columns, classify=True)
    answers = []
    for row in csv.DictReader(io.StringIO(table.text)):
        answers.append(to_example(row, reader, "README.md").answer_key)
    assert answers == ["repair", None]


# Links


def anchors(markdown: str) -> set[str]:
    """Return the anchors of a page's headings: those given, else as GitHub and MkDocs make them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", BLOCK.sub("", markdown), re.MULTILINE):
        given = re.search(r"\{ #([\w-]+) \}", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        found.add(given[1] if given else slug)
    return found


@pytest.mark.parametrize("page", [*PAGES, PROJECT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_to_files_and_headings(page: Path, reference: ModuleType) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    generated = {
        DOCS / "reference" / "recipe.md": reference.recipe_page,
        DOCS / "reference" / "command-line.md": reference.command_line_page,
        DOCS / "reference" / "settings.md": reference.settings_page,
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file in generated:
            content = generated[file]()
        else:
            assert file.exists(), f"{target}: no such file"
            content = file.read_text(encoding="utf-8") if anchor else ""
        assert not anchor or anchor in anchors(content), f"{target}: no such heading"


# The site


def test_the_site_builds_strictly_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PREFECT_HOME": str(tmp_path / "prefect")}
    done = subprocess.run(command, cwd=PROJECT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    loaded = r"<(?:script|img|iframe|link)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^>]*"
    for page in pages:
        assert re.findall(loaded, page.read_text(encoding="utf-8")) == [], page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The hook that writes the reference pages."""
    file = DOCS / "hooks" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference_hook", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys_of(schema: dict[str, Any]) -> Iterator[str]:
    """Yield the names of all keys in a JSON schema."""
    for part in (schema, *schema.get("$defs", {}).values()):
        yield from part.get("properties", {})


def test_every_key_of_a_recipe_has_a_type_and_a_meaning(reference: ModuleType) -> None:
    page = reference.recipe_page()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for row in rows:
        _, key, kind, _, meaning, _ = re.split(r"(?<!\\)\|", row)
        assert kind.strip(), key
        assert meaning.strip(), key
    listed = {row.split("`")[1] for row in rows}
    assert {*keys_of(Recipe.model_json_schema()), *keys_of(SearchRecipe.model_json_schema())} == (
        listed
    )


def test_every_command_and_flow_is_in_the_reference(reference: ModuleType) -> None:
    page = reference.command_line_page()
    commands = ("new", "check", "quote", "serve", "trace", "models sign", "labels delete")
    for name in (*commands, "store gc"):
        assert f"### distillery {name} " in page
    for flow in ("distill", "search", "batch_inference", "reproduce"):
        assert f"usage: python -m flows.{flow} " in page
    assert "| `make demo` |" in page
    assert "`--refresh`" in page or "--refresh STAGE" in page


@pytest.mark.parametrize("settings", [TeacherSettings, AzureMLSettings, LocalSettings])
def test_every_setting_is_in_sample_env_and_in_the_reference(
    settings: type[BaseSettings], reference: ModuleType
) -> None:
    page, sample = reference.settings_page(), reference.sample_env()
    for name, setting in settings.model_fields.items():
        variable = reference.variable_of(settings, name, setting)
        assert re.search(rf"^\| `{variable}` \|[^|]*\| [^|\s]", page, re.MULTILINE), variable
        # An image sets it, not a user.
        assert variable in sample or variable == "DISTILLERY_CONTAINER"


def test_every_variable_of_sample_env_is_explained(reference: ModuleType) -> None:
    assert [name for name, meaning in reference.sample_env().items() if not meaning] == []


def test_the_picture_of_the_rooms_is_true(reference: ModuleType) -> None:
    """A room imports none that stands above it or on its own line."""
    page = (DOCS / "design.md").read_text(encoding="utf-8")
    picture = re.search(r"## The rooms of the domain.*?```text\n(.*?)```", page, re.DOTALL)
    assert picture
    lines = [re.split(r" {4,}", line.strip())[0].split() for line in picture[1].splitlines()]
    found = reference.rooms()
    assert sorted(name for line in lines for name in line) == sorted(found)
    below: set[str] = set()
    for line in reversed(lines):
        for name in line:
            assert found[name] <= below, f"{name} imports {found[name] - below}"
        below.update(line)


# The measure in the table on design


def test_the_shape_of_code_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "    x = 1\n" * 51
    (tmp_path / "a.py").write_text(f"def _f():\n{long}\n\ndef g():\n    return [y for y in ()]\n")
    (tmp_path / "b.py").write_text(
        "def __str__(self):\n    return 1 if (n := 2) else 3\n\n# " + "-" * 99
    )
    assert code_shape.main([str(tmp_path)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])[str(tmp_path)]
    assert figures == {
        "modules": 2,
        "largest": 56,
        "functions": 3,
        "median": 2,
        "over_50": 0.333,
        "private": 0.333,
        "comprehensions": 1.75,
        "ternaries": 1.75,
        "walruses": 1.75,
        "long_lines": 1,
    }


def test_a_folder_without_code_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_shape.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: no Python file is in this folder\n"
