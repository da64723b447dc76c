"""An install of `distillery` alone, without the extras `azure`, `docker`, `kubernetes`, `postgres`,
`qlora` and `dev`: all modules can be imported, all commands explain themselves, and what needs an
extra says in one line which. The other packages of this environment are hidden."""

import os
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from command_names import command_names
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[1]
HIDING = Path(__file__).parent / "support" / "without_extras"

EVERYTHING = """
import importlib, pkgutil, sys
for name in ("distillery", "tasks", "flows"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not module.name.endswith(("__main__", ".env", "foundry_registration")):
            importlib.import_module(module.name)
            print(module.name)
"""
"""Left out is what is run and not imported: by its reader, by Alembic and by Foundry Local's own
environment."""

EVERY_HELP = """
import importlib, sys
from distillery import cli
print("help")
for line in sys.stdin:
    words = line.split()
    main = cli.main
    if words[:1] == ["-m"]:
        flow = importlib.import_module(words[1])
        main = lambda: flow.main(["--help"])
    sys.argv = ["distillery", *words, "--help"]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, line
"""


def needed(name: str, extras: frozenset[str], found: dict[str, set[str]]) -> None:
    """Add what a package with these extras needs to `found`: extras by package."""
    known = found.setdefault(canonicalize_name(name), set())
    if known >= extras | {""}:
        return
    known |= extras | {""}
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in known):
            needed(requirement.name, frozenset(requirement.extras), found)


def modules_of(package: Distribution) -> set[str]:
    """Return the top-level modules of a package; of a namespace, the next level."""
    modules = set()
    for file in package.files or []:
        parts = file.parts
        if len(parts) == 1 and file.suffix == ".py":
            modules.add(file.stem)
        elif parts[-1].endswith((".py", ".so")) and ".dist-info" not in parts[0]:
            modules.add(".".join(parts[:2]) if parts[0] in NAMESPACES else parts[0])
    return modules


NAMESPACES = {"azure", "google", "opentelemetry", "mpl_toolkits"}
"""Top-level modules that several packages share."""


@cache
def hidden() -> frozenset[str]:
    """Return the modules that an install without extras would not have."""
    found: dict[str, set[str]] = {}
    needed("distillery", frozenset(), found)
    kept: set[str] = set()
    others: set[str] = set()
    for package in distributions():
        wanted = canonicalize_name(package.name) in found | {"pip": set(), "setuptools": set()}
        (kept if wanted else others).update(modules_of(package))
    return frozenset(name for name in others - kept if name.isidentifier() or "." in name)


def run(*arguments: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python without the extras' packages."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT,
        env=os.environ
        | {"PYTHONPATH": f"{HIDING}:{PROJECT}", "WITHOUT_MODULES": ",".join(sorted(hidden()))}
        | environment,
        input=text,
        capture_output=True,
        text=True,
    )


def test_the_extras_packages_are_hidden() -> None:
    extras = {"adlfs", "bitsandbytes", "psycopg", "prefect_docker", "pytest", "flask", "playwright"}
    assert extras <= hidden()
    assert not hidden() & {"prefect", "torch", "sqlalchemy", "mlflow", "distillery", "azure.ai.ml"}
    assert "No module named 'psycopg'" in run("-c", "import psycopg").stderr


@pytest.mark.slow
def test_all_modules_are_imported_and_all_commands_explain_themselves() -> None:
    flows = [f"-m flows.{name}" for name in ("distill", "reproduce", "search", "batch_inference")]
    helped = ["", *command_names(), *flows]
    done = run("-c", EVERYTHING + EVERY_HELP, text="\n".join(helped))
    assert done.returncode == 0, done.stderr[-3000:]
    modules, _, helps = done.stdout.partition("\nhelp\n")
    assert {"distillery.cli", "distillery.registry.azureml", "tasks.stage"} <= set(modules.split())
    assert {"flows.distill", "flows.batch_inference"} <= set(modules.split())
    assert len(re.findall(r"(?i)\busage: ", helps)) == len(helped)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "setting", "extra"),
    [
        ("store list", {"DISTILLERY_STORE": "abfs://c@a.dfs.core.windows.net/x"}, "azure"),
        ("labels list", {"DISTILLERY_LABELS": "postgresql://a@127.0.0.1/b"}, "postgres"),
        ("models list", {"DISTILLERY_REGISTRY": "postgresql://a@127.0.0.1/b"}, "postgres"),
    ],
)
def test_what_needs_an_extra_says_which(command: str, setting: dict[str, str], extra: str) -> None:
    done = run("-m", "distillery.cli", *command.split(), **setting)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert f"install distillery[{extra}]" in done.stderr
