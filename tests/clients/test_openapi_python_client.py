"""A client that openapi-python-client generates works: run by `make test-clients`, in an environment of its own."""

import base64
import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

URL, KEY = os.environ["SERVICE_URL"], os.environ["SERVICE_KEY"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The package that is generated from the document, without a single warning."""
    folder = tmp_path_factory.mktemp("generated")
    command = [
        *(sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning", "--meta", "none"),
        *("--url", f"{URL}/openapi.json", "--output-path", folder / "generated"),
        *("--config", Path(__file__).with_name("openapi-python-client.yaml")),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it calls ruff
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "generated"


@pytest.fixture(scope="module")
def client(generated: str) -> Iterator[Any]:
    """A client of the service."""
    with part(generated).AuthenticatedClient(base_url=URL, token=KEY, raise_on_unexpected_status=True) as one:
        yield one


def part(*names: str) -> Any:
    """A module of the generated package."""
    return importlib.import_module(".".join(names))


def test_all_of_it_can_be_imported(generated: str) -> None:
    """It has a function for every operation."""
    names = [module.name for module in pkgutil.walk_packages(part(generated).__path__, f"{generated}.")]
    for name in names:
        importlib.import_module(name)
    calls = {name.rpartition(".")[2] for name in names if ".api." in name}
    assert {"get_sample", "post_sample", "post_discriminate", "get_bundles", "post_v1_images_generations"} <= calls


def test_images_are_drawn_by_query_and_by_body(generated: str, client: Any) -> None:
    """Both give the same file."""
    sample, models = part(generated, "api.images.get_sample"), part(generated, "models")
    by_query = sample.sync(client=client, seed=7, count=4, scale=2)
    assert by_query.payload.read().startswith(PNG)
    by_body = part(generated, "api.images.post_sample").sync(
        client=client, body=models.SampleBody(seed=7, count=4, scale=2)
    )
    by_query.payload.seek(0)
    assert by_body.payload.read() == by_query.payload.read()
    detailed = sample.sync_detailed(client=client, seed=7)
    assert detailed.headers["x-bundle"].startswith("mnist@")
    assert sample.sync_detailed(client=client, seed=7, if_none_match=detailed.headers["etag"]).status_code == 304


def test_images_are_judged_as_file_form_and_json(generated: str, client: Any) -> None:
    """Each upload is judged as the others are."""
    discriminate, models, types = (
        part(generated, name) for name in ("api.images.post_discriminate", "models", "types")
    )
    png = part(generated, "api.images.get_sample").sync(client=client, seed=7).payload.read()
    encoded = base64.b64encode(png).decode()
    form = models.PostDiscriminateFilesBody(images=[types.File(BytesIO(png), "a.png", "image/png")])
    bodies = [types.File(BytesIO(png)), form, models.DiscriminateRequest(images=[encoded])]
    [first, *others] = [discriminate.sync(client=client, body=body) for body in bodies]
    assert 0 < first.results[0].probability_real < 1
    assert others == [first, first]


def test_bundles_are_objects(generated: str, client: Any) -> None:
    """With the fields of their metadata."""
    listed = part(generated, "api.bundles.get_bundles").sync(client=client)
    assert listed.default == "mnist"
    one = part(generated, "api.bundles.get_bundles_name").sync("mnist", client=client)
    assert one in listed.bundles
    assert (one.image.height, one.image.width, len(one.labels)) == (28, 28, 10)


def test_an_error_is_a_problem(generated: str, client: Any) -> None:
    """Whatever the route, it is parsed as what it is."""
    models = part(generated, "models")
    problem = part(generated, "api.bundles.get_bundles_name").sync("nothing", client=client)
    assert isinstance(problem, models.Problem)
    assert problem.code == "unknown_bundle"
    images = part(generated, "api.openai.post_v1_images_generations")
    refused = images.sync(client=client, body=models.ImagesRequest(prompt="a 3", size="9x9"))
    assert (refused.error.param, refused.error.code) == ("size", "invalid")
    drawn = images.sync(client=client, body=models.ImagesRequest(prompt="a 3", size="56x56"))
    assert drawn.size == "56x56"
