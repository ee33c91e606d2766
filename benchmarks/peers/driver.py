"""The parent's end of a child process: commands out, answers or reasons in, and never a wait without an end."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from qbert.timing import Unavailable, one_line

from ..machine import child_command, child_environment

_GRACE = 5.0  # seconds for a child to leave by itself


class Child:
    """One system in a process of its own.

    Args:
        row: name of the system.
        target: whose table of rows it is in.
        environment: what its process gets on top of this one's.

    Attributes:
        rests: seconds after each command until none of its threads used the processor any more.
    """

    def __init__(self, row: str, environment: Mapping[str, str], target: str = "cpu") -> None:
        self.rests: list[float] = []
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            [*child_command("peers.child"), str(theirs.fileno()), target, row],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            env={**child_environment(), **environment},
        )  # fmt: skip
        theirs.close()
        self._connection = Connection(ours.detach())

    def call(self, command: str, *arguments: Any, timeout: float) -> Any:
        """What the command answers.

        Raises:
            Unavailable: it failed, the process died, or there was no answer in `timeout` seconds (then it is ended).
        """
        try:
            self._connection.send((command, arguments))
            if not self._connection.poll(timeout):
                self._process.kill()
                raise Unavailable(f"{command}: no answer in {timeout:.0f} s")
            result, reason, rest = self._connection.recv()
        except (EOFError, OSError) as error:
            raise Unavailable(f"{command}: its process ended ({self._last_words(error)})") from None
        if reason is not None:
            raise Unavailable(reason)
        self.rests.append(rest)
        return result

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self, error: BaseException) -> str:
        try:
            code: object = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            code = "none"
        self._log.seek(0)
        said = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return f"exit status {code}; {said[-1][:200] if said else one_line(error)}"
