# SPDX-License-Identifier: Apache-2.0
"""A log that never holds up whoever writes to it.

A server's output is often a pipe, to a supervisor or a pager. When its reader stops, a write to the full pipe waits for
ever, and with it the event loop, every open stream and every new request.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time

LINES = 10_000  # that may wait to be written; further ones are dropped and counted
FORMAT = "%(levelname)s %(name)s: %(message)s"


class Unblocked(logging.Handler):
    """Writes records from a thread of its own; what nobody reads is dropped.

    file: descriptor to write to. It is written to directly, so that neither a lock of Python's nor the end of the process
    waits for it. lines: that may wait.
    """

    def __init__(self, file: int = 2, lines: int = LINES) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))
        self._file, self._dropped = file, 0
        self._lines: queue.Queue[str | None] = queue.Queue(lines)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1
        except Exception:  # a message that does not fit its arguments
            self.handleError(record)

    def close(self, timeout: float = 1.0) -> None:
        """Write what is left, for `timeout` seconds at most."""
        try:
            self._lines.put_nowait(None)
            self._thread.join(timeout)
        except queue.Full:
            pass  # nobody has read for long
        super().close()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(line)
            if self._dropped and self._lines.empty():
                dropped, self._dropped = self._dropped, 0
                self._write(f"WARNING {__name__}: {dropped} lines of the log were dropped, since nobody read it")

    def _write(self, line: str) -> None:
        data = f"{line}\n".encode(errors="backslashreplace")
        while data:
            try:
                data = data[os.write(self._file, data) :]
            except BlockingIOError:  # whoever shares the file has made it so
                time.sleep(0.05)
            except OSError:  # its reader has closed it
                return


def log_to_stderr(level: str) -> None:
    """Send all logs and warnings of this process to its standard error output, by an `Unblocked` handler."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    if not root.handlers:
        root.addHandler(Unblocked(sys.stderr.fileno()))
    logging.captureWarnings(True)
