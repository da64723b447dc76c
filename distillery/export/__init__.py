"""In: a trained student, with or without an adapter; the recipe's form, or a ladder of forms.
Out: a folder that ONNX Runtime GenAI loads; for a ladder, also how each form compares.
Imports: evaluation (for the ladder), inference, training, models, olive_workflow and before.
"""
