"""``python -m marginclip`` is the command ``marginclip``."""

from marginclip.cli import main

if __name__ == "__main__":
    main()
