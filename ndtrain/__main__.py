"""The entry of the command `ndtrain` and of `python -m ndtrain`, which torchrun starts on every rank."""

import os
import signal
from types import FrameType


def _interrupted(number: int, frame: FrameType | None) -> None:
    """End without a traceback on Ctrl-C while the command line is being imported; `main` handles it afterwards."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"ndtrain: stopped by Ctrl-C\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)

from ndtrain.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
