"""Prints what a shell needs to complete `bc2`: subcommands, names of configs, options and files.

eval "$(bc2 completion bash)"                                   # in ~/.bashrc
eval "$(bc2 completion zsh)"                                    # in ~/.zshrc, after compinit
bc2 completion fish > ~/.config/fish/completions/bc2.fish

Options are those that `bc2 SUBCOMMAND --help` prints; of train those of the config that was typed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
from collections.abc import Sequence

from bc2_jax.cli import programs
from bc2_jax.cli.configs import curation_configs, run_configs
from bc2_jax.terminal import use_utf8

_BASH = """\
_bc2() {
  local word=${COMP_WORDS[COMP_CWORD]}
  COMPREPLY=($(compgen -W "$(_bc2_words)" -- "$word"))
  if ((COMP_CWORD > 1)) && [[ $word != -* ]]; then
    COMPREPLY+=($(compgen -f -- "$word"))
  fi
}
_bc2_words() {
  ((COMP_CWORD == 1)) && echo "SUBCOMMANDS" && return
  bc2 completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null
}
complete -o filenames -F _bc2 bc2
"""
_ZSH = """\
_bc2() {
  if ((CURRENT == 2)); then
    compadd -- SUBCOMMANDS
    return
  fi
  compadd -- ${(f)"$(bc2 completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)"}
  _files
}
compdef _bc2 bc2
"""
_FISH = """\
function __bc2_words
  set -l typed (commandline -opc)
  bc2 completion words -- $typed[2..-1] (commandline -ct) 2>/dev/null
end
complete -c bc2 -n "test (count (commandline -opc)) -eq 1" -f -a "SUBCOMMANDS"
complete -c bc2 -n "test (count (commandline -opc)) -gt 1" -a "(__bc2_words)"
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def options_of(words: Sequence[str]) -> list[str]:
    """The options that `bc2 WORDS --help` documents, and the subcommands of `bc2 convert`."""
    os.environ["COLUMNS"] = "200"  # so that no option is cut off
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        programs.main([*words, "--help"])
    found: dict[str, None] = {}
    for line in out.getvalue().splitlines():
        first, _, _ = line.strip(" │").partition("  ")
        if first.startswith("-"):
            found |= dict.fromkeys(re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*", first))
    inner = re.search(r"^ +\{([\w-]+(?:,[\w-]+)+)\}$", out.getvalue(), re.MULTILINE)
    return [*(inner[1].split(",") if inner else ()), *found]


def complete(words: Sequence[str]) -> list[str]:
    """What may stand in the place of the last word after `bc2`; files are the shell's."""
    *before, last = words or [""]
    if not before:
        return list(programs.PROGRAMS)
    if before[0] == "completion":
        return list(_SCRIPTS)
    if before[0] == "curate" and before[-1] == "--config":
        return list(curation_configs())
    has_config = before[0] in ("train", "estimate")
    if has_config and len(before) == 1 and not last.startswith("-"):
        return list(run_configs())
    if last.startswith("-") or before == ["convert"]:
        is_named = len(before) > 1 and not before[1].startswith("-") and before[0] in ("train", "convert")
        return options_of(before[: 1 + is_named])
    return []


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    if argv and argv[0] == "words":  # asked by the scripts; the words after -- are those after `bc2`
        print("\n".join(complete(argv[2:])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=tuple(_SCRIPTS))
    script = _SCRIPTS[parser.parse_args(argv).shell]
    print(script.replace("SUBCOMMANDS", " ".join(programs.PROGRAMS)), end="")
    return 0
