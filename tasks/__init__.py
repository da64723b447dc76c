"""Prefect's side of each stage: retries, cache key and artifacts around one domain call; none of the domain's logic."""
