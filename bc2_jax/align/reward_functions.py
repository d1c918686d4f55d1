"""Reward functions: Python functions of the user that score answers, with checked results.

    def reward(prompts: list[str], answers: list[str], rows: list[dict]) -> list[float]

`prompts` are the last user messages, `rows` the whole records of the prompts; all lists have the same length.
`align/checkable.py` has examples.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import itertools
import numbers
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from bc2_jax.agreement import first_decides
from bc2_jax.validation import require, show

_LEGAL = "it must be FILE.py:NAME or MODULE:NAME of a function"
_numbers_of_files = itertools.count()


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A user's function and its name for messages."""

    name: str
    function: Callable[..., Any]

    def __call__(self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The rewards, fp32 [number of answers].

        Process 0 calls the function; all processes get its result. Raises ValueError on all of them if the function
        raises (with the line), or does not return one finite number for each answer.
        """
        with jax.transfer_guard("allow"):  # the loop's guard is not meant for the function
            return np.array(first_decides(lambda: self._decide(prompts, answers, rows)), np.float32)

    def _decide(self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        with calls(f"reward function {self.name}", self.function):
            # Copies, which the function may change.
            returned = self.function(list(prompts), list(answers), copy.deepcopy(list(rows)))
            if isinstance(returned, Iterable) and not hasattr(returned, "__array__"):
                returned = returned if isinstance(returned, str | bytes | Mapping) else list(returned)
        return self._check(returned, len(answers))

    def _check(self, returned: Any, count: int) -> list[float]:
        legal = f"it must be {count} numbers, one for each answer"
        if hasattr(returned, "__array__"):
            returned = np.asarray(returned)
            is_list = returned.ndim == 1
        else:
            is_list = isinstance(returned, list)
        if not is_list:
            raise ValueError(f"reward function {self.name} returned {show(returned)}: {legal}.")
        if len(returned) != count:
            raise ValueError(f"reward function {self.name} returned {len(returned)} values: {legal}.")
        values = returned if isinstance(returned, list) else returned.tolist()
        return [self._number(value, place) for place, value in enumerate(values)]

    def _number(self, value: Any, place: int) -> float:
        number = finite_number(value)
        if number is None:
            raise ValueError(
                f"reward function {self.name} returned {show(value)} for answer {place}: each reward must be a number "
                "that is finite in fp32."
            )
        return number


def finite_number(value: Any) -> float | None:
    """`value` as a float; None if it is not a number that is finite in fp32."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # of numpy, jax and others
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= float(np.finfo(np.float32).max) else None


@contextlib.contextmanager
def calls(name: str, function: Any = None) -> Iterator[None]:
    """Runs user code: turns any exception into a ValueError with `name`, the exception and its line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} {_raised(error, function)}.") from error


def load_reward_function(name: str, field: str = "reward function") -> RewardFunction:
    """Loads FILE.py:NAME or MODULE:NAME. Raises ValueError, naming `field`, if it is missing or can't be loaded."""
    place, _, attribute = name.rpartition(":")
    require(bool(place) and attribute.isidentifier(), field, name, _LEGAL)
    if place.endswith(".py"):
        require(Path(place).is_file(), field, name, f"there is no file '{place}'")
    with calls(f"{field} = {name!r} can't be loaded: '{place}'"):
        module = _load_file(place) if place.endswith(".py") else importlib.import_module(place)
    function = getattr(module, attribute, None)
    defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    legal = f"'{place}' has no function {attribute!r}; it has {', '.join(defined) or 'none'}"
    require(callable(function), field, name, legal)
    assert callable(function)
    return RewardFunction(name, function)


def _load_file(path: str) -> ModuleType:
    # A unique module name: files in other folders, or modules, may have the same name.
    name = f"_reward_function_{next(_numbers_of_files)}_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # as for any path that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _raised(error: BaseException, function: Any = None) -> str:
    """The exception and its place: the innermost line in the function's own file, or of all."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(function, "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    message = f"raised {type(error).__name__}" + (f": {error}".rstrip(". ") if str(error) else "")
    if isinstance(error, SyntaxError):
        return message  # it names the line itself
    frame = (own or list(frames))[-1]
    return f"{message} (line {frame.lineno} of {frame.filename})"
