"""How the processes of a run find each other: at the first start, under Slurm, and after a restart."""

import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from utils import UserError, check_same_device, fresh_store, init_distributed

ROOT = Path(__file__).resolve().parents[1]

WORKER = """
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
import os
import torch
import utils

utils.init_distributed(torch.device("cpu"), 1)
names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
os.write(1, f"{utils.get_rank()} {' '.join(os.environ[name] for name in names)}\\n".encode())
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


def test_every_start_gets_an_empty_store_that_all_ranks_share():
    store, world_size = dist.HashStore(), 3
    for number in range(world_size):  # a start that ended before all processes had come
        store.set(f"request_{number}", f"of an ended process {number}")
    for _ in range(2):
        with ThreadPoolExecutor(world_size) as pool:
            parts = [*pool.map(lambda rank: fresh_store(store, rank, world_size), range(world_size))]
        assert not parts[0].check(["address"])
        parts[0].set("address", "of this start")
        assert all(part.get("address") == b"of this start" for part in parts)


def test_different_devices_are_refused_on_all_ranks():
    store, types = dist.HashStore(), ("meta", "cpu", "meta")
    with ThreadPoolExecutor(len(types)) as pool:
        checks = [
            pool.submit(check_same_device, store, rank, len(types), torch.device(kind))
            for rank, kind in enumerate(types)
        ]
    for check in checks:
        with pytest.raises(UserError, match="got meta on .* and cpu on "):
            check.result()


def test_an_incomplete_environment_is_a_mistake_of_the_user(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="torchrun.*MASTER_ADDR"):
        init_distributed(torch.device("cpu"), 1)


def test_the_tasks_of_a_slurm_job_find_each_other(tmp_path):
    """The guide's job, on two nodes with two tasks each."""
    guide = (ROOT / "classification/get_started.md").read_text(encoding="utf-8")
    (job,) = (block for block in re.findall(r"```sh\n(.*?)```", guide, re.DOTALL) if "#SBATCH" in block)
    (tmp_path / "task.py").write_text(TASK)
    commands = {
        "srun": SRUN,
        "scontrol": "#!/bin/sh\necho localhost\n",
        "python": f"#!/bin/sh\nexec {sys.executable} {tmp_path}/task.py\n",
    }
    for name, content in commands.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "1"}
    slurm |= {"SLURM_JOB_NODELIST": "localhost", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = job.replace("MASTER_PORT=29500", f"MASTER_PORT={free_port()}")
    environment = {**os.environ, **slurm, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", job], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert sorted(done.stdout.splitlines()) == ["0 0 2 4", "1 1 2 4", "2 0 2 4", "3 1 2 4"], done.stderr


def test_two_machines_meet_again_after_one_process_died(tmp_path):
    """torchrun counts the restart on the machine of the process that died, and not on the other one."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--max-restarts", "3"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}", "--rdzv_id", "test"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
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
