"""What this project uses of transformers, typed; every other name of it is `Any`.

Its own annotations take mypy minutes to read, and leave out what is asked most (attributes of
tokenizers, the modules of a LLaVA). `make lint` compares this file with the installed release.
"""

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Self, overload

import torch
from PIL.Image import Image
from torch import Tensor, nn

def __getattr__(name: str) -> Any: ...

class PreTrainedConfig:
    model_type: str
    _name_or_path: str
    # Every family's config has fields of its own.
    def __init__(self, **fields: Any) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...
    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig: ...
    def to_dict(self) -> dict[str, Any]: ...

class GenerationConfig:
    def __init__(self, **fields: Any) -> None: ...
    # Its fields are whatever `generate` takes.
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...

class GenerationMixin:
    generation_config: GenerationConfig
    # (rows, tokens) ids, or an output that holds them where `return_dict_in_generate` is set
    def generate(self, *inputs: Any, **options: Any) -> Any: ...
    def generate_batch(self, inputs: Sequence[Sequence[int]], **options: Any) -> Any: ...
    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, **inputs: Any
    ) -> dict[str, Any]: ...

# The library's own does not generate, and every model that is guarded does.
class PreTrainedModel(nn.Module, GenerationMixin):
    config: PreTrainedConfig
    def __init__(self, config: PreTrainedConfig) -> None: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    name_or_path: str
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **options: Any
    ) -> Self: ...
    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **options: Any) -> Self: ...
    def save_pretrained(self, save_directory: str | PathLike[str], **options: Any) -> None: ...
    def post_init(self) -> None: ...
    def get_input_embeddings(self) -> nn.Embedding: ...
    def get_output_embeddings(self) -> nn.Linear: ...
    def get_decoder(self) -> nn.Module: ...
    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]: ...
    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding: ...

class Cache:
    def get_seq_length(self, layer_idx: int = 0) -> int: ...

class DynamicCache(Cache):
    def __init__(self, **options: Any) -> None: ...

class StaticCache(Cache):
    def __init__(self, config: PreTrainedConfig, max_cache_len: int, **options: Any) -> None: ...

class LogitsProcessor:
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor: ...

class LogitsProcessorList(list[LogitsProcessor]):
    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor: ...

class StoppingCriteria:
    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor: ...

class StoppingCriteriaList(list[StoppingCriteria]):
    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor: ...

class BatchFeature(UserDict[str, Any]):
    # its values by name
    def __getattr__(self, name: str) -> Any: ...
    def __init__(
        self, data: dict[str, Any] | None = None, tensor_type: str | None = None
    ) -> None: ...
    def to(self, *args: Any, **kwargs: Any) -> BatchFeature: ...

class BatchEncoding(UserDict[str, Any]):
    def __getattr__(self, name: str) -> Any: ...
    def __init__(self, data: dict[str, Any] | None = None) -> None: ...
    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> BatchEncoding: ...

class AddedToken:
    content: str
    special: bool
    def __init__(self, content: str, *, special: bool = False, normalized: bool = True) -> None: ...

class PreTrainedTokenizerBase:
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    padding_side: Literal["left", "right"]
    chat_template: str | dict[str, str] | None
    all_special_ids: list[int]
    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]: ...
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **options: Any
    ) -> Self: ...
    def save_pretrained(
        self, save_directory: str | PathLike[str], **options: Any
    ) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def __call__(
        self, text: str | Sequence[str] | None = None, **options: Any
    ) -> BatchEncoding: ...
    def encode(
        self, text: str, *, add_special_tokens: bool = True, **options: Any
    ) -> list[int]: ...
    # one text of a row of ids
    def decode(
        self,
        token_ids: int | Sequence[int] | Tensor,
        skip_special_tokens: bool = False,
        **options: Any,
    ) -> str: ...
    def batch_decode(
        self,
        sequences: Sequence[Sequence[int]] | Tensor,
        skip_special_tokens: bool = False,
        **options: Any,
    ) -> list[str]: ...
    def add_tokens(
        self,
        new_tokens: str | AddedToken | Sequence[str | AddedToken],
        special_tokens: bool = False,
    ) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...
    def convert_ids_to_tokens(
        self, ids: list[int], skip_special_tokens: bool = False
    ) -> list[str]: ...
    def get_vocab(self) -> dict[str, int]: ...
    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], **options: Any
    ) -> Any: ...

class PreTrainedTokenizerFast(PreTrainedTokenizerBase):
    def __init__(self, **parts: Any) -> None: ...
    # tokens that were named when it was made, and their ids
    def __getattr__(self, name: str) -> Any: ...
    @property
    def backend_tokenizer(self) -> Any: ...

class ProcessorMixin:
    chat_template: str | dict[str, str] | None
    def __init__(self, *args: Any, **parts: Any) -> None: ...
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **options: Any
    ) -> Self: ...
    def save_pretrained(self, save_directory: str | PathLike[str], **options: Any) -> list[str]: ...
    def __call__(
        self,
        images: Sequence[Image] | Sequence[Sequence[Image]] | Image | None = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **options: Any,
    ) -> BatchFeature: ...
    # the text of one conversation: it is asked for no tokens
    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **options: Any,
    ) -> str: ...
    def decode(
        self,
        token_ids: int | Sequence[int] | Tensor,
        skip_special_tokens: bool = False,
        **options: Any,
    ) -> str: ...
    def batch_decode(
        self,
        sequences: Sequence[Sequence[int]] | Tensor,
        skip_special_tokens: bool = False,
        **options: Any,
    ) -> list[str]: ...
    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any: ...

class AutoConfig:
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **options: Any
    ) -> PreTrainedConfig: ...

class AutoTokenizer:
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **options: Any
    ) -> PreTrainedTokenizerBase: ...

class AutoProcessor:
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **options: Any
    ) -> ProcessorMixin: ...

class AutoModelForImageTextToText:
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **options: Any
    ) -> PreTrainedModel: ...

class AutoModelForCausalLM:
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **options: Any
    ) -> PreTrainedModel: ...
    @classmethod
    def from_config(cls, config: PreTrainedConfig, **options: Any) -> PreTrainedModel: ...

class LlamaConfig(PreTrainedConfig): ...
class CLIPVisionConfig(PreTrainedConfig): ...

class CLIPVisionModel(PreTrainedModel):
    def forward(self, pixel_values: Tensor, **options: Any) -> Any: ...

class LlamaForCausalLM(PreTrainedModel):
    model: Any
    lm_head: nn.Linear

class LlavaConfig(PreTrainedConfig):
    vision_config: CLIPVisionConfig
    text_config: PreTrainedConfig
    image_token_id: int
    image_seq_length: int

class LlavaForConditionalGeneration(PreTrainedModel):
    config: LlavaConfig
    # its tower, projector and language model
    model: Any
    lm_head: nn.Linear

class LlavaProcessor(ProcessorMixin):
    tokenizer: PreTrainedTokenizerFast
    image_processor: Any
    patch_size: int
    image_token: str
    image_token_id: int
