"""The files of deploy/ray say what Ray and the service understand."""

import shlex
from importlib import import_module

import yaml
from ray.serve.schema import ServeDeploySchema

from benchmarks.tools.ray_cluster import DEPLOY
from service.ray import GanService, app


def test_the_deployment_is_one_of_ours() -> None:
    """As it is shipped, with autoscaling, it is valid, and its options are those of the deployment that is there."""
    (application,) = ServeDeploySchema.model_validate(
        yaml.safe_load((DEPLOY / "gan-service.yaml").read_text())
    ).applications
    (deployment,) = application.deployments
    module, _, name = application.import_path.partition(":")
    assert getattr(import_module(module), name) is app
    assert deployment.name == GanService.name
    assert deployment.user_config is not None


def test_nodes_name_a_function_that_is_there() -> None:
    """Ray calls it in every proxy and replica, and would not start without it."""
    variables = dict(line.split("=", 1) for line in shlex.split((DEPLOY / "node.env").read_text(), comments=True))
    module, _, name = variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    assert getattr(import_module(module), name)()
