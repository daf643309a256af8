"""T2I-CompBench's attribute binding (colour, shape, texture) as a reward: BLIP-VQA.

    reward = product over the prompt's noun phrases of  P(yes) / (P(yes) + P(no))   to the question "{phrase}?"

P is BLIP's softmax over its vocabulary at the first answer token, so a factor is the sigmoid of the difference of two
logits. As BLIPvqa_eval (BLIP_vqa.py, models/blip_vqa.py): up to 8 phrases, picture stretched to 480 x 480, question in
lower case without .!"()*#:;~ and of at most 35 tokens, its first token [ENC]. transformers' own processor puts [CLS]
there, which the model was not trained on. The released code rounds each factor to 4 digits; this does not.

The hub's weights hold position embeddings for 384 x 384, shrunk from 480 when they were converted; they are stretched
back, so factors are close to, but not, the released code's. Phrases come from `_compbench_text`, not from spaCy.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reward_funcs._compbench_text import read_prompt
from reward_funcs._weights import found, pretrained
from reward_funcs.runtime import check_images, prompt_text, reward_device

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

MODEL = "Salesforce/blip-vqa-capfilt-large"
PHRASES = 8  # BLIP_vqa.py, --np_num
QUESTION_TOKENS = 35  # models/blip_vqa.py, forward
LEFT_OUT = re.compile(r"[.!\"()*#:;~]")  # data/utils.py, pre_question


@dataclass(frozen=True)
class Scorer:
    """Which weights answer, and where. Unset, the environment decides.

    image_size 480 is the benchmark's; the hub's weights were converted for 384.
    """

    model: str = field(default_factory=lambda: os.environ.get("BLIP_VQA_MODEL", MODEL))
    image_size: int = 480
    device: str = "auto"  # GCPO_REWARD_DEVICE, or else this rank's GPU if there is one
    batch_size: int = 16  # pictures at a time, with all their questions


@dataclass(frozen=True, eq=False)
class Blip:
    """A loaded model: its processor, tokenizer, and the ids of the tokens that matter."""

    model: Any
    processor: Any
    tokenizer: Any
    encode: int  # [ENC], first token of a question
    decode: int  # [DEC], first token of an answer
    yes: int
    no: int


def reward(
    prompts: Sequence[Any],
    completions: Sequence[Image | None],
    compbench: Sequence[str | None] | None = None,
    scorer: Scorer | None = None,
    **columns: Any,
) -> list[float | None]:
    """BLIP-VQA of each picture; None where the picture is None or its prompt has no noun phrase.

    compbench: JSON strings, see `_compbench_text`; without, the phrases are read from the prompt.
    """
    said = [None] * len(prompts) if compbench is None else compbench
    check_images("blip_vqa", completions, prompts=prompts, compbench=said)
    asked = [read_prompt(prompt_text(prompt), line).phrases for prompt, line in zip(prompts, said, strict=True)]
    scored = {i: image for i, image in enumerate(completions) if image is not None and asked[i]}
    rewards: list[float | None] = [None] * len(completions)
    if scored:
        answers = chances_of_yes(scorer or Scorer(), list(scored.values()), [asked[i][:PHRASES] for i in scored])
        for index, chances in zip(scored, answers, strict=True):
            rewards[index] = math.prod(chances)
    return rewards


def question(phrase: str) -> str:
    """The phrase as BLIP is asked about it."""
    return LEFT_OUT.sub("", f"{phrase}?".lower()).rstrip(" ")


def chances_of_yes(scorer: Scorer, images: Sequence[Image], phrases: Sequence[Sequence[str]]) -> list[list[float]]:
    """P(yes) / (P(yes) + P(no)) of each phrase of each image. Gradient: none."""
    import torch

    device = reward_device(scorer.device)
    blip = load_blip(scorer.model, scorer.image_size, device)
    chances: list[list[float]] = []
    for start in range(0, len(images), scorer.batch_size):
        some, asked = images[start : start + scorer.batch_size], phrases[start : start + scorer.batch_size]
        pixels = blip.processor([image.convert("RGB") for image in some], return_tensors="pt").pixel_values
        questions = [question(phrase) for each in asked for phrase in each]
        tokens = blip.tokenizer(questions, truncation=True, max_length=QUESTION_TOKENS).input_ids
        owners = [index for index, each in enumerate(asked) for _ in each]
        yes = torch.empty(len(questions))
        with torch.inference_mode():
            seen = blip.model.vision_model(pixels.to(device), interpolate_pos_encoding=True).last_hidden_state
            for rows in rows_of_one_length(tokens):
                ids = torch.tensor([tokens[row] for row in rows], device=device)
                yes[rows] = answer(blip, ids, seen[[owners[row] for row in rows]]).float().cpu()
        chances += [part.tolist() for part in yes.split([len(each) for each in asked])]
    return chances


def rows_of_one_length(tokens: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows in groups of equally many tokens, so that none needs padding.

    transformers 5.23 drops the mask of BLIP's cross-attention (BlipTextAttention passes it under another name), so the
    answer would read the padding of its question.
    """
    by_length: dict[int, list[int]] = {}
    for row, ids in enumerate(tokens):
        by_length.setdefault(len(ids), []).append(row)
    return list(by_length.values())


def answer(blip: Blip, questions: Tensor, seen: Tensor) -> Tensor:
    """P(yes) / (P(yes) + P(no)), (batch,), of questions (batch, seq) on image features (batch, patches, dim)."""
    import torch

    asked = torch.cat([torch.full_like(questions[:, :1], blip.encode), questions[:, 1:]], dim=1)
    understood = blip.model.text_encoder(asked, encoder_hidden_states=seen).last_hidden_state
    start = torch.full_like(questions[:, :1], blip.decode)
    logits = blip.model.text_decoder(start, encoder_hidden_states=understood).logits[:, 0]
    return (logits[:, blip.yes] - logits[:, blip.no]).sigmoid()


@functools.cache
def load_blip(model_id: str, image_size: int, device: str) -> Blip:
    """Load once a process."""
    from transformers import AutoTokenizer, BlipForQuestionAnswering, BlipImageProcessorPil

    logger.info("BLIP-VQA: loading %s on %s", model_id, device)
    with found("the BLIP-VQA model", model_id, MODEL, "BLIP_VQA_MODEL"):
        model = pretrained(BlipForQuestionAnswering, model_id).to(device)
        tokenizer = AutoTokenizer.from_pretrained(model_id)
    decode = model.config.text_config.bos_token_id
    # BLIP adds [DEC] and [ENC] behind BERT's vocabulary, in this order (models/blip.py, init_tokenizer); the tokenizer
    # files on the hub name neither.
    encode = decode + 1
    vocabulary = tokenizer.get_vocab()
    yes, no = vocabulary.get("yes", -1), vocabulary.get("no", -1)
    if encode >= model.config.text_config.vocab_size or -1 in (yes, no):
        raise ValueError(f"{model_id!r} is no BLIP-VQA model: its vocabulary lacks [ENC], 'yes' or 'no'; use {MODEL}")
    # Own settings: the checkpoint's file asks for 384 x 384.
    processor = BlipImageProcessorPil(size={"height": image_size, "width": image_size})
    return Blip(model, processor, tokenizer, encode, decode, yes, no)
