"""`accelerate launch launch/embed.py SOURCES --model MODEL --out FILE ...`: the same as `hf-plm embed`."""

import sys

from hf_plm.cli import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])
