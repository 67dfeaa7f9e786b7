"""`python -m arpo_ext` is `arpo-ext`."""

import sys

from arpo_ext.cli import main

sys.exit(main())
