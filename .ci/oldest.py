"""Put the oldest torch and transformers that pyproject.toml allows into constraints.txt, for `.ci/run` to test them."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Rewrite constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = ROOT / "constraints.txt"
    lines = [line for line in constraints.read_text().splitlines() if not re.match("(torch|transformers)==", line)]
    bounds = [re.match(r"(torch|transformers)>=([\d.]+)", each) for each in project["dependencies"]]
    lines += [f"{found[1]}=={found[2]}" for found in bounds if found]
    constraints.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
