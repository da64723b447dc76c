"""Composition only, one flow per file. Start with distill.py."""

from tasks.environment import set_defaults

set_defaults()
