"""Settings are read as given, or refused with one line that says why."""

import pytest

from service.settings import Settings, SettingsError, check_limits, check_names, read_settings


def test_defaults_are_the_documented_ones() -> None:
    """By default the service listens on this machine only, and every limit is on."""
    settings = Settings()
    assert (settings.host, settings.port, settings.device) == ("127.0.0.1", 8000, "auto")
    assert settings.bundles.name == "bundles"
    assert settings.bundles.parent.joinpath("service", "settings.py").exists()
    assert settings.default_bundle is None
    assert (settings.workers, settings.worker_count, settings.own_queued_images) == ("auto", 1, 16384)
    assert (settings.max_count, settings.max_queued_images) == (4096, 16384)
    assert (settings.max_body_bytes, settings.max_image_pixels) == (33_554_432, 16_000_000)
    assert settings.max_output_pixels == 64_000_000
    assert (settings.deadline_s, settings.max_deadline_s) == (30, 120)
    assert (settings.drain_delay_s, settings.drain_timeout_s) == (0, 25)
    assert (settings.log_format, settings.log_level, settings.exact) == ("console", "info", True)


def test_a_flag_wins_over_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line wins over the environment."""
    monkeypatch.setenv("GAN_PORT", "9000")
    monkeypatch.setenv("GAN_MAX_COUNT", "10")
    settings = read_settings({"port": "9001"})
    assert (settings.port, settings.max_count) == (9001, 10)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable counts as unset, because compose files pass such on."""
    monkeypatch.setenv("GAN_DEFAULT_BUNDLE", "")
    monkeypatch.setenv("GAN_PORT", "")
    assert read_settings({}) == Settings()


@pytest.mark.parametrize(
    ("text", "number"),
    [("1048576", 1048576), ("1MiB", 1048576), ("2 GiB", 2**31), ("16M", 16_000_000), ("4k", 4000), ("3KiB", 3072)],
)
def test_sizes_are_read_as_people_write_them(text: str, number: int) -> None:
    """A number may have a unit."""
    assert read_settings({"max_body_bytes": text}).max_body_bytes == number


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        pytest.param({"max_count": "0"}, ["GAN_MAX_COUNT", "--max-count", "'0'", "greater than"], id="too small"),
        pytest.param({"max_body_bytes": "32MB"}, ["GAN_MAX_BODY_BYTES", "'32MB'", "MiB"], id="unknown unit"),
        pytest.param({"port": "70000"}, ["GAN_PORT", "'70000'"], id="no such port"),
        pytest.param({"device": "gpu"}, ["GAN_DEVICE", "'gpu'", "cuda"], id="no such device"),
        pytest.param({"deadline_s": "nan"}, ["GAN_DEADLINE_S", "'nan'"], id="not a number"),
        pytest.param({"exact": "maybe"}, ["GAN_EXACT", "'maybe'"], id="neither on nor off"),
        pytest.param({"log_format": "xml"}, ["GAN_LOG_FORMAT", "'console' or 'json'"], id="no such format"),
        pytest.param({"deadline_s": "200"}, ["GAN_DEADLINE_S (200)", "GAN_MAX_DEADLINE_S (120)"], id="deadlines"),
        pytest.param({"max_count": "20000"}, ["GAN_MAX_COUNT (20000)", "GAN_MAX_QUEUED_IMAGES (16384)"], id="counts"),
        pytest.param({"root_path": "gan"}, ["GAN_ROOT_PATH", "'gan'", "such as /gan"], id="a prefix without its slash"),
        pytest.param({"root_path": "/../x"}, ["GAN_ROOT_PATH", "such as /gan"], id="a prefix that leads elsewhere"),
        pytest.param({"root_path": "//host"}, ["GAN_ROOT_PATH", "such as /gan"], id="a prefix that is a host"),
        pytest.param({"root_path": "/a\n"}, ["GAN_ROOT_PATH", "such as /gan"], id="a prefix of two lines"),
        pytest.param({"workers": "all"}, ["GAN_WORKERS", "--workers", "'all'", "auto", "1 to 64"], id="no number"),
        pytest.param({"workers": "65"}, ["GAN_WORKERS", "'65'", "1 to 64"], id="too many workers"),
        pytest.param({"port": "x", "max_count": "y"}, ["GAN_PORT", "GAN_MAX_COUNT"], id="two at once"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(flags: dict[str, str], parts: list[str]) -> None:
    """The line names the setting, its value and what is allowed."""
    with pytest.raises(SettingsError) as caught:
        read_settings(flags)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_a_misspelled_variable_is_named() -> None:
    """A misspelled variable gets a warning, instead of silently meaning the default."""
    others = ["GAN_DATA_DIR", "GAN_CLIENT_URL", "GAN_SERVICE_SERVICE_HOST", "HOME"]
    names = ["GAN_MAX_COUNTS", "GAN_COLOUR", "GAN_PORT", *others]
    assert check_names(names) == [
        "GAN_COLOUR is not a setting and is ignored",
        "GAN_MAX_COUNTS is not a setting and is ignored; did you mean GAN_MAX_COUNT?",
    ]


@pytest.mark.parametrize("name", ["GAN_API_KEY", "GAN_ADMIN_KEY_FILE", "GAN_BUNDLE_KEYS"])
def test_a_misspelled_key_keeps_the_door_shut(name: str) -> None:
    """A misspelled key setting stops the start, which would otherwise leave the service open."""
    with pytest.raises(SettingsError, match=f"^{name} is not a setting"):
        check_names([name])


@pytest.mark.parametrize(("value", "workers"), [("auto", "auto"), ("1", 1), ("64", 64)])
def test_workers_are_a_number_or_chosen(value: str, workers: object) -> None:
    """An explicit number is taken as it is."""
    assert read_settings({"workers": value, "max_count": "100"}).workers == workers


def test_limits_by_key_without_keys_are_warned_of() -> None:
    """They limit nobody, which nobody would notice; with keys, or at their defaults, there is nothing to say."""
    limits = {"key_images_per_s": "5", "key_images_in_flight": "64"}
    assert check_limits(read_settings(limits)) == [
        "GAN_KEY_IMAGES_PER_S limits nobody: there are no keys",
        "GAN_KEY_IMAGES_IN_FLIGHT limits nobody: there are no keys",
    ]
    assert check_limits(read_settings(limits | {"api_keys": "k1"})) == []
    assert check_limits(read_settings(limits | {"api_keys_file": "keys.txt"})) == []
    assert check_limits(read_settings({})) == []
