"""Rewards that a Python function of the user gives to answers; what it returns is checked before anything is learned.

    def reward(prompts: list[str], answers: list[str], rows: list[dict]) -> list[float]

`prompts` are the texts of the user messages that were answered, `rows` the records they come from, with all of their
fields. All three are as long as the list to return. `align/checkable.py` has examples.
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

_LEGAL = "it must be FILE.py:NAME or MODULE:NAME, where NAME is a function"
_numbers_of_files = itertools.count()


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A function of the user under the name by which messages call it."""

    name: str
    function: Callable[..., Any]

    def __call__(self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The rewards, fp32 [number of answers].

        All processes call it, process 0 alone calls the function, and all get what it returns. Raises ValueError on all
        of them if the function raises, naming the line, or does not return as many finite numbers as there are answers.
        """
        with jax.transfer_guard("allow"):  # that of the loop is not the function's business
            return np.array(first_decides(lambda: self._decide(prompts, answers, rows)), np.float32)

    def _decide(self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        with calls(f"reward function {self.name}", self.function):
            # Copies: what the function does to them must not change what it is given next time.
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
    """Around code of the user: raises ValueError, `name` and what it raised in which line, for whatever it raises."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} {_raised(error, function)}.") from error


def load_reward_function(name: str, field: str = "reward function") -> RewardFunction:
    """The function that `name` means: FILE.py:NAME or MODULE:NAME.

    Raises ValueError, naming `field`, for a file, module or function that is not there or can't be loaded.
    """
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
    # Under a name of its own: files of other folders may be called the same, and like existing modules.
    name = f"_reward_function_{next(_numbers_of_files)}_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # as for any path that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _raised(error: BaseException, function: Any = None) -> str:
    """What was raised and where: the innermost line of the function's own file, or of all."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(function, "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    message = f"raised {type(error).__name__}" + (f": {error}".rstrip(". ") if str(error) else "")
    if isinstance(error, SyntaxError):
        return message  # it names the line itself
    frame = (own or list(frames))[-1]
    return f"{message} (line {frame.lineno} of {frame.filename})"
