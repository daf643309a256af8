"""Captions as T5 reads them for LlamaGen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast, ProcessorMixin

from .cleaning import clean_caption


class LlamaGenProcessor(ProcessorMixin):
    """A text encoder's tokenizer with LlamaGen's length and, for reproduction, its cleaning of captions.

    max_length: tokens of a caption, the rest is cut. clean_captions: the published cleaning, twice as there; else a
    caption is read as written. For a class-conditional model the tokenizer's words are class numbers.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        max_length: int = 120,
        clean_captions: bool = False,
        **kwargs: Any,
    ) -> None:
        self.max_length = max_length
        self.clean_captions = clean_captions
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, text: str | Sequence[str], padding_side: str = "left", **kwargs: Any) -> BatchEncoding:
        """``input_ids`` and ``attention_mask`` of captions, padded to the longest of them."""
        captions = [text] if isinstance(text, str) else list(text)
        if self.clean_captions:
            captions = [clean_caption(clean_caption(caption)) for caption in captions]
        settings = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        return self.tokenizer(captions, padding_side=padding_side, **settings | kwargs)


def class_tokenizer(num_classes: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the class numbers "0" to "num_classes - 1", each its own id."""
    words = {str(index): index for index in range(num_classes)} | {"<pad>": num_classes}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>")
