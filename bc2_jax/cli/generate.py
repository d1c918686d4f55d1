"""Continues text with a model: a folder in the released PyTorch layout, or a bc2_jax checkpoint or run.

bc2 generate CHECKPOINT --prompt "登鹳雀楼->"
bc2 generate CHECKPOINT --escapes --prompt "登鹳雀楼->王之涣\\n夜雨寄北->" --stop "\\n"
bc2 generate CHECKPOINT --prompts-file prompts.txt --greedy --max-new-tokens 64
bc2 generate CHECKPOINT --chat --system "Answer in one sentence."
bc2 generate --chat --url http://127.0.0.1:8000

A prompt is taken as it is: a backslash is a backslash, unless --escapes is given. U+2581 alone becomes a space, because
the tokenizer spells spaces so. One prompt on a terminal is answered as the text is written; several are printed when
all are done. A continuation ends at an eos of the model (all that config.json and generation_config.json name), before
a --stop text or after --max-new-tokens.

With --chat it is a conversation: a line is a user message, from a terminal or a pipe; the answer is printed as it is
written. Settings that are not given are then those of the model's generation_config.json. With --url a server answers
(bc2 serve, or another with OpenAI's API), with its own settings where none are given.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import local_path, read_argument, run_program

KEY_VARIABLE = "BC2_API_KEY"
LOCAL = ("checkpoint", "adapter", "dtype", "tensor", "quantize", "kv", "long_context", "max_length")
"""Arguments of a model that is run here."""
SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
"""Options that are settings of generation."""
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=local_path, nargs="?", help="not with --url")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--prompts-file", type=local_path, metavar="FILE", help="one prompt a line; empty lines are none"
    )
    parser.add_argument("--encoding", default="utf-8", help="of FILE, such as gb18030 or utf-16 (default utf-8)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument(
        "--escapes", action="store_true",
        help=r"in prompts and stop texts \n is a newline, \t a tab, \r a carriage return and \\ a backslash",
    )  # fmt: skip
    parser.add_argument("--chat", action="store_true", help="talk with the model; /exit or Ctrl-D ends it")
    parser.add_argument("--url", help="with --chat: the server to talk with, such as http://127.0.0.1:8000")
    parser.add_argument(
        "--api-key-file", type=local_path, metavar="F",
        help=f"has the server's API key in its first line; else it is that in the variable {KEY_VARIABLE}, if any",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="what a chat model is told before the conversation")
    parser.add_argument(
        "--system-file", type=local_path, metavar="FILE", help="the same from a file, its last newline cut"
    )
    parser.add_argument(
        "--adapter", type=local_path, metavar="DIR", help="a LoRA adapter on the model, as PEFT writes it"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help="default 256; with --chat 2048, or half of the model's length if that is less",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, help="0 takes the most likely token (default 0.3)")
    parser.add_argument("--top-k", type=int, help="choose among this many tokens; 0 for all (default 5)")
    parser.add_argument("--top-p", type=float, help="choose among tokens of this total probability (default 0.85)")
    parser.add_argument("--repetition-penalty", type=float, help="1 for none (default 1.05)")
    parser.add_argument("--seed", type=int, help="default 0; with --url the server draws one")
    parser.add_argument("--greedy", action="store_true", help="same as --temperature 0 --repetition-penalty 1")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default bfloat16")
    parser.add_argument("--tensor", type=int, metavar="N", help="use all devices, cutting heads and vocabulary in N")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="keep the weights in a half or a quarter of it")
    parser.add_argument("--kv", choices=("int8",), help="keep keys and values in half the memory")
    parser.add_argument(
        "--long-context", choices=("ntk", "yarn"),
        help="allow more tokens than the model was trained on, up to --max-length (yarn: 7B only)",
    )  # fmt: skip
    parser.add_argument("--max-length", type=int, metavar="N", help="most tokens with --long-context")
    return parser


def unescape(text: str) -> str:
    """`text` with the escapes of ESCAPES read; every text can be written so. Raises ValueError for another escape."""

    def read(match: re.Match[str]) -> str:
        if match.group() not in ESCAPES:
            legal = ", ".join(ESCAPES)
            raise ValueError(f"{text!r} has {match.group()!r}, not an escape: legal with --escapes are {legal}.")
        return ESCAPES[match.group()]

    return re.sub(r"\\(.|$)", read, text, flags=re.DOTALL)


def read_prompts_file(path: Path, encoding: str) -> list[str]:
    """The lines that are not empty, without a byte order mark."""
    text = read_text_file(path, encoding)
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def read_text_file(path: Path, encoding: str) -> str:
    """The text of a file, without a byte order mark. Raises ValueError for one in another encoding."""
    from bc2_jax.data.encodings import BYTE_ORDER_MARK, check_encoding, hint

    check_encoding("--encoding", encoding)
    content = path.read_bytes()
    try:
        return content.decode(encoding).removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {content[error.start]:#04x}"
        raise ValueError(f"{path} is not {encoding.upper()}: {where}{hint(content)}.") from error


def read_system(args: argparse.Namespace) -> str:
    """The system text; raises ValueError for options that do not go with --chat, or only with it."""
    if not args.chat:
        if args.system is not None or args.system_file is not None:
            raise ValueError("--system and --system-file belong to --chat.")
        return ""
    if args.prompt or args.prompts_file is not None:
        raise ValueError("--chat reads messages from standard input: --prompt and --prompts-file do not go with it.")
    if args.system is not None and args.system_file is not None:
        raise ValueError("--system and --system-file are two system texts: give one of them.")
    if args.system_file is not None:
        return read_text_file(args.system_file, args.encoding).removesuffix("\n").removesuffix("\r")
    system = read_argument(args.system or "")
    return unescape(system) if args.escapes else system


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given."""
    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    return given | ({"temperature": 0.0, "repetition_penalty": 1.0} if args.greedy else {})


def read_texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Prompts and stop texts."""
    prompts, stop = ([read_argument(text) for text in texts] for texts in (args.prompt, args.stop))
    if args.prompts_file is not None:
        prompts += read_prompts_file(args.prompts_file, args.encoding)
    if not prompts and not args.chat:
        raise ValueError("there is no prompt: give --prompt, --prompts-file or --chat.")
    if "" in stop:
        raise ValueError("--stop = '' is not valid: it must not be empty.")
    if args.escapes:
        return list(map(unescape, prompts)), list(map(unescape, stop))
    if any(escape in text for escape in (r"\n", r"\t") for text in [*args.prompt, *stop]):
        note = r"note: \n and \t are taken as they are written; with --escapes they are a newline and a tab."
        print(note, file=sys.stderr)
    return prompts, stop


def check_place(args: argparse.Namespace) -> None:
    """Raises ValueError unless the model is either here or behind a URL, with the options of that."""
    if args.url is None:
        if args.checkpoint is None:
            raise ValueError("there is no model: name a CHECKPOINT, or a server with --chat --url URL.")
        if args.api_key_file is not None:
            raise ValueError("--api-key-file belongs to --url.")
        return
    if not args.chat:
        raise ValueError("--url belongs to --chat.")
    for name in LOCAL:
        if getattr(args, name) is not None:
            option = "CHECKPOINT" if name == "checkpoint" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} does not go with --url: the model is the server's.")


def talk_with_server(args: argparse.Namespace, system: str, stop: list[str]) -> None:
    """--chat --url."""
    from bc2_jax.align.dialogue import Dialogue
    from bc2_jax.align.server_chat import ChatServer
    from bc2_jax.align.terminal_chat import remark, talk
    from bc2_jax.serve.security import check_key, read_keys

    key = os.environ.get(KEY_VARIABLE) or None
    if args.api_key_file is not None:
        key = read_keys(args.api_key_file)[0][1]
    elif key is not None:
        check_key(f"the key in {KEY_VARIABLE}", key)
    server = ChatServer(args.url, key, remark)
    server.find_model()
    if sys.stdin.isatty():
        remark(f"talking with {server.model or 'a model'} at {args.url}")
    talk(Dialogue(server.answer, system, stop=stop, **read_settings(args)))


def run(args: argparse.Namespace) -> None:
    check_place(args)
    system = read_system(args)
    prompts, stop = read_texts(args)
    if args.url is not None:
        talk_with_server(args, system, stop)
        return
    choose_cpu_without_tpu()
    # Imported here so that --help and a typo answer at once.
    from bc2_jax.align.conversation import Conversation
    from bc2_jax.align.terminal_chat import talk
    from bc2_jax.convert.pretrained import find_model, find_tokenizer
    from bc2_jax.infer.generate import check_prompts
    from bc2_jax.infer.prepared import find_long_context
    from bc2_jax.infer.settings import Settings
    from bc2_jax.infer.text import generate_text
    from bc2_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer(find_tokenizer(args.checkpoint))
    # Before the weights are read, which may take minutes.
    config = find_model(args.checkpoint).config
    long_context = find_long_context(config, args.long_context, args.max_length)
    settings = find_settings(args, config, tokenizer)
    checked = Settings(**settings).check(config)
    if not args.chat:
        length = config.model_max_length if long_context is None else long_context.max_length
        check_prompts(config, tokenizer.encode_batch(prompts), checked.max_new_tokens, length)
    model = load(args, long_context)
    if args.chat:
        talk(Conversation(model, tokenizer, system, stop=stop, **settings))
        return

    streams = len(prompts) == 1 and sys.stdout.isatty()

    def show(place: int, text: str) -> None:
        print(text, end="", flush=True)

    if streams:
        show(0, prompts[0])
    texts = generate_text(model, tokenizer, prompts, stop=stop, on_text=show if streams else None, **settings)
    if streams:
        print()
        return
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text + ("\n" if len(prompts) > 1 else ""))


def find_settings(args: argparse.Namespace, config: Any, tokenizer: Any) -> dict[str, Any]:
    """The settings that were given, and for the others the model's or those of the released chat models; unchecked."""
    from bc2_jax.align.conversation import answer_ends, default_max_new_tokens
    from bc2_jax.infer.settings import Settings, is_whole
    from bc2_jax.infer.text import find_chat_settings, find_eos_ids

    settings = {name: getattr(Settings(), name) for name in SETTINGS}
    settings |= {"max_new_tokens": 256, "eos_token_id": find_eos_ids(args.checkpoint)}
    if args.chat:
        settings["eos_token_id"] = answer_ends(settings["eos_token_id"], config, tokenizer)
        found = find_chat_settings(args.checkpoint)
        limit = default_max_new_tokens(config)
        named = found.get("max_new_tokens", limit)
        settings |= found | {"max_new_tokens": min(named, limit) if is_whole(named) else named}
    return settings | read_settings(args)


def load(args: argparse.Namespace, long_context: Any) -> Any:
    """The model, laid out for decoding."""
    from bc2_jax.config import MeshConfig
    from bc2_jax.convert.pretrained import load_pretrained
    from bc2_jax.infer.prepared import prepare
    from bc2_jax.sharding import make_mesh

    mesh = None if args.tensor is None else make_mesh(MeshConfig(tensor=args.tensor))
    adapted: dict[str, Any] = {} if args.adapter is None else {"adapter": args.adapter}
    model = load_pretrained(args.checkpoint, dtype=args.dtype or "bfloat16", mesh=mesh, **adapted)
    prepared = prepare(model, donate=True, kv=args.kv or "compute", quantize=args.quantize)
    return prepared if long_context is None else prepared.reach(*long_context)


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, make_parser(), argv)
