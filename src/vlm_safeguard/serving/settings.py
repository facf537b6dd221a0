"""What a server is started with: one object, from the command line or a TOML file.

Its fields are the command line's options, so that importing it loads no model's library.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.loading import Loading
from vlm_safeguard.loading.fields import loading_field, loading_of, validated

KEY_VARIABLE = "VLM_SAFEGUARD_API_KEY"


def _host(name: str) -> str:
    if not name or set(name) & set("/:@?#* "):
        raise ValueError(f"'{name}' is not a host's name; write it as in example.org")
    return name.lower().rstrip(".")


def _response(name: str) -> str:
    from vlm_safeguard.policy.response import Response

    return str(Response.named(name))


class ServeSettings(BaseModel):
    """One guarded model, who may ask it, and how much."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        description="'pocket', 'coder', a Hugging Face Hub id, or a checkpoint folder."
    )
    guard: str | None = Field(
        None, description="A guard's folder or Hub id; fitted and kept if left out."
    )
    response: Annotated[str, AfterValidator(_response)] | None = Field(
        None, description="How open requests are answered: edit, text or refusal; the guard's own."
    )
    name: str | None = Field(
        None, min_length=1, description="What clients call the model; its last part if left out."
    )
    host: str = Field("127.0.0.1", description="The address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="The port; 0 takes a free one.")
    api_keys: tuple[SecretStr, ...] = Field(
        (), description=f"A key that clients have to send; or in ${KEY_VARIABLE}."
    )
    allow_image_hosts: tuple[Annotated[str, AfterValidator(_host)], ...] = Field(
        (), description="A host that images may be fetched from by https; none if left out."
    )
    max_new_tokens: int = Field(
        1024, ge=1, description="Tokens of an answer at most, and where a request does not say."
    )
    max_prompt_tokens: int = Field(
        8192, ge=1, description="Tokens of a prompt at most, those of its images among them."
    )
    max_batch: int = Field(8, ge=1, description="Answers that are generated at once.")
    batch_wait: float = Field(
        0.02, ge=0, le=10, description="Seconds that a batch waits for others to join it."
    )
    turn: int = Field(
        128, ge=1, description="Tokens of its answers that a batch generates before others' turn."
    )
    max_begun: int = Field(
        4, ge=1, description="Batches that are begun and not over at most; others wait for an end."
    )
    max_queue: int = Field(
        64, ge=0, description="Requests that may wait beside a batch; more are told to come back."
    )
    timeout: float = Field(
        300.0, gt=0, description="Seconds from a request's arrival to its answer's last token."
    )
    max_choices: int = Field(4, ge=1, description="Answers to one request (n) at most.")
    max_body: int = Field(32 * 2**20, ge=1024, description="Bytes of a request at most.")
    max_images: int = Field(8, ge=0, description="Images of a request at most.")
    max_image_bytes: int = Field(10 * 2**20, ge=1, description="Bytes of an image at most.")
    max_image_pixels: int = Field(
        4096 * 4096, ge=1, description="Pixels of an image at most, width × height."
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern="^https?://",
        description="Where OpenTelemetry spans go, by OTLP over HTTP, e.g. http://127.0.0.1:4318; "
        "or in $OTEL_EXPORTER_OTLP_ENDPOINT.",
    )
    fetch_timeout: float = Field(10.0, gt=0, description="Seconds to fetch an image in.")
    drain: float = Field(
        60.0, ge=0, description="Seconds that answers get to end in after SIGTERM."
    )
    dtype: str = loading_field("dtype")
    device: str = loading_field("device")
    device_map: str | None = loading_field("device_map")
    load_in_4bit: bool = loading_field("load_in_4bit")
    load_in_8bit: bool = loading_field("load_in_8bit")
    revision: str | None = loading_field("revision")
    trust_remote_code: bool = loading_field("trust_remote_code")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            self.loading  # noqa: B018  (checked when it is made)
        except SafeguardError as error:
            raise ValueError(str(error)) from error
        if not all(key.get_secret_value() for key in self.api_keys):
            raise ValueError("an API key is empty")
        if self.max_choices > self.max_batch:
            raise ValueError("max_choices is more than max_batch, which generates them at once")
        return self

    @property
    def loading(self) -> Loading:
        """How the model is loaded."""
        return loading_of(self)

    @property
    def served_name(self) -> str:
        """What clients call the model; never a path of this machine."""
        return self.name or (Path(self.model).name if Path(self.model).is_dir() else self.model)


def settings_of(values: dict[str, Any], where: str) -> ServeSettings:
    """Settings from plain values.

    Args:
        where: they come from, for messages.

    Raises:
        SafeguardError: what is wrong in it, by the field's name.
    """
    return validated(ServeSettings, values, where)


def read_settings(path: Path) -> dict[str, Any]:
    """The values in a TOML file, whose names are those of `ServeSettings`.

    Raises:
        SafeguardError: no such file, or no TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SafeguardError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SafeguardError(f"{path} cannot be read: {error}") from error
