"""Completion for shells, made from the parser itself. Rule: nothing is asked but, where an image is named, the
daemon for names and ids: for a second at most, and nothing is said when it does not answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

_FILE_OPTIONS = ("--config-file", "--store", "--output", "-o")
_FOLDER_OPTIONS = ("--config-dir",)
_FILE_WORDS = ("file", "mountpoint")
_IMAGE_WORDS = ("id", "ids")

_HEAD = r"""# bash completion of cachefs, from `cachefs completion bash`.

# Whoever types an image's name has perhaps quoted it. After a colon or `=` bash has begun another word.
_cachefs_images() {
    local IFS=$'\n' begun=${cur#[\"\']}
    [[ $prev == [:=] || $cur == [:=] ]] && return
    COMPREPLY=($("${COMP_WORDS[0]}" completion images "${where[@]}" --begun="${begun//\\/}" 2>/dev/null))
}

_cachefs() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= at where=()
    COMPREPLY=()
    case $prev in
"""
_PATH = """\
    for ((at = 1; at < COMP_CWORD; at++)); do
        case ${COMP_WORDS[at]} in
            --config-file|--config-dir)
                if [[ ${COMP_WORDS[at+1]} == = ]]; then where+=("${COMP_WORDS[at]}=${COMP_WORDS[at+2]}")
                else where+=("${COMP_WORDS[at]}=${COMP_WORDS[at+1]}"); fi ;;
        esac
        case "$command ${COMP_WORDS[at]}" in
"""


def bash(parser: argparse.ArgumentParser) -> str:
    """A script to be sourced, or put into /etc/bash_completion.d."""
    commands = dict(_commands(parser, ""))
    lines = [_HEAD.rstrip("\n")]
    lines.append(f'        {"|".join(_FILE_OPTIONS)}) COMPREPLY=($(compgen -f -- "$cur")); return ;;')
    lines.append(f'        {"|".join(_FOLDER_OPTIONS)}) COMPREPLY=($(compgen -d -- "$cur")); return ;;')
    lines += ["    esac", _PATH.rstrip("\n")]
    paths = "|".join(f'"{path}"' for path in commands if path)
    lines.append(f'            {paths}) command="$command ${{COMP_WORDS[at]}}" ;;')
    lines += ["        esac", "    done", "    case $command in"]
    for path, (words, takes_files, takes_images) in commands.items():
        files = ' $(compgen -f -- "$cur")' if takes_files else ""
        plain = [word for word in words if word[0] != "-"]
        if plain or takes_files or takes_images:  # Options only for who begins one.
            options = " ".join(word for word in words if word[0] == "-")
            lines.append(f'        "{path}") if [[ $cur == -* ]]; then')
            lines.append(f'                COMPREPLY=($(compgen -W "{options}" -- "$cur"))')
            lines.append("            else")
            if takes_images:
                lines.append("                _cachefs_images")
            else:
                lines.append(f'                COMPREPLY=($(compgen -W "{" ".join(plain)}" -- "$cur"){files})')
            lines.append("            fi ;;")
        else:
            lines.append(f'        "{path}") COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$cur")) ;;')
    lines += ["    esac", "}", "", "complete -o filenames -F _cachefs cachefs", ""]
    return "\n".join(lines)


def _commands(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, tuple[list[str], bool, bool]]]:
    """Each command by its words, as " config check": what may follow, whether a file may, and whether an image."""
    words: list[str] = []
    below: list[tuple[str, argparse.ArgumentParser]] = []
    takes_files = takes_images = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below += [(f"{path} {name}", inner) for name, inner in action.choices.items()]
            words += list(action.choices)
        elif action.option_strings:
            words += action.option_strings
        elif action.choices is not None:
            words += list(action.choices)
        takes_files = takes_files or action.dest in _FILE_WORDS
        takes_images = takes_images or action.dest in _IMAGE_WORDS
    yield path, (words, takes_files, takes_images)
    for name, inner in below:
        yield from _commands(inner, name)
