"""Models by name, each with its processor or tokenizer, placed and ready to answer."""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.extras import require
from vlm_safeguard.loading.checkpoint import check_complete, check_files, why_not
from vlm_safeguard.loading.devices import find_device
from vlm_safeguard.loading.options import Loading
from vlm_safeguard.pocket import FAMILY

if TYPE_CHECKING:
    from transformers import (
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )


def load_model(name: str, loading: Loading | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """(model, processor) of a vision-language model, in evaluation mode.

    Args:
        name: a reference VLM, a checkpoint's folder, or a Hugging Face Hub id.

    Raises:
        SafeguardError: no such model, not a vision-language model, or it cannot be loaded so.
    """
    loading = loading or Loading()
    if name in FAMILY:
        return _reference_vlm(name, loading)
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    config = _read_config(name, loading)
    auto_map = getattr(config, "auto_map", None) or {}
    if (
        type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and "AutoModelForImageTextToText" not in auto_map
    ):
        raise SafeguardError(
            f"'{name}' is not a vision-language model that transformers loads as one "
            f"(AutoModelForImageTextToText); its type is '{config.model_type}'."
        )
    with _explained(name, loading):
        processor = AutoProcessor.from_pretrained(name, **_source(loading))
    if getattr(processor, "image_processor", None) is None:
        raise SafeguardError(
            f"'{name}' has no image processor (preprocessor_config.json or processor_config.json); "
            "copy it from the model that this one was made from."
        )
    return _load(AutoModelForImageTextToText, name, config, loading), processor


def load_language_model(
    name: str, loading: Loading | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a language model that takes no images, in evaluation mode.

    Args:
        name: a checkpoint's folder, or a Hugging Face Hub id.

    Raises:
        SafeguardError: no such model, or it cannot be loaded so.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loading = loading or Loading()
    config = _read_config(name, loading)
    with _explained(name, loading):
        tokenizer = AutoTokenizer.from_pretrained(name, **_source(loading))
    return _load(AutoModelForCausalLM, name, config, loading), tokenizer


def sees(name: str, loading: Loading | None = None) -> bool:
    """Whether the model of this name takes images; False where its config cannot be read."""
    from transformers import AutoConfig

    if name in FAMILY:
        return True
    try:
        config = AutoConfig.from_pretrained(name, **_source(loading or Loading()))
    except (OSError, ValueError, KeyError):
        return False
    return getattr(config, "vision_config", None) is not None


def _reference_vlm(name: str, loading: Loading) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A reference VLM, which is put together in memory from its base and its trained parts."""
    import torch

    from vlm_safeguard import pocket

    for option in ("load_in_4bit", "load_in_8bit", "device_map"):
        if getattr(loading, option):
            raise SafeguardError(
                f"'{name}' is put together in memory, so --{option.replace('_', '-')} cannot be "
                f"used; write it to a folder (vlm-safeguard pocket export FOLDER --model {name}) "
                "and name that."
            )
    for option in ("revision", "trust_remote_code"):
        if getattr(loading, option):
            raise SafeguardError(
                f"'{name}' comes with this package: leave out --{option.replace('_', '-')}."
            )
    device = find_device(loading.device)
    _quieten()
    dtype = getattr(torch, loading.dtype, None)
    if dtype is None and device.type != "cpu":
        dtype = torch.bfloat16
    model, processor = pocket.load(dtype, name=name)
    with _explained(name, loading):
        return model.to(device).eval(), processor


def _load(
    auto_class: Any, name: str, config: PreTrainedConfig, loading: Loading
) -> PreTrainedModel:
    """The model, made where it runs: quantized weights can be neither moved nor cast later."""
    require("cli", "accelerate")
    options = _source(loading) | {"dtype": loading.dtype, "device_map": loading.device_map}
    scratch = None
    if loading.device_map is None:
        options["device_map"] = str(find_device(loading.device))
    else:
        scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options["offload_folder"] = scratch.name  # for what fits neither on GPUs nor in memory
    if loading.load_in_4bit or loading.load_in_8bit:
        options["quantization_config"] = _quantization(name, config, loading)
    with _explained(name, loading):
        model: PreTrainedModel
        model, info = auto_class.from_pretrained(
            name,
            **options,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told in `info`, and refused with its name
            output_loading_info=True,
        )
    check_complete(name, info)
    if scratch is not None:
        weakref.finalize(model, scratch.cleanup)
    return model.eval()


def _quantization(name: str, config: PreTrainedConfig, loading: Loading) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if packed := quantized_by(config):
        option = "--load-in-4bit" if loading.load_in_4bit else "--load-in-8bit"
        raise SafeguardError(f"'{name}' is quantized already ({packed}): leave out {option}.")
    if find_spec("bitsandbytes") is None:
        raise SafeguardError("Weights in 4 or 8 bits need bitsandbytes: pip install bitsandbytes")
    if loading.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    saved = getattr(config, "dtype", None) or config.get_text_config().dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, loading.dtype, saved or torch.bfloat16),
    )


def quantized_by(config: PreTrainedConfig) -> str | None:
    """The method that a checkpoint's weights were quantized by, if any."""
    for part in (config, config.get_text_config()):
        if given := getattr(part, "quantization_config", None):
            facts = given if isinstance(given, dict) else given.to_dict()
            return str(facts.get("quant_method", "an unnamed method"))
    return None


def _read_config(name: str, loading: Loading) -> PreTrainedConfig:
    from transformers import AutoConfig

    _quieten()
    with _explained(name, loading):
        check_files(name, loading)
        return AutoConfig.from_pretrained(name, **_source(loading))


def _source(loading: Loading) -> dict[str, Any]:
    """Which files are read: explicit, as transformers asks on the terminal what is left open."""
    revision = {} if loading.revision is None else {"revision": loading.revision}
    return {"trust_remote_code": loading.trust_remote_code, **revision}


@contextmanager
def _explained(name: str, loading: Loading) -> Iterator[None]:
    """What goes wrong becomes a sentence; loading runs code of many makers, which may raise all."""
    try:
        yield
    except SafeguardError:
        raise
    except Exception as error:
        raise SafeguardError(why_not(name, loading, error)) from error


def _quieten() -> None:
    """Loaders report to people who look at one model; here what matters is raised."""
    from transformers.utils import logging as reports

    reports.set_verbosity_error()
    reports.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else a line for each product
