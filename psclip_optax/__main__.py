"""`python -m psclip_optax` is the command `psclip`."""

import sys

from psclip_optax.cli import main

if __name__ == "__main__":
    sys.exit(main())
