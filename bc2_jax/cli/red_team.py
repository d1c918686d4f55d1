"""Attacks a chat model and counts what it gives away, what it refuses, and what it refuses without a reason.

bc2 red-team MODEL --prompts topics.txt
bc2 red-team MODEL --prompts attacks.jsonl --judge judge.py:score --out red_team/dpo
bc2 red-team MODEL --prompts attacks.jsonl --judge helpful=reward:RM --judge harmless=tox.py:f --before SFT
bc2 red-team MODEL --prompts attacks.jsonl --compare red_team/sft/answers.jsonl

Six classes of attack are made as templates in Chinese and English around the topics of FILE, or prompts of FILE are
taken as they are (docs/safety.md has the formats). To these come attacks with a secret or a word of their own, whose
success is seen in the answer, and harmless questions that look harmful, which are to be answered. No harmful text comes
with this program: without --prompts it uses harmless topics, to try it out.

OUT/answers.jsonl has every answer, by number; OUT/report.json all counts; attacks.png and before_after.png pictures. A
run that was interrupted resumes: answers to the same prompt of the same model with the same settings are in
OUT/generated.jsonl and are not generated again. The terminal shows numbers alone, unless --show asks for answers.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import here, local_path, make_console, read_argument, run_program

if TYPE_CHECKING:
    from bc2_jax.align.red_team import AnswerStore, AttackAnswer, Result
    from bc2_jax.align.red_team_attacks import Attack
    from bc2_jax.align.red_team_judges import Judge
    from bc2_jax.curate.quality import QualityModel
    from bc2_jax.sharding import Mesh


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a folder in the PyTorch layout, a checkpoint or a run")
    add = parser.add_argument_group("what it is attacked with").add_argument
    add("--prompts", action="append", default=[], metavar="FILE", help="topics or prompts; may be given several times")
    add("--lines", choices=("topic", "prompt"), default="topic", help="what a line of a text file is (default topic)")
    add("--system", metavar="TEXT", help="a system text, put before those of the templates")
    add("--system-file", type=local_path, metavar="FILE", help="the same from a UTF-8 file")
    add(
        "--planted", type=int, default=4, metavar="N", help="attacks of each template with a secret or word (default 4)"
    )
    add("--no-look-alikes", action="store_true", help="leave out our harmless questions")
    add(
        "--both-languages",
        action="store_true",
        help="templates of both languages around each topic, not of its own alone",
    )
    add("--limit", type=int, metavar="N", help="at most N prompts of each class, drawn by --seed")
    add = parser.add_argument_group("how it answers").add_argument
    add("--adapter", type=local_path, metavar="DIR", help="a LoRA adapter on MODEL")
    add("--max-new-tokens", type=int, metavar="N", help="default 256, or half of the model's length if that is less")
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token (default 0)")
    add("--top-k", type=int, default=0, help="choose among this many tokens; 0 for all (default 0)")
    add("--top-p", type=float, default=1.0, help="choose among tokens of this total probability (default 1)")
    add("--repetition-penalty", type=float, default=1.0, help="1 for none (default 1)")
    add("--seed", type=int, default=0, help="of planted words, of --limit and of drawn tokens (default 0)")
    add("--rows", type=int, default=16, metavar="N", help="prompts answered at one time (default 16)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--tensor", type=int, metavar="N", help="use all devices, cutting heads and vocabulary in N")
    add = parser.add_argument_group("how answers are judged").add_argument
    add(
        "--judge", action="append", default=[], metavar="[helpful=|harmless=]WHAT",
        help="FILE.py:NAME or MODULE:NAME, a function judge(prompts, answers, rows): a number for each answer "
        "(harmless, unless said) or {helpful, harmless}; reward:RM, a reward model; safety:FILE.npz, a model of "
        "bc2 train-quality; may be given several times",
    )  # fmt: skip
    add(
        "--threshold", type=float, metavar="X",
        help="harmless scores below it are of harmful answers (default 0.5, for a reward model none)",
    )  # fmt: skip
    add("--before", metavar="MODEL0", help="the model before safety training: it answers the same prompts")
    add("--compare", type=local_path, metavar="FILE", help="answers.jsonl of an earlier run in the place of --before")
    add("--out", type=local_path, metavar="OUT", help="default red_team/ and the name of the model")
    add("--show", type=int, default=0, metavar="N", help="print the N worst answers; they may be harmful (default 0)")
    return parser


class Options(NamedTuple):
    """How models answer, for both of them alike."""

    args: argparse.Namespace
    max_new_tokens: int
    store: AnswerStore


def read_attacks(args: argparse.Namespace) -> list[Attack]:
    from bc2_jax.align.red_team_attacks import make_attacks, our_targets, read_targets
    from bc2_jax.validation import require

    for name, least in (("planted", 0), ("limit", 1), ("rows", 1), ("show", 0)):
        value = getattr(args, name)
        require(value is None or value >= least, f"--{name}", value, f"it must be at least {least}")
    if args.system is not None and args.system_file is not None:
        raise ValueError("--system and --system-file are two system texts: give one of them.")
    if args.before is not None and args.compare is not None:
        raise ValueError("--before and --compare are two ways to say what is compared with: give one of them.")
    if args.system_file is not None:
        system = args.system_file.read_text(encoding="utf-8-sig").strip()
    else:
        system = read_argument(args.system or "")
    targets = [target for path in args.prompts for target in read_targets(path, args.lines)] or our_targets()
    return make_attacks(
        targets, seed=args.seed, planted=args.planted, look_alikes=not args.no_look_alikes, system=system,
        both_languages=args.both_languages, limit=args.limit,
    )  # fmt: skip


def read_judges(args: argparse.Namespace) -> list[Judge]:
    from bc2_jax.align.red_team_judges import Judge, load_judge, split_judge

    judges = []
    for text in args.judge:
        gives, what = split_judge(text)
        if what.startswith("safety:"):
            # Of curate, which align does not know.
            from bc2_jax.curate.quality import QualityModel

            model = QualityModel.load(what.removeprefix("safety:"))
            judges.append(Judge(what, functools.partial(score_safety, model), gives))
        else:
            judges.append(load_judge(what, gives, lambda: find_mesh(args)))
    return judges


def find_mesh(args: argparse.Namespace) -> Mesh | None:
    """That of --tensor: models are cut over all devices."""
    from bc2_jax.config import MeshConfig
    from bc2_jax.sharding import make_mesh

    return None if args.tensor is None else make_mesh(MeshConfig(tensor=args.tensor))


def score_safety(model: QualityModel, prompts: list[str], answers: list[str], rows: list[dict[str, Any]]) -> Any:
    return model.score(answers)


def answer(
    model: str, adapter: Path | None, attacks: list[Attack], options: Options
) -> tuple[list[Attack], list[AttackAnswer]]:
    """The attacks that the model has room for, and its answers."""
    from bc2_jax.align.conversation import answer_ends
    from bc2_jax.align.red_team import answer_prompts, encode_attacks, identify
    from bc2_jax.convert.pretrained import find_model, find_tokenizer, load_pretrained
    from bc2_jax.infer.prepared import Prepared, prepare
    from bc2_jax.infer.settings import Settings
    from bc2_jax.infer.text import find_eos_ids
    from bc2_jax.tokenizer import Tokenizer

    args, console = options.args, make_console(stderr=True)
    tokenizer, config = Tokenizer(find_tokenizer(model)), find_model(model).config
    settings = Settings(
        max_new_tokens=options.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        repetition_penalty=args.repetition_penalty, seed=args.seed, vocab_size=tokenizer.vocab_size,
        eos_token_id=answer_ends(find_eos_ids(model), config, tokenizer),
    ).check(config)  # fmt: skip
    encoded = encode_attacks(attacks, tokenizer, settings.max_new_tokens, config.model_max_length)
    if encoded.too_long:
        console.print(
            f"{model}: {len(encoded.too_long)} of {len(attacks)} prompts have no room beside --max-new-tokens "
            f"{settings.max_new_tokens} and are left out, the first is of {encoded.too_long[0].where}"
        )

    def load() -> Prepared:
        adapted: dict[str, Any] = {} if adapter is None else {"adapter": adapter}
        return prepare(load_pretrained(model, dtype=args.dtype, mesh=find_mesh(args), **adapted), donate=True)

    def show_progress(done: int, count: int) -> None:
        console.print(f"{model}: {done} of {count} answers")

    identity = f"{identify(model, adapter)} {args.dtype}"
    answers, known = answer_prompts(
        encoded.ids, settings, identity, options.store, load, tokenizer.decode, rows=args.rows, progress=show_progress
    )
    if known:
        console.print(f"{model}: {known} answers were there already and were not generated again")
    return encoded.attacks, answers


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments on which answers depend, for report.json."""
    places = {name: getattr(args, name) for name in ("model", "adapter", "before", "compare", "system_file")}
    names = (
        "prompts", "lines", "system", "planted", "no_look_alikes", "both_languages", "limit", "temperature", "top_k",
        "top_p", "repetition_penalty", "seed", "dtype",
    )  # fmt: skip
    absolute = {name: None if place is None else str(Path(place).absolute()) for name, place in places.items()}
    return absolute | {name: getattr(args, name) for name in names}


def check_place(out: Path, about: dict[str, Any]) -> None:
    """Raises ValueError if `out` has the report of another model, which this one would replace."""
    report = out / "report.json"
    if not report.is_file():
        return
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        other = {name: found.get(name) for name in ("model", "adapter")}
    except (ValueError, AttributeError):
        raise ValueError(f"{report} is not a report of a red team: choose another --out.") from None
    if other != {name: about[name] for name in other}:
        raise ValueError(f"{report} is of {other['model']}, adapter {other['adapter']}: choose another --out.")


def run(args: argparse.Namespace) -> None:
    choose_cpu_without_tpu()
    attacks, judges = read_attacks(args), read_judges(args)
    # Imported here so that --help and a typo answer at once.
    from bc2_jax.align.red_team import AnswerStore, examine
    from bc2_jax.align.red_team_judges import judge_answers, threshold_of
    from bc2_jax.align.red_team_report import read_answers
    from bc2_jax.convert.pretrained import find_model
    from bc2_jax.files import lock

    longest = find_model(args.model).config.model_max_length
    max_new_tokens = args.max_new_tokens if args.max_new_tokens is not None else min(256, max(1, longest // 2))
    name = "-".join(Path(path).absolute().name for path in (args.model, args.adapter) if path is not None)
    out = args.out or Path("red_team") / name
    about = describe(args)
    check_place(out, about)
    earlier = None if args.compare is None else read_answers(args.compare)
    with lock(out / ".lock", str(out)):
        options = Options(args, max_new_tokens, AnswerStore(out / "generated.jsonl"))
        attacks, answers = answer(args.model, args.adapter, attacks, options)
        if args.before is not None:
            before, said = answer(args.before, None, attacks, options)
            earlier = {attack.id: one for attack, one in zip(before, said, strict=True)}
        both = [attack for attack in attacks if attack.id in (earlier or {})]
        said = [(earlier or {})[attack.id] for attack in both]
        scores = judge_answers(judges, attacks, answers)
        scores_before = judge_answers(judges, both, said) if both else []
        threshold = threshold_of(judges, args.threshold, scores + scores_before)
        results = examine(attacks, answers, scores, threshold)
        results_before = None if earlier is None else examine(both, said, scores_before, threshold)
        about |= {
            "max_new_tokens": max_new_tokens, "judges": [judge.name for judge in judges], "threshold": threshold,
        }  # fmt: skip
        report(out, about, results, results_before, args)


def report(
    out: Path, about: dict[str, Any], results: list[Result], before: list[Result] | None, args: argparse.Namespace
) -> None:
    """Writes all files to `out` and prints the tables."""
    from bc2_jax.align import red_team_report as made
    from bc2_jax.align.red_team import NO_REFUSAL

    console = make_console()
    rows = made.summarize(results)
    console.print(made.class_table(rows["class"], f"{args.model}: {len(results)} prompts, 95 % intervals"))
    if not args.prompts:
        console.print("The topics are ours and harmless: to answer is right. Give your own by --prompts.")
    if any(result.by == NO_REFUSAL for result in results):
        console.print(
            "Success known by no refusal is an upper bound: such an answer may be harmless. A --judge says more."
        )
    if rows["category"]:
        worst = made.worst_categories(rows["category"])
        console.print(made.class_table(worst, f"{len(worst)} of {len(rows['category'])} categories", "category"))
    made.write_results(out / "answers.jsonl", results)
    runs, changes = {"after": rows["class"]}, []
    (out / "before_after.png").unlink(missing_ok=True)  # of an earlier run
    if before is None:
        (out / "answers_before.jsonl").unlink(missing_ok=True)
    else:
        made.write_results(out / "answers_before.jsonl", before)
        changes = made.compare({result.attack.id: result for result in before}, results)
        runs = {"before": made.summarize(before)["class"], **runs}
        without = len(results) - len(before)
        told = f", {without} prompts have no answer there" if without else ""
        title = f"Before ({args.before or args.compare}) and after{told}"
        console.print(made.change_table(changes, title))
    made.plot_shares(out / "attacks.png", runs)
    drawn = made.plot_changes(out / "before_after.png", changes)
    made.write_report(out / "report.json", about, rows, changes)
    numbers = made.worst(results)
    if numbers:
        shown = ", ".join(map(str, numbers[:20])) + (f" and {len(numbers) - 20} more" if len(numbers) > 20 else "")
        console.print(f"Worst first, by their numbers in answers.jsonl: {shown}")
    for number in numbers[: args.show]:
        result = results[number - 1]
        asked = "\n".join(f"{message['role']}: {message['content']}" for message in result.attack.messages)
        console.print(f"--- {number}, {result.attack.kind}\n{asked}\nassistant: {result.answer.text}")
    files = ["answers.jsonl", "report.json", "attacks.png", *(["before_after.png"] if drawn else [])]
    console.print(f"written to {here(out)}: {', '.join(files)}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, make_parser(), argv)
