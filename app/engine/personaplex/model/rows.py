"""What can be done to one row of any state: forget it, keep it, put it back.

A state is a dataclass of tensors or of further such dataclasses; axis 0 of every tensor is the row.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

State = TypeVar("State")


def leaves(state: Any) -> Iterator[Tensor]:
    """Every tensor of a state, always in the same order."""
    if isinstance(state, Tensor):
        yield state
    elif is_dataclass(state):
        for field in fields(state):
            yield from leaves(getattr(state, field.name))
    else:
        raise TypeError(f"{type(state).__name__} in a state; tensors and dataclasses of them are right")


def clear(state: Any, row: int) -> None:
    """Make a row as new, whatever its last owner left in it."""
    for tensor in leaves(state):
        tensor[row].zero_()


def first(state: State, count: int) -> State:
    """A view of the first rows as a state of its own."""
    view: State = _rebuilt(state, lambda tensor: tensor[:count])
    return view


def snapshot(state: State, row: int) -> State:
    """A copy of one row as a state of its own, with a single row."""
    copy: State = _rebuilt(state, lambda tensor: tensor[row : row + 1].clone())
    return copy


def restore(state: State, row: int, kept: State) -> None:
    """Put a snapshot into a row, its own or another."""
    for tensor, copy in zip(leaves(state), leaves(kept), strict=True):
        tensor[row].copy_(copy[0])


def _rebuilt(state: Any, of: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, Tensor):
        return of(state)
    return type(state)(**{field.name: _rebuilt(getattr(state, field.name), of) for field in fields(state)})
