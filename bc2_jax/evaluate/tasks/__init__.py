"""The benchmarks by name; a module is imported when its task is asked for."""

from __future__ import annotations

import difflib
import importlib

from bc2_jax.evaluate.task import Task

_FLORES = ("en", "fr", "es", "ar", "ru", "ja", "de")
TASKS = {
    name: f"bc2_jax.evaluate.tasks.{place}"
    for name, place in {
        "ceval": "ceval:VAL",
        "ceval_test": "ceval:TEST",
        "mmlu": "mmlu:TASK",
        "cmmlu": "cmmlu:TASK",
        "gaokao": "gaokao:TASK",
        "agieval": "agieval:TASK",
        "jecqa": "jecqa:TASK",
        "cmc": "cmc:TASK",
        "medqa_usmle": "medqa:USMLE",
        "medqa_mcmle": "medqa:MCMLE",
        "medmcqa": "medmcqa:TASK",
        "bbh": "bbh:TASK",
        "gsm8k": "gsm8k:TASK",
        "math": "competition_math:TASK",
        "humaneval": "humaneval:TASK",
        "humaneval_instruction": "humaneval:INSTRUCTED",
        "mbpp": "mbpp:TASK",
        **{f"flores_zh_{code}": f"flores:ZH_{code.upper()}" for code in _FLORES},
        **{f"flores_zh_{code}_all": f"flores:ALL_{code.upper()}" for code in _FLORES},
        "toxigen_like": "harm:TOXIGEN_LIKE",
        "bhed_like": "harm:BHED_LIKE",
    }.items()
}
"""Task name -> "module:attribute"."""


def find_task(name: str) -> Task:
    """Raises ValueError, with the names there are, for an unknown one."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"There is no task {name!r}.{meant} Known tasks: {', '.join(TASKS)}.")
    module, _, attribute = TASKS[name].partition(":")
    task: Task = getattr(importlib.import_module(module), attribute)
    return task
