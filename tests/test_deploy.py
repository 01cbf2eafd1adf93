"""The files under ``deploy/``: they parse, fit each other and the code, and the commands in them do what they should.

Prometheus itself scrapes a server and evaluates every query of the dashboard, where it is installed.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from serving import ROOT, Served, served, shared_server

from nanovllm.entrypoints.cli.flags import engine_args
from nanovllm.entrypoints.cli.main import make_parser
from nanovllm.entrypoints.cli.serve_flags import serve_args
from nanovllm.entrypoints.doctor import ascend_versions
from nanovllm.entrypoints.serve.args import ServeArgs

DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile.*[!e]"))
INSTRUCTIONS = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL",
                "ENTRYPOINT", "CMD"}  # fmt: skip


def read_yaml(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "dashboards" / "nanovllm.json").read_text(encoding="utf-8"))


def queries() -> list[str]:
    """Every query of the dashboard, its variables filled in for a server that is scraped once a second."""
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    values = {"$model_name": ".*", "$instance": ".*", "$__rate_interval": "20s"}
    for name, value in values.items():
        found = [query.replace(name, value) for query in found]
    return found


def alerts() -> list[str]:
    return [rule["expr"] for group in read_yaml("prometheus/alerts.yml")["groups"] for rule in group["rules"]]


def settings_of(arguments: list[str]) -> ServeArgs:
    """Arguments of ``nanovllm serve``, taken apart as the command does; it refuses what it does not know."""
    return serve_args(make_parser(["serve"]).parse_args(["serve", *arguments]))


def instructions(file: Path) -> list[tuple[str, str]]:
    """(name, rest) of each instruction of a Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]


# -- Docker ------------------------------------------------------------------------------------------------------------


def test_there_are_dockerfiles():
    names = [f"Dockerfile.{device}" for device in ("cpu", "cuda", "npu", "npu-310p")]
    assert [file.name for file in DOCKERFILES] == names


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_a_dockerfile_copies_what_there_is_and_starts_the_server(file: Path):
    lines = instructions(file)
    assert {name for name, _ in lines} <= INSTRUCTIONS and lines[0][0] in ("FROM", "ARG")
    ignored = file.with_name(file.name + ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for kind, rest in lines if kind == "COPY" and "--from" not in rest for name in rest.split()[:-1]}
    assert copied == sent and all((ROOT / name).exists() for name in copied)
    last = {name: rest for name, rest in lines}
    assert started_by(json.loads(last["ENTRYPOINT"])) == ["nanovllm", "serve"] and last["USER"] != "root"
    settings = settings_of(json.loads(last["CMD"]))
    assert str(settings.port) == last["EXPOSE"] and settings.host == "0.0.0.0"
    users = [index for index, (name, _) in enumerate(lines) if name == "USER"]
    assert users[-1] > max(index for index, (name, _) in enumerate(lines) if name == "RUN")
    for name, rest in lines:
        if name == "RUN":
            assert "apt-get install -y --no-install-recommends" in rest or "apt-get" not in rest
            assert subprocess.run(["sh", "-n", "-c", rest], check=False).returncode == 0


def started_by(entrypoint: list[str]) -> list[str]:
    """The program that an entry point becomes: itself, or what a shell starts after CANN's environment is set."""
    if entrypoint[:2] != ["bash", "-c"]:
        return entrypoint
    *sourced, started = entrypoint[2].split(" && ")
    scripts = ["ascend-toolkit/set_env.sh", "nnal/atb/set_env.sh"]
    assert sourced == [f"source /usr/local/Ascend/{script}" for script in scripts]
    words = shlex.split(started)
    assert words[0] == "exec" and words[-1] == "$@" and len(entrypoint) == 4  # the fourth is the shell's own name
    return words[1:-1]


@pytest.mark.parametrize("chip", ["", "-310p"])
def test_the_images_for_ascend_have_versions_that_go_together(chip: str):
    """CANN of the base image, torch and torch-npu, by the table of ``nanovllm doctor``."""
    lines = instructions(DEPLOY / "docker" / f"Dockerfile.npu{chip}")
    base = re.fullmatch(
        r"quay\.io/ascend/cann:([\d.]+)-(\S+)-ubuntu22\.04-py3\.12",
        next(rest for name, rest in lines if name == "FROM"),
    )
    installed = dict(
        re.findall(r"(torch|torch-npu)==([\w.]+)", " ".join(rest for name, rest in lines if name == "RUN"))
    )
    assert base is not None and base[2] == ("310p" if chip else "${CHIP}")
    release = ascend_versions.release_of(installed["torch-npu"])
    assert release is not None and ascend_versions.series(base[1]) in release.works_with
    assert ascend_versions.torch_of(installed["torch-npu"]) == installed["torch"]
    command = json.loads(next(rest for name, rest in lines if name == "CMD"))
    asked = engine_args(make_parser(["serve"]).parse_args(["serve", *command]))
    assert asked["device"] == "npu"
    assert (asked.get("dtype"), asked.get("enforce_eager")) == (("float16", True) if chip else (None, None))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_the_health_check_of_an_image_tells_a_server_that_works(file: Path):
    check = next(rest for name, rest in instructions(file) if name == "HEALTHCHECK")
    command = json.loads(check[check.index("CMD") + 3 :])
    url = shared_server().url

    def run(where: str) -> int:
        words = [word.replace("http://127.0.0.1:8000", where) for word in command]
        return subprocess.run([*words], capture_output=True, timeout=30, check=False).returncode

    command[0] = shutil.which("python3") or command[0]
    assert run(url) == 0
    assert run("http://127.0.0.1:9") != 0 and run(f"{url}/none") != 0


def test_the_services_of_the_compose_file_fit_each_other():
    compose = read_yaml("compose.yaml")
    services = compose["services"]
    assert list(services) == ["server", "prometheus", "grafana"]
    build = services["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    settings = settings_of(services["server"]["command"])
    (scrape,) = read_yaml("prometheus/prometheus.yml")["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == [f"server:{settings.port}"] and scrape["job_name"] == "nanovllm"
    assert services["server"]["ports"] == [f"{settings.port}:{settings.port}"]
    source = read_yaml("grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
    (provider,) = read_yaml("grafana/provisioning/dashboards/nanovllm.yml")["providers"]
    mounts = [mount.split(":") for service in services.values() for mount in service["volumes"]]
    for source_path, *_ in mounts:
        if source_path.startswith("."):
            assert (DEPLOY / source_path).is_dir(), source_path
        else:
            assert source_path in compose["volumes"]
    assert provider["options"]["path"] in {mount[1] for mount in mounts}
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/nanovllm.json"
    for name in ("prometheus", "grafana"):  # they ask for no password
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
    assert int(services["server"]["stop_grace_period"].rstrip("s")) > settings.shutdown_timeout


# -- Kubernetes and systemd --------------------------------------------------------------------------------------------


def test_the_kubernetes_example_probes_what_the_server_answers():
    parts = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "nanovllm.yaml").read_text(encoding="utf-8")))
    assert [part["kind"] for part in parts] == ["PersistentVolumeClaim", "Deployment", "Service"]
    claim, deployment, service = parts
    spec = deployment["spec"]["template"]["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    (container,) = spec["containers"]
    settings = settings_of(container["args"])
    assert container["ports"][0]["containerPort"] == settings.port == service["spec"]["ports"][0]["port"]
    assert spec["terminationGracePeriodSeconds"] > settings.shutdown_timeout
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[name]["httpGet"]
        assert probe["port"] == container["ports"][0]["name"]
        assert shared_server().client.get(probe["path"]).status_code == 200
    notes = deployment["spec"]["template"]["metadata"]["annotations"]
    assert shared_server().client.get(notes["prometheus.io/path"]).status_code == 200
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    users = [
        rest for name, rest in instructions(DEPLOY / "docker" / "Dockerfile.cpu") if name == "RUN" and "uid" in rest
    ]
    assert f"--uid {spec['securityContext']['runAsUser']} " in users[0]


def unit() -> str:
    return (DEPLOY / "systemd" / "nanovllm.service").read_text(encoding="utf-8")


def test_the_unit_starts_a_server_that_ends_politely(tmp_path: Path):
    """The command of the unit with the variables of its file, on a free port."""
    variables = dict(
        line.split("=", 1)
        for line in (DEPLOY / "systemd" / "nanovllm.env").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    command = re.search(r"^ExecStart=(.*)$", unit(), re.MULTILINE)
    assert command is not None
    words = shlex.split(command[1])
    assert words[0].endswith("/bin/nanovllm") and words[1] == "serve"
    arguments = [each for word in words[2:] for each in variables[word.removeprefix("$")].split()]
    settings = settings_of(arguments)
    assert settings.host == "127.0.0.1"
    stop = re.search(r"^TimeoutStopSec=(\d+)$", unit(), re.MULTILINE)
    assert stop is not None and int(stop[1]) > settings.shutdown_timeout
    arguments[arguments.index("--port") + 1] = "0"
    with served(*arguments, HF_HOME=str(tmp_path)) as server:
        assert server.ask("/v1/completions", {"prompt": "One, two,", "max_tokens": 2})["choices"]
        assert server.stop() == 0


def test_systemd_accepts_the_unit(tmp_path: Path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    file = tmp_path / "nanovllm.service"
    file.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit(), flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "nanovllm" not in done.stderr, done.stderr


# -- Prometheus and the dashboard --------------------------------------------------------------------------------------


def test_panels_have_names_and_do_not_overlap():
    board, taken = dashboard(), set()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) > 15
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert panel["title"] and not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"] and panel["targets"]


def test_queries_name_only_metrics_and_labels_there_are():
    answer = shared_server().client.get("/metrics").text
    series = set(re.findall(r"^([a-z0-9_:]+)[{ ]", answer, re.MULTILINE))
    for query in [*queries(), *alerts()]:
        named = set(re.findall(r"\b(?:vllm:|nanovllm:(?!tenant_)|process_)[a-z0-9_]+", query))
        assert named <= series or query.startswith("up"), named - series
    labels = set(re.findall(r'(\w+)="', answer)) | {"instance", "job", "tenant"}  # the last if there are tenants
    for query in [*queries(), *alerts()]:
        used = re.findall(r"(\w+)=~?\"", query) + [
            label for group in re.findall(r"\b(?:by|on) \(([\w, ]+)\)", query) for label in group.split(", ")
        ]
        assert set(used) <= labels, query


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus with our configuration, scraping the shared server every second under some load."""
    for name in ("prometheus", "promtool"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed: apt-get install prometheus")
    folder, server = tmp_path_factory.mktemp("prometheus"), shared_server()
    for file in (DEPLOY / "prometheus").iterdir():
        text = file.read_text(encoding="utf-8").replace("server:8000", f"127.0.0.1:{server.port}")
        (folder / file.name).write_text(re.sub(r"_interval: \d+s", "_interval: 1s", text))
    port, stop = free_port(), threading.Event()
    process = subprocess.Popen(
        ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
         f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"],
    )  # fmt: skip
    load = threading.Thread(target=_load, args=(server, stop))
    load.start()
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while _scrapes(url) < 6 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        yield url
    finally:
        stop.set()
        load.join()
        process.terminate()
        process.wait(20)


def _load(server: Served, stop: threading.Event) -> None:
    while not stop.is_set():
        server.post("/v1/completions", {"prompt": "Some words that come again. " * 8, "max_tokens": 12, "n": 2})
        stop.wait(0.1)


def _scrapes(url: str) -> int:
    try:
        answer = httpx.get(f"{url}/api/v1/query", params={"query": 'count_over_time(up{job="nanovllm"}[1h])'})
        return int(answer.json()["data"]["result"][0]["value"][1])
    except (httpx.HTTPError, LookupError, ValueError):
        return 0


def test_every_query_of_the_dashboard_has_an_answer(prometheus: str):
    targets = httpx.get(f"{prometheus}/api/v1/targets").json()["data"]["activeTargets"]
    assert [(target["health"], target["lastError"]) for target in targets] == [("up", "")]
    assert len(queries()) > 30
    for query in queries():
        answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", answer
        values = [float(series["value"][1]) for series in answer["data"]["result"]]
        assert values, f"no series: {query}"
        assert all(value == value for value in values), f"not a number: {query}"
    ask = {"query": "sum(vllm:generation_tokens_total)"}
    (total,) = httpx.get(f"{prometheus}/api/v1/query", params=ask).json()["data"]["result"]
    assert float(total["value"][1]) > 0


def test_alerts_are_loaded_and_silent_while_all_is_well(prometheus: str):
    (group,) = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    assert len(group["rules"]) == len(alerts()) and all(rule["health"] != "err" for rule in group["rules"])
    assert httpx.get(f"{prometheus}/api/v1/alerts").json()["data"]["alerts"] == []


def test_promtool_accepts_the_configuration(prometheus: str):
    done = subprocess.run(["promtool", "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = shared_server().client.get("/metrics").content
    linted = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True, check=False)
    problems = [line for line in linted.stderr.decode().splitlines() if "vllm:" not in line]
    assert linted.returncode in (0, 3) and not problems, problems
