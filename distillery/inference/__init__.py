"""In: a student's ONNX model folder, and Examples or a file of rows.
Out: letters with probabilities, generated text, predictions.jsonl and failed.jsonl.
May import: what data and prompts may import, data, prompts, teacher, labels, models, training.
"""
