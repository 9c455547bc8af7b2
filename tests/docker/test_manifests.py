"""The manifests for Kubernetes: valid by its schemas, and what they promise of users and data.

Of KubeRay's own objects the pod templates are checked in full, and the keys around them against
those that KubeRay 1.7 knows.
"""

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.docker import files
from tests.tiny import ROOT

KUBERNETES = "1.34"
DOCUMENTS = files.manifests()
OWN = [(name, each) for name, each in DOCUMENTS if not each["apiVersion"].startswith("ray.io/")]
VALUES: dict[str, Any] = yaml.safe_load((files.DOCKER / "kuberay" / "values.yaml").read_text())

_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
_HEAD = {"serviceType", "rayStartParams", "template"}
_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
_JOB = {
    "entrypoint",
    "submissionMode",
    "backoffLimit",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "submitterPodTemplate",
    "rayClusterSpec",
}


def find(name: str) -> dict[str, Any]:
    """The one document of a file."""
    (found,) = (each for file, each in DOCUMENTS if file == name)
    return found


CLUSTER, JOB, SEARCH = (find(f"{name}.yaml")["spec"] for name in ("cluster", "job", "search"))
HEAD = CLUSTER["headGroupSpec"]["template"]
(WORKER,) = (group["template"] for group in CLUSTER["workerGroupSpecs"])
JOBS = {
    each["metadata"]["name"]: each["spec"]["template"] for _, each in OWN if each["kind"] == "Job"
}
SUBMITTERS = {
    name: each["submitterPodTemplate"] for name, each in (("job", JOB), ("search", SEARCH))
}
TEMPLATES = {"head": HEAD, "worker": WORKER, **SUBMITTERS, **JOBS}
templates = pytest.mark.parametrize("name", TEMPLATES)


def mounts(template: dict[str, Any]) -> dict[str, str]:
    """What is mounted where, by the names of volumes."""
    (container,) = template["spec"]["containers"]
    return {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}


@pytest.mark.parametrize("document", [each for _, each in OWN], ids=lambda d: d["metadata"]["name"])
def test_manifests_are_valid(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@templates
def test_pod_templates_are_valid(name: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", **TEMPLATES[name]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_objects_of_kuberay_have_keys_that_it_knows() -> None:
    for _, each in DOCUMENTS:
        if each["apiVersion"].startswith("ray.io/"):
            assert each["apiVersion"] == "ray.io/v1"
    assert set(CLUSTER) == _CLUSTER
    assert set(CLUSTER["headGroupSpec"]) == _HEAD
    assert set(CLUSTER["workerGroupSpecs"][0]) == _GROUP
    assert set(JOB) == _JOB
    for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_a_job_brings_the_cluster_of_the_cluster_file() -> None:
    assert JOB["rayClusterSpec"] == CLUSTER


def test_a_search_of_many_is_put_on_the_cluster_that_stays() -> None:
    # Keys that end a cluster, or start it again, are for jobs that have one of their own.
    assert set(SEARCH) == {
        "clusterSelector",
        "entrypoint",
        "submissionMode",
        "submitterPodTemplate",
    }
    assert SEARCH["clusterSelector"] == {"ray.io/cluster": find("cluster.yaml")["metadata"]["name"]}
    assert SEARCH["submitterPodTemplate"] == JOB["submitterPodTemplate"]


def test_the_chart_makes_the_same_cluster() -> None:
    for role, template, group in (
        ("head", HEAD, CLUSTER["headGroupSpec"]),
        ("worker", WORKER, CLUSTER["workerGroupSpecs"][0]),
    ):
        values, (container,) = VALUES[role], template["spec"]["containers"]
        image = values.get("image", VALUES["image"])
        assert f"{image['repository']}:{image['tag']}" == container["image"]
        assert values["rayStartParams"] == group["rayStartParams"]
        assert values["labels"] == template["metadata"]["labels"]
        assert values["podSecurityContext"] == template["spec"]["securityContext"]
        assert values["volumes"] == template["spec"]["volumes"]
        for key in ("resources", "securityContext", "volumeMounts"):
            assert values[key] == container[key], (role, key)
        env = VALUES["common"]["containerEnv"] + values.get("containerEnv", [])
        assert {each["name"] for each in container["env"]} | {
            "RAY_AUTH_MODE",
            "RAY_AUTH_TOKEN",
        } == {each["name"] for each in env}


def test_versions_are_those_of_the_package() -> None:
    from evomerge import __version__

    texts = [path.read_text() for path in files.MANIFESTS]
    images = {name for text in texts for name in re.findall(r"image: (evomerge\S*)", text)}
    assert images == {f"evomerge:{__version__}", f"evomerge-worker:{__version__}"}
    ray = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert ray is not None
    assert CLUSTER["rayVersion"] == VALUES["head"]["rayVersion"] == ray[1]
    assert VALUES["image"]["tag"] == VALUES["worker"]["image"]["tag"] == __version__


@templates
def test_pods_are_not_root_and_write_nowhere_but_in_their_volumes(name: str) -> None:
    spec = TEMPLATES[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "/home/evomerge/tmp" in mounts(TEMPLATES[name]).values()
    assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()


@templates
def test_no_service_becomes_a_variable_of_vllm(name: str) -> None:
    assert TEMPLATES[name]["spec"]["enableServiceLinks"] is False
    names = [each["metadata"]["name"] for _, each in DOCUMENTS]
    assert "vllm" not in names
    assert VALUES["fullnameOverride"] != "vllm"


def test_sealed_data_are_for_exports_alone_and_the_store_is_not_for_workers() -> None:
    with_sealed = {name for name, each in TEMPLATES.items() if "sealed" in mounts(each)}
    assert with_sealed == {"evomerge-export"}
    told = [
        env
        for name, each in TEMPLATES.items()
        if name != "evomerge-export"
        for env in each["spec"]["containers"][0].get("env", [])
    ]
    assert "EVOMERGE_DATA" not in {env["name"] for env in told}
    with_store = {
        name
        for name, each in TEMPLATES.items()
        if any(env["name"] == "PGPASSWORD" for env in each["spec"]["containers"][0].get("env", []))
    }
    assert with_store == {"head", "evomerge-upgrade", "evomerge-export"}


def test_no_manifest_holds_a_secret() -> None:
    assert not any(each["kind"] == "Secret" for _, each in DOCUMENTS)
    for template in TEMPLATES.values():
        for env in template["spec"]["containers"][0].get("env", []):
            if any(word in env["name"] for word in ("PASSWORD", "TOKEN")):
                assert "value" not in env


def test_every_claim_that_is_mounted_is_made() -> None:
    made = {each["metadata"]["name"] for _, each in OWN if each["kind"] == "PersistentVolumeClaim"}
    mounted = {
        volume["persistentVolumeClaim"]["claimName"]
        for template in TEMPLATES.values()
        for volume in template["spec"].get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    assert mounted == made


def test_policies_select_pods_that_there_are() -> None:
    labels = {name: each["metadata"]["labels"] for name, each in TEMPLATES.items()}
    assert {each["app.kubernetes.io/part-of"] for each in labels.values()} == {"evomerge"}
    policy = next(each for _, each in OWN if each["metadata"]["name"] == "evomerge-store")
    (rule,) = policy["spec"]["podSelector"]["matchExpressions"]
    allowed = {name for name, each in labels.items() if each[rule["key"]] in rule["values"]}
    assert allowed == {"head", "evomerge-upgrade", "evomerge-export"}
