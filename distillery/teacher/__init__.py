"""The teacher: a chat-completions endpoint, and how it is asked.

In: the messages of a prompt and the teacher's settings (`TeacherRecipe`, TEACHER_MODEL_*).
Out: the completion and what it says, within the limits of the endpoint and of the budget.
May import: errors, settings, recipe, records, storage, prompts.
"""
