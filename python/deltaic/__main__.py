"""`python -m deltaic` is the `deltaic` command."""

import sys

from .cli import main

sys.exit(main())
