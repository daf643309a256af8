"""Every mistake in the settings is an error before any weight is loaded, and says what was seen and what to write."""

import dataclasses
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, CLIPConfig, LlamaConfig
from trl import GRPOConfig

from gcpo_trl.config import GCPOConfig
from gcpo_trl.trainer.checks import check_dataset, check_image_settings, check_text_only, load_config
from gcpo_trl.validation import first_non_finite


def config(**settings):
    return GCPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[], **settings)


@pytest.fixture(scope="module")
def janus(tiny_janus):
    return AutoConfig.from_pretrained(tiny_janus)


# GCPOConfig


def test_the_defaults_are_the_released_settings():
    args = config()
    assert args.select_strategies == ["initial", "entropy_gradient", "similarity"]
    assert (args.select_fraction, args.select_combine, args.select_window) == (0.1, "disjoint", [0.1, 0.9])
    assert (args.weight_form, args.weight_clip, args.weight_detach) == ("exp", 0.5, True)
    assert (args.rollout_guidance_scale, args.select_entropy_from) == (5.0, "guided")
    assert args.needs_weight and not args.selects_everything


def test_a_machine_without_bf16_trains_in_fp32(monkeypatch):
    # TRL asks for bf16 unless told otherwise, and transformers refuses it here.
    monkeypatch.setattr("gcpo_trl.config.gcpo.is_torch_bf16_gpu_available", lambda: False)
    assert GCPOConfig(output_dir="unused", report_to=[]).bf16 is False
    assert GCPOConfig(output_dir="unused", report_to=[], use_cpu=True).bf16 is True  # TRL's, on a CPU on purpose


def test_every_setting_has_its_help_and_a_room():
    ours = [f for f in dataclasses.fields(GCPOConfig) if f.name not in GRPOConfig.__dataclass_fields__]
    assert len(ours) >= 12
    for setting in ours:
        assert setting.name.split("_")[0] in {"select", "weight", "divergence", "rollout", "reward", "train", "log"}
        assert len(setting.metadata["help"]) > 40, f"{setting.name} does not explain itself"


MISTAKES = [
    ({"select_strategies": []}, ["select_strategies is empty", "'everything'"]),
    ({"select_strategies": "everything"}, ["select_strategies='everything'", "write one"]),
    ({"select_strategies": ["entropy_gradiant"]}, ["'entropy_gradiant'", "did you mean 'entropy_gradient'"]),
    ({"select_strategies": ["my_missing_package:select"]}, ["my_missing_package:select"]),
    ({"select_strategies": ["initial", "initial"]}, ["['initial', 'initial']", "once"]),
    ({"select_strategies": ["everything"], "select_complement": True}, ["select_complement=True", "no token"]),
    ({"select_fraction": 0.0}, ["select_fraction=0.0", "(0, 1]"]),
    ({"select_fraction": 1.2}, ["select_fraction=1.2", "(0, 1]"]),
    ({"select_fraction": -0.1}, ["select_fraction=-0.1"]),
    ({"select_fraction": float("nan")}, ["select_fraction=nan", "(0, 1]"]),
    ({"select_fraction": [0.1, 0.1]}, ["select_fraction=[0.1, 0.1]", "2 shares for 3 strategies", "one each"]),
    ({"select_fraction": [0.1, 0.0, 0.1]}, ["select_fraction=[0.1, 0.0, 0.1]", "(0, 1]"]),
    ({"select_fraction": [0.5, 0.4, 0.3]}, ["1.2 of all tokens"]),
    ({"select_fraction": 0.4}, ["select_fraction=0.4", "3 strategies", "1.2", "0.3333", "select_combine='union'"]),
    ({"select_combine": "plus"}, ["select_combine='plus'", "disjoint, union"]),
    ({"select_window": [0.9, 0.1]}, ["select_window=[0.9, 0.1]", "[0.1, 0.9]"]),
    ({"select_window": [0.1]}, ["select_window=[0.1]", "two shares"]),
    ({"select_window": [0.0, 1.5]}, ["select_window=[0.0, 1.5]"]),
    ({"select_entropy_from": "policy"}, ["select_entropy_from='policy'", "guided, conditional"]),
    ({"select_similarity_space": "clip"}, ["select_similarity_space='clip'", "aligner, codebook"]),
    ({"weight_form": "log"}, ["weight_form='log'", "exp, linear, none, stage"]),
    ({"weight_clip": 0.0}, ["weight_clip=0.0", "positive", "0.5"]),
    ({"weight_clip": float("nan")}, ["weight_clip=nan"]),
    ({"divergence": "js", "beta": 0.1}, ["divergence='js'", "k3, reverse_kl, forward_kl, jensen_shannon, alpha"]),
    ({"divergence_match": "beta", "beta": 0.1}, ["divergence_match='beta'", "curvature, value"]),
    ({"divergence_gradient": "path", "beta": 0.1}, ["divergence_gradient='path'", "pathwise, unbiased"]),
    ({"divergence_on": "drawn", "beta": 0.1}, ["divergence_on='drawn'", "critical, all"]),
    ({"divergence_weight": "exp", "beta": 0.1}, ["divergence_weight='exp'", "none, stage"]),
    ({"divergence": "alpha", "divergence_alpha": 1.5, "beta": 0.1}, ["divergence_alpha=1.5", "[0, 1]", "forward_kl"]),
    ({"divergence": "alpha", "divergence_alpha": float("nan"), "beta": 0.1}, ["divergence_alpha=nan"]),
    ({"divergence_alpha": 0.3, "beta": 0.1}, ["divergence_alpha=0.3", "divergence='k3'", "divergence='alpha'"]),
    ({"divergence": "forward_kl"}, ["divergence='forward_kl'", "no effect", "beta=0", "0.01"]),
    ({"divergence_on": "all"}, ["divergence_on='all'", "no effect", "beta=0"]),
    ({"divergence_weight": "stage", "divergence_match": "value"}, ["divergence_weight='stage'", "'value'", "beta=0"]),
    ({"divergence_gradient": "pathwise", "beta": 0.1}, ["'pathwise'", "set use_bias_correction_kl=False"]),
    ({"rollout_guidance_scale": -1.0}, ["rollout_guidance_scale=-1.0", "1 switches"]),
    ({"rollout_guidance_scale": float("inf")}, ["rollout_guidance_scale=inf"]),
    ({"log_images": -1}, ["log_images=-1", ">= 0", "0 for none"]),
    ({"log_images_count": 0}, ["log_images_count=0", ">= 1", "such as 8"]),
    ({"log_images_size": 0}, ["log_images_size=0", ">= 1", "pixels"]),
    ({"rollout_backend": "fast"}, ["rollout_backend='fast'", "auto, graph, eager, reference"]),
    ({"rollout_backend": "graph"}, ["rollout_backend='graph'", "use_cpu=True", "'auto'"]),
    ({"rollout_batch_size": -2}, ["rollout_batch_size=-2", "0 samples all"]),
    # G must divide the batch: TRL says so.
    ({"num_generations": 3, "per_device_train_batch_size": 8}, ["8", "3", "divisible"]),
]


@pytest.mark.parametrize(("settings", "words"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_wrong_setting_is_refused(settings, words):
    with pytest.raises(ValueError) as error:
        config(**settings)
    assert [word for word in words if word not in str(error.value)] == []


def test_thirds_are_not_too_much():
    # 3 x 1/3 sums to 1 exactly for the user, whatever floats make of it.
    assert config(select_fraction=1 / 3).select_fraction == 1 / 3
    assert config(select_fraction=[0.2]).select_fraction == 0.2
    assert config(select_fraction=[0.5, 0.3, 0.2]).select_fraction == [0.5, 0.3, 0.2]
    assert config(select_fraction=0.9, select_combine="union").select_combine == "union"


def test_a_strategy_may_come_from_outside():
    outside = "gcpo_trl.objective.selection.random:select"
    assert config(select_strategies=[outside]).select_strategies == [outside]


def test_literal_eq_7_warns_that_it_is_zero_at_the_start():
    with pytest.warns(UserWarning, match="zero for every token.*Use 'exp'"):
        config(weight_form="linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(weight_form="exp")


def test_everything_without_weight_is_plain_grpo():
    assert config(select_strategies=["everything"]).selects_everything
    assert not config(select_strategies=["initial"], select_complement=True).selects_everything
    assert not config(weight_form="none").needs_weight


def test_stage_needs_no_reference_and_the_default_divergence_is_trls():
    stage = config(weight_form="stage")
    assert stage.needs_opposing and not stage.needs_weight
    assert config(divergence_weight="stage", beta=0.1).needs_opposing and not config().needs_opposing
    assert not config(beta=0.1).own_divergence and not config(beta=0.1, divergence_match="value").own_divergence
    for changes in ({"divergence": "reverse_kl"}, {"divergence_on": "all"}, {"divergence_gradient": "unbiased"}):
        assert config(beta=0.1, **changes).own_divergence, changes
    assert config(beta=0.1, divergence_gradient="pathwise", use_bias_correction_kl=False).own_divergence


def test_a_plain_config_keeps_its_settings_and_trains_everything():
    plain = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, beta=0.3, temperature=0.7, report_to=[])
    args = GCPOConfig.plain(plain)
    assert isinstance(args, GCPOConfig) and type(plain) is GRPOConfig
    assert args.selects_everything and not args.needs_weight
    for setting in dataclasses.fields(GRPOConfig):
        assert getattr(args, setting.name) == getattr(plain, setting.name), setting.name
    assert args.rollout_guidance_scale == 5.0 and args.train_modules is None
    # its lists are its own
    assert GCPOConfig.plain(plain).select_window is not GCPOConfig.plain(plain).select_window
    assert args.to_dict()["select_strategies"] == ["everything"]


@pytest.mark.parametrize(("fraction", "tokens", "enough"), [(0.01, 81, "0.0123"), (0.001, 576, "0.0017")])
def test_a_fraction_that_keeps_no_token_is_refused(fraction, tokens, enough):
    args = config(select_fraction=fraction)
    with pytest.raises(ValueError, match=rf"select_fraction={fraction} keeps 0 of {tokens} tokens.*{enough}"):
        args.check_tokens(tokens)


def test_a_fraction_that_keeps_one_token_is_enough():
    config(select_fraction=1 / 81).check_tokens(81)
    config(select_fraction=0.001, select_strategies=["everything"]).check_tokens(81)


# checks


IMAGE_MISTAKES = [
    ({"use_vllm": True}, ["use_vllm=True", "janus", "set it to False"]),
    ({"use_transformers_continuous_batching": True}, ["use_transformers_continuous_batching=True", "False"]),
    ({"mask_truncated_completions": True}, ["mask_truncated_completions=True", "set it to False"]),
    ({"pad_to_multiple_of": 8}, ["pad_to_multiple_of=8", "None"]),
    ({"cast_lm_head_to_fp32": True}, ["cast_lm_head_to_fp32=True", "False"]),
    ({"min_p": 0.1}, ["min_p=0.1", "top_p"]),
    ({"repetition_penalty": 1.1}, ["repetition_penalty=1.1", "leave it at 1.0"]),
    ({"generation_kwargs": {"num_beams": 2}}, ["generation_kwargs", "None"]),
    ({"select_fraction": 0.01}, ["select_fraction=0.01", "0 of 81", "0.0123"]),
]


@pytest.mark.parametrize(("settings", "words"), IMAGE_MISTAKES, ids=lambda value: str(value)[:40])
def test_a_setting_without_meaning_for_images_is_refused(janus, settings, words):
    args = config()
    vars(args).update(settings)
    with pytest.raises(ValueError) as error:
        check_image_settings(args, janus)
    assert [word for word in words if word not in str(error.value)] == []


def test_the_default_settings_suit_images(janus):
    check_image_settings(config(), janus)


def test_a_token_count_without_a_grid_is_refused(tiny_janus):
    crooked = AutoConfig.from_pretrained(tiny_janus)
    crooked.vision_config.num_image_tokens = 80
    with pytest.raises(ValueError, match=r"80 image tokens .* 9x9 grid"):
        check_image_settings(config(), crooked)


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_what_only_conversations_have_is_refused_for_images(name):
    with pytest.raises(ValueError, match=f"{name} is for text models"):
        check_text_only(**{"tools": None, "rollout_func": None, name: [len]})
    check_text_only(tools=None, rollout_func=None)


def test_datasets_with_the_wrong_columns_are_refused():
    with pytest.raises(ValueError, match=r"columns \['caption'\] but no 'prompt'; rename"):
        check_dataset(Dataset.from_dict({"caption": ["a"]}))
    for column in ("image", "images"):
        with pytest.raises(ValueError, match=f"column '{column}'.*'reference_image'"):
            check_dataset(Dataset.from_dict({"prompt": ["a"], column: ["b"]}))
    check_dataset(Dataset.from_dict({"prompt": ["a"], "metadata": ["{}"]}))
    check_dataset(None)
    check_dataset(SimpleNamespace(column_names=None))  # a stream does not know its columns yet


def test_something_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="model is a dict; pass a path, a hub id or a transformers model"):
        load_config({})
    CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a CLIPModel, which generates nothing; give a Janus"):
        load_config(str(tmp_path))
    with pytest.raises(OSError, match="no_such_folder"):
        load_config("./no_such_folder")
    # code of a model's own may call its class as it likes
    LlamaConfig(architectures=["NoSuchChatModel"]).save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).architectures == ["NoSuchChatModel"]


def test_the_first_broken_parameter_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert first_non_finite(model).startswith("all parameters are finite")
    model[1].bias.data[0] = torch.inf
    assert first_non_finite(model) == "parameter 1.bias is not finite"


def test_a_configuration_is_read_from_where_the_weights_will_be(tmp_path, monkeypatch):
    seen = {}
    read = "gcpo_trl.trainer.checks.AutoConfig.from_pretrained"
    monkeypatch.setattr(read, lambda model, **where: seen.update(where) or CLIPConfig())
    load_config("some/model", config(model_init_kwargs={"revision": "v2", "dtype": "float32"}, trust_remote_code=True))
    assert seen == {"revision": "v2", "trust_remote_code": True}
    seen.clear()
    load_config("some/model")
    assert seen == {"trust_remote_code": False}


# where rewards live


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with cuda:0 and cuda:1, as far as torch is asked."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_a_device_of_rewards_that_is_there(two_gpus, device):
    assert config(reward_device=device).reward_device == device


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cuda:2", r"reward_device='cuda:2', but torch \S+ sees 2 cuda device\(s\); write 'auto', 'cpu'"),
        ("xpu", "reward_device='xpu', but torch .* sees 0 xpu"),
        ("gpu", "reward_device='gpu' is no device; write 'auto', 'cpu' or a GPU such as 'cuda:1'"),
        (1, "reward_device=1 is no device"),
    ],
)
def test_a_device_of_rewards_that_is_not_there(two_gpus, device, says):
    with pytest.raises(ValueError, match=says):
        config(reward_device=device)


def test_a_machine_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    with pytest.raises(ValueError, match=r"reward_device='cuda', but torch .* sees 0 cuda"):
        config(reward_device="cuda")
