"""python -m fdpass_bench is fdpass-bench."""

import sys

from fdpass_bench.cli import main

# The guard keeps a spawned worker, which may import this file, from measuring as well.
if __name__ == "__main__":
    sys.exit(main())
