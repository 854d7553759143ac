"""The recipes of examples/launch run as they stand, but for the commands of a cluster, which stubs replace."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from fastdpo.checks import check_deepspeed
from fastdpo.sharding import zero_stage

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def launched(name: str | Path, *words: str) -> dict[str, str]:
    """Return the environment that `accelerate launch` gives its processes with a file, which may be a recipe."""
    line = [
        "--config_file",
        str(LAUNCH / name),
        "--main_process_port",
        "0",
        *words,
        "-m",
        "fastdpo",
        "train",
        "run.yaml",
    ]
    args, settings, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    args.deepspeed_fields_from_accelerate_config = ",".join(settings.deepspeed_config)
    environment: dict[str, str]
    environment = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    assert int(args.num_processes) == (int(words[-1]) if words else 8)
    return environment


def test_ddp_is_launched() -> None:
    environment = launched("ddp.yaml", "--num_processes", "2")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"  # the run's own settings decide
    assert "ACCELERATE_USE_FSDP" not in environment
    assert "ACCELERATE_USE_DEEPSPEED" not in environment


def test_fsdp2_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launched("fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, True)
    assert plugin.cpu_ram_efficient_loading
    assert str(plugin.state_dict_type) == "StateDictType.SHARDED_STATE_DICT"


def test_the_lines_of_the_docs_replicate_the_shards(tmp_path: Path) -> None:
    lines = (ROOT / "docs" / "scaling.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "hsdp.yaml").write_text((LAUNCH / "fsdp2.yaml").read_text() + lines)
    environment = launched(tmp_path / "hsdp.yaml", "--num_processes", "16")
    sizes = [environment[f"PARALLELISM_CONFIG_DP_{name}_SIZE"] for name in ("REPLICATE", "SHARD")]
    assert (environment["ACCELERATE_USE_PARALLELISM_CONFIG"], sizes) == ("true", ["2", "8"])


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_is_launched(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    environment = launched(f"zero{stage}.yaml", "--num_processes", "2")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    assert environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
    assert environment["ACCELERATE_GRADIENT_CLIPPING"] == "auto"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == str(stage == 3).lower()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()  # as the processes read it
    args = SimpleNamespace(
        deepspeed_plugin=plugin,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        max_grad_norm=0.7,
        world_size=2,
        bf16=True,
        fp16=False,
        torch_compile=False,
        activation_offloading=False,
    )
    check_deepspeed(args)
    assert zero_stage(args) == stage
    assert plugin.deepspeed_config["gradient_clipping"] in ("auto", 0.7)
    assert plugin.deepspeed_config["bf16"]["enabled"]


def script(folder: Path, name: str, text: str) -> None:
    """Put a command into a folder."""
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder whose commands come before all others."""
    folder = tmp_path / "commands"
    folder.mkdir()
    return folder


def environment_of(commands: Path, **more: object) -> dict[str, str]:
    paths = {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return os.environ | paths | {name: str(value) for name, value in more.items()}


def test_torchrun_is_told_what_the_recipe_says(commands: Path) -> None:
    script(commands, "torchrun", 'printf "%s\\n" "$@"')
    done = subprocess.run(
        ["bash", LAUNCH / "torchrun.sh", "run.yaml", "--output_dir", "a folder"],
        env=environment_of(commands, HEAD="node1:29400", GPUS=4),
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    assert words[words.index("--rdzv-endpoint") + 1] == "node1:29400"
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert words[words.index("-m") :] == [
        *("-m", "fastdpo", "train", "run.yaml", "--output_dir", "a folder", "--resume_from_checkpoint", "auto")
    ]
    without = subprocess.run(["bash", LAUNCH / "torchrun.sh"], env=environment_of(commands), capture_output=True)
    assert without.returncode == 1
    assert b"set HEAD to a machine and a free port" in without.stderr


SRUN = """
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids[$i]=$!; done
code=0
for pid in ${pids[@]}; do wait $pid; each=$?; ((each > code)) && code=$each; done
exit $code"""


@pytest.mark.parametrize(
    ("codes", "expected", "requeued"), [([143, 143], 143, True), ([0, 0], 0, False), ([1, 0], 1, False)]
)
def test_slurm_starts_a_process_per_gpu_and_queues_a_preempted_job_again(
    codes: list[int], expected: int, requeued: bool, commands: Path, tmp_path: Path
) -> None:
    script(commands, "srun", SRUN)
    script(commands, "scontrol", f'[ $1 = show ] && printf "node1\\nnode2\\n" || echo "$@" > {tmp_path}/scontrol')
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    says = f'for name in {names}; do printf "%s " "${{!name}}"; done; echo "$@"'
    script(
        commands,
        "python",
        f"({says}) > {tmp_path}/process-$RANK; codes=({' '.join(map(str, codes))}); exit ${{codes[$RANK]}}",
    )
    job = {"SLURM_JOB_ID": 12345, "SLURM_NTASKS": 2, "SLURM_JOB_NUM_NODES": 1, "SLURM_JOB_NODELIST": "node[1-2]"}
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sh", "run.yaml", "--beta", "0.2"], env=environment_of(commands, **job)
    )
    assert done.returncode == expected
    assert (tmp_path / "scontrol").exists() is requeued
    for rank in (0, 1):
        assert (tmp_path / f"process-{rank}").read_text().split() == [
            *(str(rank), str(rank), "2", "2", "node1", "22345"),
            *("-m", "fastdpo", "train", "run.yaml", "--beta", "0.2", "--resume_from_checkpoint", "auto"),
        ]


@pytest.mark.slow
def test_two_machines_go_on_from_the_last_checkpoint_after_a_worker_is_killed(commands: Path, tmp_path: Path) -> None:
    """They end as an uninterrupted run does, in every bit. Each "machine" is a torchrun of its own."""
    until_the_program = 'for word; do [ "$word" = -m ] && break; options+=("$word"); done'
    torchrun = f'{sys.executable} -m tests.helpers.torchrun {tmp_path} "${{options[@]}}"'
    script(commands, "torchrun", f"{until_the_program}\nexec {torchrun}")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    more = {"HEAD": f"localhost:{port}", "GPUS": 1, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
    machines = [
        subprocess.Popen(
            ["bash", LAUNCH / "torchrun.sh"],
            env=environment_of(commands, **more),
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)
    assert (tmp_path / "killed" / "marker").exists()
    assert sum(each.count("resuming from") for each in said) == 1
    for rank in (0, 1):
        ends = [(tmp_path / name / f"end-{rank}").read_text() for name in ("through", "killed/run")]
        assert ends[0] == ends[1]
