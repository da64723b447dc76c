"""In: models to score, test rows with gold answers, rows that the baselines learn from.
Out: the scoreboard and the answers of all predictors, as files; the gate's decision.
Imports: inference, training, models, prompts, data, and what stands before them.
"""
