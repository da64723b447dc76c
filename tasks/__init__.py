"""Prefect's side of each stage: retries, cache key, progress and artifacts around one domain call.

The domain's logic is in distillery/, which knows nothing of Prefect.
"""
