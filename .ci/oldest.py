"""Put the oldest torch and transformers that pyproject.toml allows into constraints.txt, for `.ci/run` to test them.

The oldest NumPy comes along, because the interpreter of the oldest Triton does not run with NumPy 2.4.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Rewrite constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = ROOT / "constraints.txt"
    lines = [
        line for line in constraints.read_text().splitlines() if not re.match("(numpy|torch|transformers)==", line)
    ]
    bounds = [re.match(r"(numpy|torch|transformers)>=([\d.]+)", each) for each in project["dependencies"]]
    lines += [f"{found[1]}=={found[2]}" for found in bounds if found]
    constraints.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
