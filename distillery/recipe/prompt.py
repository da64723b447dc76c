"""recipe/prompt"""

from typing import Literal, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Slice


class PromptRecipe(Slice):
    """The chat prompt of every stage. `user` has the places {question} and {choices}; `choice` is one option.

    The default text is that of the Build 2025 lab 329, notebook 01; {letters} in it becomes 'A', 'B', … or 'E'.
    `answer` is what the assistant says: the option's letter, or its text, where the options' likelihoods are compared
    and `user` may leave {choices} out. A teacher is asked for letters; student.prompt may ask otherwise."""

    system: str = "You are a helpful assistant. Your output should only be one of the {count} choices: {letters}."
    user: str = (
        "Answer the following multiple-choice question by selecting the correct option.\n\n"
        "Question: {question}\nAnswer Choices:\n{choices}"
    )
    choice: str = "({letter}) {text}"
    answer: Literal["letter", "text"] = "letter"
    max_tokens: int = Field(
        512, ge=8, description="Longer prompts, in the student's tokens, are set aside and listed"
    )

    @model_validator(mode="after")
    def _has_places(self) -> Self:
        if "{question}" not in self.user or (
            self.answer == "letter" and "{choices}" not in self.user
        ):
            raise ValueError("prompt.user needs the places {question} and {choices}")
        if "{letter}" not in self.choice or "{text}" not in self.choice:
            raise ValueError("prompt.choice needs the places {letter} and {text}")
        return self
