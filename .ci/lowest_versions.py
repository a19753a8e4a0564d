"""Print the lowest version that pyproject.toml allows of every dependency, one pip constraint a line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    found = re.match(r"([A-Za-z0-9-]+).*?>=([0-9.]+)", requirement)
    if found is None:
        raise SystemExit(f"{requirement} declares no lowest version")
    print(f"{found[1]}=={found[2]}")
