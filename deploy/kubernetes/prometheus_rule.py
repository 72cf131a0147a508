"""Writes the alerts of deploy/prometheus into the PrometheusRule that the Prometheus operator reads (`make docs`).

python deploy/kubernetes/prometheus_rule.py
"""

import re
from pathlib import Path

DEPLOY = Path(__file__).parents[1]
PRODUCT = DEPLOY / "kubernetes/components/monitoring/prometheusrule.yaml"
HEAD = """\
# Written by deploy/kubernetes/prometheus_rule.py from the rules in deploy/prometheus: change them there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: gan-service
"""
GROUPS = re.compile(r"^groups:\n(.*)", re.MULTILINE | re.DOTALL)  # the last key of such a file


def prometheus_rule() -> str:
    """The file's text: the groups of every file of rules, as they stand there, and the labels of the ServiceMonitor."""
    monitor = PRODUCT.with_name("servicemonitor.yaml").read_text()
    labels = monitor[monitor.index("  labels:") : monitor.index("spec:")]
    files = sorted((DEPLOY / "prometheus").rglob("*.yml"))
    groups = "".join(found[1] for file in files if (found := GROUPS.search(file.read_text())))
    spec = re.sub(r"^(?=.)", "    ", groups, flags=re.MULTILINE)
    return f"{HEAD}{labels}spec:\n  groups:{'' if spec else ' []'}\n{spec}"


if __name__ == "__main__":
    PRODUCT.write_text(prometheus_rule())
