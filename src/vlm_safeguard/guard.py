"""The guard: directions, gate and edit of one model; fitted, saved, loaded and attached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import torch

from vlm_safeguard.anchors import (
    MINIMUM_PAIRS,
    Anchor,
    fingerprint,
    shipped_anchors,
    shipped_calibration,
)
from vlm_safeguard.attachment import Attachment
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.images import blank_image, meaningless_image
from vlm_safeguard.model.activations import image_states, text_states
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import encode_chat
from vlm_safeguard.model.template import learn_text_view
from vlm_safeguard.policy import artifact
from vlm_safeguard.policy.artifact import FORMAT, Config, Provenance
from vlm_safeguard.policy.directions import (
    Directions,
    choose_layers,
    fit_directions,
    held_out_scores,
    legible_before,
    legible_layers,
    random_basis,
)
from vlm_safeguard.policy.edits import Edit, Refuse, edit_from_config
from vlm_safeguard.policy.gate import GATES, AnyGate, CalibratedGate, threshold_for
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.text_view import TextView
from vlm_safeguard.refusal import (
    opening_tokens,
    refusal_margin,
    refusal_opening,
    words_margin,
)
from vlm_safeguard.request_batch import TextReadings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

RANK = 64  # a layer, where there are as many anchors; development prompts lost more with 32
STORED_RANK = 8  # directions kept in the artifact at least, to choose a smaller rank from
BUDGET = 0.01  # share of harmless requests that may open the gate
_TELLS = 0.5  # by how much more of the harmful anchors than of the calibration requests a model
#               must refuse for its own decision to count
_DRIFT_PAIRS = 32  # anchors whose shift under a blank image is measured
_ANSWERED = 64  # anchors whose answers' openings are compared


@dataclass(eq=False)
class Guard:
    """Everything needed to guard one model. Make it with `Guard.fit` or `Guard.from_pretrained`.

    Attributes:
        directions: of every layer, `STORED_RANK` or `rank` of them, whichever is more.
        drift: (layers, hidden) mean shift of the last token's state by a blank image.
        layers: indices of the layers that are edited, 0 being the first decoder layer.
        rank: directions of each layer that are used, m.
        edit: what is done to a request whose gate is open.
        gate: which requests are edited.
        text_view: how a request loses its images.
        provenance: what it was fitted on.
        scores: the gate's scores at fitting: `harmful` and `harmless` anchors, held out,
            `calibration` requests as text and, where the gate looks at the multimodal pass,
            `calibration_image` with an image.
        embedding_sample: some of the model's embeddings, to recognise it by.
        hold: whether every token of the answer is edited, too; with many directions that breaks
            the text.
        opening: token ids that most of the model's own refusals start with. By them a refusal is
            told from "I can't see a picture"; and behind an open gate an answer that starts so is
            edited there as well, or it turns to the image in its middle ("I'm … looking at").
        random_seed: where set, a random subspace takes the directions' place in the edit (a
            control); the gate keeps the true ones.
    """

    directions: Directions
    drift: torch.Tensor
    layers: tuple[int, ...]
    rank: int
    edit: Edit
    gate: AnyGate
    text_view: TextView
    provenance: Provenance
    scores: dict[str, torch.Tensor]
    embedding_sample: torch.Tensor
    hold: bool = False
    opening: tuple[int, ...] = ()
    random_seed: int | None = None
    _receipts: list[Receipt] = field(default_factory=list, repr=False)

    # --- making ---

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        anchors: Sequence[Anchor] | None = None,
        calibration: Sequence[str] | None = None,
        edit: Edit | None = None,
        gate: str = "calibrated",
        layers: Sequence[int] | None = None,
        rank: int | None = None,
        hold: bool = False,
        budget: float = BUDGET,
        batch_size: int = 32,
    ) -> Self:
        """Fit a guard for `model`: forward passes only, nothing is trained.

        Args:
            model: a vision-language model from transformers, in eval mode.
            processor: its processor, with a chat template.
            anchors: pairs of a harmful and a harmless request; the shipped ones by default.
            calibration: harmless requests that choose the gate's thresholds; likewise.
            edit: what to do to a request whose gate is open; `Refuse()` by default.
            gate: `calibrated` to the budget; `paper`, its uncentred one for each layer by itself;
                or `open`, always.
            layers: layers to edit; `choose_layers` decides by default.
            rank: directions a layer, m; 64 by default, or as many as there are anchors.
            hold: also edit every token of the answer.
            budget: share of harmless requests that may open the gate, 0–1.
            batch_size: requests in one forward pass.

        Raises:
            SafeguardError: the model, the processor or the data cannot be used, and why.
        """
        if model.training:
            raise SafeguardError("The model is in training mode; call model.eval() first.")
        backbone = Backbone.of(model)
        anchors = list(shipped_anchors() if anchors is None else anchors)
        calibration = list(shipped_calibration() if calibration is None else calibration)
        rank = min(RANK, len(anchors), backbone.hidden_size) if rank is None else rank
        if len(anchors) < max(MINIMUM_PAIRS, rank):
            raise SafeguardError(
                f"{len(anchors)} anchor pairs are too few for {rank} directions; give at least "
                f"{max(MINIMUM_PAIRS, rank)}, better 100."
            )
        if rank < 1:
            raise SafeguardError(f"The rank is {rank}; at least one direction is needed.")
        if not 0 < budget < 1:
            raise SafeguardError(f"The false-positive budget {budget} is not between 0 and 1.")
        view = learn_text_view(processor, backbone.placeholder_ids)

        requests = [a.harmful for a in anchors] + [a.harmless for a in anchors] + calibration
        states, final = text_states(backbone, processor, requests, batch_size=batch_size)
        pairs = len(anchors)
        sizes = [pairs, pairs, len(calibration)]
        harmful, harmless, ordinary = torch.split(states, sizes)
        if not torch.isfinite(states).all():
            raise SafeguardError(
                f"The model's hidden states are not finite in {model.dtype}; load it in bfloat16 "
                "or float32."
            )
        held_out = held_out_scores(harmful, harmless)
        directions = fit_directions(
            harmful, harmless, min(max(STORED_RANK, rank), pairs), held_out=held_out
        )
        chosen = tuple(layers) if layers is not None else choose_layers(directions)
        _check_layers(chosen, len(backbone.layers))

        shown = anchors[:_DRIFT_PAIRS]
        asked = [a.harmful for a in shown] + [a.harmless for a in shown]
        blank = blank_image()
        blanks = image_states(
            backbone,
            processor,
            asked,
            [blank] * len(asked),
            batch_size=batch_size,
            label="blank image",
        )
        plain = torch.cat([harmful[: len(shown)], harmless[: len(shown)]])
        gate_layers = list(legible_layers(directions, chosen))
        scores = {
            "harmful": held_out[0][:, gate_layers].mean(1),
            "harmless": held_out[1][:, gate_layers].mean(1),
            "calibration": directions.harm_scores(ordinary)[:, gate_layers].mean(1),
        }
        ends = torch.split(final, sizes)
        tokens, opening, own = _own_decision(
            backbone,
            processor,
            *ends,
            anchors=requests[:pairs],
            calibration=calibration,
            scores=scores["calibration"],
        )
        image_layer = legible_before(directions, chosen[0]) if gate == "calibrated" else None
        if image_layer is not None:
            with_image = image_states(
                backbone,
                processor,
                calibration,
                [meaningless_image(i) for i in range(len(calibration))],
                upto=image_layer,
                batch_size=batch_size,
                label="meaningless images",
            )
            scores["calibration_image"] = directions.harm_score(
                with_image[:, image_layer], image_layer
            )
        made: AnyGate
        if gate == "calibrated":
            try:
                share = budget if image_layer is None else budget / 2

                def threshold(name: str) -> float:
                    return threshold_for(scores[name].masked_fill(own, -torch.inf), share)

                made = CalibratedGate(
                    refusal_tokens=tokens,
                    layers=tuple(gate_layers),
                    text_threshold=threshold("calibration"),
                    image_layer=image_layer,
                    image_threshold=None if image_layer is None else threshold("calibration_image"),
                    budget=budget,
                    calibrated_on=len(calibration),
                )
            except ValueError as error:
                raise SafeguardError(f"The gate cannot be calibrated: {error}.") from error
        elif gate in GATES:
            made = GATES[gate]()
        else:
            raise SafeguardError(
                f"There is no gate '{gate}'; there are calibrated, {', '.join(GATES)}."
            )
        return cls(
            directions=directions,
            drift=(blanks - plain).mean(0),
            layers=chosen,
            rank=rank,
            hold=hold,
            opening=opening,
            edit=Refuse() if edit is None else edit,
            gate=made,
            text_view=view,
            provenance=_provenance(backbone, processor, anchors, calibration),
            scores=scores,
            embedding_sample=_embedding_sample(backbone),
        )

    def variant(self, **changes: Any) -> Guard:
        """The same guard with some fields changed, e.g. `guard.variant(edit=Restore())`."""
        return replace(self, **changes, _receipts=[])

    # --- using ---

    def attach(self, model: PreTrainedModel, *, readings: TextReadings | None = None) -> Attachment:
        """Guard every `generate` and `forward` of `model` inside a `with` block.

        Hooks go on, are verified by a forward pass in which each has to act, and come off again.

        Args:
            readings: text-only passes to take instead of making them, and to add to; for
                evaluations that attach several guards, one after the other, to the same prompts.

        Raises:
            SafeguardError: on entering, where this guard is not for this model or its hooks do
                not act; inside, where a pass cannot be guarded. Nothing is generated then.
        """
        return Attachment(self, model, readings)

    @property
    def receipts(self) -> list[Receipt]:
        """What was done to each row of the latest batch that was read under this guard."""
        return list(self._receipts)

    def _keep_receipts(self, receipts: list[Receipt]) -> None:
        self._receipts = receipts

    def basis(self) -> torch.Tensor:
        """(layers, stored rank, hidden) orthonormal rows that the edit works in."""
        if self.random_seed is None:
            return self.directions.vectors
        return random_basis(self.directions, self.random_seed)

    def check_fits(self, backbone: Backbone) -> None:
        """Refuse a model this guard was not fitted on.

        Raises:
            SafeguardError: what differs.
        """
        there = {
            "model_type": backbone.model.config.model_type,
            "hidden_size": backbone.hidden_size,
            "num_layers": len(backbone.layers),
            "decoder_path": backbone.decoder_path,
        }
        for name, value in there.items():
            fitted = getattr(self.provenance, name)
            if fitted != value:
                raise SafeguardError(
                    f"This guard was fitted on {self.provenance.model_name}, whose {name} is "
                    f"{fitted}; this model's is {value}. Fit a guard for this model."
                )
        if backbone.placeholder_ids != self.text_view.placeholder_ids:
            raise SafeguardError(
                f"This guard knows image tokens {sorted(self.text_view.placeholder_ids)}, the "
                f"model uses {sorted(backbone.placeholder_ids)}. Fit a guard for this model."
            )
        sample = _embedding_sample(backbone)
        if sample.shape != self.embedding_sample.shape or not torch.allclose(
            sample, self.embedding_sample, rtol=0.02, atol=0.02 * float(sample.std())
        ):
            raise SafeguardError(
                f"This guard was fitted on {self.provenance.model_name}; this model has the same "
                "shape but other weights. Fit a guard for this model."
            )

    def check_sound(self) -> None:
        """Refuse directions that cannot be right.

        Raises:
            SafeguardError: not finite, not orthonormal, or layers and rank that do not exist.
        """
        vectors = self.directions.vectors
        if vectors.dim() != 3:
            raise SafeguardError(f"The guard's directions have shape {tuple(vectors.shape)}.")
        count, stored, hidden = vectors.shape
        _check_layers(self.layers, count)
        if not 0 < self.rank <= stored:
            raise SafeguardError(f"The guard's rank is {self.rank}; it stores {stored}.")
        if isinstance(self.gate, CalibratedGate):
            _check_layers(self.gate.layers, count)
            if self.gate.image_layer is not None:
                _check_layers((self.gate.image_layer,), self.layers[0] + 1)
            for name in ("text_threshold", "image_threshold"):
                threshold = getattr(self.gate, name)
                if threshold is not None and not isfinite(threshold):
                    raise SafeguardError(f"The gate's {name} is {threshold}: it would never open.")
        tensors = {
            "directions": vectors,
            "drift": self.drift,
            "harmful mean": self.directions.harmful_mean,
            "harmless mean": self.directions.harmless_mean,
        }
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32 or tensor.is_meta:
                raise SafeguardError(
                    f"The guard's {name} is {tensor.dtype} on {tensor.device}; it has to be "
                    "float32, with values."
                )
            if not torch.isfinite(tensor).all():
                raise SafeguardError(f"The guard's {name} holds values that are not finite.")
            if tensor.shape[0] != count or tensor.shape[-1] != hidden:
                raise SafeguardError(f"The guard's {name} has shape {tuple(tensor.shape)}.")
        vectors = self.basis()
        gram = vectors.double() @ vectors.double().mT
        if not torch.allclose(gram, torch.eye(stored).double(), atol=1e-4):
            raise SafeguardError("The guard's directions are not orthonormal.")

    # --- keeping ---

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `guard.safetensors`, `guard_config.json` and a model card into `folder`."""
        config = Config(
            format=FORMAT,
            provenance=self.provenance,
            text_view=self.text_view,
            layers=list(self.layers),
            rank=self.rank,
            hold=self.hold,
            opening=list(self.opening),
            random_seed=self.random_seed,
            edit=self.edit.to_config(),
            gate=self.gate,
            held_out_auroc=[round(float(value), 4) for value in self.directions.auroc],
        )
        tensors = {
            "vectors": self.directions.vectors,
            "spectrum": self.directions.spectrum,
            "harmful_mean": self.directions.harmful_mean,
            "harmless_mean": self.directions.harmless_mean,
            "auroc": self.directions.auroc,
            "drift": self.drift,
            "embedding_sample": self.embedding_sample,
            **{f"scores.{name}": values for name, values in self.scores.items()},
        }
        artifact.write(Path(folder), config, tensors)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Self:
        """Load a guard from a folder or from a repository on the Hugging Face Hub.

        Raises:
            SafeguardError: nothing there, or files that are incomplete, corrupt or of another
                format.
        """
        config, tensors = artifact.read(source, revision)
        try:
            guard = cls(
                directions=Directions(
                    **{
                        name: tensors.pop(name)
                        for name in (
                            "vectors",
                            "spectrum",
                            "harmful_mean",
                            "harmless_mean",
                            "auroc",
                        )
                    }
                ),
                drift=tensors.pop("drift"),
                layers=tuple(config.layers),
                rank=config.rank,
                hold=config.hold,
                opening=tuple(config.opening),
                edit=edit_from_config(config.edit),
                gate=config.gate,
                text_view=config.text_view,
                provenance=config.provenance,
                embedding_sample=tensors.pop("embedding_sample"),
                scores={name.removeprefix("scores."): tensors[name] for name in tensors},
                random_seed=config.random_seed,
            )
        except KeyError as error:
            raise SafeguardError(
                f"{source}/{artifact.WEIGHTS_NAME} holds no tensor {error}."
            ) from error
        guard.check_sound()
        return guard

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Save to a model repository on the Hugging Face Hub; returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload guard"
            )
        return str(commit)


def _own_decision(
    backbone: Backbone,
    processor: ProcessorMixin,
    harmful: torch.Tensor,
    harmless: torch.Tensor,
    ordinary: torch.Tensor,
    *,
    anchors: Sequence[str],
    calibration: Sequence[str],
    scores: torch.Tensor,
) -> tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]:
    """How the model itself refuses, and which calibration requests open the gate by that.

    No tokens where its opening says too little: it must refuse far more of the harmful anchors
    than of the calibration requests.

    Args:
        harmful: (pairs, hidden) final states of the harmful anchors; `harmless` likewise.
        ordinary: (requests, hidden) those of the calibration requests.
        anchors: the harmful anchors' texts; `calibration` likewise.
        scores: (requests,) the gate's scores of the calibration requests.

    Returns:
        The first tokens of a refusal, what most refusals begin with, and (requests,) bool.
    """
    own = torch.zeros(len(ordinary), dtype=torch.bool)
    tokens = opening_tokens(backbone, harmful, harmless)
    if not tokens:
        return (), (), own
    margins = refusal_margin(backbone, ordinary, tokens)
    refused = refusal_margin(backbone, harmful, tokens) > 0
    if refused.float().mean() - (margins > 0).float().mean() < _TELLS:
        return (), (), own
    places = refused.nonzero()[:_ANSWERED, 0].tolist()
    opening = refusal_opening(backbone, [encode_chat(processor, anchors[i]) for i in places])
    for place in (margins > 0).nonzero()[:, 0].tolist():
        margin = margins[place : place + 1]
        states = backbone.run_text([encode_chat(processor, calibration[place])], opening)
        words = words_margin(backbone, states, opening, margin)
        own[place] = CalibratedGate.heeds(float(margin), float(words), float(scores[place]))
    return tokens, opening, own


def _provenance(
    backbone: Backbone,
    processor: ProcessorMixin,
    anchors: Sequence[Anchor],
    calibration: Sequence[str],
) -> Provenance:
    config = backbone.model.config
    return Provenance(
        model_name=str(config._name_or_path or type(backbone.model).__name__),
        model_revision=getattr(config, "_commit_hash", None),
        model_type=config.model_type,
        architecture=type(backbone.model).__name__,
        hidden_size=backbone.hidden_size,
        num_layers=len(backbone.layers),
        decoder_path=backbone.decoder_path,
        chat_template_sha256=template_sha256(processor),
        estimator="paired-svd",
        anchor_pairs=len(anchors),
        anchors_sha256=fingerprint(anchors),
        calibration_requests=len(calibration),
        calibration_sha256=fingerprint(calibration),
        versions={name: version(name) for name in ("vlm-safeguard", "torch", "transformers")},
    )


def template_sha256(processor: ProcessorMixin) -> str:
    """SHA-256, in hex, of a processor's chat template, by which a guard tells it again."""
    template = json.dumps(getattr(processor, "chat_template", None), sort_keys=True)
    return hashlib.sha256(template.encode()).hexdigest()


def _check_layers(layers: Sequence[int], count: int) -> None:
    """Refuse layer indices that are none, not in order, repeated, or not in 0 … count − 1."""
    if not layers or list(layers) != sorted(set(layers)):
        raise SafeguardError(f"Layers {list(layers)} are not a list of layers in ascending order.")
    if not (layers[0] >= 0 and layers[-1] < count):
        raise SafeguardError(f"Layers {list(layers)} are not all in 0–{count - 1}.")


@torch.no_grad()
def _embedding_sample(backbone: Backbone) -> torch.Tensor:
    """(8, 16) values spread over the input embeddings, float32.

    Looked up by the model itself, as its weights may be packed or elsewhere.
    """
    embeddings = backbone.model.get_input_embeddings()
    rows = torch.linspace(0, len(embeddings.weight) - 1, 10).long()[1:-1]
    looked_up: torch.Tensor = embeddings(rows[None].to(backbone.device))
    return looked_up[0, :, :16].float().cpu()
