"""`python -m pipelines.demo`."""

import sys

from dice_core.interrupts import told_in_one_line

if __name__ == "__main__":
    with told_in_one_line("stopped; `make demo` goes on from here"):
        from pipelines.demo.demo import main

        sys.exit(main())
