"""In: the records of a run, and the folders of its evaluation and its labels.
Out: the run's page, one HTML file that opens offline.
Imports: export (the ladder's table), evaluation, labels, and what stands before them.
"""
