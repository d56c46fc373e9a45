"""A process of a comparison: ``python -m leanmim.comparison.worker WHAT FOLDER``. It ends when its standard input does."""

import os
import signal
import sys
import threading
from pathlib import Path

from leanmim.comparison.cells import run_cell
from leanmim.comparison.plan import measure
from leanmim.errors import UserError
from leanmim.signals import stoppable

TASKS = {"speeds": measure, "cell": run_cell}


def end_with_parent() -> None:
    """Wait for the end of the standard input, then ask this process to stop."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Do a task; exit as `leanmim` does."""
    what, folder = sys.argv[1:]
    try:
        with stoppable():
            threading.Thread(target=end_with_parent, daemon=True).start()
            TASKS[what](Path(folder))
    except UserError as error:
        print("leanmim:", " ".join(str(error).split()), flush=True)  # one line: a log's last is what is told
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        print(f"leanmim: {stop}", flush=True)
        raise SystemExit(128 + getattr(stop, "number", 2)) from None


if __name__ == "__main__":
    main()
