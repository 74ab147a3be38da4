"""Runs several `keystone-manage` commands at the price of one. Rule: what they do is Keystone's business.

Nine tenths of a `keystone-manage` are imports, and its `main` can be called only once in a process; so this
imports, and runs each command in a forked child: all but the last at once, then the last. Arguments: the
commands, each as one argument, quoted as for a shell.
"""

import os
import shlex
import sys

from keystone.cmd import cli  # type: ignore[import-untyped]


def start(command: str) -> int:
    child = os.fork()
    if child == 0:
        cli.main(["keystone-manage", *shlex.split(command)])
        os._exit(0)  # What Python would tidy up takes it as long as the command.
    return child


def main(commands: list[str]) -> int:
    *independent, last = commands
    children = [start(command) for command in independent]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if not any(statuses):
        statuses.append(os.waitpid(start(last), 0)[1])
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
