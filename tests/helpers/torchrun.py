"""torchrun, whose workers import nothing: `python -m tests.helpers.torchrun FOLDER OPTIONS...`.

Each time torchrun starts them, its workers are forked from one process that has imported what they need.
"""

import multiprocessing
import sys
from pathlib import Path

from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args


def work(folder: str) -> None:
    from tests.helpers import restarted_ranks

    restarted_ranks.main(Path(folder))


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["tests.helpers.restarted_ranks"])
    config, _, _ = config_from_args(parse_args([*sys.argv[2:], "the program"]))
    config.start_method = "forkserver"
    elastic_launch(config, work)(sys.argv[1])
