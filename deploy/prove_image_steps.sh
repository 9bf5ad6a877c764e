#!/usr/bin/env bash
# Proves the image's `cpu` target without Docker: takes its steps out of deploy/Dockerfile, runs them in a plain
# folder, starts the service as the image would (with ENGINE=echo, which needs no model), asks its health check, stops
# it with the image's signal and wants exit code 0.
#
#   deploy/prove_image_steps.sh FOLDER     an empty or new folder with 1 GB to spare, and a Python 3.11-3.13 as python3
#
# Left out, and said so as it goes: what needs a root file system of its own (apt-get, useradd, USER).
#
# shellcheck disable=SC2154  # entrypoint, cmd, healthcheck and stop_signal are set by run.sh, which is made here
set -euo pipefail

if [[ $# -ne 1 || -z $1 ]]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
mkdir -p "$1"
if [[ -n $(ls -A "$1") ]]; then
    echo "$1 is not empty: give an empty or new folder" >&2
    exit 2
fi
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$(cd "$1" && pwd)
context=$folder/context image=$folder/image

say() { printf '\n== %s\n' "$*"; }

# What the builder would be sent. A .dockerignore counts its patterns from the root, a git one from anywhere, and
# otherwise they agree as far as our file goes; so git does the matching, in an index of its own.
copy_context() {
    mkdir "$context"
    sed -E -e '/^(#|$)/d' -e 's|^(!?)/?|\1/|' "$repository/.dockerignore" >"$folder/ignored"
    git init --quiet --bare "$folder/index.git"
    git --git-dir="$folder/index.git" --work-tree="$repository" -C "$repository" \
        ls-files --others --exclude-from="$folder/ignored" >"$folder/files"
    tar -C "$repository" -cf - -T "$folder/files" | tar -C "$context" -xf -
}

# The Dockerfile as bash: build.sh runs what builds, run.sh sets the environment, the folder and the commands to run.
translate() {
    python3 - "$repository/deploy/Dockerfile" "$context" "$image" "$folder" <<'PYTHON'
import json
import re
import shlex
import sys
from pathlib import Path

dockerfile, context, image, folder = sys.argv[1:]
STAGES = ("build-cpu", "cpu")

text = re.sub(r"^\s*#.*\n", "", Path(dockerfile).read_text(), flags=re.M)
lines = [line.split(None, 1) for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
stage, steps = "", []
for word, rest in lines:
    if word == "FROM":
        stage = rest.split(" AS ")[1]
    elif stage in STAGES:
        steps.append((stage, word, rest))

named = [rest for _, word, rest in steps if word == "WORKDIR"]
named += [path for _, word, rest in steps if word == "VOLUME" for path in json.loads(rest)]
named += [rest.split()[-1] for _, word, rest in steps if word == "COPY"]
roots = sorted({path for path in named if path.startswith("/")})
inside = re.compile(r"(?<![\w.-])(" + "|".join(map(re.escape, roots)) + r")(?![\w.-])")


def moved(words: str) -> str:
    return inside.sub(lambda found: image + found.group(1), words)


def quoted(command: str) -> str:
    return " ".join(shlex.quote(moved(word)) for word in json.loads(command))


def copied(rest: str) -> list[str]:
    *sources, target = [word for word in rest.split() if not word.startswith("--")]
    if "--from=" in rest:
        return [] if sources == [target] else sys.exit(f"COPY --from to another path is not known here: {rest}")
    script = [f"mkdir -p {shlex.quote(moved(target))}"]
    for source in sources:
        origin = Path(context, source)
        script.append(f"cp -R {shlex.quote(str(origin))}{'/.' if origin.is_dir() else ''} {shlex.quote(moved(target))}")
    return script


build, run = ["set -euo pipefail"], []
for stage, word, rest in steps:
    script = build if stage == "build-cpu" or word in ("RUN", "COPY", "VOLUME") else run
    if word == "RUN" and rest.startswith(("apt-get", "useradd")):
        script.append(f"echo {shlex.quote('left out: RUN ' + rest)}")
        continue
    script.append(f"echo {shlex.quote(word + ' ' + rest)} >&2") if script is build else None
    if word == "ENV":
        script += [f'export {name}="{moved(value)}"' for name, value in (pair.split("=", 1) for pair in shlex.split(rest))]
    elif word == "WORKDIR":
        script.append(f"mkdir -p {shlex.quote(moved(rest))}; cd {shlex.quote(moved(rest))}")
    elif word == "RUN":
        script.append(moved(rest))
    elif word == "COPY":
        script += copied(rest)
    elif word == "VOLUME":
        script += [f"mkdir -p {shlex.quote(moved(path))}" for path in json.loads(rest)]
    elif word in ("ENTRYPOINT", "CMD"):
        script.append(f"{word.lower()}=({quoted(rest)})")
    elif word == "HEALTHCHECK":
        script.append(f"healthcheck=({quoted(rest.split('CMD ', 1)[1])})")
    elif word == "STOPSIGNAL":
        script.append(f"stop_signal={shlex.quote(rest)}")
    elif word not in ("LABEL", "EXPOSE", "USER"):
        sys.exit(f"{dockerfile}: {word} is not known to this script")
Path(folder, "build.sh").write_text("\n".join(build) + "\n")
Path(folder, "run.sh").write_text("\n".join(run) + "\n")
PYTHON
}

wait_for_health() {
    for _ in $(seq 120); do
        if "${healthcheck[@]}" 2>"$folder/health.log"; then
            return
        fi
        if ! kill -0 "$service" 2>/dev/null; then
            break
        fi
        sleep 0.5
    done
    echo "the service did not get healthy; its last lines, and the health check's:" >&2
    tail -n 20 "$folder/service.log" "$folder/health.log" >&2
    exit 1
}

say "context"
copy_context
echo "$(wc -l <"$folder/files") files"

say "build"
translate
bash "$folder/build.sh"

say "run"
# shellcheck source=/dev/null
source "$folder/run.sh"
# The image listens to its container's network; here only this machine may reach it, on a port that is free.
HOST=127.0.0.1
PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export HOST PORT ENGINE=echo
echo "${entrypoint[*]} ${cmd[*]}, port $PORT"
"${entrypoint[@]}" "${cmd[@]}" >"$folder/service.log" 2>&1 &
service=$!
trap 'kill -KILL "$service" 2>/dev/null || true' EXIT
wait_for_health
echo "healthy"

say "stop"
kill -s "$stop_signal" "$service"
code=0
wait "$service" || code=$?
trap - EXIT
if [[ $code -ne 0 ]]; then
    echo "$stop_signal ended the service with exit code $code; 0 is right. Its last lines:" >&2
    tail -n 20 "$folder/service.log" >&2
    exit 1
fi
echo "$stop_signal, exit code 0: the image's steps work"
