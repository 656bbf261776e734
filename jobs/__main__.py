"""`python -m jobs` is `armd`."""

import sys

from jobs.cli import main

sys.exit(main())
