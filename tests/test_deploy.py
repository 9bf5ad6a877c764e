import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
KNOWN = {name.upper() for name in Settings.model_fields}
STANDARD = {
    *("ENGINE", "HOST", "PORT", "PUBLIC_URL", "DATABASE_URL", "PERSONAS_DIR", "LOG_LEVEL"),
    *("TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN", "DEV_ALLOW_UNSIGNED", "CASCADE_LLM"),
    *("HF_TOKEN", "ROWS", "PERSONAPLEX_CHECKPOINT"),
}

Steps = list[tuple[str, str]]


def example(path: Path) -> dict[str, str]:
    """Every NAME=value of an environment example, also those behind a #."""
    return dict(re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", path.read_text(), flags=re.M))


def stages() -> dict[str, Steps]:
    """The Dockerfile's stages, each with its instructions in order."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M)
    found: dict[str, Steps] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.startswith("FROM "):
            steps = found.setdefault(line.split(" AS ")[1], [])
        elif line:
            word, rest = line.split(None, 1)
            steps.append((word, rest))
    return found


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return loaded


# --- environment examples


def test_the_example_names_the_standard_settings_and_no_others() -> None:
    assert set(example(ROOT / ".env.example")) == STANDARD
    assert STANDARD <= KNOWN


def test_the_example_can_be_copied_as_it_is_and_with_every_line_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KNOWN:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "as-it-is").write_text((ROOT / ".env.example").read_text())
    shown = example(ROOT / ".env.example")
    (tmp_path / "taken").write_text("".join(f"{name}={value}\n" for name, value in shown.items()))

    defaults, taken = load_settings(tmp_path / "absent"), load_settings(tmp_path / "taken")

    assert load_settings(tmp_path / "as-it-is") == defaults
    forms = {"public_url": None, "cascade_llm": None, "personas_dir": defaults.personas_dir}
    forms |= {"rows": None, "personaplex_checkpoint": None}
    assert taken.model_copy(update=forms) == defaults


def test_the_compose_example_names_what_compose_or_the_service_reads() -> None:
    read_by_compose = set(re.findall(r"\$\{([A-Z_]+)", (DEPLOY / "compose.yaml").read_text()))

    assert read_by_compose <= set(example(DEPLOY / ".env.example"))
    assert set(example(DEPLOY / ".env.example")) <= read_by_compose | KNOWN


# --- the image


def test_everything_the_image_copies_is_there_and_sent_to_the_builder() -> None:
    """Our .dockerignore leaves out all but what it names, so a name must stand there for each source."""
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [rest for steps in stages().values() for word, rest in steps if word == "COPY" and "--from" not in rest]
    sources = {source for rest in copies for source in rest.split()[:-1]}

    assert sources == sent
    assert [source for source in sorted(sources) if not (ROOT / source).exists()] == []


def test_the_cuda_image_is_the_cpu_image_and_what_personaplex_needs() -> None:
    bases = dict(re.findall(r"^FROM (\S+) AS (\S+)$", (DEPLOY / "Dockerfile").read_text(), flags=re.M))
    installed = [rest.partition(" install ")[2] for word, rest in stages()["build-cuda"] if word == "RUN"]
    pinned = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(), flags=re.M)

    assert {bases["build-cpu"], bases["cpu"]} == {"build-cuda", "cuda"}
    assert pinned is not None
    assert installed == ["--require-hashes -r requirements-personaplex.lock", pinned[1]]
    assert ("COPY", "--from=build-cuda /opt/personaline /opt/personaline") in stages()["cuda"]


def test_the_locks_leave_torch_and_what_it_brings_for_gpus_to_the_machine() -> None:
    for name in ("requirements.lock", "requirements-personaplex.lock", "requirements-test.lock"):
        pinned = re.findall(r"^([a-z0-9_.-]+)==", (ROOT / name).read_text(), flags=re.M)
        assert [package for package in pinned if package.startswith(("torch", "nvidia", "cuda", "triton"))] == []
        assert ("sentencepiece" in pinned) is (name != "requirements.lock")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_starts_as_an_ordinary_user_with_settings_that_hold(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = stages()["cpu"] + (stages()["cuda"] if target == "cuda" else [])
    words = [word for word, _ in steps]
    environment = dict(pair.split("=", 1) for word, rest in steps if word == "ENV" for pair in rest.split())
    for name in KNOWN:
        monkeypatch.delenv(name, raising=False)
    for name in KNOWN & set(environment):
        monkeypatch.setenv(name, environment[name])

    assert int(dict(steps)["USER"]) > 0
    last = max(place for place, word in enumerate(words) if word == "USER")
    assert "RUN" not in words[last:]
    assert str(load_settings(tmp_path / "absent").port) == dict(steps)["EXPOSE"]


def test_the_image_keeps_models_and_data_on_its_volumes() -> None:
    steps = dict(stages()["cpu"])

    assert yaml.safe_load(steps["VOLUME"]) == ["/models", "/data"]
    assert "PERSONALINE_CACHE=/models " in steps["ENV"]
    assert "DATABASE_URL=sqlite:////data/" in steps["ENV"]


def test_the_proof_of_the_image_leaves_a_folder_alone_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    ran = subprocess.run([DEPLOY / "prove_image_steps.sh", tmp_path], capture_output=True, text=True, timeout=30)

    assert (ran.returncode, ran.stderr) == (2, f"{tmp_path} is not empty: give an empty or new folder\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# --- compose


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_what_compose_builds_is_a_target_of_the_dockerfile(name: str) -> None:
    build = (
        compose("compose.yaml")["services"]["personaline"]["build"]
        | (compose(name)["services"]["personaline"]["build"])
    )

    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert build["target"] in stages()


def test_what_compose_mounts_is_there_or_a_volume_it_declares() -> None:
    mounts = [mount.split(":")[0] for service in compose()["services"].values() for mount in service.get("volumes", [])]
    files = [mount for mount in mounts if mount.startswith(".")]

    assert files
    assert [mount for mount in files if not (DEPLOY / mount).exists()] == []
    assert set(mounts) - set(files) == set(compose()["volumes"])


def test_every_volume_of_the_image_is_kept() -> None:
    kept = [mount.split(":")[1] for mount in compose()["services"]["personaline"]["volumes"]]

    assert set(yaml.safe_load(dict(stages()["cpu"])["VOLUME"])) <= set(kept)


def test_the_service_itself_is_published_to_this_machine_only() -> None:
    assert [port.split(":")[0] for port in compose()["services"]["personaline"]["ports"]] == ["127.0.0.1"]


# --- what the public reaches


def caddy_blocks() -> dict[str, list[str]]:
    """The Caddyfile's blocks at the top level: their name and their lines."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Caddyfile").read_text(), flags=re.M)
    blocks = re.findall(r"^(\S+) \{\n(.*?)^\}", text, flags=re.M | re.S)
    return {name: [line.strip() for line in body.splitlines()] for name, body in blocks}


def test_the_public_reaches_the_carriers_paths_and_the_health_check_only() -> None:
    blocks = caddy_blocks()
    rules = blocks.pop("(for_the_public)")

    assert rules == [
        *("@public path /twilio/* /health",),
        *("handle @public {", "reverse_proxy personaline:8000", "}"),
        *("handle {", "respond 404", "}"),
    ]
    assert blocks == {site: ["import for_the_public"] for site in ("{$DOMAIN:localhost}", ":8080")}


def test_the_proxy_finds_the_service_where_compose_starts_it() -> None:
    service = compose()["services"]["personaline"]

    assert f"reverse_proxy personaline:{service['environment']['PORT']}" in caddy_blocks()["(for_the_public)"]


def test_the_tunnel_leads_through_the_same_rules_and_its_door_is_not_published() -> None:
    services = compose()["services"]
    found = re.search(r"--url http://caddy(:\d+)$", services["tunnel"]["command"])

    assert found is not None
    assert found[1] in caddy_blocks()
    assert [port for port in services["caddy"]["ports"] if port.endswith(found[1])] == []
