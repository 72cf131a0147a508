"""The series of all replicas, as Prometheus finds them by Ray's exporter."""

import math
import shutil
from pathlib import Path

import pytest
import yaml

from benchmarks.tools.ray_cluster import DEPLOY, Cluster, wait_for
from benchmarks.tools.steady_load import Load
from tests.deploy.conftest import Prometheus
from tests.deploy.test_dashboard import QUERIES, filled_in


class OnRay(Prometheus):
    """Prometheus with deploy/ray/prometheus.yml, but for where Ray writes the file that names the nodes."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        super().__init__(folder, [], [])
        configuration = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
        (job,) = configuration["scrape_configs"]
        (found,) = job["file_sd_configs"]
        found["refresh_interval"] = "2s"
        found["files"] = [str(cluster.folder / "ray" / Path(*found["files"]).name)]
        configuration["global"] = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "2s"}
        configuration["rule_files"] = []
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))


def test_each_replica_has_its_series(cluster: Cluster, tmp_path: Path) -> None:
    """By their own names, each with the label `replica`, and panels of the dashboard have values."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    with OnRay(tmp_path, cluster).running() as prometheus, Load().running() as load:
        load.wait_for(500)

        def seen(expression: str) -> set[str]:
            return {labels["replica"] for labels, value in prometheus.query(expression) if value > 0}

        def have_been_seen(expression: str) -> bool:
            """Those that run now: Ray may have replaced one."""
            return seen(expression) >= {replica.id for replica in cluster.wait_until_running(2)}

        try:
            wait_for(lambda: have_been_seen('gan_requests_total{route="/sample",status="200"}'))
            wait_for(lambda: have_been_seen("rate(gan_request_duration_seconds_bucket[30s])"))
        except AssertionError:
            print(cluster.replicas(), cluster.answered(), prometheus.get("/targets"), cluster.logs(), sep="\n")
            raise
        replicas = {replica.id for replica in cluster.wait_until_running(2)}
        for name in ("gan_ready", "gan_bundle_info", "gan_engine_threads", "process_resident_memory_bytes"):
            assert seen(name) >= replicas
        # A replica keeps to the one processor that is reserved for it.
        assert {value for _, value in prometheus.query("gan_engine_threads")} == {1}
        assert {labels["instance"] for labels, _ in prometheus.query("gan_ready")} >= replicas
        values = {place: prometheus.query(filled_in(query)) for place, query in QUERIES.items()}
        assert all(math.isfinite(value) for found in values.values() for _, value in found)
        assert sum(map(bool, values.values())) > len(QUERIES) / 2  # the rest tells of what has not happened
        (up,) = {labels["job"] for labels, _ in prometheus.query("up")}
        assert up == "gan-service"
