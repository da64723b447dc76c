"""Base models and their weights, on this machine. In: what a recipe names as a base model.
Out: a folder of safetensors, config and tokenizer, and the model that PyTorch loads from it.
May import recipe, records, storage and the modules above them (errors, machine, settings)."""
