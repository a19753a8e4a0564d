"""The command ``marginclip defend`` for a checkout: python defend.py attack=badnet"""

from __future__ import annotations

import sys

from marginclip.cli import main

if __name__ == "__main__":
    main(["defend", *sys.argv[1:]])
