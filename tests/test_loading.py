"""Loading by name: what reaches `from_pretrained`, and a sentence for each thing that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from support.hub import Repository, serve
from tiny.language_model import language_model, tokenizer_with
from tiny.pocket import make_model
from vlm_safeguard import extras
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.loading import (
    Loading,
    find_device,
    load_guard,
    load_language_model,
    load_model,
    models,
    quantized_by,
    read_guard,
)
from vlm_safeguard.model.backbone import model_inputs
from vlm_safeguard.pocket import base
from vlm_safeguard.policy.gate import GATES

CPU = Loading(device="cpu")
BITS = [Loading(device="cpu", load_in_4bit=True), Loading(device="cpu", load_in_8bit=True)]


@pytest.fixture(scope="session")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def sharded(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, tmp_path: Path
) -> Path:
    folder = tmp_path / "sharded"
    model.save_pretrained(folder, max_shard_size="60KB")
    processor.save_pretrained(folder)
    return folder


def change_json(path: Path, **facts: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def refused(name: Path | str, words: str, loading: Loading = CPU) -> str:
    with pytest.raises(SafeguardError, match=words) as caught:
        load_model(str(name), loading)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def answer(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    inputs = model_inputs(model, processor, ["How to swim"], [noise_image(1)])
    return list(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, -5:])


# --- what is asked for ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float4"}, "no dtype 'float4'; choose one of auto, float32"),
        ({"device_map": "all"}, "no device map 'all'; choose one of auto, balanced"),
        ({"device_map": "cuda:0"}, "or name one device with --device"),
        ({"device_map": "auto", "device": "cpu"}, "leave out --device, or --device-map"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "in 4 bits or in 8, not in both"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SafeguardError, match=words):
        Loading(**options)


class Machine:
    """What `torch.accelerator` says of a machine."""

    def __init__(self, kind: str | None, count: int = 0) -> None:
        self.kind, self.count = kind, count

    def is_available(self) -> bool:
        return self.kind is not None

    def current_accelerator(self) -> torch.device:
        assert self.kind is not None
        return torch.device(self.kind)

    def device_count(self) -> int:
        return self.count


@pytest.mark.parametrize(
    ("machine", "name", "device"),
    [
        (Machine(None), "auto", "cpu"),
        (Machine("cuda", 2), "auto", "cuda"),
        (Machine("xpu", 1), "auto", "xpu"),
        (Machine("mps", 1), "auto", "mps"),
        (Machine("cuda", 2), "cuda:1", "cuda:1"),
        (Machine("cuda", 2), "cpu", "cpu"),
        (Machine(None), "cpu:0", "cpu"),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, machine: Machine, name: str, device: str) -> None:
    monkeypatch.setattr(torch, "accelerator", machine)
    assert str(find_device(name)) == device


@pytest.mark.parametrize(
    ("machine", "name", "there"),
    [
        (Machine(None), "cuda", "sees cpu on"),
        (Machine("cuda", 2), "cuda:7", "sees cpu, cuda:0, cuda:1 on"),
        (Machine("xpu", 1), "cuda", "sees cpu, xpu:0 on"),
        (Machine("cuda", 1), "meta", "sees cpu, cuda:0 on"),
        (Machine("cuda", 1), "nowhere", "sees cpu, cuda:0 on"),
        (Machine("cuda", 1), "cuda:-1", "sees cpu, cuda:0 on"),
        (Machine(None), "", "sees cpu on"),
    ],
)
def test_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, name: str, there: str
) -> None:
    monkeypatch.setattr(torch, "accelerator", machine)
    with pytest.raises(SafeguardError, match=f"'{name}' cannot be used: .*{there}"):
        find_device(name)


class StoppedError(Exception):
    """Instead of a model, once it is known what was asked for."""


@pytest.fixture
def bitsandbytes_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as what comes before `from_pretrained` can tell."""
    monkeypatch.setattr(models, "find_spec", lambda _: True)


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What `AutoModelForImageTextToText.from_pretrained` is given."""
    given: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> None:
        given.update(options, name=name)
        raise StoppedError("seen")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    yield given
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("loading", "expected"),
    [
        (Loading(), {"device_map": "cuda", "dtype": "auto", "trust_remote_code": False}),
        (CPU, {"device_map": "cpu"}),
        (Loading(device="cuda:1", dtype="bfloat16"), {"device_map": "cuda:1", "dtype": "bfloat16"}),
        (Loading(device_map="auto"), {"device_map": "auto"}),
        (Loading(device_map="balanced"), {"device_map": "balanced"}),
        (Loading(trust_remote_code=True), {"trust_remote_code": True}),
    ],
)
def test_what_reaches_from_pretrained(
    monkeypatch: pytest.MonkeyPatch,
    saved: Path,
    arrived: dict[str, Any],
    loading: Loading,
    expected: dict[str, Any],
) -> None:
    monkeypatch.setattr(torch, "accelerator", Machine("cuda", 2))
    refused(saved, "could not be loaded: seen", loading)
    assert {name: arrived[name] for name in expected} == expected
    assert arrived["name"] == str(saved)
    assert "quantization_config" not in arrived
    assert "revision" not in arrived
    assert ("offload_folder" in arrived) == (loading.device_map is not None)


@pytest.mark.parametrize(
    ("dtype", "computed"), [("auto", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")]
)
def test_4_bits_are_nf4_and_computed_in_the_models_own_type(
    bitsandbytes_is_there: None,
    saved: Path,
    arrived: dict[str, Any],
    dtype: str,
    computed: str,
) -> None:
    refused(saved, "seen", Loading(dtype=dtype, device="cpu", load_in_4bit=True))
    packing = arrived["quantization_config"]
    assert packing.load_in_4bit
    assert not packing.load_in_8bit
    assert packing.bnb_4bit_quant_type == "nf4"
    assert packing.bnb_4bit_compute_dtype == getattr(torch, computed)
    assert arrived["device_map"] == "cpu"


def test_8_bits(bitsandbytes_is_there: None, saved: Path, arrived: dict[str, Any]) -> None:
    refused(saved, "seen", BITS[1])
    packing = arrived["quantization_config"]
    assert (packing.load_in_4bit, packing.load_in_8bit) == (False, True)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_a_loaded_model_answers(saved: Path, processor: LlavaProcessor, dtype: str) -> None:
    model, loaded = load_model(str(saved), Loading(device="cpu", dtype=dtype))
    assert not model.training
    assert model.dtype == getattr(torch, dtype, torch.float32)
    assert model.device.type == "cpu"
    assert len(answer(model, loaded)) == 5


# --- what a machine cannot do ---


@pytest.mark.parametrize(
    ("loading", "advice"),
    [
        (Loading(), "Try --load-in-4bit or --device-map auto or --dtype bfloat16"),
        (Loading(dtype="bfloat16", load_in_8bit=True), "Try --device-map auto."),
        (
            Loading(dtype="float16", device_map="auto", load_in_4bit=True),
            "Take a smaller model",
        ),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
    bitsandbytes_is_there: None,
    saved: Path,
    error: Exception,
    loading: Loading,
    advice: str,
) -> None:
    def from_pretrained(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    refused(saved, f"does not fit into the memory there is. {advice}", loading)


def test_quantized_weights_that_do_not_fit_the_gpus(
    monkeypatch: pytest.MonkeyPatch, bitsandbytes_is_there: None, saved: Path
) -> None:
    # transformers' own words for it, which need a GPU to be raised
    said = "Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM"

    def from_pretrained(*_: Any, **__: Any) -> None:
        raise ValueError(said)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    source = Path(transformers.__file__).parent / "quantizers" / "quantizer_bnb_4bit.py"
    assert said.partition(".")[0] in source.read_text("utf-8")
    loading = Loading(device_map="auto", load_in_4bit=True)
    refused(saved, "does not fit into the GPUs, and weights in 4 or 8 bits cannot", loading)


def test_accelerate_is_missing(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    refused(saved, r"needs accelerate: pip install 'vlm-safeguard\[cli\]'", Loading())


@pytest.mark.parametrize("loading", BITS)
def test_bitsandbytes_is_missing(
    monkeypatch: pytest.MonkeyPatch, saved: Path, loading: Loading
) -> None:
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    refused(saved, "pip install bitsandbytes", loading)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
@pytest.mark.parametrize("loading", BITS)
def test_what_is_quantized_is_not_quantized_again(
    copy: Path, method: str, loading: Loading
) -> None:
    packing: dict[str, Any] = {"quant_method": method, "bits": 4}
    if method == "bitsandbytes":
        packing |= {"load_in_4bit": True}
    change_json(copy / "config.json", quantization_config=packing)
    option = "4bit" if loading.load_in_4bit else "8bit"
    refused(copy, rf"quantized already \({method}\): leave out --load-in-{option}", loading)


@pytest.mark.parametrize("method", ["gptq", "awq", "aqlm", "hqq"])
def test_the_package_that_a_quantized_checkpoint_needs_is_named(copy: Path, method: str) -> None:
    packing = {"quant_method": method, "bits": 4, "group_size": 32}
    change_json(copy / "config.json", quantization_config=packing)
    refused(copy, "could not be loaded: .*(install|requires)")


# --- what is no whole model ---


def test_no_such_model() -> None:
    refused("/nowhere/model", "There is no model '/nowhere/model'")


def test_a_folder_has_no_revisions(saved: Path) -> None:
    refused(saved, "is a folder, which has no revisions", Loading(revision="main"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_is_no_checkpoint(saved: Path, name: str) -> None:
    refused(saved / name, "is a file; name the folder")


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "llava-Q4_K_M.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "llava-Q4_K_M.gguf", "is a GGUF file")
    refused("someone/llava-GGUF/llava-Q4_K_M.gguf", "is a GGUF file")
    refused(tmp_path, "holds GGUF files only")


def test_an_adapter(tmp_path: Path) -> None:
    facts = {"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "a PEFT adapter of llava-hf/llava-1.5-7b-hf. Merge it")


def test_an_adapter_inside_a_model_is_not_loaded_unseen(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    refused(copy, "a PEFT adapter. Merge it")


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(copy, "holds no weights")


def test_pickles_are_not_read(copy: Path, model: LlavaForConditionalGeneration) -> None:
    (copy / "model.safetensors").unlink()
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    refused(copy, "pickled weights only")


def test_no_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    refused(copy, "has no config.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "unheard-of"}'])
def test_a_config_that_says_nothing(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    refused(copy, "could not be loaded")


def test_a_shard_is_missing(sharded: Path, model: LlavaForConditionalGeneration) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    loaded, _ = load_model(str(sharded), CPU)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    shards[1].unlink()
    refused(sharded, f"1 of its {len(shards)} files of weights are missing, .*{shards[1].name}")


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", None])
def test_a_file_of_weights_is_damaged(copy: Path, content: bytes | None) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if content is None else content)
    refused(copy, "damaged or incomplete file of weights")


def test_an_index_that_cannot_be_read(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{}")
    refused(sharded, "index.json cannot be read")


def test_weights_that_are_not_there_are_not_made_up(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    name = next(each for each in sorted(weights) if "mlp.up_proj" in each)
    del weights[name]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    refused(copy, "lacks 1 weights of the model .*mlp.up_proj")


def test_weights_of_another_shape(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 48
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, r"weights of another shape .* is \(\d+, \d+\), not \(\d+, \d+\)")


def test_a_text_only_model(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(None)
    language_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refused(tmp_path, "is not a vision-language model .* type is 'llama'")
    loaded, read = load_language_model(str(tmp_path), CPU)
    assert not loaded.training
    assert read("How to swim")["input_ids"] == tokenizer("How to swim")["input_ids"]
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SafeguardError, match=r"lacks 1 weights .* model\.norm\.weight"):
        load_language_model(str(tmp_path), CPU)


def test_a_model_without_its_image_processor(copy: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (copy / name).unlink(missing_ok=True)
    refused(copy, "image processor")


CODE = """
from pathlib import Path
from transformers import LlavaConfig
Path({marker!r}).touch()
class OurConfig(LlavaConfig):
    model_type = "our-own"
"""


def test_code_of_a_checkpoint_runs_only_where_it_is_allowed(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "ran"
    (copy / "ours.py").write_text(CODE.format(marker=str(marker)))
    change_json(
        copy / "config.json", model_type="our-own", auto_map={"AutoConfig": "ours.OurConfig"}
    )
    refused(copy, "its own Python code, .* then add --trust-remote-code")
    assert not marker.exists()
    refused(copy, "type is 'our-own'", Loading(device="cpu", trust_remote_code=True))
    assert marker.exists()


@pytest.mark.parametrize("name", ["pocket", "coder"])
@pytest.mark.parametrize(
    ("loading", "words"),
    [
        (Loading(load_in_4bit=True), "--load-in-4bit cannot be used; write it to a folder"),
        (Loading(load_in_8bit=True), "--load-in-8bit cannot be used; write it to a folder"),
        (Loading(device_map="auto"), "--device-map cannot be used; write it to a folder"),
        (Loading(revision="v1"), "comes with this package: leave out --revision"),
        (Loading(trust_remote_code=True), "leave out --trust-remote-code"),
        (Loading(device="cuda:99"), "'cuda:99' cannot be used"),
    ],
)
def test_reference_vlms_take_what_makes_sense_for_them(
    name: str, loading: Loading, words: str
) -> None:
    refused(name, words, loading)


# --- the Hub ---


@pytest.fixture
def hub(
    saved: Path,
    guard: Guard,
    processor: LlavaProcessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """Repositories: someone/llava (main, v2), someone/gated, someone/guard (main), …"""
    second, adapter, pickled = (tmp_path / name for name in ("v2", "adapter", "pickled"))
    make_model(processor, seed=7).save_pretrained(second)
    processor.save_pretrained(second)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/llava"}')
    shutil.copytree(saved, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    guard.save_pretrained(tmp_path / "guard")
    repositories = {
        "someone/llava": Repository({"main": saved, "v2": second}),
        "someone/gated": Repository({"main": saved}, gated=True),
        "someone/adapter": Repository({"main": adapter}),
        "someone/pickled": Repository({"main": pickled}),
        "someone/guard": Repository({"main": saved, "v1": tmp_path / "guard"}),
    }
    with serve(repositories) as address:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")  # asks a service of the real Hub
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield


def test_a_revision_is_the_one_that_is_loaded(
    hub: None, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    for revision, expected in ((None, model), ("v2", make_model(processor, seed=7))):
        loaded, _ = load_model("someone/llava", Loading(device="cpu", revision=revision))
        for name, weight in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("someone/llava", "v9", "has no revision 'v9' on the Hugging Face Hub"),
        ("someone/nothing", None, "There is no model 'someone/nothing': it is not a folder"),
        ("someone/gated", None, "is gated: accept its terms at .*someone/gated, then log in"),
        ("someone/adapter", None, "holds a PEFT adapter of someone/llava"),
        ("someone/pickled", None, "safetensors"),
    ],
)
def test_what_the_hub_does_not_give(hub: None, name: str, revision: str | None, words: str) -> None:
    refused(name, words, Loading(device="cpu", revision=revision))


def test_the_hub_cannot_be_reached(hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(
        "someone/llava", "There is no model 'someone/llava' on this machine, and the .* reached"
    )
    revision = Loading(device="cpu", revision="v2")
    refused("someone/llava", "'someone/llava' at revision 'v2' on this machine", revision)


def test_a_guard_of_a_revision(hub: None, guard: Guard) -> None:
    found = read_guard("someone/guard@v1")
    assert torch.equal(found.policy.directions.vectors, guard.policy.directions.vectors)
    with pytest.raises(SafeguardError, match="'someone/guard' has no revision 'v9'"):
        read_guard("someone/guard@v9")
    with pytest.raises(SafeguardError, match="There is no guard 'someone/none'"):
        read_guard("someone/none")
    with pytest.raises(SafeguardError, match="guard"):
        read_guard("someone/guard")  # a model


# --- guards on what was loaded so ---


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the device maps of transformers believe in this many bytes of memory."""
    from transformers.integrations import accelerate

    def limit(size: int) -> None:
        monkeypatch.setattr(accelerate, "accelerate_max_memory", lambda *_: {"cpu": size})

    return limit


@pytest.mark.parametrize("device_map", ["auto", "sequential"])
def test_a_model_spread_over_memory_and_disk_is_guarded_the_same(
    saved: Path,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    open_guard: Guard,
    little_memory: Callable[[int], None],
    device_map: str,
) -> None:
    with open_guard.attach(model):
        expected = answer(model, processor)
    assert expected != answer(model, processor)
    size = sum(weight.nbytes for weight in model.parameters())
    little_memory(size // 2)
    spread, _ = load_model(str(saved), Loading(device_map=device_map))
    assert {weight.is_meta for weight in spread.parameters()} == {True, False}  # meta: on disk
    assert answer(spread, processor) == answer(model, processor)
    with open_guard.attach(spread):
        assert answer(spread, processor) == expected
        assert open_guard.receipts[0].guarded


@pytest.mark.parametrize("loading", BITS)
@pytest.mark.parametrize("again", [False, True], ids=["now", "saved so"])
def test_packed_weights_are_fitted_and_guarded(
    saved: Path, processor: LlavaProcessor, tmp_path: Path, loading: Loading, again: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    model, _ = load_model(str(saved), loading)
    if again:
        model.save_pretrained(tmp_path / "packed")
        processor.save_pretrained(tmp_path / "packed")
        model, _ = load_model(str(tmp_path / "packed"), CPU)
    assert quantized_by(model.config) == "bitsandbytes"
    packed = model.get_submodule("model.language_model.layers.0.mlp.up_proj").weight
    assert packed.dtype in (torch.uint8, torch.int8)
    questions = [f"How to count to {i}" for i in range(9)]
    guard = Guard.fit(
        model, processor, rank=4, budget=0.2, calibration=questions, gate="calibrated"
    )
    free = answer(model, processor)
    edits = guard.variant(layers=(1, 2, 3, 4), gate=GATES["open"])
    with edits.attach(model):
        answer(model, processor)
        assert edits.receipts[0].guarded
    assert answer(model, processor) == free


def test_a_kept_guard_is_of_its_models_dtype(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    guard: Guard,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
) -> None:
    fitted = []

    def fit(model: Any, processor: Any) -> Guard:
        fitted.append(model.dtype)
        return guard

    monkeypatch.setattr(Guard, "fit", fit)
    monkeypatch.setenv("VLM_SAFEGUARD_CACHE", str(tmp_path))
    assert base.cache_folder() == tmp_path
    halved = make_model(processor).to(torch.bfloat16)
    for each in (model, halved, model, halved):
        load_guard(None, "pocket", each, processor)
    assert fitted == [torch.float32, torch.bfloat16]
