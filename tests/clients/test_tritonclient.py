"""NVIDIA's tritonclient works unchanged: run by `make test-clients`, in an environment of its own."""

import os
from collections.abc import Iterator

import pytest
import tritonclient.http as triton

AUTHORIZATION = {"Authorization": f"Bearer {os.environ['SERVICE_KEY']}"}


@pytest.fixture(scope="module")
def client() -> Iterator[triton.InferenceServerClient]:
    """A client of the service."""
    with triton.InferenceServerClient(os.environ["SERVICE_URL"].removeprefix("http://")) as one:
        yield one


def test_the_index_lists_the_embedded_bundles(client: triton.InferenceServerClient) -> None:
    """The repository's index has each with its state."""
    listed = client.get_model_repository_index(headers=AUTHORIZATION)
    assert {entry["name"]: entry["state"] for entry in listed}["mnist"] == "READY"
