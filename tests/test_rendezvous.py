"""How the processes of a run find each other: at the first start, under Slurm, and after a restart."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO

import utils
from utils import UserError, init_distributed

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
DIES_ONCE = """
import os, sys, time
from pathlib import Path
import torch
import utils

with open(sys.argv[1] + os.environ["MACHINE"], "a") as file:
    print("start", file=file)
utils.init_distributed(torch.device("cpu"), 1)
total = int(utils.all_gather(torch.ones(1)).sum())
died, busy = Path(sys.argv[1]), Path(sys.argv[1] + "_busy")
if not died.exists():
    if os.environ["MACHINE"] == "1":
        busy.touch()
        time.sleep(100)  # so that its torchrun counts no failure of its own
    while not busy.exists():
        time.sleep(0.05)
    died.touch()
    os._exit(1)
with open(sys.argv[1] + os.environ["MACHINE"], "a") as file:
    print(total, file=file)
os._exit(0)  # torch 2.6 may hang when it closes a group of gloo
"""
TASK = """
import os, sys
import torch
import utils

names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
try:
    utils.init_distributed(torch.device("cpu" if os.environ["RANK"] != "2" else sys.argv[1]), 1)
    text = f"{utils.get_rank()} {' '.join(os.environ[name] for name in names)}"
except utils.UserError as error:
    text = str(error)
os.write(1, f"{text}\\n".encode())
os._exit(0)
"""
SRUN = """#!/bin/sh
for task in 0 1 2 3; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" &
done
wait
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_a_wrong_environment_is_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"torchrun.*MASTER_ADDR"):
        init_distributed(torch.device("cpu"), 1)
    monkeypatch.setattr(utils, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="expected 1 with --max-restarts on several machines"):
        init_distributed(torch.device("cpu"), 1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_tasks_of_a_slurm_job_find_each_other(device: str, tmp_path: Path) -> None:
    """The guide's job on two nodes of two tasks; a device that one task lacks is an error of all."""
    guide = (REPO / "classification/get_started.md").read_text(encoding="utf-8")
    (job,) = (block for block in re.findall(r"```sh\n(.*?)```", guide, re.DOTALL) if "#SBATCH" in block)
    (tmp_path / "task.py").write_text(TASK)
    commands = {
        "srun": SRUN,
        "scontrol": "#!/bin/sh\necho localhost\n",
        "python": f"#!/bin/sh\nexec {sys.executable} {tmp_path}/task.py {device}\n",
    }
    for name, content in commands.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "1"}
    slurm |= {"SLURM_JOB_NODELIST": "localhost", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = job.replace("MASTER_PORT=29500", f"MASTER_PORT={free_port()}")
    done = subprocess.run(
        ["bash", "-c", job],
        env=ENVIRONMENT | slurm,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = sorted(done.stdout.splitlines())
    if device == "cpu":
        assert lines == ["0 0 2 4", "1 1 2 4", "2 0 2 4", "3 1 2 4"], done.stderr
    else:
        assert len(lines) == 4 and all("got cpu on" in line and "meta on" in line for line in lines)


def test_two_machines_meet_again_after_one_process_died(tmp_path: Path) -> None:
    """torchrun counts the restart on the machine of the process that died, and not on the other one."""
    worker = tmp_path / "worker.py"
    worker.write_text(DIES_ONCE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--max-restarts", "3"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}", "--rdzv_id", "test"]
    environment = ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    machines = [
        subprocess.Popen(
            [*command, str(worker), str(tmp_path / "died")], env={**environment, "MACHINE": number}
        )
        for number in "01"
    ]
    try:
        assert [machine.wait(timeout=600) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    for number in "01":
        assert (tmp_path / f"died{number}").read_text().split() == ["start", "start", "2"]
