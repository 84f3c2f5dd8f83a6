"""`python -m longvita.cli …` is the same as `longvita …`."""

import sys

from longvita.cli import entry

sys.exit(entry())
