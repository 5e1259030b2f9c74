"""`accelerate launch launch/pretrain.py RECIPE --section.knob value ...`: the same as `hf-plm pretrain`."""

import sys

from hf_plm.cli import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
