"""Two network namespaces joined by a cable are two hosts: each starts its own `accelerate launch`."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import launches
import pytest
import scenarios


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """The names of two namespaces, 10.77.0.1 and 10.77.0.2 on their `eth0`; skips where they cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts need root and the command ip (iproute2) for network namespaces")
    tag = uuid.uuid4().hex[:6]
    names = [f"vir{tag}a", f"vir{tag}b"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", f"v{tag}a", "netns", names[0], "type", "veth", "peer", "name", f"v{tag}b", "netns", names[1])
        for number, name in enumerate(names):
            device = f"v{tag}{'ab'[number]}"
            ip("-n", name, "link", "set", device, "name", "eth0")
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (subprocess.CalledProcessError, OSError) as error:
        remove(names)
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
    yield names
    remove(names)


def remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def launch_on_both(hosts: list[str], words: list[str], timeout_seconds: int) -> list[tuple[int, str]]:
    """Run the same command on both hosts, each with its own machine rank."""
    started = []
    for rank, host in enumerate(hosts):
        own = [part.format(machine_rank=rank) for part in words]
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *own],
                env=launches.environment(GLOO_SOCKET_IFNAME="eth0"), cwd=launches.ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )
        )  # fmt: skip
    results = []
    for process in started:
        try:
            output, _ = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            for each in started:
                if each.poll() is None:
                    launches.kill_all(each)
            output, _ = process.communicate()
            output += f"\nnot done after {timeout_seconds} s"
        results.append((process.returncode, output))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(("config", "engine"), [("cpu", "DDP"), ("multi_node_zero2", "ZeRO-2")])
def test_two_hosts_train_as_one_process(
    config: str, engine: str, two_hosts: list[str], parts: Path, tmp_path: Path
) -> None:
    if engine != "DDP":
        pytest.importorskip("deepspeed")
    changes = {"training.max_steps": 4}
    words = launches.accelerate_words(config, 2)
    words[words.index("--main_process_port") + 1] = "29500"
    words += ["--num_machines", "2", "--machine_rank", "{machine_rank}", "--main_process_ip", "10.77.0.1"]
    words += ["-m", "vir_hf.train", *scenarios.overrides(parts, tmp_path / "two", "tower", **changes)]
    results = launch_on_both(two_hosts, words, timeout_seconds=200)
    assert [code for code, _ in results] == [0, 0], "\n".join(output[-3000:] for _, output in results)
    assert f"engine: {engine} · 2 ranks on 2 nodes" in results[0][1]
    done = launches.run(
        [*launches.accelerate_words("cpu", 1), "-m", "vir_hf.train"]
        + scenarios.overrides(parts, tmp_path / "one", "tower", **changes),
        timeout_seconds=200,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert launches.losses(tmp_path / "two") == pytest.approx(launches.losses(tmp_path / "one"), rel=2e-6)
