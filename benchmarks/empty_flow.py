"""A flow as large as the demo's, of tasks that do nothing: what Prefect itself costs."""

from prefect import flow, task


@task(persist_result=True, result_serializer="json")
def nothing(number: int) -> int:
    return number


@flow(persist_result=True, result_serializer="json")
def part(numbers: list[int]) -> list[int]:
    return [nothing(number) for number in numbers]


@flow(name="empty", persist_result=True, result_serializer="json")
def empty() -> list[int]:
    """Ten tasks, of which four are in three subflows."""
    return [*part([1]), *part([2, 3]), *part([4]), *[nothing(number) for number in range(5, 11)]]


if __name__ == "__main__":
    empty()
