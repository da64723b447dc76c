"""The groups of the command line, a module each; cli.py has the commands that stand alone.

In: what a user types. Out: lines on standard output. May import: all but cli.
"""
