"""A model's family is found by what its file states; an image model that nobody adapts is not a text model."""

import pytest
from transformers import ChameleonConfig, Emu3Config, JanusConfig, LlamaConfig, Qwen2VLConfig

from gcpo_trl.models.llamagen import LlamaGenConfig
from gcpo_trl.policies import families, family_of


@pytest.mark.parametrize(
    ("config", "family"),
    [(JanusConfig, "janus"), (LlamaGenConfig, "llamagen"), (LlamaConfig, "text"), (Qwen2VLConfig, "text")],
)
def test_a_configuration_has_the_family_that_claims_it(config, family):
    assert family_of(config()) == family
    assert families() == ["janus", "llamagen"]


@pytest.mark.parametrize(("config", "name"), [(Emu3Config, "emu3"), (ChameleonConfig, "chameleon")])
def test_an_image_model_that_nobody_claims_is_an_error_that_names_the_families(config, name):
    with pytest.raises(ValueError, match=f"a '{name}' model holds an image tokenizer.*there are janus, llamagen"):
        family_of(config())
