"""The log file of a run; apart from the loggers, for Hydra imports it before anything needs torch."""

import logging
import sys


class RunLog(logging.FileHandler):
    """A run's log file; a full disk ends the run, where Python's own handler would print a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exception(), OSError):
            raise
        super().handleError(record)
