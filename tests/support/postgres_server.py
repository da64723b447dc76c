"""PostgreSQL on this machine: a real server on a Unix socket, which can be stopped and started
again."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Self


class Postgres:
    """A server with data of its own, started by `with` or start(). Any password opens it.

    It is run by 'nobody' where the tests run as root. Raises RuntimeError where its programs are
    missing."""

    def __init__(self) -> None:
        config = shutil.which("pg_config")
        if config is None:
            raise RuntimeError("PostgreSQL's server programs are missing: install postgresql")
        found = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=True)
        self._programs = Path(found.stdout.strip())
        self._numbers = count()
        self._user = "nobody" if os.geteuid() == 0 else None
        # A socket's path is short, and 'nobody' may not enter the tests' own folders.
        self._folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        if self._user:
            shutil.chown(self._folder, self._user)
        options: list[str | Path] = [
            "-D",
            self._folder / "data",
            "-U",
            "owner",
            "--auth=trust",
            "--no-sync",
            "-E",
            "UTF8",
        ]
        self._run("initdb", *options)

    @property
    def host(self) -> str:
        """The folder of its socket, as PGHOST names it."""
        return str(self._folder)

    def url(
        self,
        driver: str = "postgresql",
        password: str = "any",
        user: str = "owner",
        database: str = "postgres",
    ) -> str:
        return f"{driver}://{user}:{password}@/{database}?host={self._folder}"

    def start(self) -> None:
        """Starts it on the same data; returns once it answers."""
        data = self._folder / "data"
        server: list[str | Path] = [self._programs / "postgres", "-D", data, "-k", self._folder]
        server += ["-c", "listen_addresses=", "-c", "fsync=off"]
        self._process = subprocess.Popen(
            server, user=self._user, stderr=subprocess.DEVNULL, cwd=self._folder
        )
        isready = self._programs / "pg_isready"
        ready: list[str | Path] = [isready, "-h", self._folder, "-U", "owner", "-q"]
        while subprocess.run(ready, check=False).returncode:
            assert self._process.poll() is None
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends it, and all connections with it. It keeps its data."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(20)

    def ask(self, query: str, user: str = "owner", database: str = "postgres") -> str:
        """What psql prints: a row a line, columns apart by |."""
        return self._run("psql", "-h", self._folder, "-U", user, "-Atc", query, database).strip()

    @contextmanager
    def new_database(self) -> Iterator[str]:
        """The URL of a database of its own, which is removed, with all connections to it."""
        name = f"own_{next(self._numbers)}"
        self.ask(f"CREATE DATABASE {name}")
        yield self.url(database=name)
        self.ask(f"DROP DATABASE {name} WITH (FORCE)")

    def dump(self) -> str:
        """All that the database holds, as SQL."""
        return self._run("pg_dump", "-h", self._folder, "-U", "owner", "postgres")

    def restore(self, dump: str) -> None:
        """Make what a dump holds, in an empty database."""
        owner = ("-h", self._folder, "-U", "owner", "-q", "-v", "ON_ERROR_STOP=1", "postgres")
        self._run("psql", *owner, text=dump)

    def _run(self, program: str, *arguments: str | Path, text: str = "") -> str:
        command = [self._programs / program, *arguments]
        done = subprocess.run(
            command, user=self._user, cwd=self._folder, input=text, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()
        shutil.rmtree(self._folder)
