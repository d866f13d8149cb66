"""`python -m pipelines COMMAND`: Ctrl-C ends it with one line from its first moment on."""

import sys

from dice_core.interrupts import LINE, told_in_one_line

if __name__ == "__main__":
    with told_in_one_line(LINE.format("pipelines")):
        from pipelines.cli import main

        sys.exit(main())
