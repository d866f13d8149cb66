"""`dice`, `python -m dice_core`: the command line, which Ctrl-C ends with one line from its first moment on."""

import sys

from dice_core.interrupts import LINE, told_in_one_line


def main() -> int:
    """Run the command of this process and return its exit code."""
    with told_in_one_line(LINE.format("dice")):
        from dice_core import cli
        from dice_core.stages.light_start import begin

        begin(next(iter(sys.argv[1:]), ""))
        return cli.main()


if __name__ == "__main__":
    sys.exit(main())
