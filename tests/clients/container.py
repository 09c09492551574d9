"""Whether Dockerfile, .dockerignore, docker-compose.yml and config/docker.toml of a folder fit together.

Prints what does not, one problem a line. No Docker engine is needed: the files are parsed as Docker
parses them, and what they name is looked up.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

from compose_spec import PyCompose
from dockerfile_parse import DockerfileParser

root = Path(sys.argv[1])
problems = []


def holds(condition, problem):
    if not condition:
        problems.append(problem)
    return condition


# --- the image ------------------------------------------------------------------------------------

hadolint = Path(sys.executable).with_name("hadolint")
found = subprocess.run([hadolint, root / "Dockerfile"], capture_output=True, text=True)
holds(found.returncode == 0, f"hadolint: {found.stdout.strip()}{found.stderr.strip()}")

parsed = DockerfileParser(fileobj=open(root / "Dockerfile", "rb"))
stages = []
for step in parsed.structure:
    if step["instruction"] == "FROM":
        stages.append([])
    if stages:
        stages[-1].append((step["instruction"], step["value"]))
build, final = stages


def values(stage, instruction):
    return [value for name, value in stage if name == instruction]


made = " ".join(values(build, "RUN"))
copied = {}
for value in values(final, "COPY"):
    flags = [word for word in value.split() if word.startswith("--")]
    source, target = [word for word in value.split() if not word.startswith("--")]
    holds("--from=build" in flags, f"COPY {source} is not from the build stage")
    holds(re.search(rf"{re.escape(source)}(\s|$)", made), f"the build stage does not make {source}")
    copied[target] = flags
binary = json.loads(values(final, "ENTRYPOINT")[0])[0]
holds(binary in copied, f"ENTRYPOINT {binary} is not copied")
holds("--bin pulsebus" in made, "the build stage does not build pulsebus")
holds(not values(final, "RUN"), "the final stage runs something, and has no shell for it")
user = (values(final, "USER") or ["root"])[0]
holds(re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), f"USER {user} is not a number other than root's")
health = (values(final, "HEALTHCHECK") or [""])[0]
probe = re.search(r"CMD\s+(\[.*\])", health)
if holds(probe, "HEALTHCHECK needs a shell"):
    holds(json.loads(probe[1])[:2] == [binary, "healthcheck"], "HEALTHCHECK does not ask the binary")
holds(values(final, "STOPSIGNAL") == ["SIGTERM"], "STOPSIGNAL is not SIGTERM")
volume = values(final, "VOLUME")[0]
environment = dict(value.split("=", 1) for value in values(final, "ENV"))
holds(environment.get("STATE_DIRECTORY") == volume, "STATE_DIRECTORY is not the volume")
holds(f"--chown={user}" in copied.get(volume, []), f"{volume} does not belong to {user}")

# --- what the build sees --------------------------------------------------------------------------

lines = [line for line in (root / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
holds(lines[0] == "*", ".dockerignore does not begin with everything")
let_in = [line.removeprefix("!") for line in lines[1:]]
for path in let_in:
    holds((root / path).exists(), f".dockerignore lets {path} in, which is not there")
for path in ("Cargo.toml", "Cargo.lock", "src"):
    holds(path in let_in, f".dockerignore keeps {path} out")

# --- the system -----------------------------------------------------------------------------------

text = (root / "docker-compose.yml").read_text()
try:
    compose = PyCompose.from_yaml(text)
    compose.validate()
    compose = compose.to_dict()
except ValueError as error:
    print(f"docker-compose.yml: {error}")
    sys.exit(1)
services = compose["services"]
for name in re.findall(r"\$\{?(\w+)(?!\w|:-)", "\n".join(l for l in text.splitlines() if l.strip()[:1] != "#")):
    problems.append(f"variable {name} has no default")

used_volumes, used_configs = set(), set()
for name, service in services.items():
    image = service.get("image", "")
    if "build" not in service:
        tag = image.rpartition(":")[2] if ":" in image else ""
        holds(re.search(r"\d", tag), f"{name}: {image} is not pinned")
    holds("healthcheck" in service, f"{name} has no healthcheck")
    for port in service.get("ports", []):
        address = port.get("host_ip") if isinstance(port, dict) else port.rsplit(":", 2)[0]
        holds(address == "127.0.0.1", f"{name}: port {port} is open to others than this host")
    for mount in service.get("volumes", []):
        source = mount["source"] if isinstance(mount, dict) else mount.split(":")[0]
        if source.startswith("."):
            holds((root / source).exists(), f"{name} mounts {source}, which is not there")
        else:
            used_volumes.add(source)
    for config in service.get("configs", []):
        used_configs.add(config["source"] if isinstance(config, dict) else config)
    for other, how in service.get("depends_on", {}).items():
        if holds(other in services, f"{name} depends on {other}, which is not there"):
            waits = how["condition"] == "service_healthy"
            holds(not waits or "healthcheck" in services[other], f"{other} is never healthy")
declared = set(compose.get("volumes", {}))
holds(used_volumes == declared, f"volumes: used {sorted(used_volumes)}, declared {sorted(declared)}")
declared = set(compose.get("configs", {}))
holds(used_configs == declared, f"configs: used {sorted(used_configs)}, declared {sorted(declared)}")

# --- pulsebus among them --------------------------------------------------------------------------

ours = services["pulsebus"]
test = ours["healthcheck"]["test"]
holds(test[:3] == ["CMD", binary, "healthcheck"], f"pulsebus: healthcheck {test}")
mounts = [mount if isinstance(mount, str) else f"{mount['source']}:{mount['target']}" for mount in ours["volumes"]]
holds(f"pulsebus:{volume}" in mounts, f"pulsebus does not keep {volume}")
holds(any(mount.startswith("./config/docker.toml:/etc/pulsebus/pulsebus.toml") for mount in mounts), "pulsebus does not read config/docker.toml")
settings = tomllib.loads((root / "config/docker.toml").read_text())
holds(settings["data_dir"] == volume, "data_dir is not the volume")
port = settings["http"]["listen"].rpartition(":")[2]
holds(f'"127.0.0.1:{port}:{port}"' in text, f"port {port} of pulsebus is not published")
urls = [transport["url"] for transport in settings["transports"].values()]
urls.append(ours["environment"]["PULSEBUS_STORE__URL"].replace("${POSTGRES_PASSWORD:-pulsebus}", "p"))
needs = set()
for url in urls:
    host = urlsplit(url).hostname
    holds(host in services, f"{url} is no service")
    needs.add(host)
for host in needs:
    how = ours["depends_on"].get(host, {}).get("condition")
    holds(how == "service_healthy", f"pulsebus does not wait for {host}")


def seconds(text):
    return sum(float(n) * {"s": 1, "m": 60, "h": 3600}[unit] for n, unit in re.findall(r"([\d.]+)([smh])", str(text)))


drain = seconds(settings.get("shutdown_timeout", "25s"))
holds(seconds(ours.get("stop_grace_period", "10s")) > drain, "pulsebus is killed while it drains")

# --- Prometheus and Grafana -----------------------------------------------------------------------

prometheus = services.get("prometheus")
if prometheus:
    import yaml

    scrape = yaml.safe_load((root / "config/prometheus/prometheus.yml").read_text())
    job = next(job for job in scrape["scrape_configs"] if job["job_name"] == "pulsebus")
    holds(job["static_configs"][0]["targets"] == [f"pulsebus:{port}"], "Prometheus scrapes something else")
    token = job["authorization"]["credentials_file"]
    holds(any(config.get("target") == token for config in prometheus["configs"]), f"Prometheus has no {token}")
    content = compose["configs"]["scrape-token"]["content"]
    holds(content == ours["environment"]["PULSEBUS_HTTP__TOKEN"], "Prometheus has another token than pulsebus")
    sources = yaml.safe_load((root / "config/grafana/provisioning/datasources/prometheus.yml").read_text())
    url = urlsplit(sources["datasources"][0]["url"])
    holds(url.hostname in services, f"Grafana asks {url.hostname}, which is no service")
    boards = yaml.safe_load((root / "config/grafana/provisioning/dashboards/pulsebus.yml").read_text())
    folder = boards["providers"][0]["options"]["path"]
    holds(f":{folder}:ro" in text, f"Grafana has no {folder}")

for problem in problems:
    print(problem)
sys.exit(1 if problems else 0)
