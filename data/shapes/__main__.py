"""Write the embedded demo data: ``python -m data.shapes --out shards/shapes``."""

from data.shapes.packer import main

if __name__ == "__main__":
    main()
