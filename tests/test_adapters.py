"""Adapters: those that act at fitting have to act at attaching, and no other; none moves inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaProcessor
from transformers.generation.streamers import BaseStreamer

from support.observe import Model, Watch
from support.reference import QUESTIONS, ask, refitted
from vlm_safeguard.anchors import shipped_anchors
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.adapters import active_adapters
from vlm_safeguard.policy.response import Response

LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"
KINDS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=2, target_modules=LANGUAGE, init_lora_weights=False),
    "dora": peft.LoraConfig(r=2, target_modules=LANGUAGE, init_lora_weights=False, use_dora=True),
    "ia3": peft.IA3Config(target_modules=LANGUAGE, feedforward_modules=[], init_ia3_weights=False),
}


@pytest.fixture
def own(model: Model) -> Model:
    """A copy to adapt."""
    return copy.deepcopy(model)


@pytest.fixture
def adapted(own: Model) -> Any:
    """With two LoRA adapters, of which `default` acts."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(own, KINDS["lora"]).eval()
    wrapped.add_adapter("other", KINDS["lora"])
    return wrapped


def attach(guard: Guard, model: Any) -> None:
    with guard.attach(model):
        pass


# --- before attaching ---


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_added_before_attaching_is_refused(own: Model, guard: Guard, kind: str) -> None:
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(own, KINDS[kind]).eval()
    for model in (wrapped, own):
        with pytest.raises(
            SafeguardError,
            match=r"fitted with no adapter; .* the adapter 'default' acts.*fit a guard for",
        ):
            attach(guard, model)
    with wrapped.disable_adapter():
        attach(guard, wrapped)
    attach(refitted(guard, own), wrapped)


def test_an_adapter_that_transformers_added_is_refused_until_it_is_off(
    model: Model, guard: Guard
) -> None:
    own: Any = copy.deepcopy(model)
    own.add_adapter(KINDS["lora"], "mine")
    own.eval()
    with pytest.raises(SafeguardError, match="the adapter 'mine' acts"):
        attach(guard, own)
    own.disable_adapters()
    attach(guard, own)


def test_a_guard_is_fitted_for_the_adapter_that_acts_and_says_so(
    adapted: Any, processor: LlavaProcessor, tmp_path: Path
) -> None:
    calibration = [f"How to count to {i}" for i in range(9)]
    made = Guard.fit(
        adapted,
        processor,
        anchors=shipped_anchors()[:12],
        calibration=calibration,
        budget=0.2,
        rank=4,
        gate="calibrated",
    )
    made.save_pretrained(tmp_path)
    assert "with the adapters default" in (tmp_path / "README.md").read_text("utf-8")
    guard = Guard.from_pretrained(tmp_path)
    assert guard.provenance.adapters == ("default",)
    attach(guard, adapted)
    adapted.set_adapter("other")
    with pytest.raises(SafeguardError, match=r"the adapter 'default'; .*'other' acts. Switch to"):
        attach(guard, adapted)
    adapted.set_adapter("default")
    attach(guard, adapted)
    with (
        adapted.disable_adapter(),
        pytest.raises(SafeguardError, match=r"'default'; in this model no adapter acts"),
    ):
        attach(guard, adapted)


def test_another_adapter_of_the_same_name_is_refused(adapted: Any, guard: Guard) -> None:
    fitted = refitted(guard, adapted.get_base_model())
    for name, weight in adapted.named_parameters():
        if "lora_B.default" in name:
            weight.data.neg_()
    with pytest.raises(SafeguardError, match=r"other weights: .*lora_B\.default"):
        attach(fitted, adapted)


@pytest.mark.parametrize("unload", [False, True])
def test_a_merged_adapter_is_refused(adapted: Any, guard: Guard, unload: bool) -> None:
    base = adapted.get_base_model()
    if unload:
        adapted.merge_and_unload()
        assert active_adapters(base) == ()
    else:
        adapted.merge_adapter()
    message = "other weights.*adapter was merged" if unload else "the adapter 'default' acts"
    with pytest.raises(SafeguardError, match=message):
        attach(guard, base)
    attach(refitted(guard, base), base)


# --- inside the block ---


def first(model: Any) -> Any:
    """The first adapted layer of the decoder."""
    return model.get_base_model().model.language_model.layers[0].self_attn.q_proj


def hot_swap(model: Any, folder: Path) -> None:
    state = peft.get_peft_model_state_dict(model, adapter_name="default")
    model.peft_config["default"].save_pretrained(folder)
    negative = {name: -weight for name, weight in state.items()}
    save_file(negative, folder / "adapter_model.safetensors")
    hotswap_adapter(model, str(folder), adapter_name="default", torch_device="cpu")


def load(model: Any) -> None:
    base = model.get_base_model()
    base.load_state_dict({name: weight * 2 for name, weight in base.state_dict().items()})


def point_elsewhere(model: Any) -> None:
    head = model.get_base_model().lm_head
    head.weight.data = head.weight.data * 2


@torch.no_grad()
def write(model: Any) -> None:
    model.get_base_model().model.language_model.norm.weight.copy_(torch.tensor(2.0))


def replace_parameter(model: Any) -> None:
    head = model.get_base_model().lm_head
    head.weight = nn.Parameter(head.weight.detach() * 2)


def replace_module(model: Any) -> None:
    model.get_base_model().model.language_model.layers[1].mlp.act_fn = nn.Identity()


def write_projector(model: Any) -> None:
    with torch.no_grad():
        model.get_base_model().model.multi_modal_projector.linear_1.weight.zero_()


def write_by_data(model: Any) -> None:
    first(model).base_layer.weight.data.mul_(2)


def scale(model: Any) -> None:
    first(model).scaling["default"] = 9.0


@torch.no_grad()
def write_one_embedding(model: Any) -> None:
    model.get_base_model().get_input_embeddings().weight[7] = 0.0


@torch.no_grad()
def write_tower(model: Any) -> None:
    model.get_base_model().model.vision_tower.encoder.layers[1].mlp.fc1.weight.zero_()


def add_in_place(model: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["k_proj"])
    peft.inject_adapter_in_model(config, model.get_base_model(), "third")


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "switched": (lambda m: m.set_adapter("other"), r"active: .*default.*, now .*other"),
    "switched off": (lambda m: m.base_model.disable_adapter_layers(), "disabled: False, now True"),
    "merged": (lambda m: m.merge_adapter(), r"merged: \(\), now \('default',\)"),
    "scaled": (lambda m: first(m).scale_layer(3.0), "scaling: "),
    "scaled by hand": (scale, "scaling: .*, now .*9.0"),
    "added": (lambda m: m.add_adapter("third", KINDS["lora"]), "scaling: |replaced"),
    "added beside": (add_in_place, "adapters of|were replaced"),
    "deleted": (lambda m: m.delete_adapter("other"), "scaling: |replaced"),
    "unloaded": (lambda m: m.unload(), "were replaced"),
    "weights loaded": (load, "written to after attaching"),
    "weights pointed elsewhere": (point_elsewhere, r"lm_head\.weight was written to"),
    "weights written": (write, r"language_model\.norm\.weight was written to"),
    "weights written by way of .data": (write_by_data, "Weights were written to"),
    "a parameter replaced": (replace_parameter, "Parts of lm_head were replaced"),
    "a module replaced": (replace_module, r"layers\.1\.mlp were replaced"),
    "an embedding written": (write_one_embedding, r"embed_tokens\.weight was written to"),
    "the tower written": (write_tower, r"vision_tower\..*fc1\.weight was written to"),
    "the projector written": (write_projector, r"projector\.linear_1\.weight was written to"),
}


@pytest.mark.parametrize("way", ["generate", "forward"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_inside_the_block_is_noticed_before_a_token(
    adapted: Any, processor: LlavaProcessor, open_guard: Guard, name: str, way: str
) -> None:
    guard = refitted(open_guard, adapted.get_base_model())
    inputs = ask(processor, QUESTIONS[:1])
    watch = Watch()
    change, message = CHANGES[name]
    with guard.attach(adapted):
        adapted.generate(**inputs, max_new_tokens=1)
        base = adapted.get_base_model()
        change(adapted)
        with pytest.raises(SafeguardError, match=f"(?:{message}).*nothing is returned"):  # noqa: PT012
            if way == "forward":
                base(**inputs)
            else:
                base.generate(**inputs, max_new_tokens=2, streamer=watch)
    assert not watch.streamed


@pytest.fixture
def native(own: Any, tmp_path: Path) -> Any:
    """With two LoRA adapters that transformers put in, of which `mine` acts; a third is saved."""
    torch.manual_seed(1)
    for name in ("third", "other", "mine"):
        own.add_adapter(KINDS["lora"], name)
        if name == "third":
            own.set_adapter(name)
            own.save_pretrained(tmp_path)
            own.delete_adapter(name)
    own.set_adapter("mine")
    return own.eval()


NATIVE: dict[str, Callable[[Any, Path], Any]] = {
    "add_adapter": lambda m, saved: m.add_adapter(KINDS["lora"], "fourth"),
    "load_adapter": lambda m, saved: m.load_adapter(str(saved), adapter_name="third"),
    "set_adapter": lambda m, saved: m.set_adapter("other"),
    "set_adapter, both": lambda m, saved: m.set_adapter(["mine", "other"]),
    "disable_adapters": lambda m, saved: m.disable_adapters(),
    "delete_adapter": lambda m, saved: m.delete_adapter("mine"),
}


@pytest.mark.parametrize("name", NATIVE)
def test_what_transformers_does_with_adapters_inside_the_block_is_noticed(
    native: Any, processor: LlavaProcessor, open_guard: Guard, tmp_path: Path, name: str
) -> None:
    guard = refitted(open_guard, native)
    assert guard.provenance.adapters == ("mine",)
    inputs = ask(processor, QUESTIONS[:1])
    with guard.attach(native):
        native.generate(**inputs, max_new_tokens=1)
        NATIVE[name](native, tmp_path)
        with pytest.raises(SafeguardError, match=r"adapters of .* were changed|were replaced"):
            native.generate(**inputs, max_new_tokens=2)


def test_an_ia3_adapter_that_is_scaled_inside_the_block_is_noticed(
    own: Any, processor: LlavaProcessor, open_guard: Guard
) -> None:
    wrapped: Any = peft.get_peft_model(own, KINDS["ia3"]).eval()
    guard = refitted(open_guard, own)
    with guard.attach(wrapped):
        first(wrapped).ia3_l["default"].data.mul_(2)
        with pytest.raises(SafeguardError, match="Weights were written to"):
            wrapped.generate(**ask(processor, QUESTIONS[:1]), max_new_tokens=2)


class Meddler(BaseStreamer):
    """Changes a model once its answer has begun, and counts the tokens that come after."""

    def __init__(self, change: Callable[[], Any]) -> None:
        self.change = change
        self.puts = self.later = 0

    def put(self, value: Tensor) -> None:
        self.puts += 1
        self.later += self.puts > 2
        if self.puts == 2:  # the first is the prompt
            self.change()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("response", Response)
@pytest.mark.parametrize("name", ["switched", "merged", "scaled", "switched off"])
def test_adapters_that_move_while_it_answers_stop_it_before_the_next_token(
    adapted: Any, processor: LlavaProcessor, open_guard: Guard, name: str, response: Response
) -> None:
    guard = refitted(open_guard, adapted.get_base_model()).variant(response=response)
    change, message = CHANGES[name]
    meddler = Meddler(lambda: change(adapted))
    with guard.attach(adapted), pytest.raises(SafeguardError, match=message):
        adapted.generate(
            **ask(processor, QUESTIONS[:1]), max_new_tokens=6, min_new_tokens=6, streamer=meddler
        )
    assert (meddler.puts, meddler.later) == (2, 0)


@pytest.mark.parametrize("name", ["weights written", "weights written by way of .data"])
def test_an_answer_during_which_weights_were_written_is_withheld(
    adapted: Any, processor: LlavaProcessor, open_guard: Guard, name: str
) -> None:
    guard = refitted(open_guard, adapted.get_base_model())
    change, message = CHANGES[name]
    meddler = Meddler(lambda: change(adapted))
    with guard.attach(adapted), pytest.raises(SafeguardError, match=f"{message}.*returned"):
        adapted.generate(
            **ask(processor, QUESTIONS[:1]), max_new_tokens=6, min_new_tokens=6, streamer=meddler
        )


def test_a_hot_swap_is_noticed(
    adapted: Any, processor: LlavaProcessor, open_guard: Guard, tmp_path: Path
) -> None:
    adapted.delete_adapter("other")
    guard = refitted(open_guard, adapted.get_base_model())
    with guard.attach(adapted):
        hot_swap(adapted, tmp_path)
        with pytest.raises(SafeguardError, match="after attaching"):
            adapted.generate(**ask(processor, QUESTIONS[:1]), max_new_tokens=2)


def test_adapters_of_each_row_are_refused(
    adapted: Any, processor: LlavaProcessor, open_guard: Guard
) -> None:
    guard = refitted(open_guard, adapted.get_base_model())
    inputs = ask(processor, QUESTIONS[:2])
    with (
        guard.attach(adapted),
        pytest.raises(SafeguardError, match="chosen for each row"),
    ):
        adapted.generate(**inputs, max_new_tokens=2, adapter_names=["default", "other"])


def test_what_is_switched_back_goes_on(
    adapted: Any, processor: LlavaProcessor, open_guard: Guard
) -> None:
    guard = refitted(open_guard, adapted.get_base_model())
    inputs = ask(processor, QUESTIONS[:1])
    with guard.attach(adapted):
        expected = adapted.generate(**inputs, max_new_tokens=4, do_sample=False)
        adapted.set_adapter("other")
        with pytest.raises(SafeguardError, match="active"):
            adapted.generate(**inputs, max_new_tokens=4)
        adapted.set_adapter("default")
        found = adapted.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)
