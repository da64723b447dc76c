"""Composition only, one flow per file. Start with distill.py."""

from pathlib import Path

from tasks.environment import close_temporary_server, refuse_foreign_settings, set_defaults

refuse_foreign_settings(Path.cwd())
set_defaults()
close_temporary_server()
