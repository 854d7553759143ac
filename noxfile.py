"""Test `fastdpo.patch_trl()` with releases of TRL, each in an environment of its own.

    nox -s trl-0.28

fastdpo's trainer needs a newer transformers than an old TRL does, but `patch_trl` does not: so fastdpo is installed
without its dependencies. CI tests the current TRL.
"""

import nox

ERAS = {
    "0.24": ["trl==0.24.0", "transformers==4.57.6", "peft==0.18.1", "accelerate==1.12.0"],
    "0.28": ["trl==0.28.0", "transformers==4.57.6", "peft==0.18.1", "accelerate==1.12.0"],
    "0.29": ["trl==0.29.1", "transformers==4.57.6", "peft==0.18.1", "accelerate==1.12.0"],
    "1.8": ["trl==1.8.0", "transformers==5.17.0", "peft==0.21.2"],
    "1.14": ["trl==1.14.0", "transformers==5.23.0", "peft==0.21.2"],
    # without Triton, no trainer of this release runs; the tests run Triton in its interpreter
    "1.15": ["trl==1.15.0", "transformers==5.23.0", "peft==0.21.2", "triton"],
    "1.16": ["trl==1.16.0", "transformers==5.23.0", "peft==0.21.2"],
}
TORCH = "torch==2.13.0"

nox.options.sessions = [f"trl-{era}" for era in ERAS]


def _define(era: str, packages: list[str]) -> None:
    @nox.session(name=f"trl-{era}")
    def session(session: nox.Session) -> None:
        session.install(TORCH, *packages, "pytest", "requests")
        session.install("--no-deps", "-e", ".")
        session.run("python", "-m", "pytest", "-q", "tests/compat/test_patch_trl.py", *session.posargs)


for _era, _packages in ERAS.items():
    _define(_era, _packages)
