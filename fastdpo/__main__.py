"""`python -m fastdpo` is the `fastdpo` command, which starts here."""

import sys


def run() -> None:
    """Call `fastdpo.cli.main`; Ctrl-C while that is imported ends the process with code 130 and no traceback."""
    try:
        from fastdpo.cli import main

        main()
    except KeyboardInterrupt:
        print("fastdpo: stopped by Ctrl-C; nothing was saved", file=sys.stderr)  # noqa: T201
        sys.exit(130)


if __name__ == "__main__":
    run()
