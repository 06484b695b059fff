"""`python -m deltaic` is the `deltaic` command."""

import sys

from deltaic.cli import main

sys.exit(main())
