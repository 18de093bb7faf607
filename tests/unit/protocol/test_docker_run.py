"""Clients' `docker run` lines: the safe subset is read, the rest is refused by its flag."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.docker_run import DockerRunError, parse_docker_run
from ngpu_protocol.workspaces import WorkspaceSpec


def test_a_whole_line_becomes_a_specification() -> None:
    line = (
        r"""docker run -d --gpus all -p 8080:80 -p 127.0.0.1:9000:9000/tcp \
        -e MODE=fast -e "GREETING=hello world" --env=EMPTY= --shm-size=8g -m 16g --cpus 2.5 \
        -v models:/models -v cache:/root/.cache:rw --name paint --restart unless-stopped \
        registry.example:5000/acme/paint:1.2@sha256:"""
        + "ab" * 32
        + ' python -m paint --steps 20 --title "a b"'
    )
    found = parse_docker_run(line)
    assert found.fields == {
        "image": "registry.example:5000/acme/paint:1.2@sha256:" + "ab" * 32,
        "command": ["python", "-m", "paint", "--steps", "20", "--title", "a b"],
        "gpu_count": 1,
        "ports": [80, 9000],
        "env": {"MODE": "fast", "GREETING": "hello world", "EMPTY": ""},
        "shm_bytes": 8 * 2**30,
        "memory_bytes": 16 * 2**30,
        "cpus": 2.5,
        "volumes": [{"name": "models", "path": "/models"}, {"name": "cache", "path": "/root/.cache"}],
    }
    assert found.published == {80: 8080, 9000: 9000}
    assert found.passed_over == ("-d", "--name", "--restart")
    WorkspaceSpec.model_validate({"id": "1", "name": "paint", **found.fields})


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ("-it --rm", {}),
        ("-dp 8080:80", {"ports": [80]}),
        ("-p80 -p 80:80 -p 81", {"ports": [80, 81]}),
        ("-p :80", {"ports": [80]}),
        ("-eA=1", {"env": {"A": "1"}}),
        ("-e A=b=c", {"env": {"A": "b=c"}}),
        ("--gpus 2", {"gpu_count": 2}),
        ("--gpus=count=3", {"gpu_count": 3}),
        ("""--gpus '"device=0,2"'""", {"gpu_count": 2}),
        ("--gpus all,capabilities=utility", {"gpu_count": 1}),
        ("--shm-size 64m", {"shm_bytes": 64 * 2**20}),
        ("--shm-size 1GB", {"shm_bytes": 2**30}),
        ("--shm-size 4096", {"shm_bytes": 4096}),
        ("--", {}),
    ],
)
def test_each_form_of_a_flag_is_read(options: str, fields: dict[str, Any]) -> None:
    assert parse_docker_run(f"docker run {options} image").fields == {"image": "image", **fields}


@pytest.mark.parametrize("head", ["docker run", "sudo docker run", "docker container run"])
def test_what_follows_the_image_is_the_command(head: str) -> None:
    found = parse_docker_run(f"{head} image --privileged -v /:/host")
    assert found.fields == {"image": "image", "command": ["--privileged", "-v", "/:/host"]}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--privileged", "--privileged"),
        ("--network host", "--network"),
        ("--network=host", "--network"),
        ("--net host", "--net"),
        ("--pid host", "--pid"),
        ("--ipc=host", "--ipc"),
        ("--device /dev/kvm", "--device"),
        ("--cap-add SYS_ADMIN", "--cap-add"),
        ("--security-opt seccomp=unconfined", "--security-opt"),
        ("--mount type=bind,src=/,dst=/host", "--mount"),
        ("--volumes-from other", "--volumes-from"),
        ("--env-file .env", "--env-file"),
        ("--entrypoint sh", "--entrypoint"),
        ("-u 0", "-u"),
        ("-w /", "-w"),
        ("-itu0", "-u"),
        ("--runtime nvidia", "--runtime"),
        ("--userns=host", "--userns"),
        ("-P", "-P"),
        ("-v /:/host", "-v /:/host: paths of the host"),
        ("-v ./data:/data", "-v ./data:/data: paths of the host"),
        ("-v ~/data:/data", "paths of the host"),
        ("-v ../x:/data", "paths of the host"),
        (r"-v C:\\data:/data", "-v"),
        ("-v /data", "-v /data: name the volume"),
        ("-v a:/b:ro", "option of a volume"),
        ("-v a:/b:rw:z", "option of a volume"),
        ("-e HOME", "-e HOME: write NAME=VALUE"),
        ("-e 1A=2", "-e 1A"),
        ("-p 53:53/udp", "-p 53:53/udp"),
        ("-p 1-3:1-3", "-p 1-3:1-3"),
        ("-p 0", "-p 0"),
        ("-p 70000", "-p 70000"),
        ("--gpus 0", "--gpus 0"),
        ("--gpus 18446744073709551615", "1 to 64"),
        ("--gpus driver=nvidia", "--gpus driver=nvidia"),
        ("--shm-size lots", "--shm-size lots"),
        ("--cpus nan", "--cpus nan"),
        ("--cpus", "--cpus image: write a number"),
        ("--rm=perhaps", "--rm takes no value"),
    ],
)
def test_everything_else_is_refused_by_its_flag(options: str, says: str) -> None:
    with pytest.raises(DockerRunError) as refused:
        parse_docker_run(f"docker run {options} image")
    assert says in str(refused.value)


def test_a_secret_in_a_wrong_variable_is_not_repeated() -> None:
    with pytest.raises(DockerRunError) as refused:
        parse_docker_run("docker run -e 1TOKEN=s3cret image")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "image",
        "docker",
        "docker pull image",
        "docker run",
        "docker run -d",
        "docker run -p",
        "docker run 'image",
        "docker run image && rm -rf /",
        "docker run image; reboot",
        "docker run image | tee log",
        "docker run -e A=$(cat /etc/passwd) image",
        "docker run -e A=`id` image",
        "podman run image",
        "docker run " + "x" * 70_000,
    ],
)
def test_what_is_no_such_line_is_refused(line: str) -> None:
    with pytest.raises(DockerRunError):
        parse_docker_run(line)


WORDS = ["-d", "-p", "80:80", "-e", "A=1", "--gpus", "all", "-v", "x:/y", "--", "image", "--privileged", "-", '"', "\\"]


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=6), max_size=10))
def test_any_line_is_read_or_refused_and_never_more_than_the_subset(words: list[str]) -> None:
    with suppress(DockerRunError):
        found = parse_docker_run("docker run " + " ".join(words))
        allowed = {"image", "command", "env", "ports", "volumes", "gpu_count", "shm_bytes", "memory_bytes", "cpus"}
        assert set(found.fields) <= allowed


def test_an_endless_number_of_gpus_is_refused_like_any_other() -> None:
    with pytest.raises(DockerRunError, match="--gpus"):
        parse_docker_run(f"docker run --gpus {'9' * 5000} app")
