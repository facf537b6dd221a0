"""What travels with a request to vLLM's workers: whose it is, and what is read and edited there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from vlm_safeguard.engines.vllm.edit_plan import EditPlan
from vlm_safeguard.errors import SafeguardError

#: In a request's `extra_args`, and in an engine's `additional_config`.
KEY = "vlm_safeguard"
#: Readings, and edits, that a worker keeps until they are taken; then the oldest ones go.
KEPT = 1024


class Mark(BaseModel):
    """Of one request.

    Attributes:
        policy: sha256 of the policy that it is answered under, in hex.
        name: under which workers keep what they read or edit of it; None where that is nothing.
        position: the prompt's token whose states are read; −1 for its last one.
        tokens: the prompt's tokens whose coordinates are read, in order.
        edit: of an open request that is answered beside its media.
        beginnings: what its answer begins with, token ids: that whose first one is likeliest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    name: str | None = None
    position: int | None = None
    tokens: tuple[int, ...] = ()
    edit: EditPlan | None = None
    beginnings: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, arguments: Mapping[str, Any] | None) -> Self:
        """The mark among a request's `extra_args`.

        Raises:
            SafeguardError: there is none, or it is not one.
        """
        try:
            return cls.model_validate((arguments or {})[KEY])
        except (KeyError, ValidationError) as error:
            raise SafeguardError(
                "A request came to vLLM's workers that did not come through the guarded client, so "
                "it is not answered."
            ) from error

    def on(self, params: Any) -> Any:
        """A copy of these `SamplingParams` that bears it.

        Raises:
            ValueError: they bear one already, which would be of the client's making.
        """
        arguments = params.extra_args or {}
        if KEY in arguments:
            raise ValueError(f"'{KEY}' is not a client's to give; leave it out of the request")
        marked = params.clone()
        marked.extra_args = {**arguments, KEY: self.model_dump(exclude_defaults=True)}
        return marked


class EditSettings(BaseModel):
    """What workers have to know of an edit before the model is compiled.

    Attributes:
        edit: its name and parameters.
        layers: that it acts in.
        rank: directions of each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    edit: dict[str, Any]
    layers: tuple[int, ...]
    rank: int


class Settings(BaseModel):
    """Of the workers, in an engine's `additional_config`, which its compiled graphs are kept by.

    Attributes:
        policy: sha256 of the policy whose requests they answer.
        layers: whose states they read.
        edit: that they make; None where open requests are answered from their text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    layers: tuple[int, ...]
    edit: EditSettings | None = None

    @classmethod
    def of(cls, config: Any) -> Self:
        """Those in an `additional_config`.

        Raises:
            SafeguardError: there are none.
        """
        try:
            return cls.model_validate(config[KEY])
        except (KeyError, TypeError, ValidationError) as error:
            raise SafeguardError(
                "This worker reads for a guard, and the engine's additional_config names none; "
                "docs/vllm.md says how it is started."
            ) from error
