"""The log file of a run; apart from the loggers, for Hydra imports it before torch is needed."""

import logging
import sys


class RunLog(logging.FileHandler):
    """A run's log file; a full disk ends the run: Python's own would print a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exception(), OSError):
            raise
        super().handleError(record)
