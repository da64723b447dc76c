"""A student as an OpenAI-compatible chat-completions server, or asked in the terminal.

In: an exported model's folder, and HTTP requests or questions. Out: answers and their
probabilities.
May import: errors, settings, storage, processes, prompts, inference,
registry.
"""
