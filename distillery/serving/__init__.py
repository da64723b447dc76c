"""A student as an OpenAI-compatible chat-completions server.

In: an exported model's folder and HTTP requests. Out: answers and their log-probabilities.
May import: errors, settings, storage, processes, prompts, inference,
registry.
"""
