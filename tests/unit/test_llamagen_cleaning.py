"""The published cleaning of captions, rule by rule."""

import pytest

from gcpo_trl.models.llamagen.cleaning import clean_caption
from gcpo_trl.models.llamagen.processing import LlamaGenProcessor
from gcpo_trl.shapes.llamagen import build_tokenizer


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A Photo of a Cat", "a photo of a cat"),
        ("see https://example.com/a now", "see now"),
        ("<b>bold</b> cat", "bold cat"),
        ("“quoted” cat", '"quoted" cat'),
        ("cat &amp; dog", "cat dog"),
        ("my-very-long-file-name", "my very long file name"),
        ("two-tone red-hot", "two-tone red-hot"),  # three hyphens or fewer stay
        ("free shipping on hats", "on hats"),
        ("jc6640 shoes 1024x768", "shoes"),
        ("wow!!! ... really", "wow!!! really"),
        ("cat#123 @someone", "cat"),
    ],
)
def test_clean_caption(caption, expected):
    assert clean_caption(caption) == expected


def test_captions_are_read_as_written_unless_cleaning_is_asked_for():
    words = "a photo of a red circle https://example.com"
    plain, cleaned = (LlamaGenProcessor(build_tokenizer(), clean_captions=c)(words) for c in (False, True))
    end = plain["input_ids"][0, -1].item()
    assert cleaned["input_ids"][0].tolist() == [*plain["input_ids"][0, :6].tolist(), end]
    assert plain["input_ids"].shape[1] > cleaned["input_ids"].shape[1]
