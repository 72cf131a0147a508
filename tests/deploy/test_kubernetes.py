"""The Kubernetes manifests are valid, strictly and offline, and agree with the settings, the code and each other.

They are merged here as kustomize does it, and kustomize itself says that this is so where kubectl is there. No cluster
has seen them.
"""

import importlib
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry

from service import __version__
from service.engine.device import MAX_BATCH_ROWS
from service.engine.gpu.device import GPU
from service.http.layers.auth import read_keys
from service.http.operations.probes import METRICS_S
from service.metrics import Metrics
from service.server.worker_count import Machine, choose_workers, weights_bytes
from service.settings import Settings, check_names, read_settings

ROOT = Path(__file__).parents[2]
HERE = ROOT / "deploy/kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
Objects = dict[str, dict[str, Any]]  # by kind and name

OVERLAYS = ("cpu", "gpu", "bundles-volume", "bundles-image")
BUILDS = ("base", *(f"overlays/{name}" for name in (*OVERLAYS, "mine")))  # mine: the one in docs/kubernetes.md
OLDEST, NEWEST = "1.27", "1.37"  # of Kubernetes
FIRST_WITH = {"overlays/bundles-image": "1.31"}
CUSTOM = {  # generated from the operators' own schemas
    ("monitoring.coreos.com/v1", "ServiceMonitor"): "cloudcoil.models.prometheus_operator.v1",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "cloudcoil.models.prometheus_operator.v1",
    ("keda.sh/v1alpha1", "ScaledObject"): "cloudcoil.models.keda.v1alpha1",
}
MERGED_BY = {"containers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath"}


# --- Merging -----------------------------------------------------------------------------------------------------


def merged(old: Any, new: Any, key: str = "") -> Any:
    """A strategic merge: mappings by key, the lists of MERGED_BY by an item's name, null removes, the rest replaces."""
    if isinstance(old, dict):
        both = old | {name: merged(old.get(name), value, name) for name, value in new.items()}
        return {name: value for name, value in both.items() if value is not None}
    if isinstance(old, list) and key in MERGED_BY:
        name = MERGED_BY[key]
        items = {item[name]: item for item in old}
        return [*(items | {item[name]: merged(items.get(item[name]), item) for item in new}).values()]
    return new


def documents(path: Path) -> Objects:
    """The objects of a file."""
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in yaml.safe_load_all(path.read_text())}


def build(folder: Path, objects: Objects | None = None) -> Objects:
    """What `kubectl kustomize` makes of a folder, as far as ours go; of a component, these objects with it added."""
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "resources", "components", "patches", "images", "namespace"}
    assert plan.keys() <= known
    objects = dict(objects or {})
    for path in plan.get("resources", []):
        more = build(folder / path) if (folder / path).is_dir() else documents(folder / path)
        assert not objects.keys() & more.keys()
        objects |= more
    for path in plan.get("components", []):
        objects = build(folder / path, objects)
    for patch in plan.get("patches", []):
        change = yaml.safe_load(patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text())
        key = f"{change['kind']}/{change['metadata']['name']}"
        objects[key] = merged(objects[key], change)
    for one in objects.values():
        one["metadata"] |= {"namespace": plan["namespace"]} if "namespace" in plan else {}
    for image in plan.get("images", []):
        for container in pod_spec(objects)["containers"]:
            if container["image"].startswith(f"{image['name']}:"):
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return objects


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifests, and beside our overlays the one that the documentation shows."""
    copy = tmp_path_factory.mktemp("deploy") / "kubernetes"
    shutil.copytree(HERE, copy)
    shown = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/kubernetes.md").read_text(), flags=re.DOTALL)[0]
    (copy / "overlays/mine").mkdir()
    (copy / "overlays/mine/kustomization.yaml").write_text(shown)
    return copy


@pytest.fixture(params=BUILDS)
def built(folder: Path, request: pytest.FixtureRequest) -> Objects:
    """The objects of each build."""
    return build(folder / request.param)


def pod_spec(objects: Objects) -> dict[str, Any]:
    """The pods of the Deployment."""
    spec: dict[str, Any] = objects["Deployment/gan-service"]["spec"]["template"]["spec"]
    return spec


def container(objects: Objects) -> dict[str, Any]:
    """The only container."""
    (one,) = pod_spec(objects)["containers"]
    assert isinstance(one, dict)
    return one


def environment(one: dict[str, Any]) -> dict[str, str]:
    """A container's variables."""
    return {variable["name"]: variable["value"] for variable in one["env"]}


def image_environment() -> dict[str, str]:
    """The settings that the image has."""
    return dict(re.findall(r"(GAN_\w+)=(\S+)", DOCKERFILE))


def ordered(value: Any, key: str = "") -> Any:
    """The same, with what is merged by name in the order of names: kustomize puts new items first, we last."""
    if isinstance(value, dict):
        return {name: ordered(item, name) for name, item in value.items()}
    if isinstance(value, list):
        items = [ordered(item) for item in value]
        return sorted(items, key=lambda item: item[MERGED_BY[key]]) if key in MERGED_BY else items
    return value


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_merges_alike(folder: Path) -> None:
    """Each build is what `kubectl kustomize` makes of the folder."""
    version = subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True, check=False).stdout
    if "Kustomize Version: v5" not in version:
        pytest.skip("this kubectl has another kustomize")
    for name in BUILDS:
        done = subprocess.run(["kubectl", "kustomize", folder / name], capture_output=True, text=True, check=True)
        theirs = {f"{one['kind']}/{one['metadata']['name']}": one for one in yaml.safe_load_all(done.stdout)}
        assert ordered(build(folder / name)) == ordered(theirs)


# --- Schemas -----------------------------------------------------------------------------------------------------


def validate(one: dict[str, Any], version: str) -> None:
    """Raise where an object is not exactly what its schema says; a kind without a schema raises too."""
    key = one["apiVersion"], one["kind"]
    if key not in CUSTOM:
        kubernetes_validate.validate(one, version, strict=True)
        return
    model = getattr(importlib.import_module(CUSTOM[key]), one["kind"])
    read = model.model_validate(one).model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert read == one  # it drops fields that it does not know


@pytest.mark.slow  # two seconds for the operators' models
@pytest.mark.parametrize("name", BUILDS)
def test_every_object_is_what_its_schema_says(folder: Path, name: str) -> None:
    """In the oldest and in the newest Kubernetes."""
    for one in build(folder / name).values():
        for version in (FIRST_WITH.get(name, OLDEST), NEWEST):
            validate(one, version)


def test_the_newest_kubernetes_is_the_newest() -> None:
    """When the schemas of another one come, these are checked against them."""
    assert kubernetes_validate.latest_version() == f"{NEWEST}.0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("base/deployment.yaml", ("readinessProbe:", "redinessProbe:")),
        ("base/deployment.yaml", ("periodSeconds: 5", "periodSeconds: five")),
        ("base/service.yaml", ("kind: Service", "kind: Servise")),
        ("base/networkpolicy.yaml", ("networking.k8s.io/v1", "networking.k8s.io/v1beta1")),
        ("components/hpa/horizontalpodautoscaler.yaml", ("averageValue:", "avergeValue:")),
        ("components/monitoring/servicemonitor.yaml", ("interval:", "intervall:")),
        ("components/monitoring/servicemonitor.yaml", ("interval: 15s", "interval: 15 seconds")),
        ("components/monitoring/prometheusrule.yaml", ("groups:", "group:")),
        ("components/keda/scaledobject.yaml", ("minReplicaCount:", "minReplicas:")),
        ("components/keda/scaledobject.yaml", ('threshold: "1"', "threshold: 1")),
        ("kserve/inferenceservice.yaml", ("kind: ", "kind: My")),
    ],
)
def test_mistakes_are_found(path: str, wrong: tuple[str, str]) -> None:
    """Unknown kinds, versions and fields, and values of another type, at any depth."""
    text = (HERE / path).read_text()
    assert wrong[0] in text
    with pytest.raises(Exception):  # noqa: B017, PT011 - each validator has its own
        validate(yaml.safe_load(text.replace(*wrong)), NEWEST)


def test_every_file_is_in_a_build(folder: Path) -> None:
    """So all that lies there has been validated, but for the two that are no part of kustomize."""
    used = set()
    for plan in folder.glob("**/kustomization.yaml"):
        listed = yaml.safe_load(plan.read_text())
        paths = listed.get("resources", []) + listed.get("components", [])
        paths += [patch["path"] for patch in listed.get("patches", []) if "path" in patch]
        used |= {(plan.parent / path).resolve() for path in paths} | {plan}
    files = {path.resolve() for path in folder.rglob("*.yaml")}
    assert {path.name for path in files - used} == {"inferenceservice.yaml", "prometheus-adapter.yaml"}
    folders = {path.parent for path in folder.glob("*/*/kustomization.yaml")}
    assert folders - used == {folder / name for name in BUILDS} - {folder / "base", folder / "overlays/cpu"}


# --- The pod and the service -------------------------------------------------------------------------------------


@pytest.fixture
def settings(built: Objects, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the service reads from the image's variables and the pod's; a misspelled one fails."""
    variables = image_environment() | environment(container(built))
    assert check_names(variables) == []
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return read_settings({})


def test_the_port_is_the_one_that_the_service_listens_on(built: Objects, settings: Settings) -> None:
    """On every interface; Service, NetworkPolicy and probes name it."""
    (port,) = container(built)["ports"]
    assert (settings.host, settings.port) == ("0.0.0.0", port["containerPort"])  # noqa: S104 - in a container
    assert f"EXPOSE {settings.port}\n" in DOCKERFILE
    (public,) = built["Service/gan-service"]["spec"]["ports"]
    ((allowed,),) = [rule["ports"] for rule in built["NetworkPolicy/gan-service"]["spec"]["ingress"]]
    probes = [container(built)[f"{name}Probe"]["httpGet"]["port"] for name in ("startup", "readiness", "liveness")]
    assert {public["targetPort"], allowed["port"], *probes} == {port["name"]}


def test_the_probes_ask_their_routes(built: Objects, live: Any) -> None:
    """The service answers each with 200, within the time that the probe waits."""
    for name, path in {"startup": "/startupz", "readiness": "/readyz", "liveness": "/livez"}.items():
        probe = container(built)[f"{name}Probe"]
        assert probe["httpGet"]["path"] == path
        assert probe["timeoutSeconds"] >= 3
        assert httpx.get(live.url + path, trust_env=False).status_code == 200


def test_the_pod_outlives_its_drain(built: Objects, settings: Settings) -> None:
    """A hook, the delay, the drain, and ten seconds for last replies and the log fit into the grace."""
    hook = container(built).get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})
    needed = hook["sleep"]["seconds"] + settings.drain_delay_s + settings.drain_timeout_s
    assert pod_spec(built)["terminationGracePeriodSeconds"] >= needed + 10
    assert settings.drain_delay_s >= 5  # until proxies have heard of it
    assert settings.drain_timeout_s >= settings.deadline_s  # whoever was accepted gets an answer


def test_the_documentation_has_these_numbers(folder: Path) -> None:
    """The tables of probes and of stopping, the seconds after a failed liveness probe, and the oldest Kubernetes."""
    page = (ROOT / "docs/kubernetes.md").read_text()
    pod, one = pod_spec(build(folder / "base")), container(build(folder / "base"))
    for title, name in {"start-up": "startup", "readiness": "readiness", "liveness": "liveness"}.items():
        probe = one[f"{name}Probe"]
        period, failures = probe["periodSeconds"], probe["failureThreshold"]
        assert f"| {title} | `{probe['httpGet']['path']}` | {period} s | {period * failures} s |" in page
    seconds = {name: int(environment(one)[name]) for name in ("GAN_DRAIN_DELAY_S", "GAN_DRAIN_TIMEOUT_S")}
    grace = pod["terminationGracePeriodSeconds"]
    assert all(f"| `{name}` | {value} |" in page for name, value in seconds.items())
    assert f"| to spare | {grace - sum(seconds.values())} |" in page
    assert f"| `terminationGracePeriodSeconds` | {grace} | the sum |" in page
    assert f"it gets {one['livenessProbe']['terminationGracePeriodSeconds']} s." in page
    assert f"Kubernetes {OLDEST} and newer" in page


def test_the_pod_is_restricted(built: Objects) -> None:
    """As the `restricted` pod security standard has it, and with a root that can't be written."""
    pod, one = pod_spec(built), container(built)
    user, group = map(int, re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[-1])
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": group,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert one["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    allowed = {"emptyDir", "secret", "persistentVolumeClaim", "image"}
    assert {kind for volume in pod["volumes"] for kind in volume if kind != "name"} <= allowed
    writable = {mount["mountPath"] for mount in one["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {re.findall(r"HOME=(\S+)", DOCKERFILE)[-1]}


def test_every_volume_is_mounted_where_a_setting_looks(built: Objects, settings: Settings) -> None:
    """Mounts and volumes belong together; bundles and keys lie where the variables say."""
    pod = pod_spec(built)
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container(built)["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert mounts.get("bundles", Settings.model_fields["bundles"].default) == settings.bundles
    assert mounts.get("keys") == (settings.api_keys_file.parent if settings.api_keys_file else None)
    claims = {
        f"PersistentVolumeClaim/{v['persistentVolumeClaim']['claimName']}"
        for v in pod["volumes"]
        if len(v) > 1 and "persistentVolumeClaim" in v
    }
    assert claims == {name for name in built if name.startswith("PersistentVolumeClaim/")}


def test_keys_are_read_from_a_secret_as_it_is_mounted(tmp_path: Path) -> None:
    """Each file is a link through a link to the folder of the moment."""
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026/api-keys").write_text("team-a 5f0c2d9a31\n")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "api-keys").symlink_to("..data/api-keys")
    assert read_keys(Settings(api_keys_file=tmp_path / "api-keys")) != read_keys(Settings())


def quantity(text: str) -> int:
    """Bytes of such as 4Gi."""
    return int(text.removesuffix("Gi")) * 2**30


def test_the_limits_are_those_of_the_workers(built: Objects, settings: Settings) -> None:
    """Requests equal limits, processors are whole, and the memory is enough for a worker on each."""
    limits, requests = (dict(container(built)["resources"][kind]) for kind in ("limits", "requests"))
    gpus = int(limits.pop("nvidia.com/gpu", 0))
    assert limits == requests
    assert gpus == (settings.device == "cuda")
    machine = Machine(int(limits["cpu"]), quantity(limits["memory"]), has_gpu=bool(gpus))
    weights = weights_bytes(Settings().bundles, settings.max_resident_bundles)
    assert choose_workers(settings, machine, weights).workers == (1 if gpus else machine.processors)


# --- The objects and each other ----------------------------------------------------------------------------------


def selectors(value: Any, key: str = "") -> Iterator[dict[str, str]]:
    """Every selector of labels in an object that names one."""
    if isinstance(value, dict):
        if key in {"selector", "podSelector", "labelSelector"} and value:
            yield value.get("matchLabels", value)
        else:
            for name, item in value.items():
                yield from selectors(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from selectors(item)


def test_every_selector_finds_the_pods(built: Objects) -> None:
    """All have the same two labels, which pods and Service bear and which no upgrade changes."""
    pods = built["Deployment/gan-service"]["spec"]["template"]["metadata"]["labels"]
    found = [selector for one in built.values() for selector in selectors(one["spec"])]
    assert len(found) >= 6
    for selector in found:
        assert selector.keys() == {"app.kubernetes.io/name", "app.kubernetes.io/instance"}
        for labels in (pods, built["Service/gan-service"]["metadata"]["labels"]):
            assert selector.items() <= labels.items()


def test_everything_has_the_recommended_labels(built: Objects) -> None:
    """With the version of the code, which is the image's tag."""
    for one in (*built.values(), built["Deployment/gan-service"]["spec"]["template"]):
        assert one["metadata"]["labels"] == {
            "app.kubernetes.io/name": "gan-service",
            "app.kubernetes.io/instance": "gan-service",
            "app.kubernetes.io/version": __version__,
            "app.kubernetes.io/component": "server",
            "app.kubernetes.io/part-of": "gan-service",
            "app.kubernetes.io/managed-by": "kustomize",
        }
    assert re.search(rf"gan-service:{re.escape(__version__)}(-cuda)?$", container(built)["image"])


def test_one_autoscaler_at_most_decides_how_many(built: Objects) -> None:
    """Then the Deployment leaves it open, and pods can be evicted one at a time whatever the number."""
    scalers = [one for one in built.values() if one["kind"] in {"HorizontalPodAutoscaler", "ScaledObject"}]
    assert len(scalers) + ("replicas" in built["Deployment/gan-service"]["spec"]) == 1
    assert all(one["spec"]["scaleTargetRef"]["name"] == "gan-service" for one in scalers)
    least = [one["spec"].get("minReplicas", one["spec"].get("minReplicaCount")) for one in scalers]
    assert all(number >= 2 for number in least)
    assert built["PodDisruptionBudget/gan-service"]["spec"]["maxUnavailable"] == 1


@pytest.mark.parametrize(("overlay", "batch"), [("cpu", MAX_BATCH_ROWS), ("gpu", GPU.max_batch_rows)])
def test_pods_are_added_when_more_than_a_full_batch_is_in_flight(folder: Path, overlay: str, batch: int) -> None:
    """By the metric that the adapter makes."""
    scaler = build(folder / "overlays" / overlay)["HorizontalPodAutoscaler/gan-service"]
    pods = next(metric["pods"] for metric in scaler["spec"]["metrics"] if metric["type"] == "Pods")
    assert pods["target"]["averageValue"] == str(batch)
    assert pods["metric"]["name"] == adapter_rule()["name"]["as"]


# --- Metrics -----------------------------------------------------------------------------------------------------


def adapter_rule() -> dict[str, Any]:
    """The only rule of the Prometheus adapter."""
    (rule,) = yaml.safe_load((HERE / "components/hpa/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert isinstance(rule, dict)
    return rule


def test_the_alerts_are_those_of_prometheus() -> None:
    """The PrometheusRule is as `make docs` writes it, and holds every group of deploy/prometheus."""
    written = HERE / "components/monitoring/prometheusrule.yaml"
    assert runpy.run_path(str(HERE / "prometheus_rule.py"))["prometheus_rule"]() == written.read_text()
    files = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "deploy/prometheus").rglob("*.yml"))]
    groups = [group for file in files for group in file.get("groups", [])]
    assert yaml.safe_load(written.read_text())["spec"] == {"groups": groups}


def test_the_monitor_scrapes_the_service(folder: Path) -> None:
    """Long enough for all workers to add up, under the job's name of the alerts, and no label of ours is displaced."""
    built = build(folder / "overlays/cpu")
    monitor = built["ServiceMonitor/gan-service"]["spec"]
    (endpoint,) = monitor["endpoints"]
    service = built["Service/gan-service"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert endpoint["path"] == "/metrics"
    interval, timeout = (int(endpoint[name].removesuffix("s")) for name in ("interval", "scrapeTimeout"))
    assert METRICS_S < timeout <= interval
    rules = yaml.safe_dump(built["PrometheusRule/gan-service"]["spec"])
    assert {*re.findall('job="(.*?)"', rules)} <= {service["metadata"]["labels"][monitor["jobLabel"]]}
    taken = {"namespace", "service", "pod", "container", "endpoint", "job", "instance"}
    assert not taken & {label for _, _, labels in Metrics(CollectorRegistry()).declarations for label in labels}


def test_the_autoscalers_ask_for_series_that_there_are(folder: Path) -> None:
    """With the labels of the ServiceMonitor."""
    queue_age, _ = build(folder / "overlays/mine")["ScaledObject/gan-service"]["spec"]["triggers"]
    rule = adapter_rule()
    asked = {
        re.sub("_(sum|count)$", "", name)
        for query in (queue_age["metadata"]["query"], rule["seriesQuery"], rule["metricsQuery"])
        for name in re.findall(r"gan_\w+", query)
    }
    assert asked <= {name for name, _, _ in Metrics(CollectorRegistry()).declarations}
    assert re.findall('job="(.*?)"', queue_age["metadata"]["query"]) == ["gan-service"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_images_in_flight_are_those_that_wait_and_those_in_batches(tmp_path: Path, folder: Path) -> None:
    """100 wait, and 1.5 batches of 300 run at any time; an idle pod has none. The oldest entry counts for all pods."""
    query = adapter_rule()["metricsQuery"].replace("<<.LabelMatchers>>", 'pod=~"busy|idle"')
    age = build(folder / "overlays/mine")["ScaledObject/gan-service"]["spec"]["triggers"][0]["metadata"]["query"]
    series = {
        'gan_queue_images{pod="busy",device="cpu"}': "100x20",
        'gan_queue_images{pod="idle",device="cpu"}': "0x20",
        'gan_queue_oldest_age_seconds{pod="busy",job="gan-service"}': "4x20",
        'gan_queue_oldest_age_seconds{pod="idle",job="gan-service"}': "0x20",
    }
    for name, step in {
        "gan_compute_seconds_sum": 22.5,
        "gan_batch_images_sum": 4500,
        "gan_batch_images_count": 15,
    }.items():
        series[f'{name}{{pod="busy",bundle="b"}}'] = f"0+{step}x20"
        series[f'{name}{{pod="idle",bundle="b"}}'] = "7x20"
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": query.replace("<<.GroupBy>>", "pod"),
                "eval_time": "5m",
                "exp_samples": [{"labels": '{pod="busy"}', "value": 550}, {"labels": '{pod="idle"}', "value": 0}],
            },
            {"expr": age, "eval_time": "5m", "exp_samples": [{"labels": "{}", "value": 4}]},
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- KServe ------------------------------------------------------------------------------------------------------


def test_kserve_runs_the_same_pod(folder: Path) -> None:
    """But for what KServe asks for; the pod's part is strictly what its schema says. test_kserve.py has KServe's."""
    text = (HERE / "kserve/inferenceservice.yaml").read_text()
    predictor = yaml.safe_load(text)["spec"]["predictor"]
    spec = {name: value for name, value in predictor.items() if not re.match("(min|max)Replicas|scale", name)}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "gan-service"}, "spec": spec}
    for version in (OLDEST, NEWEST):
        validate(pod, version)
    base = build(folder / "base")
    ours = container(base)
    (theirs,) = spec["containers"]
    port = theirs["ports"][0].pop("containerPort")
    assert (theirs.pop("name"), theirs.pop("ports")) == ("kserve-container", [{"name": "http1"}])
    assert [ours.pop("name"), *ours.pop("ports")] == ["gan-service", {"name": "http", "containerPort": port}]
    for name in ("startup", "readiness", "liveness"):
        assert theirs[f"{name}Probe"]["httpGet"].pop("port") == port
        assert ours[f"{name}Probe"]["httpGet"].pop("port") == "http"
    assert theirs["env"].pop(0) == {"name": "PROTOCOL", "value": "v2"}
    expected = pod_spec(base)
    del expected["topologySpreadConstraints"]
    assert spec == expected
