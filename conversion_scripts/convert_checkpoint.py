"""Door to conversion: `python conversion_scripts/convert_checkpoint.py SRC --out DIR`; `--help` teaches."""

import sys

from msgfm_hf.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
