"""Write the pages of the site that come from the code, while MkDocs builds it.

`reference/recipe.md` comes from the recipe's models, `reference/command-line.md` from typer and
argparse, `reference/settings.md` from the settings classes and sample.env. On the page on design,
the line `<!-- rooms -->` becomes the table of packages and of what each imports.

Their functions take no arguments and return Markdown, so that tests call them without MkDocs.
"""

import ast
import contextlib
import inspect
import io
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

PROJECT = Path(__file__).resolve().parents[2]
ROOMS = "<!-- rooms -->"
BRACKETED = r"(?<![`\w])([\[{][^`\[\]{}]*(?:[\[{][^`\[\]{}]*[\]}][^`\[\]{}]*)*[\]}])"
"""Such as {KEY: [A, B]}, outside of code; two levels deep."""

FLOWS = ("distill", "search", "batch_inference", "reproduce")

# Flows, unlike the package distillery, are not installed.
if str(PROJECT) not in sys.path:
    sys.path.insert(0, str(PROJECT))


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    pages = {
        "reference/recipe.md": recipe_page,
        "reference/command-line.md": command_line_page,
        "reference/settings.md": settings_page,
    }
    for path, page in pages.items():
        files.append(File.generated(config, path, content=page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of rooms where a page asks for it."""
    if ROOMS in markdown:
        return markdown.replace(ROOMS, rooms_table())
    return markdown


# The recipe


KINDS = {"choose": "choice", "classify": "classify", "write": "extract, generate"}
"""By name of a file of settings, the kinds of task that start from it."""


def recipe_page() -> str:
    """Return the page with every key of a recipe and of a search space: type, default, meaning."""
    from distillery.recipe import Recipe, SearchRecipe
    from distillery.recipe.preset import PRESETS

    models = models_of(Recipe)
    parts = [
        "# Recipe",
        "A recipe is a YAML file with the keys below. A key that you leave out keeps its default, "
        "or the value of the `preset` that the recipe starts from. This page is generated from "
        "`distillery/recipe/`.",
    ]
    for model, paths in models.items():
        parts.append(section(model, paths, models))
    parts.append("## The search space { #search }")
    parts.append(
        "The second file of `python -m flows.search RECIPE SPACE` ([Students]"
        "(../how-to/students.md#search-for-settings))."
    )
    parts += [text(SearchRecipe), table(SearchRecipe, "", models_of(SearchRecipe))]
    folder = PROJECT / "distillery" / "recipe" / "presets"

    def shown(title: str, name: str) -> str:
        return f"`{title}`\n\n```yaml\n{(folder / f'{name}.yaml').read_text()}```"

    parts.append("## The presets { #presets }")
    parts += [shown(f"preset: {name}", name) for name in PRESETS]
    parts.append("## What a kind of task starts from { #kinds }")
    parts.append(
        "A recipe that says its `task.kind` starts from these settings; what it says itself takes "
        "their place. With `kind: choice` they count only in a recipe without the key `preset`. "
        "`preset: null` leaves the defaults of this page."
    )
    parts += [shown(f"task.kind: {kinds}", name) for name, kinds in KINDS.items()]
    return "\n\n".join(parts) + "\n"


def models_of(model: type[BaseModel]) -> dict[type[BaseModel], list[str]]:
    """Return `model` and all models inside it, each with the paths of the keys that hold it.

    The order is that of the keys, the shortest path first."""
    found: dict[type[BaseModel], list[str]] = {model: [""]}
    waiting = [(model, "")]
    while waiting:
        outer, prefix = waiting.pop(0)
        told = outer.model_json_schema()["properties"]
        for name, field in outer.model_fields.items():
            for inner, suffix in inner_models(field.annotation) if name in told else ():
                path = f"{prefix}{name}{suffix}"
                if inner not in found:
                    found[inner] = []
                    waiting.append((inner, f"{path}."))
                found[inner].append(path)
    order = sorted(found, key=lambda inner: place_in(model, found[inner][0]))
    return {inner: found[inner] for inner in order}


def place_in(model: type[BaseModel], path: str) -> tuple[int, ...]:
    """Return where a key stands in the order of the fields, level by level."""
    if not path:
        return ()
    name, _, rest = path.partition(".")
    field = name.partition("[")[0]
    position = list(model.model_fields).index(field)
    inner, _ = next(inner_models(model.model_fields[field].annotation))
    return (position, *place_in(inner, rest))


def inner_models(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the models in an annotation; the suffix is [] for models in a list, and [KIND] for
    those that their kind tells apart."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ""
        return
    arguments = getattr(annotation, "__args__", ())
    listed = getattr(annotation, "__origin__", None) is tuple
    for argument in arguments:
        for inner, suffix in inner_models(argument):
            yield inner, f"[{kind_of(inner)}]" if listed else suffix


def kind_of(model: type[BaseModel]) -> str:
    """Return the only kind that a model's `kind` can be; '' for a model without."""
    kind = model.model_fields.get("kind")
    kinds = getattr(kind.annotation, "__args__", ()) if kind else ()
    return str(kinds[0]) if len(kinds) == 1 else ""


def section(model: type[BaseModel], paths: list[str], models: dict[Any, list[str]]) -> str:
    """Return the section of one model: heading, docstring and the table of its keys."""
    path = paths[0]
    lines = [f"## {path or 'The whole recipe'} {{ #{anchor(path)} }}", text(model)]
    if len(paths) > 1:
        others = ", ".join(f"`{other}`" for other in paths[1:])
        lines.append(f"The same keys are in {others}.")
    lines.append(table(model, path, models))
    return "\n\n".join(lines)


def anchor(path: str) -> str:
    """Return the id of a model's heading."""
    return re.sub(r"\W+", "-", path).strip("-") or "recipe"


def text(model: type[BaseModel]) -> str:
    """Return a model's docstring as Markdown."""
    return inspect.cleandoc(model.__doc__ or "")


def table(model: type[BaseModel], path: str, models: dict[Any, list[str]]) -> str:
    """Return the table of a model's keys."""
    schema = model.model_json_schema()
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for attribute, field in model.model_fields.items():
        name = attribute
        if isinstance(field.validation_alias, AliasChoices):
            name = str(field.validation_alias.choices[0])
        # The schemas of a judge and of a cheap teacher leave out what has no meaning for them.
        if name not in schema["properties"]:
            continue
        key = schema["properties"][name]
        inner = next(inner_models(field.annotation), None)
        kind = spelled(key, schema.get("$defs", {}))
        meaning = cell(field.description or "")
        if inner:
            target = models[inner[0]][0]
            kind = kind.replace("settings", f"[settings](#{anchor(target)})")
            meaning = meaning or cell(text(inner[0]).split("\n\n")[0])
        lines.append(f"| `{name}` | {kind} | {default(field)} | {meaning} |")
    return "\n".join(lines)


def default(field: FieldInfo) -> str:
    """Return a field's default in YAML's words; of nested settings, what differs from their own."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        changed = value.model_dump(exclude_defaults=True, mode="json")
        return code(flow_style(changed)) if changed else ""
    return code(flow_style(to_jsonable_python(value)))


def flow_style(value: Any) -> str:
    """Return a value as a line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow_style(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow_style, value)) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./:-]+", value) else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def spelled(key: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return a JSON schema of one key in words."""
    if "$ref" in key:
        return "settings"
    if "allOf" in key:
        return spelled(key["allOf"][0], definitions)
    if "anyOf" in key or "oneOf" in key:
        options = [spelled(option, definitions) for option in key.get("anyOf") or key["oneOf"]]
        # A key may take settings of several kinds.
        return " or ".join(dict.fromkeys(options))
    if "enum" in key:
        return ", ".join(code(str(option)) for option in key["enum"])
    if "const" in key:
        return code(str(key["const"]))
    kind = str(key.get("type", "any"))
    if kind == "array":
        if "prefixItems" in key:
            return f"list of {len(key['prefixItems'])} {spelled(key['prefixItems'][0], {})}s"
        return f"list of {spelled(key['items'], definitions)}"
    if kind == "object":
        if key.get("additionalProperties") is True:
            return "mapping"
        names = key.get("propertyNames", {})
        keys = f"{spelled(names, definitions)} to " if "enum" in names else "name to "
        return f"mapping, {keys}{spelled(key['additionalProperties'], definitions)}"
    return kind + limits(key)


def limits(key: dict[str, Any]) -> str:
    """Return a number's limits, such as ' ≥ 0, ≤ 1'."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {key[name]}" for name, sign in signs.items() if name in key]
    return " " + ", ".join(found) if found else ""


def code(value: str) -> str:
    """Return a value as code in a table's cell; with two backticks where it holds one."""
    marks = "``" if "`" in value else "`"
    return f"{marks}{value.replace('|', chr(92) + '|')}{marks}"


def cell(value: str) -> str:
    """Return a text as one line of a table; what stands in braces or brackets becomes code."""
    line = " ".join(value.split()).replace("|", "\\|")
    line = re.sub(BRACKETED, r"`\1`", line)
    parts = line.split("`")
    # The even parts are outside of code, where < would begin a tag.
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


# The command line


def command_line_page() -> str:
    """Return the page with every command: `distillery`, the flows and the targets of make."""
    import typer

    from distillery.cli import app

    parts = [
        "# Command line",
        "Run the commands from the project's folder, as `.venv/bin/distillery ...` and "
        "`.venv/bin/python -m flows....`, or without the prefix in an activated environment. An "
        "error that you can correct is one line on standard error, with exit code 1; a wrong "
        "command line exits with 2. This page is generated from the code.",
        "## Flows",
    ]
    for name in FLOWS:
        parts.append(f"### python -m flows.{name} {{ #flows-{name.replace('_', '-')} }}")
        parts.append(f"```text\n{help_of(name)}\n```")
    parts.append("## distillery")
    parts += commands(typer.main.get_command(app), "distillery")
    parts += ["## make", make_targets()]
    return "\n\n".join(parts) + "\n"


def help_of(flow: str) -> str:
    """Return what `python -m flows.FLOW --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        import_module(f"flows.{flow}").main(["--help"])
    return printed.getvalue().strip()


def commands(command: Any, path: str) -> list[str]:
    """Return the sections of a typer command and of those below it."""
    children = getattr(command, "commands", {})
    parts = [f"### {path} {{ #{path.replace(' ', '-')} }}"] if path != "distillery" else []
    parts.append(inspect.cleandoc(command.help or ""))
    arguments = [option for option in command.params if not option.opts[0].startswith("-")]
    options = [option for option in command.params if option not in arguments]
    if not children:
        usage = [path]
        for argument in arguments:
            word = argument.metavar or argument.name.upper()
            usage.append(word if argument.required else f"[{word}]")
        if options:
            usage.append("[OPTIONS]")
        parts.append(f"```text\n{' '.join(usage)}\n```")
    rows = [
        f"| `{argument.metavar or argument.name.upper()}` | {cell(argument.help or '')} | "
        f"{'required' if argument.required else ''} |"
        for argument in arguments
    ]
    for option in options:
        shown = "" if option.is_flag or option.default in (None, []) else code(str(option.default))
        names = ", ".join(f"`{name}`" for name in option.opts)
        rows.append(f"| {names} | {cell(option.help or '')} | {shown} |")
    if rows and not children:
        parts.append("\n".join(["| argument | meaning | default |", "|---|---|---|", *rows]))
    for name, child in children.items():
        parts += commands(child, f"{path} {name}")
    return parts


def make_targets() -> str:
    """Return the table of the Makefile's targets."""
    targets = re.findall(r"^([a-z-]+):.*## (.*)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    rows = [f"| `make {name}` | {cell(meaning)} |" for name, meaning in targets]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


# Settings


def settings_page() -> str:
    """Return the page with every environment variable: default and meaning."""
    from distillery.settings import (
        AzureMLSettings,
        CheapSettings,
        JudgeSettings,
        LocalSettings,
        TeacherSettings,
    )

    explained = sample_env()
    parts = [
        "# Settings",
        "Settings belong to the machine or the account; a recipe holds none of them, and no cache "
        "key depends on them. Each is an environment variable. Copy `sample.env` to `.env` and "
        "fill in what you need. The file is read from the working folder (`make up` reads that of "
        "the project's folder), if it is a regular file of yours, of root or of the folder's owner "
        "that others can't write to. A variable that is set already wins over it. Names that are "
        "not on this page, `AZURE_...` apart, are not taken from it; a warning names them. Runs of "
        "a worker read no `.env`: the worker and its pool give them their variables. Processes "
        "that a run starts get no secret that they don't need. This page is generated from "
        "`distillery/settings.py` and `sample.env`.",
    ]
    headings = {
        TeacherSettings: "The teacher",
        CheapSettings: "The cheap teacher",
        JudgeSettings: "The judge",
        AzureMLSettings: "Azure ML",
        LocalSettings: "This machine",
    }
    for settings in headings:
        rows = []
        for field_name, field in settings.model_fields.items():
            variable = variable_of(settings, field_name, field)
            more = explained.pop(variable, "")
            meaning = cell(field.description or more)
            rows.append(f"| `{variable}` | {default_of(field)} | {meaning} |")
        parts += [f"## {headings[settings]}", text(settings), settings_table(rows)]
    groups: dict[str, list[str]] = {}
    for variable, meaning in explained.items():
        groups.setdefault(meaning, []).append(f"`{variable}`")
    rows = [f"| {', '.join(names)} | | {cell(meaning)} |" for meaning, names in groups.items()]
    parts += ["## Others", "Read by a library, by one command or by a deployment."]
    parts.append(settings_table(rows))
    parts.append(f"## sample.env\n\n```ini\n{(PROJECT / 'sample.env').read_text()}```")
    return "\n\n".join(parts) + "\n"


def settings_table(rows: list[str]) -> str:
    """Return a table of variables."""
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def variable_of(settings: Any, name: str, field: FieldInfo) -> str:
    """Return the environment variable that a field is read from."""
    alias = field.validation_alias
    if alias is not None:
        return str(getattr(alias, "choices", [alias])[0])
    return f"{settings.model_config['env_prefix']}{name}".upper()


def default_of(field: FieldInfo) -> str:
    """Return a setting's default; nothing where it is empty."""
    value = str(field.default)
    return code(value) if value else ""


def sample_env() -> dict[str, str]:
    """Return each variable of sample.env with the comment above it; variables that stand
    together share one."""
    found: dict[str, str] = {}
    comment: list[str] = []
    ended = False
    for line in (PROJECT / "sample.env").read_text().splitlines():
        name = re.match(r"(?:# )?([A-Z][A-Z0-9_]+)=", line)
        if name:
            found[name[1]] = " ".join(comment)
            ended = True
        elif not line.startswith("#") or ended:
            comment, ended = [], False
        if not name and line.startswith("#"):
            comment.append(line.removeprefix("#").strip())
    return found


# The rooms


def rooms() -> dict[str, set[str]]:
    """Return each package and leaf module of distillery/ with the others that it imports."""
    top = PROJECT / "distillery"
    found: dict[str, set[str]] = {}
    for path in sorted(top.iterdir()):
        if not is_room(path):
            continue
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        found[path.stem] = set()
        for file in files:
            for module in imports(file):
                top_package, _, inner = module.partition(".")
                if top_package == "distillery":
                    found[path.stem].add(inner.split(".")[0])
        found[path.stem] -= {path.stem, ""}
    return found


def is_room(path: Path) -> bool:
    """Return whether a path in distillery/ is a package or a module."""
    if path.is_dir():
        return (path / "__init__.py").exists()
    return path.suffix == ".py" and path.stem != "__init__"


def imports(file: Path) -> Iterator[str]:
    """Yield the modules that a file imports by `from ... import`, at the top or in a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "distillery":
                yield from (f"distillery.{alias.name}" for alias in node.names)
            else:
                yield node.module


def in_order(found: dict[str, set[str]]) -> list[str]:
    """Return the rooms so that each stands behind those that it imports.

    The import contracts of `make lint` rule out circles, so this does not look for them."""
    order: list[str] = []
    left = dict(found)
    while left:
        first = min(left, key=lambda name: len(left[name] - set(order)))
        order.append(first)
        del left[first]
    return order


def rooms_table() -> str:
    """Return the table of rooms: what each takes and gives, and which others it imports today."""
    found = rooms()
    order = in_order(found)
    lines = ["| room | what it is for | imports |", "|---|---|---|"]
    for name in order:
        file = PROJECT / "distillery" / name / "__init__.py"
        if not file.exists():
            file = PROJECT / "distillery" / f"{name}.py"
        needs = ", ".join(other for other in order if other in found[name])
        lines.append(f"| `{name}` | {cell(purpose(file))} | {needs} |")
    return "\n".join(lines)


def purpose(file: Path) -> str:
    """Return a package's docstring without its last line, which says what it may import; of a
    module the first paragraph."""
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    if file.stem == "__init__":
        return docstring.partition("May import:")[0]
    return docstring.partition("\n\n")[0]
