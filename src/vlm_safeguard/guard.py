"""The guard: a policy fitted for one model; fitted, saved, loaded and attached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self
from warnings import warn

import torch

from vlm_safeguard.anchors import Anchor, fingerprint, shipped_anchors, shipped_calibration
from vlm_safeguard.engines.hooks.attachment import Attachment
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.fit.data import FitData
from vlm_safeguard.fit.policy import DEFAULT_GATE, fit_policy
from vlm_safeguard.model.adapters import active_adapters
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import encode_chat
from vlm_safeguard.model.fingerprint import EmbeddingSample, Fingerprint
from vlm_safeguard.model.identity import check_adapters, check_structure
from vlm_safeguard.model.wrappers import unwrapped
from vlm_safeguard.policy import artifact
from vlm_safeguard.policy.artifact import FORMAT, Config, Provenance
from vlm_safeguard.policy.directions import Directions
from vlm_safeguard.policy.discriminant import Discriminant
from vlm_safeguard.policy.edits import Edit, Refuse, edit_from_config
from vlm_safeguard.policy.options import FitOptions
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.response import DEFAULT_RESPONSE, Response
from vlm_safeguard.policy.soundness import check_sound

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from vlm_safeguard.engines.hooks.text_passes import TextReadings

_TENSORS = ("vectors", "spectrum", "harmful_mean", "harmless_mean", "auroc")


@dataclass(eq=False)
class Guard:
    """Everything needed to guard one model. Make it with `Guard.fit` or `Guard.from_pretrained`.

    Attributes:
        policy: what is decided and done.
        provenance: what it was fitted on.
        scores: what the gate's text criterion gave at fitting to `harmful` and `harmless` anchors,
            held out, and to `calibration` requests; with a discriminant in all their forms. Where
            the gate looks at the multimodal pass, `calibration_image`, its scores with an image.
        fingerprint: of the model, to know it again by.
    """

    policy: Policy
    provenance: Provenance
    scores: dict[str, torch.Tensor]
    fingerprint: Fingerprint | EmbeddingSample
    _attachment: Attachment | None = field(default=None, repr=False)

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
        gate: str = DEFAULT_GATE,
        response: Response | None = None,
        layers: Sequence[int] | None = None,
        batch_size: int = 32,
        **options: Any,
    ) -> Self:
        """Fit a guard for `model`: forward passes only, nothing is trained.

        Args:
            model: a vision-language model from transformers, in eval mode; also inside a
                `PeftModel` or a `DistributedDataParallel`.
            processor: its processor, with a chat template.
            anchors: pairs of a harmful and a harmless request; the shipped ones by default.
            calibration: harmless requests that choose the gate's thresholds; likewise.
            edit: what `Response.EDIT` does to a request's states; `Refuse()` by default.
            gate: `discriminant`, fitted on wrapped, translated and follow-up anchors, too, and
                calibrated to the budget; `calibrated`, the same with the text's harm score in the
                discriminant's place, from a third of the texts; `paper`, its uncentred one for
                each layer by itself; or `open`, always.
            response: to an open request: `Response.REFUSAL`, or the edit where one is given.
            layers: layers to edit; `choose_layers` decides by default.
            batch_size: requests in one forward pass.
            options: fields of `FitOptions` that are not to be the default, e.g. `rank` or `budget`.

        Raises:
            SafeguardError: the model, the processor, the data or an option cannot be used, and why.
        """
        model = unwrapped(model)
        if model.training:
            raise SafeguardError("The model is in training mode; call model.eval() first.")
        chosen = FitOptions.of(options)
        backbone = Backbone.of(model)
        data = FitData(
            list(shipped_anchors() if anchors is None else anchors),
            list(shipped_calibration() if calibration is None else calibration),
        )
        policy, scores = fit_policy(
            backbone,
            processor,
            data,
            chosen,
            edit=Refuse() if edit is None else edit,
            gate=gate,
            response=response or (DEFAULT_RESPONSE if edit is None else Response.EDIT),
            layers=layers,
            batch_size=batch_size,
        )
        return cls(
            policy=policy,
            provenance=_provenance(backbone, processor, data, chosen),
            scores=scores,
            fingerprint=_fingerprint(backbone, processor, data),
        )

    def variant(self, **changes: Any) -> Guard:
        """The same with parts of it or its policy changed; an edit, if given, is the response."""
        if "edit" in changes:
            changes = {"response": Response.EDIT, **changes}
        names = {each.name for each in fields(Policy)}
        policy = {name: value for name, value in changes.items() if name in names}
        rest = {name: value for name, value in changes.items() if name not in names}
        return replace(self, policy=replace(self.policy, **policy), **rest, _attachment=None)

    # --- using ---

    def attach(
        self,
        model: PreTrainedModel,
        *,
        readings: TextReadings | None = None,
        wait: bool = False,
    ) -> Attachment:
        """Guard every `generate` and `forward` of `model` inside a `with` block.

        Hooks go on, are verified by a forward pass in which each has to act, and come off again.

        Args:
            model: as for `fit`; guarded through its wrapper, too.
            readings: text-only passes to take instead of making them, and to add to; for
                evaluations that attach several guards, one after the other, to the same prompts.
            wait: whether leaving the block waits for runs in other threads; by default they are
                stopped before their next token.

        Raises:
            SafeguardError: at once, where the model is in a wrapper that cannot be guarded; on
                entering, where this guard is not for it or its hooks do not act; inside, where a
                pass cannot be guarded. Nothing is generated then.
        """
        self._attachment = Attachment(
            self.policy,
            unwrapped(model),
            self.check_fits,
            self.check_behaves,
            readings,
            wait=wait,
        )
        return self._attachment

    @property
    def receipts(self) -> list[Receipt]:
        """What was done to each row of the latest batch that was read under this guard."""
        return [] if self._attachment is None else self._attachment.receipts

    def check_fits(self, backbone: Backbone) -> None:
        """Refuse a model this guard was not fitted on.

        Raises:
            SafeguardError: what differs: its structure, adapters or weights.
        """
        check_structure(backbone, self.provenance, self.policy)
        check_adapters(backbone, self.provenance)
        self.fingerprint.check_weights(backbone, self.provenance.model_name)

    def check_behaves(self, backbone: Backbone) -> None:
        """Refuse a model whose text passes give other than they gave at fitting.

        Raises:
            SafeguardError: by how much.
        """
        self.fingerprint.check_behaviour(backbone, self.policy, self.provenance.model_name)

    # --- keeping ---

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `guard.safetensors`, `guard_config.json` and a model card into `folder`."""
        policy, directions = self.policy, self.policy.directions
        config = Config(
            format=FORMAT,
            provenance=self.provenance,
            policy_sha256=policy.sha256(),
            text_view=policy.text_view,
            generation_prompt=policy.generation_prompt,
            layers=list(policy.layers),
            rank=policy.rank,
            refusal_prefix=list(policy.refusal_prefix),
            other_prefixes=[list(prefix) for prefix in policy.other_prefixes],
            sentences=policy.sentences,
            response=policy.response,
            random_seed=policy.random_seed,
            edit=policy.edit.to_config(),
            gate=policy.gate,
            held_out_auroc=[round(float(value), 4) for value in directions.auroc],
            tolerances=self.fingerprint.tolerances,
        )
        tensors = {
            **policy.tensors(),
            **{name: getattr(directions, name) for name in _TENSORS},
            **self.fingerprint.tensors(),
            **{f"scores.{name}": values for name, values in self.scores.items()},
        }
        artifact.write(Path(folder), config, tensors)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Self:
        """Load a guard from a folder or from a repository on the Hugging Face Hub.

        Raises:
            SafeguardError: nothing there, or files that are incomplete, corrupt, of another
                format, or not of one guard.
        """
        config, tensors = artifact.read(source, revision)
        try:
            policy = Policy(
                directions=Directions(**{name: tensors.pop(name) for name in _TENSORS}),
                drift=tensors.pop("drift"),
                layers=tuple(config.layers),
                rank=config.rank,
                edit=edit_from_config(config.edit),
                gate=config.gate,
                text_view=config.text_view,
                generation_prompt=config.generation_prompt,
                refusal_prefix=tuple(config.refusal_prefix),
                other_prefixes=tuple(map(tuple, config.other_prefixes)),
                sentences=config.sentences,
                response=config.response,
                random_seed=config.random_seed,
                discriminant=_discriminant(tensors),
            )
            known = _known(tensors, config)
        except KeyError as error:
            raise SafeguardError(
                f"{source}/{artifact.WEIGHTS_NAME} holds no tensor {error}."
            ) from error
        check_sound(policy)
        if config.policy_sha256 not in (None, policy.sha256()):
            raise SafeguardError(
                f"{source} was changed after it was saved: {artifact.CONFIG_NAME} and "
                f"{artifact.WEIGHTS_NAME} are not of one guard. Take both from where it was saved; "
                "to change a guard, use guard.variant(…) and save that."
            )
        if policy.generation_prompt is None:
            warn(
                f"{source} does not say where this model's answers begin (guards of format 3 do "
                "not), so an answer that is begun in the prompt is judged as a part of the "
                "request. Fit the guard again.",
                stacklevel=2,
            )
        return cls(
            policy=policy,
            provenance=config.provenance,
            scores={name.removeprefix("scores."): tensors[name] for name in tensors},
            fingerprint=known,
        )

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


def _discriminant(tensors: dict[str, torch.Tensor]) -> Discriminant | None:
    """Taken out of a guard's tensors; None where there is none among them."""
    names = ("discriminant_weights", "discriminant_offset")
    if not any(name in tensors for name in names):
        return None
    return Discriminant(*(tensors.pop(name) for name in names))


def _known(tensors: dict[str, torch.Tensor], config: Config) -> Fingerprint | EmbeddingSample:
    """What the model is known by, taken out of a guard's tensors."""
    if config.tolerances is None:
        return EmbeddingSample(tensors.pop("embedding_sample"))
    return Fingerprint.take(tensors, config.tolerances)


def _provenance(
    backbone: Backbone, processor: ProcessorMixin, data: FitData, options: FitOptions
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
        anchor_pairs=len(data.anchors),
        anchors_sha256=fingerprint(data.anchors),
        calibration_requests=len(data.calibration),
        calibration_sha256=fingerprint(data.calibration),
        adapters=active_adapters(backbone.model),
        options=options,
        versions={name: version(name) for name in ("vlm-safeguard", "torch", "transformers")},
    )


def template_sha256(processor: ProcessorMixin) -> str:
    """SHA-256, in hex, of a processor's chat template, by which a guard tells it again."""
    template = json.dumps(getattr(processor, "chat_template", None), sort_keys=True)
    return hashlib.sha256(template.encode()).hexdigest()


def _fingerprint(backbone: Backbone, processor: ProcessorMixin, data: FitData) -> Fingerprint:
    """By the first anchors, as text."""
    shown = data.anchors[:2]
    texts = [*(each.harmful for each in shown), *(each.harmless for each in shown)]
    return Fingerprint.of(backbone, [encode_chat(processor, text) for text in texts])
