"""`python -m fastdpo` is the `fastdpo` command."""

from fastdpo.cli import main

main()
