"""Write the embedded demo data: ``python -m data.shapes --out shards/shapes``."""

import sys

from data.shapes.packer import main

if __name__ == "__main__":
    sys.exit(main())
