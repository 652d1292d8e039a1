"""The command line: which job, its configuration, and what an error looks like from outside.

Nothing heavy is imported here: `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config import validate_sections
from cluster.config_parser import DEBUG_VARIABLE, parse_job
from cluster.environment import absolute_paths, quiet_environment
from cluster.errors import ConfigError, MegaContextError
from cluster.registry import with_local_nets

EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """One job of the command line."""

    command: str
    """Its words, for example `tree verify`."""

    config_type: type
    """Its configuration, a dataclass whose docstring is the job's one-line description."""

    target: str
    """`module:function` that runs it; imported only once the configuration is known to be sound."""

    @property
    def summary(self) -> str:
        return (self.config_type.__doc__ or "").strip().splitlines()[0]


def main(jobs: Sequence[Job], arguments: Sequence[str] | None = None, prog: str = "ray_job.py") -> int:
    """Run the job the arguments ask for.

    Args:
        jobs: what there is.
        arguments: words after the program's name; None takes `sys.argv`.
        prog: the program's name in messages.

    Returns:
        The exit code: the job's own, 0 when it returns None; a `MegaContextError`'s; 130 when interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    quiet_environment()
    try:
        if not words or words[0] in {"-h", "--help"}:
            print(_overview(jobs, prog), file=sys.stdout if words else sys.stderr)
            return 0 if words else ConfigError.exit_code
        job, rest = _choose(jobs, words, prog)
        config = parse_job(job.config_type, rest, f"{prog} {job.command}")
        validate_sections(config)
        return _run(job, with_local_nets(absolute_paths(config)))
    except MegaContextError as error:
        if os.environ.get(DEBUG_VARIABLE, "") not in {"", "0"}:
            raise
        error = _original(error)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"interrupted; the same command resumes: {prog} {shlex.join(words)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as stop:  # --help and --print_config of a job, or SIGTERM through Ray's handler
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _run(job: Job, config: object) -> int:
    module, _, function = job.target.partition(":")
    return getattr(importlib.import_module(module), function)(config) or 0


def _choose(jobs: Sequence[Job], words: list[str], prog: str) -> tuple[Job, list[str]]:
    for job in jobs:
        command = job.command.split()
        if words[: len(command)] == command:
            return job, words[len(command) :]
    group = [job for job in jobs if job.command.startswith(f"{words[0]} ")]
    if group and (len(words) == 1 or words[1] in {"-h", "--help"}):
        print(_overview(group, prog), file=sys.stdout if len(words) > 1 else sys.stderr)
        raise SystemExit(0 if len(words) > 1 else ConfigError.exit_code)
    asked = " ".join(words[:2] if group else words[:1])
    names = [job.command for job in group or jobs]
    close = difflib.get_close_matches(asked, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ConfigError(f"unknown job {asked!r}{hint} The job comes first and is one of: {', '.join(names)}")


def _overview(jobs: Sequence[Job], prog: str) -> str:
    width = max(len(job.command) for job in jobs)
    lines = [f"usage: {prog} <job> [--config FILE] [--section.key value ...]", "", "jobs:"]
    lines += [f"  {job.command:<{width}}  {job.summary}" for job in jobs]
    lines += ["", f"`{prog} <job> --help` explains every key, `--print_config` prints them all as a recipe."]
    return "\n".join(lines)


def _original(error: MegaContextError) -> MegaContextError:
    """The error as the worker raised it, without the traceback that Ray makes part of its text."""
    cause = getattr(error, "cause", None)
    return _original(cause) if isinstance(cause, MegaContextError) else error
