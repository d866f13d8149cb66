"""The states of a run's stages: those of its tasks, and what the run's folder tells beside. Pure: no calls, no clock.

A task may run several stages one after the other, and the cluster knows the task alone. Which of them is at work, or
has failed, follows from their results: a complete manifest, the reason that a failed one left. Without these, such a
task is told as a whole.
"""

import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from dice_core.stages.place import Place
from pipelines.kfp.task_graph import GraphTask
from pipelines.kfp.task_states import FAILED, NOT_RUN, OK, SKIPPED, STOPPED, UNKNOWN, WAITING, TaskState

_OF_ALL = (OK, SKIPPED, NOT_RUN, WAITING)
"""A task in one of these has all of its stages in it."""
_COMPLETE = "its results are complete"


@dataclass(frozen=True)
class Results:
    """What a run's folder tells."""

    complete: Container[str]
    """Places below the run with complete results."""
    reasons: Mapping[str, str]
    """Why the last attempt of a stage failed, by its place below the run."""


def tell_more(states: Sequence[TaskState], tasks: Sequence[GraphTask]) -> bool:
    """Return whether the run's folder may know what the states of tasks leave open."""
    return any(
        state.state in (UNKNOWN, FAILED) or (len(_parts(task)) > 1 and state.state not in _OF_ALL)
        for state, task in zip_longest(states, tasks)
    )


def stage_states(
    states: Sequence[TaskState], tasks: Sequence[GraphTask], results: Results | None = None
) -> list[TaskState]:
    """Return the states of stages, one after the other as they run.

    Args:
        states: of the tasks.
        tasks: in the same order; none: there is nothing to look up.
        results: of the run; None: not known, or not asked for.
    """
    return [told for pair in zip_longest(states, tasks) for told in _of_task(*pair, results)]


def _parts(task: GraphTask | None) -> tuple[Place, ...]:
    return task.place.parts if task and task.place else ()


def _of_task(state: TaskState, task: GraphTask | None, results: Results | None) -> Iterator[TaskState]:
    places = _parts(task)
    if len(places) < 2:
        yield _with_result(state, places[0].below if places else "", results)
    elif state.state in _OF_ALL:
        for place in places[:-1]:
            yield TaskState(place.label, state.state)
        yield _last(state, places)
    elif results is None:
        yield state
    elif state.state == UNKNOWN:
        for place in places:
            yield _with_result(dataclasses.replace(state, label=place.label), place.below, results)
    else:
        yield from _around(_at_work(places, results), state, places, results)


def _with_result(state: TaskState, place: str, results: Results | None) -> TaskState:
    if results is None:
        return state
    reason = results.reasons.get(place, "")
    if state.state == FAILED and reason:
        return dataclasses.replace(state, note=reason)
    if state.state != UNKNOWN or not place:
        return state
    if reason:
        return dataclasses.replace(state, note=f"its last attempt failed: {reason}")
    return dataclasses.replace(state, state=OK, note=_COMPLETE) if place in results.complete else state


def _at_work(places: Sequence[Place], results: Results) -> int:
    """Return which stage of a task is at work, or was at last: the one that failed, else the first that is to do."""
    failed = [index for index, place in enumerate(places) if place.below in results.reasons]
    left = [index for index, place in enumerate(places) if place.below not in results.complete]
    return [*failed, *left, len(places) - 1][0]


def _around(index: int, state: TaskState, places: Sequence[Place], results: Results) -> Iterator[TaskState]:
    """Yield the states of a task's stages, of which one has the task's own."""
    for place in places[:index]:
        is_complete = place.below in results.complete
        yield TaskState(place.label, OK if is_complete else UNKNOWN, note=_COMPLETE if is_complete else "")
    yield _with_result(_last(state, places[: index + 1]), places[index].below, results)
    for place in places[index + 1 :]:
        yield TaskState(place.label, NOT_RUN if state.state in (FAILED, STOPPED) else WAITING)


def _last(state: TaskState, places: Sequence[Place]) -> TaskState:
    """Return the state of the last of some stages; the time is that of all of them."""
    others = ", ".join(place.stage for place in places[:-1]) if state.seconds >= 1 else ""
    note = "; ".join(filter(None, [f"with {others}" if others else "", state.note]))
    return dataclasses.replace(state, label=places[-1].label, note=note)
