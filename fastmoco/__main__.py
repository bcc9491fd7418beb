"""`python -m fastmoco VERB` is the console command `fastmoco VERB`."""

import sys

from fastmoco.cli import main

if __name__ == "__main__":
    sys.exit(main())
