"""The command ``marginclip train`` for a checkout: python train.py attack=badnet"""

from __future__ import annotations

import sys

from marginclip.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
