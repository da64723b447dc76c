"""The model registry: named, numbered models that carry their history, in MLflow or Azure ML.

In: the folder of an exported model, tags and provenance. Out: a RegisteredModel, or its files,
verified.
May import: errors, settings, recipe, records, storage, data, labels, evaluation, export (the
ladder's table).
"""
