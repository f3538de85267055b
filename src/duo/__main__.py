"""`python -m duo`, which is what `accelerate launch -m duo …` starts in each process."""

import sys

from duo.cli import main

sys.exit(main())
