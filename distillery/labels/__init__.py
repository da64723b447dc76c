"""Labels: which of a teacher's answers become labels, and what is known about them.

In: rows (`Example`), the prompt and teacher settings, and an endpoint or labels that exist.
Out: the files of labels and rejected rows with their report; every answer, in the label store.
May import: errors, machine, settings, recipe, records, storage, processes, data, prompts, teacher.
"""
