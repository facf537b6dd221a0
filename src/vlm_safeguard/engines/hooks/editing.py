"""What is done in the layers during one guarded pass."""

from __future__ import annotations

from math import isfinite

import torch

from vlm_safeguard.engines.hooks.passes import Pass
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.directions import Directions
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.reading import Reading
from vlm_safeguard.policy.rows import Rows, edit_rows
from vlm_safeguard.policy.subspace import Subspace


class Editing:
    """Edits the open rows of one pass, after the criteria that read the pass itself were asked.

    Attributes:
        current: the pass.
        layers: those that have to be hooked in it: none where nothing is to be done.
    """

    def __init__(
        self,
        policy: Policy,
        directions: Directions,
        subspaces: dict[int, Subspace],
        current: Pass,
    ) -> None:
        """Of this pass; directions and subspaces are the policy's, on the model's device."""
        self._policy = policy
        self._directions = directions
        self._subspaces = subspaces
        self.current = current
        self._image_states: dict[int, torch.Tensor] = {}
        self._rows: dict[int, Rows] | None = None  # by layer, once it is decided
        self._finite: list[torch.Tensor] = []  # of each edit, whether it is
        self.layers: tuple[int, ...] = ()
        if self._looks and bool(current.batch.editable.any()):
            edited = policy.layers if policy.edits else ()
            self.layers = tuple(sorted({*edited, *policy.image_layers}))
        elif policy.edits and current.batch.decision.is_open.any():
            self.layers = policy.layers

    def __call__(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """A layer's (rows, tokens, hidden) states with the open rows edited; None if all closed."""
        if self._looks and layer in self._policy.image_layers:
            self._look(layer, hidden)
        if layer not in self._subspaces:
            return None
        if self._rows is None:
            self._rows = self._rows_by_layer(hidden.device)
        rows = self._rows.get(layer)
        return None if rows is None else self._edit(layer, hidden, rows)

    def check_finite(self) -> None:
        """Refuse a pass in which an edit gave what is not a number, asking the device once.

        Raises:
            SafeguardError: one did.
        """
        finite = self._finite
        if finite and not bool(torch.stack([each.to(finite[0].device) for each in finite]).all()):
            raise SafeguardError(
                "An edit in this pass gave a state that is not finite; nothing more is generated."
            )

    @property
    def _looks(self) -> bool:
        """Whether criteria are still to be asked that read this pass."""
        return self.current.reads_end and self.current.batch.decision.awaits_image

    def _look(self, layer: int, hidden: torch.Tensor) -> None:
        """Keep the prompts' last states; decide once all that is read of them is there."""
        batch = self.current.batch
        ends = (batch.ends - self.current.start).to(hidden.device)
        if bool((ends < 0).any()):
            raise SafeguardError(
                "A request ends in an earlier part of its prompt than the part in which its gate "
                "reads the image; leave prefill_chunk_size out, or the answer's beginning."
            )
        dropped = _dropped(hidden, self.current.width)
        _check_kept(hidden, self.current.width, ends >= dropped)
        states = hidden[torch.arange(len(hidden), device=hidden.device), ends - dropped]
        self._image_states[layer] = states.to(self._directions.vectors.device)
        if len(self._image_states) == len(self._policy.image_layers):
            batch.decide_image(Reading(self._image_states, self._directions, self._policy.layers))

    def _rows_by_layer(self, device: torch.device) -> dict[int, Rows]:
        """What each layer where some request is open edits in this pass."""
        rows, is_open = self.current.rows, self.current.batch.decision.is_open
        by_layer: dict[int, Rows] = {}
        chosen: dict[tuple[bool, ...], Rows] = {}  # most layers share one
        for column, layer in enumerate(self._policy.layers):
            opened = is_open[:, column]
            pattern = tuple(opened.tolist())
            if pattern not in chosen:
                chosen[pattern] = rows[opened[rows.owner]].to(device)
            if len(chosen[pattern]):
                by_layer[layer] = chosen[pattern]
        return by_layer

    def _edit(self, layer: int, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        batch, current = self.current.batch, self.current
        dropped = _dropped(hidden, current.width)
        if dropped:
            kept = rows.position >= dropped
            _check_kept(hidden, current.width, kept[rows.final])
            rows = rows[kept]
        positions = rows.position - dropped
        subspace = self._subspaces[layer].to(hidden.device)
        text = batch.coordinates.get(layer)
        if text is not None:
            text = text.to(hidden.device)[rows.token]
        index = rows.owner * hidden.shape[1] + positions
        flat = hidden.reshape(-1, hidden.shape[-1])
        at = subspace.reference(text, rows.last)
        edited = edit_rows(self._policy.edit, flat, subspace.V, index, at)
        self._finite.append(torch.isfinite(edited[index]).all())
        if current.reads_end and not batch.finished:
            self._note_harm(layer, rows.owner[rows.last], index[rows.last], flat, edited)
        return edited.view(hidden.shape)

    def _note_harm(
        self,
        layer: int,
        owners: torch.Tensor,
        index: torch.Tensor,
        states: torch.Tensor,
        edited: torch.Tensor,
    ) -> None:
        """Keep the harm scores of the requests that are edited here first, for their receipts."""
        batch = self.current.batch
        numbered = list(enumerate(owners.tolist()))
        # a prompt's last token comes before its answer's, which may be read in the same pass
        new = {owner: i for i, owner in reversed(numbered) if owner not in batch.harm}
        if not new:
            return
        device = self._directions.vectors.device
        chosen = index[list(new.values())]
        before, after = (
            self._directions.harm_score(x[chosen].to(device), layer).tolist()
            for x in (states, edited)
        )
        for owner, *scores in zip(new, before, after, strict=True):
            if not all(map(isfinite, scores)):
                raise SafeguardError(
                    f"Row {owner}: the edit at layer {layer} gave a state that is not finite; "
                    "nothing is generated."
                )
            batch.harm[owner] = (scores[0], scores[1])


def _dropped(hidden: torch.Tensor, width: int) -> int:
    """How many of a pass's first tokens a layer was not given.

    Gemma 4's layers with shared keys and values drop the tokens that need no logits: no later state
    is made of theirs.
    """
    return max(width - hidden.shape[1], 0)


def _check_kept(hidden: torch.Tensor, width: int, kept: torch.Tensor) -> None:
    """Refuse a pass in which a layer was not given a token that has to be read or edited there.

    Args:
        kept: of each such token, whether it was.

    Raises:
        SafeguardError: one was not.
    """
    if width > hidden.shape[1] and not bool(kept.all()):
        raise SafeguardError(
            f"A guarded layer was given only the last {hidden.shape[1]} of {width} tokens, "
            "so a request's end cannot be guarded there. Pad on the left, and leave "
            "logits_to_keep and the answer's beginning out."
        )
