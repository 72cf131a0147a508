"""The Open Inference Protocol beside inference: the service, its models, their statistics, and errors in its shape."""

import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from models.bundle import Bundle
from models.spec import ImageSpec
from service import __version__
from service.app import create_app
from service.http.operations.merged_metrics import Series, series_of
from service.machine.worker_group import WorkerGroup
from service.settings import Settings

pytestmark = pytest.mark.anyio

Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]


async def test_the_service_names_itself_and_its_extensions(client: httpx.AsyncClient) -> None:
    """Clients ask whether binary tensors are understood."""
    told = (await client.get("/v2")).json()
    assert (told["name"], told["version"]) == ("gan-service", __version__)
    assert {"binary_tensor_data", "model_repository", "statistics"} <= set(told["extensions"])


async def test_health_speaks_to_every_client(client: httpx.AsyncClient) -> None:
    """Some read the status, some `live`, some `ready`."""
    for probe in ("live", "ready"):
        reply = await client.get(f"/v2/health/{probe}")
        assert (reply.status_code, reply.json()) == (200, {"live": True, "ready": True})


async def test_a_service_that_loads_is_alive_but_not_ready(tiny_settings: Callable[..., Settings]) -> None:
    """Until the bundles are there, all but live is 503 in the protocol's shape, and no list is empty."""
    app = create_app(tiny_settings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        assert (await client.get("/v2/health/live")).status_code == 200
        for path in ("/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/stats"):
            reply = await client.get(path)
            assert (reply.status_code, set(reply.json())) == (503, {"error"})


async def test_a_bundle_is_two_models(client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]) -> None:
    """The metadata of both has names, datatypes and shapes; a bundle without classes has no labels."""
    version = tiny_bundles["cond"].version
    generator = (await client.get("/v2/models/cond")).json()
    assert (generator["name"], generator["versions"]) == ("cond", [version])
    assert {one["name"]: (one["datatype"], one["shape"]) for one in generator["inputs"]} == {
        "seed": ("INT64", [1]), "first_index": ("INT64", [1]), "count": ("INT64", [1]), "labels": ("INT64", [-1]),
        "truncation": ("FP32", [1]), "latents": ("FP32", [-1, 12]),
    }  # fmt: skip
    assert generator["outputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}]
    discriminator = (await client.get(f"/v2/models/cond.discriminator/versions/{version}")).json()
    assert [one["name"] for one in discriminator["inputs"]] == ["images", "labels"]
    assert discriminator["outputs"] == [
        {"name": name, "datatype": "FP32", "shape": [-1]} for name in ("probability_real", "logit")
    ]
    rgb = (await client.get("/v2/models/rgb")).json()
    assert "labels" not in [one["name"] for one in rgb["inputs"]]
    assert rgb["outputs"][0]["shape"] == [-1, 6, 10, 3]


async def test_the_configuration_says_the_same_as_the_metadata(client: httpx.AsyncClient) -> None:
    """In the form that tools for Triton read: which inputs can be left out, too."""
    for model, required in (("cond", []), ("cond.discriminator", ["images"])):
        metadata, config = [(await client.get(f"/v2/models/{model}{end}")).json() for end in ("", "/config")]
        assert config["max_batch_size"] == 0
        for kind in ("input", "output"):
            assert [(one["name"], one["data_type"], one["dims"]) for one in config[kind]] == [
                (one["name"], f"TYPE_{one['datatype']}", one["shape"]) for one in metadata[f"{kind}s"]
            ]
        assert [one["name"] for one in config["input"] if not one["optional"]] == required


@pytest.mark.parametrize("end", ["", "/ready", "/config", "/stats"])
async def test_a_model_or_version_that_is_not_there_is_404(
    client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle], end: str
) -> None:
    """In the protocol's shape, and the versions that are there are answered."""
    version = tiny_bundles["tiny"].version
    for model in ("tiny", "tiny.discriminator", f"tiny/versions/{version}", f"tiny.discriminator/versions/{version}"):
        assert (await client.get(f"/v2/models/{model}{end}")).status_code == 200
    for model in ("nope", "tiny.generator", "tiny/versions/1", f"nope/versions/{version}", "tiny.discriminator@1"):
        reply = await client.get(f"/v2/models/{model}{end}")
        assert (reply.status_code, set(reply.json())) == (404, {"error"})


async def test_statistics_are_those_of_the_metrics(start: Start, tiny_settings: Callable[..., Settings]) -> None:
    """Images, batches and time of each model, whichever route asked for them."""
    async with start(create_app(tiny_settings())) as client:
        before = (await client.get("/v2/models/stats")).json()["model_stats"]
        assert len(before) == 6
        assert not any(one["inference_count"] or one["last_inference"] for one in before)
        await client.get("/sample?count=3")
        await client.post("/v2/models/tiny/infer", json={"parameters": {"count": 2}})
        (tiny,) = (await client.get("/v2/models/tiny/stats")).json()["model_stats"]
        assert (tiny["name"], tiny["inference_count"], tiny["execution_count"]) == ("tiny", 5, 2)
        assert tiny["last_inference"] > 1e12
        times = tiny["inference_stats"]
        assert (times["success"]["count"], times["queue"]["count"], times["compute_infer"]["count"]) == (2, 2, 2)
        assert times["success"]["ns"] == times["queue"]["ns"] + times["compute_infer"]["ns"] > 0
        after = {
            one["name"]: one["inference_count"] for one in (await client.get("/v2/models/stats")).json()["model_stats"]
        }
        assert after == {name: 5 * (name == "tiny") for name in after}


async def test_errors_have_the_protocols_shape(client: httpx.AsyncClient) -> None:
    """Those of the routes, and those from before a route is found."""
    for method, path, status in (
        ("POST", "/v2", 405), ("GET", "/v2/models/tiny/infer", 405), ("GET", "/v2/", 404), ("GET", "/v2/logging", 404),
        ("GET", "/v2/systemsharedmemory/status", 404), ("GET", "/v2/models", 404), ("GET", "/v2/models//ready", 404),
    ):  # fmt: skip
        reply = await client.request(method, path)
        assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
        assert set(reply.json()) == {"error"}
    assert "error" not in (await client.get("/v2x")).json()


async def test_only_health_needs_no_key(start: Start, tiny_settings: Callable[..., Settings]) -> None:
    """Everything else is for those who have one."""
    async with start(create_app(tiny_settings(api_keys="secret"))) as client:
        for probe in ("live", "ready"):
            assert (await client.get(f"/v2/health/{probe}")).status_code == 200
        for method, path in (
            ("GET", "/v2"), ("GET", "/v2/models/tiny"), ("GET", "/v2/models/tiny/ready"), ("GET", "/v2/models/stats"),
            ("POST", "/v2/models/tiny/infer"), ("POST", "/v2/repository/index"),
        ):  # fmt: skip
            reply = await client.request(method, path)
            assert (reply.status_code, set(reply.json())) == (401, {"error"})
            reply = await client.request(method, path, headers={"Authorization": "Bearer secret"})
            assert reply.status_code == 200


async def test_a_route_is_measured_by_its_template(client: httpx.AsyncClient) -> None:
    """However many models and versions are named."""
    for name in ("a", "b", "tiny"):
        await client.post(f"/v2/models/{name}/infer")
    page = (await client.get("/metrics")).text
    assert 'gan_requests_total{method="POST",route="/v2/models/{name}/infer",status="404"} 2.0' in page
    assert "/v2/models/a" not in page


async def test_the_protocol_works_under_a_prefix(start: Start, tiny_settings: Callable[..., Settings]) -> None:
    """Where a proxy leaves it in front of the path, too."""
    async with start(create_app(tiny_settings(root_path="/gan"))) as client:
        reply = await client.post("/gan/v2/models/tiny/infer", json={"parameters": {"seed": 1}})
        assert reply.json()["model_name"] == "tiny"


async def test_versions_side_by_side_are_versions_of_the_models(
    start: Start, tiny_settings: Callable[..., Settings], make_tiny: Callable[..., Bundle], tmp_path: Path
) -> None:
    """Metadata lists them, the newest first; each answers under its own address, and the newest without one."""
    for seed in (1, 2):
        bundle = make_tiny(tmp_path / "tiny", ImageSpec(channels=1, height=8, width=8), None, None, seed)
        bundle.folder.rename(tmp_path / str(seed))
    async with start(create_app(tiny_settings(bundles=tmp_path))) as client:
        for model in ("tiny", "tiny.discriminator"):
            versions = (await client.get(f"/v2/models/{model}")).json()["versions"]
            assert len(set(versions)) == 2
            for version in versions:
                assert (await client.get(f"/v2/models/{model}/versions/{version}/ready")).json()["name"] == model
        asked = {"parameters": {"seed": 3}}
        replies = [
            (await client.post(f"/v2/models/tiny{end}/infer", json=asked)).json()
            for end in ("", *(f"/versions/{version}" for version in versions))
        ]
        assert [reply["model_version"] for reply in replies] == [versions[0], *versions]
        assert replies[0]["outputs"] == replies[1]["outputs"] != replies[2]["outputs"]


async def test_load_takes_nothing_but_the_folder(
    start: Start, tiny_settings: Callable[..., Settings], tiny_bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    """A configuration or files in the request are refused; what else clients send is ignored."""
    shutil.copytree(tiny_bundles["tiny"].folder, tmp_path / "tiny")
    async with start(create_app(tiny_settings(bundles=tmp_path, admin_keys="root"))) as client:
        client.headers["Authorization"] = "Bearer root"
        for parameters in ({"config": "{}"}, {"file:1/model.onnx": "AAAA"}):
            reply = await client.post("/v2/repository/models/tiny/load", json={"parameters": parameters})
            assert (reply.status_code, set(reply.json())) == (422, {"error"})
            assert "is not taken" in reply.json()["error"]
        for body in ({"parameters": {"other": 1, "config": None}}, {"parameters": None}, {"unknown": 1}, {}):
            assert (await client.post("/v2/repository/models/tiny/load", json=body)).status_code == 200


class Neighbour(WorkerGroup):
    """A group of two workers, of which the other is asked for its metrics."""

    other: FastAPI

    async def ask(self, what: str, **_: object) -> list[Series]:
        """The other's metrics."""
        assert what == "metrics"
        return [series_of(self.other.state.manager.metrics.registry)]


async def test_statistics_are_those_of_all_workers(start: Start, tiny_settings: Callable[..., Settings]) -> None:
    """Whichever worker is asked."""
    group = Neighbour()
    app, group.other = create_app(tiny_settings(), worker_group=group), create_app(tiny_settings())
    async with start(app) as one, start(group.other) as other:
        await one.get("/sample?count=2")
        await other.get("/sample?count=3")
        (tiny,) = (await one.get("/v2/models/tiny/stats")).json()["model_stats"]
        assert tiny["inference_count"] == 5
