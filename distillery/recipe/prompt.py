"""The prompt slice: the texts with which teacher and student are asked."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Slice


class PromptRecipe(Slice):
    """The chat prompt of every stage. The default texts are those of the Build 2025 lab 329."""

    added_later: ClassVar[frozenset[str]] = frozenset({"pooling"})

    system: str = (
        "You are a helpful assistant. "
        "Your output should only be one of the {count} choices: {letters}."
    )
    """The system message; empty leaves it out. {count} becomes the number of options in words,
    {letters} their letters: 'A', 'B' or 'C'. With task.kind: classify, {labels} becomes the
    classes, one a line; with extract, {schema} the JSON Schema of the answers."""

    user: str = (
        "Answer the following multiple-choice question by selecting the correct option.\n\n"
        "Question: {question}\nAnswer Choices:\n{choices}"
    )
    """The user message. {question} or {text} becomes the question or text, {choices} the options,
    one a line, and the name of a column in dataset.fields that column's text. {text} and these
    columns may stand in `system` too where answers are written. What all prompts begin with is
    computed once, so put what never changes first."""

    choice: str = "({letter}) {text}"
    """One line of {choices}: {letter} becomes the option's letter, {text} its text."""

    answer: Literal["letter", "text", "class", "written"] = "letter"
    """What the assistant says. letter: the option's letter. text: the option's text, or the name of
    the class; the model chooses the likeliest, and `user` may leave {choices} out. It is for
    student.prompt or, with task.kind: choice and teacher.kind: local, for teacher and student: an
    endpoint doesn't tell how likely the texts are. class: with task.kind: classify, the class. A
    student answers with one token of its own for each class; an endpoint writes the name. written:
    with task.kind: extract or generate, a text of its own."""

    pooling: Literal["mean_and_last", "mean", "last"] = "mean_and_last"
    """With answer: class, what a student reads the class from. mean: the mean of the hidden states
    of the text's tokens. last: that of the prompt's last token. mean_and_last: two thirds of the
    one and a third of the other."""

    max_tokens: int = Field(512, ge=8)
    """Tokens of the student's tokenizer that a prompt may have. Rows with longer prompts are set
    aside and listed in training, and count as wrong in evaluation."""

    @model_validator(mode="after")
    def check_placeholders(self) -> Self:
        if self.answer in ("class", "written"):
            if "{" not in self.user:
                raise ValueError("user needs the placeholder {text}, or a column of dataset.fields")
            return self
        choices_missing = self.answer == "letter" and "{choices}" not in self.user
        if "{question}" not in self.user or choices_missing:
            raise ValueError("user needs the placeholders {question} and {choices}")
        if "{letter}" not in self.choice or "{text}" not in self.choice:
            raise ValueError("choice needs the placeholders {letter} and {text}")
        return self
