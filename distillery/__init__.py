"""Distil a large language model into a small one that you own. Start reading at flows/distill.py,
then records.py."""

__version__ = "0.1.0"
