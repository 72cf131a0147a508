"""The bench against other servers: what it reads, what it makes of it, and that one that can't start stops nobody."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers.work import Ask, encode
from benchmarks.serving.compare import Measurer, Plan, expected, fault, note_what_follows
from benchmarks.serving.contenders import (
    CORES,
    KINDS,
    ROWS,
    SEED,
    Contender,
    NotServing,
    Uploads,
    contenders,
    read_reply,
    serving,
)
from benchmarks.serving.standings import (
    BEGIN,
    END,
    LIMIT,
    LOADS,
    OURS,
    STATIC,
    WORKERS,
    Place,
    Results,
    judge,
    lines,
    page_text,
    write_page,
)
from benchmarks.tools import wrk
from benchmarks.tools.client import Request
from benchmarks.tools.process import ROOT
from models.bundle import Bundle, read_bundle

WRK_SAID = """\
Running 1s test @ http://127.0.0.1:9100/sample
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     3.38ms    1.46ms  10.78ms   71.08%
    Req/Sec    17.45k     2.98k   22.65k    60.00%
  17433 requests in 1.00s, 7.10MB read
Requests/sec:  17353.47
Transfer/sec:      7.07MB
{"replies": 17433, "microseconds": 1004583, "bytes": 7444010, "refused": 33, "lost": 2, "late": 1, \
"p50_us": 3214, "p90_us": 5300, "p99_us": 7621, "max_us": 10783}
"""
FORMATS = {"grid": "png", "few": "npy"}
PNG_64 = [load for load in LOADS if load.name == "png-64"]


def results(**rates: float) -> Results:
    """What one round at count=1 over 64 connections gave each server."""
    made = Results({name: f"{name} 1.0" for name in rates})
    for name, rate in rates.items():
        made.note(name, "png-64", per_s=rate)
    return made


def test_the_output_of_wrk_is_understood() -> None:
    """Its last line counts: replies that were no refusals, by the time that it really took."""
    seen = wrk.parse(WRK_SAID)
    assert seen.per_s == pytest.approx((17433 - 33) / 1.004583)
    assert (seen.p50_ms, seen.p90_ms, seen.p99_ms) == (3.214, 5.3, 7.621)
    assert (seen.replies, seen.failed) == (17433, 36)
    assert seen.reply_bytes == pytest.approx(427.007, abs=1e-3)


def test_output_without_that_line_is_an_error() -> None:
    """As when nobody listens: wrk then says so in words."""
    with pytest.raises(wrk.WrkError, match="unable to connect"):
        wrk.parse("unable to connect to 127.0.0.1:9 Connection refused\n")


def test_medians_spread_and_ratios() -> None:
    """Of the rounds, the middle one counts; the ratio is that of two medians."""
    made = results(ours=100, mosec=90)
    for mine, theirs in ((300, 50), (200, 10)):
        made.note("ours", "png-64", per_s=mine)
        made.note("mosec", "png-64", per_s=theirs)
    assert made.spread(Place("ours", "png-64")) == (200, 100, 300)
    assert made.ratio(Place("mosec", "png-64")) == 0.25
    assert made.spread(Place("mosec", "npy-2")) is None
    assert made.facts()["mosec"]["png-64"]["per_s"] == [50, 10, 90]


@pytest.mark.parametrize(("mine", "met"), [(124, False), (125, True)], ids=["too slow", "fast enough"])
def test_a_target_is_judged_by_its_factor(mine: float, met: bool) -> None:  # noqa: FBT001 - a parameter
    """1.25 times mosec, and nothing else, since nobody else took part."""
    (check,) = judge(results(**{WORKERS: mine, "mosec": 100}))
    assert "1.25 x mosec" in check.wanted
    assert check.met is met
    assert f"{mine} and 100" in check.seen


def test_most_is_judged_the_other_way_round() -> None:
    """A p50 may be at most 0.7 of another, memory at most a number."""
    made = results(ours=1, **{WORKERS: 1, "plain FastAPI": 1})
    made.note(WORKERS, "png-1", p50_ms=0.8)
    made.note("plain FastAPI", "png-1", p50_ms=1.0)
    made.note(OURS, "memory", above_mib=119.0)
    assert [check.met for check in judge(made) if "p50" in check.wanted or "120 MiB" in check.wanted] == [False, True]


def test_what_could_not_be_measured_is_not_met() -> None:
    """A target that needs a server that failed says why; one whose load nobody asked for is left out."""
    made = results(**{WORKERS: 100})
    made.titles["mosec"] = "mosec 1.0"
    made.absent["mosec"] = "it ended with 1"
    checks = [check for check in judge(made) if "mosec" in check.wanted]
    assert {check.met for check in checks} == {False}
    assert {check.seen for check in checks} == {"mosec: it ended with 1"}


def test_the_machine_s_limit_is_the_sum_of_three_costs() -> None:
    """Cores over the processor time of a fixed reply, an image and a PNG, round by round."""
    made = Results({OURS: OURS, STATIC: STATIC})
    for cost_us in (40, 60):
        made.note(STATIC, "png-64", cpu_us=cost_us)
        made.note(LIMIT, "png", image_us=50, png_us=10)
    made.note(LIMIT, "memory", bare_mib=230)
    made.note(OURS, "memory", rss_at_start_mib=300)
    note_what_follows(made)
    assert made.values(Place(LIMIT, "png-64")) == [CORES / 100e-6, CORES / 120e-6]
    assert made.values(Place(OURS, "memory", "above_mib")) == [70]


def test_the_page_keeps_what_is_around_the_table(tmp_path: Path) -> None:
    """A new page gets the marks; written again, only what is between them is another."""
    page = tmp_path / "performance.md"
    write_page(page, "first")
    page.write_text(f"{page.read_text()}\nBehind it.\n")
    made = results(ours=5712, mosec=2856)
    made.note("ours", "png-64", per_s=5800)
    write_page(page, page_text(made, PNG_64, {"mosec": "in Rust"}, "Two cores."))
    text = page.read_text()
    assert text.startswith("# Performance\n")
    assert text.endswith(f"{END}\n\nBehind it.\n")
    assert "first" not in text
    assert "| 5,756 (5,712…5,800) | 2,856 ×0.50 | – |" in text.partition(BEGIN)[2]
    assert "- mosec 1.0: in Rust." in text


def test_the_first_table_of_the_page_is_read_at_once() -> None:
    """A line for each server with a few medians; all else is folded away below it."""
    names = (OURS, WORKERS, "mosec", "Triton", "LitServe", "BentoML", "Ray Serve", "plain FastAPI", STATIC)
    made = results(**dict.fromkeys(names, 100.0))
    made.note("mosec", "png-64", per_s=300, p99_ms=12.5)
    before, _, folded = page_text(made, PNG_64, {}, "Two cores.").partition("<details>")
    assert before.startswith("Two cores.\n")
    head, _, *lines_of_servers = (line.split("|")[1:-1] for line in before.splitlines() if line.startswith("|"))
    assert len(head) <= 7
    assert [line[0].strip() for line in lines_of_servers] == [*(f"{name} 1.0" for name in names[:-1]), LIMIT]
    assert [cell.strip() for cell in lines_of_servers[2]] == ["mosec 1.0", "–", "200", "12.5", "–", "–", "–"]
    assert "| 200 (100…300) ×2.00 |" in folded
    assert "| count=1, 64 connections: >= 1.25 x mosec | 0.5 x (100 and 200) | **not met** |" in folded


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    """Nothing is written into what is not the bench's."""
    page = tmp_path / "performance.md"
    page.write_text("mine\n")
    with pytest.raises(ValueError, match="performance"):
        write_page(page, "table")
    assert page.read_text() == "mine\n"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(Path(__file__).parents[2] / "bundles" / "mnist-mlp")


@pytest.fixture(scope="module")
def uploads(bundle: Bundle) -> Uploads:
    return Uploads(bundle.draw(ROWS, seed=1))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("judge")])
def test_replies_are_read_as_they_are_written(kind: str, bundle: Bundle, uploads: Uploads) -> None:
    """Every format, as the peers write it, and wrapped as BentoML wraps it."""
    images = bundle.draw(KINDS[kind], seed=3)
    body = encode(images, Ask(count=len(images), seed=3, format=FORMATS.get(kind, kind)))
    wrapped = json.dumps([base64.b64encode(body).decode()]).encode()
    peers = {peer.name: peer for peer in contenders(uploads, bundle.folder.parent, bundle.name)}
    np.testing.assert_array_equal(read_reply(kind, body), images)
    np.testing.assert_array_equal(peers["BentoML"].read(kind, wrapped), images)


def test_tensors_are_read_from_behind_their_head(bundle: Bundle, uploads: Uploads) -> None:
    """As Triton sends them."""
    images = bundle.draw(2, seed=3)
    told = {"shape": images.shape, "parameters": {"binary_data_size": images.nbytes}}
    body = json.dumps({"model_name": "sample", "outputs": [told]}).encode() + images.tobytes()
    peers = {peer.name: peer for peer in contenders(uploads, bundle.folder.parent, bundle.name)}
    np.testing.assert_array_equal(peers["Triton"].read("npy", body), images)


def test_every_contender_is_asked_with_a_new_seed_each_time(bundle: Bundle, uploads: Uploads) -> None:
    """A cache on the way, or in the server, would make it a race of caches."""
    for contender in contenders(uploads, bundle.folder.parent, bundle.name):
        for kind, request in contender.requests.items():
            assert request.body.count(SEED.encode()) == (not kind.startswith("judge")), (contender.name, kind)


@pytest.mark.slow
def test_a_peer_that_cannot_start_is_in_the_table_and_stops_nobody(bundle: Bundle, uploads: Uploads) -> None:
    """One has no environment, one ends at once, one gives wrong pixels; the last is measured as if nothing had been."""
    *_, plain, _ = contenders(uploads, bundle.folder.parent, bundle.name)
    broken = Contender("broken", "benchmarks.no_such_server", {"png": Request("POST", "/")})
    missing = replace(broken, name="missing", environment="no-such-environment")
    made = Results({name: name for name in (OURS, "missing", "broken", plain.name)})
    right = expected(bundle, uploads) | {"png": bundle.draw(1, seed=1000)}
    measurer = Measurer(Plan(PNG_64, 1, bundle.folder.parent, bundle), made, right)
    for contender in (missing, measurer.tune(broken), plain):
        measurer.measure(contender)
    assert list(made.absent) == ["missing", "broken"]
    assert "make bench" in made.absent["missing"]
    assert "it ended with 1; " in made.absent["broken"]
    assert "No module named" in made.absent["broken"]
    assert "away from what is right" in made.faults[plain.name, "png-64"]
    assert made.spread(Place(plain.name, "start", "s"))
    remarks = {str(line["server"]): str(line["remark"]) for line in lines(made, PNG_64) if "remark" in line}
    assert remarks.keys() == {"missing", "broken", plain.name}
    assert "| broken: failed |" in page_text(made, PNG_64, {}, "")


@pytest.mark.slow
def test_a_peer_whose_start_fails_once_is_measured_all_the_same(
    bundle: Bundle, uploads: Uploads, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A port that is still taken, say: no reason to leave it out of every round."""
    *_, static = contenders(uploads, bundle.folder.parent, bundle.name)
    (tmp_path / "moody.py").write_text(
        "import pathlib, runpy, sys\n"
        "tried = pathlib.Path(__file__).with_name('tried')\n"
        "if not tried.exists():\n"
        "    tried.touch()\n"
        "    sys.exit('not today\\n; ;')\n"
        f"runpy.run_module({static.module!r}, run_name='__main__')\n"
    )
    moody = replace(static, module="moody", variables={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    made = Results({moody.name: moody.name})
    Measurer(Plan([], 1, bundle.folder.parent, bundle), made, {}).measure(moody)
    assert "it ended with 1; not today; once more" in capsys.readouterr().err
    assert made.spread(Place(moody.name, "start", "s"))
    assert not made.absent


@pytest.mark.slow
def test_a_peer_does_the_service_s_work(bundle: Bundle, uploads: Uploads) -> None:
    """Every kind of request to a real peer, that for which nothing has to be installed; then all its processes end."""
    *_, plain, _ = contenders(uploads, bundle.folder.parent, bundle.name)
    right = expected(bundle, uploads)
    with serving(plain, bundle.folder) as server:
        assert {kind: fault(server, kind, right[kind]) for kind in plain.requests} == dict.fromkeys(KINDS)
        assert server.memory_bytes() > 2**20
        assert server.cpu_s() > 0
    with pytest.raises(OSError, match="refused"):
        server.ask("png", 1)
    with pytest.raises(NotServing), serving(replace(plain, module="benchmarks.no_such_server"), bundle.folder):
        pass
