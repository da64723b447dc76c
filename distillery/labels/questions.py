"""labels/questions"""

from dataclasses import dataclass

from distillery.prompts import Message, render_messages
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example, digest_of
from distillery.teacher.answers import rotated_order


def request_key(
    identity: str, messages: list[Message], settings: TeacherRecipe, vote: int = 0
) -> str:
    """SHA-256 (hex) of what is asked of whom: the teacher's identity, the messages, the temperature, the token limit,
    whether log-probabilities are wanted, whether JSON is, and which of several votes it is. Not the URL, the SDK, the
    key or the row's place."""
    asked = {
        "teacher": identity,
        "messages": messages,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "soft_labels": settings.asks_log_probabilities,
    }
    # Left out where they ask for nothing, so that what was asked before they were there is still known.
    asked |= {"form": "json"} if settings.answers.form == "json" else {}
    asked |= {"vote": vote} if vote else {}
    return digest_of(asked)


@dataclass(frozen=True, slots=True)
class Question:
    """One request for a row: `order` holds the row's option at each place that was shown."""

    key: str
    messages: list[Message]
    order: list[int]
    row: Example

    @property
    def letters(self) -> tuple[str, ...]:
        return self.row.letters

    @property
    def choices(self) -> list[str]:
        return [self.row.choices[option] for option in self.order]


def questions(
    row: Example, prompt: PromptRecipe, recipe: TeacherRecipe, identity: str
) -> list[Question]:
    """What is asked for a row: in each order of its options, each vote."""
    asked = []
    for number in range(min(recipe.answers.orders, len(row.choices))):
        order = rotated_order(len(row.choices), number)
        shown = (
            row.model_copy(update={"choices": tuple(row.choices[option] for option in order)})
            if number
            else row
        )
        messages = render_messages(shown, prompt)
        if recipe.answers.form == "rationale":
            last = messages[-1]
            messages = [
                *messages[:-1],
                last | {"content": f"{last['content']}\n\n{recipe.answers.instruction}"},
            ]
        for vote in range(recipe.answers.votes):
            asked.append(
                Question(request_key(identity, messages, recipe, vote), messages, order, row)
            )
    return asked
