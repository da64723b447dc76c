"""Train a student, or a teacher from gold labels. In: rendered rows, a base model and a recipe's
training settings. Out: a checkpoint's folder with weights or an adapter, and the figures.
May import models, labels, prompts, data, olive_workflow, storage, records, recipe and below."""
