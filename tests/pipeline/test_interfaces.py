"""Two nodes whose /etc/hosts maps their own name to 127.0.1.1, as Debian's installer leaves it:
real network namespaces, linked by a cable of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from segfleet.pipeline.launch import rendezvous

NODE = """
set -e
hostname {name}
mount --bind {hosts} /etc/hosts
ip link set lo up
echo ready
exec sleep 300
"""
PROGRAM = """
import json, os, sys
from pathlib import Path
from segfleet.slurm import rank
rank.become_rank()
from segfleet.pipeline.ranks import join_ranks
ranks = join_ranks(Path(sys.argv[1]))
names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "SEGFLEET_MASTER_HOST")
facts = {name: os.environ.get(name) for name in names}
print(json.dumps({"gathered": ranks.gather(ranks.rank), **facts}))
ranks.close()
sys.stdout.flush()
os._exit(0)  # as a rank of a job ends: torch's threads may abort a process that Python takes down
"""
ADDRESSES = {
    "inet": ("10.77.0.1", "10.77.0.2", "/24"),
    "inet6": ("fd77::1", "fd77::2", "/64"),
}


def _node(folder, name: str, lines: list[str]) -> subprocess.Popen:
    """A process that holds the namespaces of a node."""
    hosts = folder / f"hosts-{name}"
    hosts.write_text("\n".join(lines) + "\n")
    script = NODE.format(name=name.replace("_", "-"), hosts=hosts)  # hostname refuses a _
    node = subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "bash", "-c", script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if node.stdout.readline() != "ready\n":
        node.kill()
        pytest.skip(f"no namespaces here: {node.communicate()[1].strip()}")
    return node


@pytest.fixture(params=["inet", pytest.param("inet6", marks=pytest.mark.long)])
def nodes(request, tmp_path):
    """Two nodes that reach each other over `cable`; IPv6 alone in the second round."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("network namespaces need root, util-linux and iproute2")
    first, second, bits = ADDRESSES[request.param]
    own = ["127.0.0.1 localhost", "::1 localhost"] if request.param == "inet" else ["::1 localhost"]
    loop = "127.0.1.1" if request.param == "inet" else "::1"
    made = [
        _node(tmp_path, "node_1", [*own, f"{loop} node_1", f"{second} node_2"]),
        _node(tmp_path, "node_2", [*own, f"{loop} node_2", f"{first} node_1"]),
    ]
    try:
        ends = ["cable", "netns", str(made[0].pid)], ["cable", "netns", str(made[1].pid)]
        subprocess.run(
            ["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]], check=True
        )
        for node, address in zip(made, (first, second), strict=True):
            at_once = ["nodad"] if ":" in address else []
            _inside(node, "ip", "addr", "add", address + bits, "dev", "cable", *at_once)
            _inside(node, "ip", "link", "set", "cable", "up")
            if request.param == "inet6":
                _inside(node, "ip", "-4", "addr", "flush", "dev", "lo")
        yield made
    finally:
        for node in made:
            node.kill()
            node.wait()
            node.stdout.close()
            node.stderr.close()


def _enter(node: subprocess.Popen) -> list[str]:
    return ["nsenter", "--target", str(node.pid), "--net", "--uts", "--mount"]


def _inside(node: subprocess.Popen, *command: str) -> None:
    subprocess.run([*_enter(node), *command], check=True, timeout=20)


def test_names_on_the_loopback_do_not_keep_nodes_apart(nodes, tmp_path):
    """Names with underscores, too. Without the way chosen by the route gloo publishes the loopback:
    Connection refused."""
    ranks = []
    for number, node in enumerate(nodes):
        environment = {  # without what an earlier rank in this process has chosen
            **{name: value for name, value in os.environ.items() if "SOCKET_IFNAME" not in name},
            "OMP_NUM_THREADS": "1",
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": "0",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node_[1-2]",
            "SLURMD_NODENAME": f"node_{number + 1}",
        }
        ranks.append(
            subprocess.Popen(
                [*_enter(node), sys.executable, "-c", PROGRAM, str(tmp_path / "address")],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        )
    told = [rank.communicate(timeout=120) for rank in ranks]
    assert not any(rank.returncode for rank in ranks), told
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in told)
    assert first["gathered"] == second["gathered"] == [0, 1]
    for facts in (first, second):
        assert facts["GLOO_SOCKET_IFNAME"] == "cable" and facts["NCCL_SOCKET_IFNAME"] == "=cable"
    assert json.loads((tmp_path / "address").read_text())["host"] == first["SEGFLEET_MASTER_HOST"]


def test_a_rank_that_cannot_join_has_lost_nobody(tmp_path):
    """It ends its job instead of waiting for SLURM to find a dead node."""
    from segfleet.pipeline.launch.worker import peer_failure
    from segfleet.pipeline.ranks import join_ranks

    rendezvous.publish(tmp_path / "address", {"host": "127.0.0.1", "port": 9, "token": "00" * 32})
    settings = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segfleet.pipeline.ranks.TIMEOUT", rendezvous.datetime.timedelta(seconds=1))
        for name, value in settings.items():
            patch.setenv(name, value)
        with pytest.raises(rendezvous.JoinFailed, match="rank 1 on .* could not join") as end:
            join_ranks(tmp_path / "address")
    assert not peer_failure(end.value) and end.value.exit_code == 1
    assert peer_failure(RuntimeError("Connection refused"))


def test_looks_for_the_address_become_rare(tmp_path, monkeypatch):
    """Hundreds of ranks look into one folder of a shared disk."""
    pauses, clock = [], [0.0]

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with pytest.raises(rendezvous.JoinFailed, match="waited 300 s for rank 0"):
        rendezvous.published(tmp_path / "address", 3)
    assert pauses[0] < 0.05 and pauses[-1] == 1.0 and len(pauses) < 320


def test_the_limit_of_descriptors_is_raised():
    import resource

    from segfleet.pipeline.ranks import raise_descriptor_limit

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 65_536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
