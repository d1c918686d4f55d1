"""Any task of lm-eval (EleutherAI's lm-evaluation-harness) put to a model of ours; needs the extra `eval`.

lm-eval makes the requests and the figures, the Scorer answers. Nothing is downloaded unless HF_HUB_OFFLINE=0 and
HF_DATASETS_OFFLINE=0 are set: a task then reads its data from files that its YAML names.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bc2_jax.agreement import require_agreement
from bc2_jax.align.chat import Message, encode_prompt
from bc2_jax.align.conversation import answer_ends
from bc2_jax.convert.chat_template import CHAT_TEMPLATE
from bc2_jax.evaluate.encoding import Request
from bc2_jax.evaluate.scorer import Scorer
from bc2_jax.files import fingerprint
from bc2_jax.validation import choices, require

for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(_name, "1")  # these libraries read it when they are imported
os.environ.setdefault(
    "DISABLE_MULTIPROC", "1"
)  # for its bootstrap lm-eval would fork a process in which JAX has threads
try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ValueError(f"Tasks of lm-eval need lm-eval ({error}): pip install 'bc2_jax[eval]'.") from error

Progress = Callable[[int, int], object]
"""Told how many requests are done, and of how many."""
_DEFAULT_NEW_TOKENS = 256
"""As in lm-eval's own models."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the same setting, the one that counts first."""
_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""With their defaults; greedy requests have none of them."""
_OTHERS = ("until", "do_sample", "repetition_penalty")
_KEPT_AT_ONCE = 2048
"""Requests after which a cache is given what is known."""


class _Chat(NamedTuple):
    """A conversation as ids: its text alone could forge a role."""

    head: list[int]
    tail: str
    """The beginning of the answer, which the model is to continue."""


class LmEvalModel(TemplateLM):
    """What lm-eval asks, answered by a Scorer; on several processes each of them runs lm-eval on the same files."""

    backend = "causal"

    def __init__(self, scorer: Scorer, progress: Progress | None = None, name: str = "bc2_jax") -> None:
        super().__init__()
        self.scorer, self.progress, self.name = scorer, progress, name
        self._chats: dict[str, _Chat] = {}

    # ------------------------------------------------------------------------------------------------ what the model is

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    @property
    def eot_token_id(self) -> int:
        return self.scorer.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.scorer.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return self.scorer.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval puts into the config of its results."""
        return {
            "model": self.name,
            "max_length": self.max_length,
            "prefix_token_id": self.prefix_token_id,
            "tokenizer_sha256": self.tokenizer_name,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; Baichuan 2 adds none at either end."""
        return self.scorer.tokenizer.encode(string)

    # ----------------------------------------------------------------------------------------------------------- scores

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats of the continuation, whether it is what greedy decoding gives) of each (context, continuation)."""
        return self._answer("loglikelihood", [request.args for request in requests], self._score)

    def _score(self, pairs: Sequence[tuple[str, str]], progress: Progress | None) -> list[tuple[float, bool]]:
        if not self._chats:
            return self.scorer.loglikelihood(pairs, progress=progress)
        return self._score_ids([self._encode_chat(*pair) for pair in pairs], progress)

    def _score_ids(self, requests: Sequence[Request], progress: Progress | None) -> list[tuple[float, bool]]:
        return [(score.log_prob, score.is_greedy) for score in self.scorer.score(requests, progress=progress)]

    def _encode_chat(self, context: str, continuation: str) -> Request:
        chat = self._chats.get(context, _Chat([], context))
        if not chat.tail and chat.head:
            return Request(chat.head, self.scorer.tokenizer.encode(continuation))
        pair = self.scorer.encode_pair(chat.tail, continuation)
        return Request([*chat.head, *pair.context], pair.continuation)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """`loglikelihood` of what is ids already: ((context, continuation), context ids, continuation ids)."""
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        return self._score_ids(pairs, None)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each text, every token of which is predicted once."""
        return self._answer("loglikelihood_rolling", [request.args for request in requests], self._roll)

    def _roll(self, texts: Sequence[tuple[str]], progress: Progress | None) -> list[float]:
        return [rolled.log_prob for rolled in self.scorer.roll([text for (text,) in texts], progress=progress)]

    # ------------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each (context, generation_kwargs), up to a stop text, eos or the most tokens.

        A prompt keeps as many of its last tokens as the new ones leave room for. Raises ValueError for a setting that
        we do not have.
        """
        return self._answer("generate_until", [request.args for request in requests], self._generate)

    def _generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]], progress: Progress | None) -> list[str]:
        groups: dict[str, list[int]] = {}
        for place, (_, given) in enumerate(requests):
            stops, length, settings = read_generation(given)
            groups.setdefault(json.dumps([stops, length, settings]), []).append(place)
        texts = [""] * len(requests)
        done = 0
        for key, places in groups.items():
            stops, length, settings = json.loads(key)
            found = self._generate_alike([requests[place][0] for place in places], stops, length, settings)
            for place, text in zip(places, found, strict=True):
                texts[place] = text
            done += len(places)
            if progress is not None:
                progress(done, len(requests))
        return texts

    def _generate_alike(
        self, contexts: Sequence[str], stops: list[str], length: int, settings: Mapping[str, Any]
    ) -> list[str]:
        tokenizer = self.scorer.tokenizer
        prompts: list[str | Sequence[int]] = list(contexts)
        if self._chats:
            settings = {**settings, "eos_token_id": answer_ends(None, self.scorer.model.config, tokenizer)}
            chats = [self._chats.get(context, _Chat([], context)) for context in contexts]
            prompts = [chat.head + tokenizer.encode(chat.tail) for chat in chats]
        asked = [(prompt, stops, length) for prompt in prompts]
        return [generated.text for generated in self.scorer.generate_texts(asked, None, **settings)]

    # ------------------------------------------------------------------------------------------------------------- chat

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text; what is asked with that text is asked with the ids of `bc2_jax.align.chat`.

        Without `add_generation_prompt` the last message is the beginning of an answer, which is to be continued. Raises
        ValueError as `encode_prompt`.
        """
        tokenizer = self.scorer.tokenizer
        history = [{"role": message["role"], "content": message["content"]} for message in chat_history]
        goes_on = not add_generation_prompt and history and history[-1]["role"] == "assistant"
        tail = history[-1]["content"] if goes_on else ""
        head = history[:-1] if goes_on else history
        ids = encode_prompt(tokenizer, head, 0, 1 << 30)
        marks = {"system": "", "user": tokenizer.piece(tokenizer.user_id)}
        answer = tokenizer.piece(tokenizer.assistant_id)
        text = "".join(marks.get(message["role"], answer) + message["content"] for message in head) + answer + tail
        chat = _Chat(ids, tail)
        if self._chats.setdefault(text, chat) != chat:
            raise ValueError(f"Two conversations have the text {text[-80:]!r}: a message spells the mark of a role.")
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The same as Jinja, which lm-eval records."""
        return CHAT_TEMPLATE if chat_template else None

    # -------------------------------------------------------------------------------------------------- order and cache

    def _answer(self, kind: str, requests: list[Any], answer: Callable[[list[Any], Progress | None], list[Any]]) -> Any:
        """The answers to all requests; a cache of lm-eval gets them piece by piece, so that a stop loses little."""
        digest = fingerprint([kind, requests], sort_keys=False)
        require_agreement({f"lm-eval's {kind} requests": digest})
        keeps = self.cache_hook.dbdict is not None
        answers: list[Any] = []
        for part in _cut(requests, _KEPT_AT_ONCE if keeps else len(requests)):
            answers += answer(part, self._progress_from(len(answers), len(requests)))
            if keeps:
                for request, found in zip(part, answers[-len(part) :], strict=True):
                    self.cache_hook.add_partial(kind, request, found)
        return answers

    def _progress_from(self, first: int, total: int) -> Progress | None:
        if (progress := self.progress) is None:
            return None
        return lambda done, _: progress(first + done, total)


def _cut(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), max(size, 1)))


def read_generation(given: Mapping[str, Any]) -> tuple[list[str], int, dict[str, float]]:
    """Stop texts, most new tokens and settings of sampling of a request's generation_kwargs.

    do_sample is false unless temperature is above 0; a greedy request obeys no other setting but repetition_penalty.
    Raises ValueError for settings that we do not have: they would change the answers.
    """
    unknown = [name for name in given if name not in (*_LENGTHS, *_SAMPLING, *_OTHERS)]
    legal = f"legal are {choices((*_OTHERS, *_SAMPLING, *_LENGTHS))}"
    require(not unknown, "generation_kwargs", dict(given), f"we do not have {', '.join(unknown)}; {legal}")
    until = given.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    lengths = [given[name] for name in _LENGTHS if given.get(name) is not None]
    length = int(lengths[0]) if lengths else _DEFAULT_NEW_TOKENS
    settings: dict[str, float] = {"temperature": 0.0, "repetition_penalty": given.get("repetition_penalty") or 1.0}
    temperature = given.get("temperature")
    if given.get("do_sample", bool(temperature)):
        legal = "with do_sample it must be above 0"
        require(temperature is None or temperature > 0, "generation_kwargs: temperature", temperature, legal)
        settings |= {name: default if given.get(name) is None else given[name] for name, default in _SAMPLING.items()}
    return stops, length, settings


def run_lm_eval(
    scorer: Scorer | Callable[[], Scorer], tasks: Sequence[str], *,
    include_path: str | Path | Sequence[str | Path] | None = None,
    name: str = "bc2_jax", shots: int | None = None, limit: float | None = None, chat: bool = False,
    system: str | None = None, cache: Path | None = None, identity: str = "", progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What lm-eval's `simple_evaluate` returns for `tasks`, the same on every process: results, samples, configs.

    `tasks` are names of tasks, groups or tags of the YAML files below `include_path`, or of those that come with
    lm-eval, which are only looked at if a name is not in `include_path`, as that takes a while. `shots` and `limit` are
    lm-eval's. `chat` asks in our chat format, after the `system` text. `cache` is a folder in which answers are kept
    for the next call with the same `identity`, which must say all that an answer depends on beside the request: lm-eval
    knows answers by their request alone. A `scorer` that is still to be loaded is called once the tasks are known to be
    there. Raises ValueError for unknown tasks, data that can't be read, and settings that we do not have.
    """
    require(len(tasks) > 0, "tasks", list(tasks), "at least one is needed")
    require(cache is None or bool(identity), "identity", identity, "a cache needs to know what the answers are of")
    alone = jax.process_count() == 1
    require(cache is None or alone, "cache", str(cache), "answers are kept by a single process only")
    from lm_eval import simple_evaluate

    manager = _find_tasks(tasks, include_path)
    model = LmEvalModel(scorer if isinstance(scorer, Scorer) else scorer(), progress, name)
    kept = None if cache is None else str(cache / hashlib.sha256(f"{identity} {chat}".encode()).hexdigest()[:32])
    try:
        return simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, num_fewshot=shots, limit=limit, use_cache=kept,
            apply_chat_template=chat, system_instruction=system, log_samples=True,
        )  # fmt: skip
    except (FileNotFoundError, ConnectionError) as error:
        offline = (
            "" if os.environ["HF_DATASETS_OFFLINE"] == "0" else "; nothing is downloaded: HF_DATASETS_OFFLINE is set"
        )
        raise ValueError(f"lm-eval: the data of {', '.join(tasks)} can't be read ({error}){offline}.") from error


def _find_tasks(tasks: Sequence[str], include_path: str | Path | Sequence[str | Path] | None) -> Any:
    """lm-eval's TaskManager, which has all of `tasks`."""
    from lm_eval.tasks import TaskManager

    given = [include_path] if isinstance(include_path, str | Path) else list(include_path or ())
    for path in given:
        require(Path(path).exists(), "include_path", str(path), "there is no such folder")
    paths = [str(Path(path).absolute()) for path in given]
    manager = TaskManager(include_path=paths, include_defaults=False) if paths else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=paths or None, include_defaults=True)
    for task in tasks:
        if task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.5)
            meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            where = f" and below {', '.join(paths)}" if paths else ""
            raise ValueError(f"lm-eval has no task {task!r} among its own{where}{meant.rstrip('?')}.")
    return manager


def tabulate(results: Mapping[str, Any]) -> str:
    """lm-eval's own tables of its results, of the tasks and of the groups."""
    from lm_eval.utils import make_table

    tables = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
    return "\n".join(tables)


def write_results(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes results.json and the samples of each task, samples_TASK.jsonl, as lm-eval does; returns their paths."""
    from lm_eval.utils import handle_non_serializable

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "results.json"]
    kept = {name: value for name, value in results.items() if name != "samples"}
    paths[0].write_text(json.dumps(kept, indent=1, ensure_ascii=False, default=handle_non_serializable) + "\n", "utf-8")
    for task, samples in results.get("samples", {}).items():
        paths.append(folder / f"samples_{task}.jsonl")
        lines = [json.dumps(sample, ensure_ascii=False, default=handle_non_serializable) + "\n" for sample in samples]
        paths[-1].write_text("".join(lines), "utf-8")
    return paths
