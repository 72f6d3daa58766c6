"""`python -m localmamba.cli`, as torchrun starts it: `torchrun -m localmamba.cli COMMAND`."""

import sys

from localmamba.cli import main

sys.exit(main())
