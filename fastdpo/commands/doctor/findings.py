"""What `fastdpo doctor` has found, as lines of at most 80 characters."""

import textwrap

WIDTH = 80


class Findings:
    """What was found: printed as it comes, with the faults and the advice kept for the end."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.advice: list[str] = []

    def heading(self, text: str) -> None:
        print(f"\n{text}", flush=True)  # noqa: T201

    def line(self, name: str, text: str) -> None:
        """Print a line of a name and a text, which goes on below itself where it is long."""
        indent = " " * 18
        body = textwrap.wrap(" ".join(text.split()), WIDTH - len(indent)) or [""]
        print("\n".join([f"  {name:<15} {body[0]}", *(indent + each for each in body[1:])]), flush=True)  # noqa: T201

    def end(self) -> None:
        """Print the faults and the advice."""
        for title, texts in (("what is wrong", self.faults), ("advice", self.advice)):
            if texts:
                self.heading(title)
            for text in texts:
                print(textwrap.fill(text, WIDTH, initial_indent="  - ", subsequent_indent="    "))  # noqa: T201
        if not self.faults:
            print("\nnothing is wrong", flush=True)  # noqa: T201
