"""Door to publishing: `python conversion_scripts/push_to_hub.py DIR REPO_ID [--dry-run]`; `--help` teaches."""

import sys

from msgfm_hf.cli import main

if __name__ == "__main__":
    main(["push", *sys.argv[1:]])
