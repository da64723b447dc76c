"""In: a hub data set, local files in JSONL, CSV or Parquet, or the shipped sample.
Out: validated rows, split and free of copies and leaks, as `<role>.jsonl` of records.Example.
May import: errors, machine, settings, recipe, records, storage, processes, olive_workflow.
"""
