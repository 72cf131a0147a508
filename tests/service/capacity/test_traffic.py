"""Traffic files: what they mean, which of them are refused, their busiest seconds, and arrivals at their rates."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from service.capacity.traffic import (
    MAX_BYTES,
    MAX_ROWS,
    Piece,
    Traffic,
    TrafficError,
    arrivals,
    busiest,
    read_traffic,
    steady,
)

HEAD = "time_s,requests_per_s,count\n"
Read = Callable[[str], Traffic]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Read a file of these lines."""

    def make(lines: str) -> Traffic:
        file = tmp_path / "traffic.csv"
        file.write_text(lines)
        return read_traffic(file, 4096)

    return make


def test_rows_hold_until_the_next_time_and_add_up(read: Read) -> None:
    """The last holds for as long as the one before it; what asks for nothing is no piece; times begin at 0."""
    traffic = read(HEAD + "100,10,1\n100,2,64\n\n160,0,1\n200,5,4\n")
    assert traffic == Traffic((Piece(0, 60, 10, 1), Piece(0, 60, 2, 64), Piece(100, 140, 5, 4)), 140)
    assert traffic.requests_per_s == pytest.approx((600 + 120 + 200) / 140)
    assert traffic.images_per_s == pytest.approx((600 + 120 * 64 + 200 * 4) / 140)
    assert traffic.counts == [1, 4, 64]


def test_a_single_time_is_a_steady_load(read: Read) -> None:
    """Its rates, whatever the time is; a mark of the byte order and spaces do no harm."""
    assert read("\ufeff time_s , requests_per_s , count \n7,10,1\n7,1,64\n").requests_per_s == 11


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        pytest.param("", "its first line must be time_s,requests_per_s,count", id="empty"),
        pytest.param("seconds,rate,count\n0,1,1\n", "its first line must be", id="another head"),
        pytest.param(HEAD, "it asks for nothing", id="no rows"),
        pytest.param(HEAD + "0,0,1\n", "it asks for nothing", id="no requests"),
        pytest.param(HEAD + "0,1\n", "line 2: has 2 cells in place of 3", id="a cell too few"),
        pytest.param(HEAD + "0,x,1\n", "line 2: requests_per_s is 'x': no number", id="no number"),
        pytest.param(HEAD + "0,nan,1\n", "line 2: requests_per_s is nan", id="not a number"),
        pytest.param(HEAD + "0,-1,1\n", "line 2: requests_per_s is -1", id="negative"),
        pytest.param(HEAD + "0,1e999,1\n", "line 2: requests_per_s is inf", id="infinite"),
        pytest.param(HEAD + "0,1,1\n-1,1,1\n", "line 3: time_s is -1, which is not between 0", id="back in time"),
        pytest.param(HEAD + "0,1,0\n", "line 2: count is 0, which is not between 1 and 4096", id="no images"),
        pytest.param(HEAD + "0,1,4097\n", "line 2: count is 4097", id="more than the service draws"),
        pytest.param(HEAD + "0,1,1.5\n", "line 2: count is 1.5: no whole number", id="half an image"),
        pytest.param(HEAD + "0,1,1\n0.001,1,1\n", "it lasts less than 0.1 s", id="too short"),
        pytest.param(HEAD + "0,1,1\n" * (MAX_ROWS + 1), f"has over {MAX_ROWS} rows", id="too many rows"),
        pytest.param(HEAD + "\n" * (MAX_ROWS + 1), f"has over {MAX_ROWS} rows", id="too many empty lines"),
        pytest.param(HEAD + "0," + "9" * 200_000 + ",1\n", "line 2: has over 1000 characters", id="a long cell"),
        pytest.param("," * 10_000_000, "line 1: has over 1000 characters", id="a head of too many cells"),
        pytest.param(HEAD + '"' + "0,1,1\n" * 30_000, "field larger than field limit", id="a quote without its end"),
        pytest.param(HEAD + "0,5e-324,1\n", "line 2: requests_per_s is 4.94066e-324: less than", id="next to nothing"),
        pytest.param(HEAD + "0,1,[[[[\n", "line 2: count is '[[[[': no number", id="JSON"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(read: Read, lines: str, reason: str) -> None:
    """One line that says what is wrong, and where."""
    with pytest.raises(TrafficError) as refused:
        read(lines)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    """With the operating system's reason, or ours."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name, reason in (
        *(("binary", "not text"), ("missing", "No such file"), (".", "Is a directory")),
        ("endless", f"has over {MAX_BYTES} bytes"),
    ):
        with pytest.raises(TrafficError, match=reason):
            read_traffic(tmp_path / name, 1)


def test_the_busiest_seconds_are_found(read: Read) -> None:
    """By images and by requests, each whole, wherever its pieces begin; a short file is taken as it is."""
    traffic = read(HEAD + "0,1,1\n10,100,1\n12,1,1\n20,3,1\n20,5,200\n23,1,1\n40,0,1\n")
    by_requests, by_images = busiest(traffic, 2)
    assert by_requests == Traffic((Piece(0, 2, 100, 1),), 2)
    assert by_images == Traffic((Piece(0, 2, 3, 1), Piece(0, 2, 5, 200)), 2)
    around = busiest(traffic, 4)[0]
    assert around.requests_per_s == pytest.approx((200 + 2) / 4)
    assert busiest(traffic, 1000) == [traffic]
    assert busiest(steady(5, 1, 60), 4) == [steady(5, 1, 4)]


def test_arrivals_have_the_rates_and_a_seed() -> None:
    """In each part as many as asked for, give or take four standard deviations; begun again where it is over."""
    traffic = Traffic((Piece(0, 1, 100, 1), Piece(1, 2, 900, 8)), 2)
    asked = arrivals(traffic, 10, 5, seed=3)
    assert (np.diff(asked.due_s) >= 0).all()
    assert asked.due_s[-1] < 5
    for start, per_s, images in ((0, 1000, 1), (1, 9000, 8), (2, 1000, 1), (3, 9000, 8), (4, 1000, 1)):
        within = (asked.due_s >= start) & (asked.due_s < start + 1)
        assert abs(within.sum() - per_s) < 4 * np.sqrt(per_s)
        assert set(asked.counts[within].tolist()) == {images}
    again, other = arrivals(traffic, 10, 5, seed=3), arrivals(traffic, 10, 5, seed=4)
    np.testing.assert_array_equal(asked.due_s, again.due_s)
    assert len(other.due_s) != len(asked.due_s) or (other.due_s != asked.due_s).any()
