"""docker/: the compose file's own training commands run on this machine; images, scripts and their page agree."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli
from torch.distributed.run import get_args_parser

from m5.cli import parse
from m5.config import load_config
from tests.world import TINY, write_world

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")
README = (DOCKER / "README.md").read_text()
NODES = ("node-0", "node-1")
TIMEOUT = 240  # seconds
QUICK = (*TINY, "training.epochs=2", "training.validation_targets=50")


def compose() -> dict:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def node_command(name: str) -> list[str]:
    return shlex.split(compose()["services"][name]["command"])


def shell_commands(text: str) -> list[list[str]]:
    """Words of every command line in a page's sh blocks or in a script, comments aside."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, the rest of its line) of a Dockerfile, with continued lines joined."""
    lines = [line for line in (DOCKER / dockerfile).read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(words[0], words[1]) for line in joined.splitlines() if len(words := line.split(maxsplit=1)) == 2]


def values(dockerfile: str, instruction: str) -> list[str]:
    return [rest for name, rest in instructions(dockerfile) if name == instruction]


def run_all(commands: list[list[str]], folder: Path, environment: dict[str, str]) -> list[tuple[int, str]]:
    """Run commands side by side in `folder`, each in a process group that is gone afterwards; (exit code, output).

    They write to files: a process whose pipe is full while another is read would stand still, and the other with it.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    outputs = [folder / f"output-{index}" for index in range(len(commands))]
    started: list[subprocess.Popen] = []
    try:
        for command, output in zip(commands, outputs, strict=True):
            with output.open("w") as file:
                started.append(
                    subprocess.Popen(
                        command,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        env=os.environ | {"PYTHONPATH": path} | environment,
                        cwd=folder,
                    )
                )
        codes = [process.wait(timeout=TIMEOUT) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [(code, output.read_text()) for code, output in zip(codes, outputs, strict=True)]


@pytest.mark.distributed
@pytest.mark.slow
def test_the_nodes_of_compose_train_to_the_end(tmp_path: Path) -> None:
    """Two torchruns with the services' own commands, on loopback: host names, port, paths and sizes replaced."""
    write_world(tmp_path / "data", users=30, rights=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    commands = []
    for name in NODES:
        words = [re.sub(r"\bnode-\d\b", "127.0.0.1", word) for word in node_command(name)]
        words = [word.replace(":29400", f":{port}").replace("/work/", f"{tmp_path}/") for word in words]
        assert words[0] == "torchrun"
        commands.append([sys.executable, "-m", "torch.distributed.run", *words[1:], *QUICK])
    ended = run_all(commands, tmp_path, compose()["services"]["node-0"]["environment"])
    assert [code for code, _ in ended] == [0, 0], "\n".join(output[-3000:] for _, output in ended)
    run = tmp_path / "runs/two-nodes"
    assert (run / "best/weights.safetensors").is_file()
    # Both ranks took part: the run's first rank reports once, whichever node has it.
    assert sum("best validation" in output for _, output in ended) == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_ray_train_leaves_a_run(tmp_path: Path) -> None:
    write_world(tmp_path / "data", users=30, rights=True)
    arguments = ["--workers", "2", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *QUICK]
    command = [sys.executable, str(DOCKER / "ray_train.py"), *arguments]
    ((code, output),) = run_all([command], tmp_path, {"OMP_NUM_THREADS": "1"})
    assert code == 0, output[-3000:]
    assert (tmp_path / "run/best/weights.safetensors").is_file()


def test_the_nodes_differ_in_their_address_only() -> None:
    first, second = (node_command(name) for name in NODES)
    for name, words in zip(NODES, (first, second), strict=True):
        options = get_args_parser().parse_args(words[1:])
        assert options.local_addr == name == compose()["services"][name]["hostname"]
        assert options.rdzv_endpoint.split(":")[0] in compose()["services"]
        assert options.nnodes == str(len(NODES))
        assert options.training_script == "m5.train" and options.module
    assert [word for word in first if word not in NODES] == [word for word in second if word not in NODES]


def test_the_nodes_train_on_what_the_first_service_prepares() -> None:
    services = compose()["services"]
    script = services["prepare"]["command"][-1]
    lines = [shlex.split(line) for line in script.splitlines() if line.startswith("m5 ")]
    synth, prepare = (parse(words[1:]) for words in lines)
    assert prepare.path == synth.out / "dataset.yaml"
    assert f"test -f {prepare.out}/manifest.json && exit 0" in script
    for name in NODES:
        assert services[name]["depends_on"] == {"prepare": {"condition": "service_completed_successfully"}}
        words = node_command(name)
        options = parse(["train", *words[words.index("m5.train") + 1 :]])
        load_config(options.preset, options.overrides, options.data, options.out)
        assert options.data == prepare.out
        assert options.resume
    for service in services.values():
        (volume,) = service["volumes"]
        source, target = volume.split(":")
        assert source in compose()["volumes"]
        assert all(path.is_relative_to(target) for path in (synth.out, prepare.out, options.out))


def test_a_node_that_is_stopped_has_time_to_save() -> None:
    for name in NODES:
        service = compose()["services"][name]
        patience = int(service["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
        assert int(service["stop_grace_period"].removesuffix("s")) > patience > 30
        assert re.fullmatch(r"on-failure:\d+", service["restart"])
        # What lets a node come back to one that lived on.
        assert service["environment"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    script = (DOCKER / "train.sbatch").read_text()
    (lead,) = re.findall(r"--signal=B:TERM@(\d+)", script)
    (patience,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", script)
    assert int(lead) > int(patience) > 30


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_install_by_the_script_and_pin_everything(name: str) -> None:
    kind = name.removeprefix("Dockerfile.")
    steps = [re.search(r"docker/install\.sh (.*)", line) for line in values(name, "RUN")]
    assert [step[1] for step in steps if step] == [f"requirements {kind} /opt/venv", "project /opt/venv"]
    assert not [line for line in values(name, "RUN") if re.search(r"\bpip install|curl|wget|git ", line)]
    for line in values(name, "RUN"):
        packages = re.findall(r"apt-get install (.*?)(?:&&|$)", line)
        assert all("=" in word for part in packages for word in part.split() if not word.startswith("-"))
    assert "PIP_ARGS=" in values(name, "ARG")
    base = next(line for line in values(name, "ARG") if line.startswith("BASE_IMAGE="))
    assert re.fullmatch(r"BASE_IMAGE=python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    assert {line.partition(" AS ")[0] for line in values(name, "FROM")} == {"${BASE_IMAGE}"}
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            assert not line or re.match(r"#|-r \w+\.txt$|[\w.-]+(\[\w+\])?==[\w.]+$", line), f"{path.name}: {line}"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_no_root_and_report_their_health(name: str) -> None:
    last = [instruction for instruction, _ in instructions(name)]
    user = values(name, "USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"--uid {user.split(':')[0]} " in " ".join(values(name, "RUN"))
    assert "RUN" not in last[len(last) - last[::-1].index("USER") :]
    (health,) = values(name, "HEALTHCHECK")
    assert re.search(r'CMD \[.*"m5", "doctor"\]$', health)
    # Arguments may hold an index with a password: only the first stage, which is thrown away, sees them.
    assert last.index("ARG") < last.index("FROM")
    assert "ARG" not in last[len(last) - last[::-1].index("FROM") :]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_build_context_has_what_is_copied_and_little_else(name: str) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = {Path(line.removeprefix("!")) for line in lines if line.startswith("!")}
    copied = {
        Path(word) for line in values(name, "COPY") if not line.startswith("--from") for word in line.split()[:-1]
    }
    assert all((ROOT / path).exists() for path in copied)
    assert allowed == {next(place for place in allowed if path.is_relative_to(place)) for path in copied}


def test_make_and_ci_run_the_same_steps() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "docker/install.sh requirements $(SET) .venv" in makefile
    assert "docker/install.sh project .venv" in makefile
    assert "pip install" not in makefile
    assert "make install" in (ROOT / ".ci/run").read_text()
    for name in DOCKERFILES:
        assert f"docker/{name}" in re.search(r"hadolint (.*)", makefile)[1]


@pytest.mark.parametrize(
    ("arguments", "python", "code", "complaint"),
    [
        (["requirements", "rocm", "venv"], sys.executable, 2, "usage"),
        (["project"], sys.executable, 2, "usage"),
        (["requirements", "cpu", "{tmp}/venv"], "false", 1, "is for Python 3.11"),
    ],
)
def test_the_script_refuses(arguments: list[str], python: str, code: int, complaint: str, tmp_path: Path) -> None:
    words = [word.format(tmp=tmp_path) for word in arguments]
    ended = subprocess.run(
        [DOCKER / "install.sh", *words],
        env=os.environ | {"PYTHON": python},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, complaint in ended.stderr) == (code, True), ended.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("name", ["install.sh", "train.sbatch"])
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", DOCKER / name], check=True)
    assert os.access(DOCKER / name, os.X_OK)


def test_shell_blocks_of_the_page_parse() -> None:
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (DOCKER / target).exists(), target


def test_commands_of_the_page_have_options_that_exist() -> None:
    seen = set()
    for words in shell_commands(README):
        if "torchrun" in words:
            options = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
            assert options.training_script == "m5.train" and options.module
            parse(["train", *options.training_script_args])
            seen.add("torchrun")
        if "m5" in words:
            parse(words[words.index("m5") + 1 :])
            seen.add("m5")
        if words[0] == "sbatch":
            script = next(word for word in words if word.endswith(".sbatch"))
            assert (ROOT / script).is_file()
            parse(["train", *words[words.index(script) + 1 :], "--resume"])
            seen.add("sbatch")
        if words[0] == "python":
            helped = (ROOT / words[1]).read_text()
            assert all(f'"{word}"' in helped for word in words if word.startswith("--"))
            seen.add("python")
        if "ray" in words:
            command, *arguments = words[words.index("ray") + 1 :]
            ray_cli.commands[command].make_context(command, list(arguments))
            seen.add("ray")
            if command == "exec":
                *_, shell = arguments
                parse(shlex.split(shell.partition("bin/m5 ")[2]))
        if words[:2] == ["docker", "build"]:
            assert words[words.index("-f") + 1].removeprefix("docker/") in DOCKERFILES
            seen.add("docker")
        for word in words:
            if word.startswith("requirements/"):
                assert (ROOT / word).is_file()
    assert seen == {"torchrun", "m5", "sbatch", "python", "docker", "ray"}


def test_torchrun_in_the_slurm_script_has_options_that_exist() -> None:
    script = (DOCKER / "train.sbatch").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"exec torchrun (.*?) \"\$@\"'", script)
    options = get_args_parser().parse_args(shlex.split(command))
    assert options.training_script == "m5.train" and options.module
    assert options.rdzv_backend == "c10d"
