"""How a rank's process ends: at once after an error, and after its work."""

from __future__ import annotations

import logging
import os
import sys
import traceback

logger = logging.getLogger(__name__)


def end_rank(error: BaseException) -> None:
    """Ends this process at once, so that TorchServe fails the worker's requests and starts all ranks anew.

    Returns where `error` ends Python by itself.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return
    where = traceback.extract_tb(error.__traceback__)[-1]
    # The message of an exception may hold a user's text: the type and the place are what can be logged.
    logger.critical("[dsserve] %s at %s:%d; ending the rank", type(error).__name__, where.filename, where.lineno or 0)
    logging.shutdown()
    os._exit(1)


def finish_rank() -> None:
    """Ends this process after its work, with exit code 0, and never comes back.

    Destroying a process group whose collectives a living CUDA graph holds never returns (NCCL 2.28), and an interpreter
    that simply ends may be aborted by the group's threads.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
