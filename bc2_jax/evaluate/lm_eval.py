"""Runs tasks of lm-eval (EleutherAI's lm-evaluation-harness) on our models; needs the extra `eval`.

lm-eval makes requests and metrics, the Scorer answers. Nothing is downloaded unless HF_HUB_OFFLINE=0 and
HF_DATASETS_OFFLINE=0 are set: tasks read their data from files named in their YAML.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bc2_jax.agreement import require_agreement
from bc2_jax.align.chat import Message, encode_prompt
from bc2_jax.align.conversation import answer_ends
from bc2_jax.convert.chat_template import CHAT_TEMPLATE
from bc2_jax.evaluate.encoding import Request
from bc2_jax.evaluate.scorer import Progress, Scorer
from bc2_jax.files import fingerprint
from bc2_jax.validation import choices, require

for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(_name, "1")  # read by these libraries at import
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap would fork a process with JAX's threads
try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ValueError(f"Tasks of lm-eval need lm-eval ({error}): pip install 'bc2_jax[eval]'.") from error

_DEFAULT_NEW_TOKENS = 256  # as in lm-eval's own models
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the same setting, by priority."""
_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # settings of sampled requests and their defaults
_OTHERS = ("until", "do_sample", "repetition_penalty")
_KEPT_AT_ONCE = 2048  # requests between writes to the cache


class _Chat(NamedTuple):
    """A conversation as ids: its text could forge a role."""

    head: list[int]
    tail: str  # beginning of the answer to continue


class LmEvalModel(TemplateLM):
    """lm-eval's model interface on a Scorer; each of several processes runs lm-eval on the same files."""

    backend = "causal"

    def __init__(self, scorer: Scorer, progress: Progress | None = None, name: str = "bc2_jax") -> None:
        super().__init__()
        self.scorer, self.progress, self.name = scorer, progress, name
        self._chats: dict[str, _Chat] = {}

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
        """For the config in lm-eval's results."""
        return {
            "model": self.name,
            "max_length": self.max_length,
            "prefix_token_id": self.prefix_token_id,
            "tokenizer_sha256": self.tokenizer_name,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; Baichuan 2 adds none at either end."""
        return self.scorer.tokenizer.encode(string)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, whether it is greedy) of each (context, continuation)."""
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
        """`loglikelihood` of ((context, continuation), context ids, continuation ids)."""
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        return self._score_ids(pairs, None)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each text, every token predicted once."""
        return self._answer("loglikelihood_rolling", [request.args for request in requests], self._roll)

    def _roll(self, texts: Sequence[tuple[str]], progress: Progress | None) -> list[float]:
        return [rolled.log_prob for rolled in self.scorer.roll([text for (text,) in texts], progress=progress)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of each (context, generation_kwargs) up to a stop text, eos or the token limit.

        Long prompts lose their first tokens. Raises ValueError for an unsupported setting.
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

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text; requests with this text are asked with the ids of `bc2_jax.align.chat`.

        Without `add_generation_prompt` the last message is the beginning of an answer to continue. Raises ValueError as
        `encode_prompt`.
        """
        tokenizer = self.scorer.tokenizer
        history = [{"role": message["role"], "content": message["content"]} for message in chat_history]
        is_begun = not add_generation_prompt and history and history[-1]["role"] == "assistant"
        tail = history[-1]["content"] if is_begun else ""
        head = history[:-1] if is_begun else history
        ids = encode_prompt(tokenizer, head, 0, 1 << 30)
        marks = {"system": "", "user": tokenizer.piece(tokenizer.user_id)}
        answer = tokenizer.piece(tokenizer.assistant_id)
        text = "".join(marks.get(message["role"], answer) + message["content"] for message in head) + answer + tail
        chat = _Chat(ids, tail)
        if self._chats.setdefault(text, chat) != chat:
            raise ValueError(f"Two conversations have the text {text[-80:]!r}: a message spells the mark of a role.")
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The same as Jinja, for lm-eval's records."""
        return CHAT_TEMPLATE if chat_template else None

    def _answer(self, kind: str, requests: list[Any], answer: Callable[[list[Any], Progress | None], list[Any]]) -> Any:
        """Answers all requests; with a cache in parts, each saved when done."""
        digest = fingerprint([kind, requests], sort_keys=False)
        require_agreement({f"lm-eval's {kind} requests": digest})
        keeps = self.cache_hook.dbdict is not None
        answers: list[Any] = []
        size = _KEPT_AT_ONCE if keeps else max(len(requests), 1)
        for start in range(0, len(requests), size):
            part = requests[start : start + size]
            answers += answer(part, self._progress_from(len(answers), len(requests)))
            if keeps:
                for request, found in zip(part, answers[-len(part) :], strict=True):
                    self.cache_hook.add_partial(kind, request, found)
        return answers

    def _progress_from(self, first: int, total: int) -> Progress | None:
        if (progress := self.progress) is None:
            return None
        return lambda done, _: progress(first + done, total)


def read_generation(given: Mapping[str, Any]) -> tuple[list[str], int, dict[str, float]]:
    """(stop texts, new tokens, sampling settings) of generation_kwargs.

    do_sample defaults to temperature > 0; greedy requests use only repetition_penalty. Raises ValueError for
    unsupported settings, which would change the answers.
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
    """The result of lm-eval's `simple_evaluate`, the same on every process: results, samples, configs.

    `tasks`: tasks, groups or tags of the YAML files in `include_path`, or of lm-eval itself, which is searched only for
    names not in `include_path` (slow). `shots`, `limit`: lm-eval's. `chat`: ask in our chat format, after `system`.
    `cache`: folder that keeps answers for calls with the same `identity`, which must name everything an answer depends
    on besides the request. `scorer` may be a function, called after the tasks are found. Raises ValueError for unknown
    tasks, unreadable data and unsupported settings.
    """
    require(len(tasks) > 0, "tasks", list(tasks), "at least one is needed")
    require(cache is None or bool(identity), "identity", identity, "a cache needs the identity of the model")
    alone = jax.process_count() == 1
    require(cache is None or alone, "cache", str(cache), "only a single process can keep answers")
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
    """A TaskManager of lm-eval with all of `tasks`."""
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
    """lm-eval's tables of tasks and groups."""
    from lm_eval.utils import make_table

    tables = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
    return "\n".join(tables)


def write_results(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes results.json and samples_TASK.jsonl of each task, as lm-eval does; returns their paths."""
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
