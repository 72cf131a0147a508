"""The settings: environment variables GAN_…, each also a flag of `python -m service`."""

import ipaddress
import re
import socket
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import did_you_mean

PREFIX = "GAN_"
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_WITH_UNIT = re.compile(r"\s*([0-9]+)\s*(|[kMG]|[KMG]iB)\s*")
# GAN_DATA_DIR belongs to `python -m models`, two others to gan_client; Kubernetes sets the rest for a Service called
# gan-service.
_NOT_OURS = re.compile(r"GAN_DATA_DIR$|GAN_CLIENT_(?:URL|KEY)$|GAN_SERVICE_")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+")
_OWN_PORT = re.compile(r"^(https://.+):443$|^(http://.+):80$")
MAX_WORKERS = 64
_KEYS = ("GAN_API_KEY", "GAN_ADMIN_KEY", "GAN_BUNDLE_KEY")
_TLS = ("GAN_TLS", "GAN_SSL")
MAX_KEYS_BYTES = 2**20  # of a file of keys


class SettingsError(ValueError):
    """A setting can't be used; the message is one line that names it and says why."""


def _number(value: object) -> object:
    """Parse numbers such as 33554432, 32MiB and 16M."""
    if not isinstance(value, str):
        return value
    if not (match := _WITH_UNIT.fullmatch(value)):
        raise ValueError("write a whole number, alone or with k, M, G (thousands) or KiB, MiB, GiB (1024s)")
    return int(match[1]) * _UNITS[match[2]]


def _origins(text: str) -> str:
    """Check origins and write them as browsers do: in lower case and without the scheme's own port."""
    origins = [_OWN_PORT.sub(r"\1\2", origin.strip().lower()) for origin in text.split(",")]
    if not all(_ORIGIN.fullmatch(origin) for origin in origins):
        raise ValueError("write origins such as https://example.com:8443, without a path and separated by commas, or *")
    return ",".join(origins)


def networks(listed: str | None) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Parse addresses and networks, separated by commas, such as 10.0.0.0/8,::1; None holds none.

    Raises:
        ValueError: One is neither.
    """
    return [] if listed is None else [ipaddress.ip_network(one.strip()) for one in listed.split(",")]


def _networks_listed(listed: str | None) -> str | None:
    networks(listed)
    return listed


def _worker_count(value: object) -> object:
    if value == "auto" or (re.fullmatch("[0-9]+", str(value)) and 1 <= int(str(value)[:9]) <= MAX_WORKERS):
        return value
    raise ValueError(f"write auto, or a whole number from 1 to {MAX_WORKERS}")


_Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
_Seconds = Annotated[float, Field(allow_inf_nan=False)]


def _prefix(value: str) -> str:
    """A prefix of paths, without the slash at its end."""
    if not re.fullmatch(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*/?", value):
        raise ValueError("write a path such as /gan or /apps/gan, of letters, digits and ._~-")
    return value.rstrip("/")


class Settings(BaseSettings):
    """Each field is a setting: GAN_MAX_COUNT, --max-count and `Settings(max_count=…)` are the same.

    Arguments win over the environment. An empty variable counts as unset, because compose files create such.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    bundles: Path = Field(
        Path(__file__).parent.parent / "bundles", description="Folder whose sub-folders are bundles, or that is one."
    )
    default_bundle: str | None = Field(
        None,
        description="Bundle of requests that name none, as name or name@version; unset: mnist, else the first by name.",
    )
    max_resident_bundles: _Count = Field(
        8, description="Bundles, versions counted, that are kept in memory; others are loaded when they are asked for."
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="auto (a GPU where there is one), cpu, cuda or cuda:N.",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="Of the nets: float32, tf32 (GPUs only) or bfloat16; the log says by how much images then differ.",
    )
    cuda_graphs: bool = Field(
        default=False, description="On GPUs: run each batch as one CUDA graph, captured in warm-up."
    )
    workers: Annotated[int | Literal["auto"], BeforeValidator(_worker_count)] = Field(
        "auto",
        description="Worker processes, each with its share of the processors and of the queue; auto: as many as pay.",
    )
    processors: _Count | None = Field(
        None, description="Processors to compute with at most, of all workers together; unset: all that there are."
    )
    max_count: _Count = Field(4096, description="Most images in one request; over it 422.")
    max_queued_images: _Count = Field(16384, description="Most images that wait per device; over it 429.")
    batch_window_ms: _Seconds = Field(
        0, ge=0, le=1000, description="Milliseconds that an idle engine waits for a fuller batch; 0: it starts at once."
    )
    max_body_bytes: _Count = Field(32 * 2**20, description="Largest request body in bytes, such as 32MiB; over it 413.")
    max_image_pixels: _Count = Field(
        16 * 10**6, description="Largest uploaded image in pixels, such as 16M; over it 413."
    )
    max_output_pixels: _Count = Field(
        64 * 10**6, description="Largest reply that is made whole, in pixels, such as 64M; over it 422."
    )
    exact: bool = Field(
        default=True,
        description="Pixels never depend on the batch; off allows faster modes that differ in the last bits.",
    )
    deadline_s: _Seconds = Field(30, gt=0, description="Seconds that a request without X-Timeout-Ms may take.")
    max_deadline_s: _Seconds = Field(120, gt=0, description="Seconds that X-Timeout-Ms can ask for at most.")
    decode_timeout_s: _Seconds = Field(
        2, gt=0, description="Seconds of processor time for decoding one uploaded image; over it 422."
    )
    drain_delay_s: _Seconds = Field(
        0, ge=0, description="Seconds between becoming not ready and refusing requests, at shutdown."
    )
    drain_timeout_s: _Seconds = Field(
        25, ge=0, description="Seconds that accepted requests get to finish, at shutdown."
    )
    root_path: Annotated[str, AfterValidator(_prefix)] | None = Field(
        None, max_length=200, description="Prefix of our addresses at the proxy in front, such as /gan; unset: none."
    )
    recipe: bool = Field(
        default=False,
        description="Pictures carry the recipe that made them, and say that they were generated, unless a request has "
        "recipe=false.",
    )
    api_keys: SecretStr | None = Field(
        None, description="Keys of clients, separated by commas; unset: no key is needed."
    )
    api_keys_file: Path | None = Field(
        None, description="File with a client's key on each line, a name before it or not; # starts a comment."
    )
    admin_keys: SecretStr | None = Field(
        None, description="Keys that also allow loading and unloading bundles, separated by commas; unset: nobody may."
    )
    admin_keys_file: Path | None = Field(None, description="File with an administrator's key on each line.")
    bundle_keys_file: Path | None = Field(
        None, description="File of public keys, a line id base64 each; only bundles that one of them signed are loaded."
    )
    tls_cert_file: Path | None = Field(
        None, description="File in PEM with the certificate for HTTPS and those that vouch for it; unset: plain HTTP."
    )
    tls_key_file: Path | None = Field(
        None, description="File in PEM with the certificate's private key, not encrypted."
    )
    key_images_per_s: _Seconds = Field(
        0, ge=0, le=1e9, description="Images a second that each key, by its name, may have computed; 0: no such limit."
    )
    key_images_in_flight: Annotated[int, BeforeValidator(_number), Field(ge=0)] = Field(
        0, description="Images of each key, by its name, that may wait or be computed at a time; 0: no such limit."
    )
    cors_origins: Annotated[str, AfterValidator(_origins)] | None = Field(
        None,
        description="Origins whose pages may call the service from a browser, separated by commas, such as "
        "https://example.com; * for all.",
    )
    trusted_proxies: Annotated[str | None, AfterValidator(_networks_listed)] = Field(
        None,
        description="Addresses and networks, separated by commas, whose X-Forwarded-For names the client in the log.",
    )
    scored_share: float = Field(
        0.01,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of sampled images that D scores, while nothing waits, so that metrics show drift; 0: none.",
    )
    log_format: Literal["console", "json"] = Field("console", description="console or json.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error."
    )

    traces: Literal["off", "otlp"] = Field(
        "off", description="off, or otlp: OpenTelemetry traces, by the usual OTEL_… variables."
    )

    @model_validator(mode="after")
    def _limits_agree(self) -> "Settings":
        if self.deadline_s > self.max_deadline_s:
            raise ValueError(
                f"GAN_DEADLINE_S ({self.deadline_s:g}) is over GAN_MAX_DEADLINE_S ({self.max_deadline_s:g})"
            )
        if self.max_count > self.own_queued_images:  # such a request would get 429 every time
            share = f" / GAN_WORKERS ({self.workers})" if self.worker_count > 1 else ""
            raise ValueError(
                f"GAN_MAX_COUNT ({self.max_count}) is over GAN_MAX_QUEUED_IMAGES ({self.max_queued_images}){share}"
            )
        if (self.tls_cert_file is None) != (self.tls_key_file is None):  # plain HTTP would be a surprise
            named, other = ("cert", "key") if self.tls_key_file is None else ("key", "cert")
            raise ValueError(f"GAN_TLS_{named.upper()}_FILE needs GAN_TLS_{other.upper()}_FILE beside it")
        if self.worker_count > 1 and not hasattr(socket, "send_fds"):
            raise ValueError("GAN_WORKERS can't be more than 1 on this system: it passes no connections to processes")
        return self

    @property
    def worker_count(self) -> int:
        """The number of workers; 1 where it is still to be chosen, as for an application that is built by itself."""
        return 1 if self.workers == "auto" else self.workers

    @property
    def own_queued_images(self) -> int:
        """Most images that wait in one worker: its share of the queue."""
        return self.max_queued_images // self.worker_count


def read_settings(flags: Mapping[str, str]) -> Settings:
    """Read settings: flags (by field name, as text) win over the environment, which wins over the defaults.

    Raises:
        SettingsError: Some values can't be used; one line names each setting.
    """
    try:
        return Settings.model_validate(dict(flags))
    except ValidationError as error:
        raise SettingsError("; ".join(_reason(mistake) for mistake in error.errors())) from None


def _reason(mistake: ErrorDetails) -> str:
    message = mistake["msg"].removeprefix("Value error, ")
    if not mistake["loc"]:  # from _limits_agree
        return message
    name = str(mistake["loc"][0])
    return f"{variable(name)} (or {flag(name)}) is {str(mistake['input'])!r}: {message}"


def variable(field: str) -> str:
    """The environment variable of a setting: max_count → GAN_MAX_COUNT."""
    return PREFIX + field.upper()


def flag(field: str) -> str:
    """The flag of a setting: max_count → --max-count."""
    return "--" + field.replace("_", "-")


def lines_of(field: str, file: Path) -> list[str]:
    """The lines of a file of keys, which the setting of this name names.

    Raises:
        SettingsError: It can't be read, is too large or no text, or is a pipe, which gives its keys once and to one
            worker, or never if nobody writes to it.
    """
    source = f"{variable(field)}: {file}"
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise SettingsError(f"{source}: is not a regular file, which every worker could read, and read again")
        with file.open("rb") as opened:
            content = opened.read(MAX_KEYS_BYTES + 1)
        if len(content) > MAX_KEYS_BYTES:
            raise SettingsError(f"{source}: has over {MAX_KEYS_BYTES} bytes")
        return content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise SettingsError(f"{source}: {reason}") from None


def check_names(names: Iterable[str]) -> list[str]:
    """Warnings about environment variables that look like settings but are none; most likely misspelled.

    Raises:
        SettingsError: A misspelled setting of keys or TLS. Starting would leave a service open whose operator believes
            that it needs a key, or its connections plain.
    """
    known = {variable(field) for field in Settings.model_fields}
    warnings = []
    for name in sorted(names):
        if not name.startswith(PREFIX) or name in known or _NOT_OURS.match(name):
            continue
        if name.startswith(_KEYS):
            raise SettingsError(
                f"{name} is not a setting; keys are read from GAN_API_KEYS, GAN_ADMIN_KEYS, …_FILE and "
                "GAN_BUNDLE_KEYS_FILE"
            )
        if name.startswith(_TLS):
            raise SettingsError(f"{name} is not a setting; TLS is set by GAN_TLS_CERT_FILE and GAN_TLS_KEY_FILE")
        warnings.append(f"{name} is not a setting and is ignored{did_you_mean(name, known)}")
    return warnings


def check_limits(settings: Settings) -> list[str]:
    """A warning for each limit by key that limits nobody, because clients need no key."""
    if settings.api_keys or settings.api_keys_file:
        return []
    limits = ("key_images_per_s", "key_images_in_flight")
    return [f"{variable(name)} limits nobody: there are no keys" for name in limits if getattr(settings, name)]
