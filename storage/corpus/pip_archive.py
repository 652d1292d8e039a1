"""Fetches one archive from pip's package index: `python -P pip_archive.py <project> <archive> <target> <max bytes>`.

`pip download` runs a source distribution's build hooks to learn its metadata, so it cannot be used on code that is
only to be read. Here pip finds and transfers the named file and does nothing else with it. Index, links, proxies,
certificates and credentials are the ones pip itself would use: its environment variables and configuration files.

The price: these classes are pip's own and no promised interface (unchanged from pip 21.3 to 26.3, which were tried).
So this is a program of its own, which also keeps pip out of the caller's process, and an archive can be placed in the
cache by hand instead.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

NOT_FOUND = 3
"""Exit code: the index answered, or could not be reached, and has no such file; why is on standard error."""

_CHUNK_BYTES = 2**20
_SHOWN_CANDIDATES = 12


class _Failures(logging.Handler):
    """Pages of an index that could not be read; pip only notes them in its debug log and goes on."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "Could not fetch" in message:
            self.messages.append(message)


def fetch(project: str, archive: str, target: Path, max_bytes: int) -> int:
    """Write the file `archive` of `project` to the new file `target`. Returns the exit code."""
    from pip._internal.commands import create_command

    failures = _Failures()
    logger = logging.getLogger("pip")
    logger.addHandler(failures)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False

    # Also where the user's configuration forbids this kind of archive: nothing is going to be installed.
    kind = "--only-binary" if archive.endswith(".whl") else "--no-binary"
    command = create_command("download")
    options, _ = command.parse_args([kind, project, "--ignore-requires-python", "--no-input", project])
    with command.main_context():
        session = command.get_default_session(options)  # type: ignore[attr-defined]
        finder = command._build_package_finder(options, session)  # type: ignore[attr-defined]
        links = {candidate.link.filename: candidate.link for candidate in finder.find_all_candidates(project)}
        if archive not in links:
            found = ", ".join(sorted(links)[-_SHOWN_CANDIDATES:])
            answer = f"the package index has, among others, {found}" if found else "the package index has none"
            print("; ".join([answer, *failures.messages]), file=sys.stderr)
            return NOT_FOUND
        # Unpacking a transfer encoding would change the bytes that are hashed.
        with session.get(
            links[archive].url_without_fragment, stream=True, headers={"Accept-Encoding": "identity"}
        ) as response:
            response.raise_for_status()
            with target.open("xb") as file:
                for chunk in response.iter_content(_CHUNK_BYTES):
                    file.write(chunk)
                    if file.tell() > max_bytes:
                        print(f"{archive} is larger than {max_bytes} bytes", file=sys.stderr)
                        return 1
    return 0


if __name__ == "__main__":
    sys.exit(fetch(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
