"""What every test relies on."""

import signal

# A shell lets what it starts in the background ignore Ctrl-C, and so would all that the tests start: some send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
