"""`python -m pipelines.demo`."""

import sys

from pipelines.demo.demo import main

if __name__ == "__main__":
    sys.exit(main())
