"""What the verbs of the command line share: exit codes, signals, options."""

import atexit
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from batch_rerank import __version__
from batch_rerank.errors import BatchRerankError, GateError
from batch_rerank.outside import shown, without_secrets

app = typer.Typer(
    name="batch-rerank",
    help="Score every candidate of a first-stage run with a reranker and write the run back re-sorted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
log = logging.getLogger("batch_rerank")

INTERRUPTED = "interrupted: finished units are kept; run the same command again to resume"
EXIT_CODE = "exit code %d"
"""The last line of a log, without a time: scripts read it."""

ENDING_SECONDS = 60.0
"""How long the end of an interrupted job may take: a status that storage does not take, a Ray that does not answer."""

P = ParamSpec("P")

Job = Annotated[str, typer.Argument(metavar="JOB.YAML", help="The job file.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the job file.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N queries, into OUTPUT-limit-N: a sample run.")]
Output = Annotated[
    str, typer.Argument(help="A job's output: a path or an s3:// URL, or the job file, with its storage options.")
]
SetOfJob = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key, where given a job file.")
]
LimitOfJob = Annotated[int | None, typer.Option("--limit", min=1, help="The sample run of N queries of a job file.")]
Local = Annotated[bool, typer.Option("--local", help="In this process, without Ray.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def verb(function: Callable[P, None]) -> Callable[P, None]:
    """Give a verb its log format and its exit codes; expected errors end without a traceback."""
    return _verb(function, _Shown())


def lasting(function: Callable[P, None]) -> Callable[P, None]:
    """A verb that may take hours: its lines begin with the time, in UTC as all times in an output are."""
    return _verb(function, _Timed("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ"))


def _verb(function: Callable[P, None], lines: logging.Formatter) -> Callable[P, None]:
    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(lines)
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(logging.INFO)
        try:
            function(*args, **kwargs)
        except BatchRerankError as error:
            leave(error.exit_code, f"error: {error}")
        except KeyboardInterrupt:
            leave(130, INTERRUPTED)
        finally:
            log.removeHandler(handler)

    return wrapped


class _Shown(logging.Formatter):
    """Lines without secrets, and without the characters that a terminal obeys: ids, names and the messages of other
    libraries are somebody's bytes."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(without_secrets(super().format(record)))


class _Timed(_Shown):
    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return record.getMessage() if record.msg == EXIT_CODE else line


@contextmanager
def verdict_told(as_json: bool) -> Iterator[None]:
    """With --json, print what the gate has found also where it ends the verb."""
    try:
        yield
    except GateError as error:
        if as_json:
            print_json({"gate": error.verdict, "exit_code": error.exit_code})
        raise


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"batch-rerank {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Score every candidate of a first-stage run with a reranker and write the run back re-sorted."""


def interrupt(number: int, frame: object) -> NoReturn:
    """The first signal interrupts. What follows is the job's end, and no other signal cuts it short: its status would
    say "running" for ever. It has ENDING_SECONDS."""
    for again in (signal.SIGTERM, signal.SIGINT):
        signal.signal(again, _ending)
    end = threading.Timer(ENDING_SECONDS, _give_up)
    end.daemon = True
    end.start()
    raise KeyboardInterrupt


def _ending(number: int, frame: object) -> None:
    sys.stderr.write(f"ending; this takes up to {ENDING_SECONDS:g} s\n")


def _give_up() -> None:
    sys.stderr.write(f"{INTERRUPTED}\nexit code 130\n")
    sys.stderr.flush()
    os._exit(130)


@contextmanager
def last_word() -> Iterator[None]:
    """The process ends with the code of the SystemExit that leaves here (1 for another exception), after all that
    others have registered for its end.

    Not by Python's own end: a thread of Arrow's or Ray's that then asks for Python's lock ends the process with
    SIGABRT (before Python 3.14), and a verb that has found all well would be told as a crash.
    """
    ended = [1]
    atexit.register(_end, ended)  # the last one registered is called first
    try:
        yield
    except SystemExit as error:
        ended[0] = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    ended[0] = 0


def _end(ended: list[int]) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # whoever read it has gone
            ended[0] = ended[0] or 120  # as Python's own end says it
    os._exit(ended[0])


def leave(code: int, message: str) -> NoReturn:
    """End with an exit code."""
    # Ray turns every driver's failure into exit code 1, so the last line of the log carries ours
    log.error("%s", message)
    log.error(EXIT_CODE, code)
    raise typer.Exit(code)


def print_json(value: Any) -> None:
    """One object on stdout."""
    sys.stdout.write(json.dumps(value) + "\n")
