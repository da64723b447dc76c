"""Composition only, one flow a file. Start with distill.py."""
