"""`python -m benchmarks`: the benchmarks alone, for a machine that lacks what the rest of the command line imports."""

from . import main

raise SystemExit(main())
