"""What the lines of the log look like, and where they go: as oslo.log's options say, mended where a line would
mislead. Rule: nothing is logged before `start`, and nothing here decides what is worth a line.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from oslo_log import log
from oslo_log.formatters import ContextFormatter

from cachefs import __version__
from cachefs.errors import ConfigError
from cachefs.words import printable_lines

if TYPE_CHECKING:
    from oslo_config import cfg


def start(conf: cfg.ConfigOpts) -> None:
    """From here on the root logger does what `[DEFAULT]` of this configuration says, or `ConfigError`."""
    try:
        log.setup(conf, "cachefs", __version__, fix_eventlet=False)
    except log.LogConfigError as e:
        raise ConfigError("DEFAULT/log_config_append", f"{e.log_config}: {e.err_msg}") from e
    except OSError as e:
        raise ConfigError("DEFAULT/log_file", f"{e.filename}: {e.strerror}") from e
    threading.excepthook = _log_end_of_thread
    for handler in logging.getLogger().handlers:
        if type(handler.formatter) is ContextFormatter:
            handler.setFormatter(_formatter(conf))


def _log_end_of_thread(args: threading.ExceptHookArgs) -> None:
    """As oslo.log does for the main thread: in lines that have their time."""
    name = args.thread.name if args.thread is not None else "?"
    error = args.exc_value
    if error is not None:
        logging.getLogger("cachefs").critical("unexpected end of the thread %s", name, exc_info=error)


class _OnceFormatter(ContextFormatter):
    """oslo.log's, but for three things. Where a line is written while an exception is handled, it puts that one
    behind the line as well: ours say themselves what failed. Of what has several lines it leaves all but the
    first without their time, so that a text from elsewhere could look like a line of ours. And it writes what a
    terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(self._stamped(record), coloured=self.conf.log_color)

    def _stamped(self, record: logging.LogRecord) -> str:
        level = record.levelno
        if not record.exc_info:
            record.levelno = min(level, logging.INFO)  # What it goes by; the level's name is another field.
        try:
            text = super().format(record)
        finally:
            record.levelno = level
        trace = f"\n{record.exc_text}" if record.exc_text else ""  # That has it on each line.
        said = text.removesuffix(trace)
        if "\n" not in said:
            return text
        if not hasattr(record, "asctime"):
            record.asctime = self.formatTime(record, self.datefmt)
        prefix = self.conf.logging_exception_prefix.replace(" ERROR ", " %(levelname)s ") % vars(record)
        return said.replace("\n", f"\n{prefix}") + trace


def _formatter(conf: cfg.ConfigOpts) -> ContextFormatter:
    return _OnceFormatter(project="cachefs", version=__version__, datefmt=conf.log_date_format, config=conf)
