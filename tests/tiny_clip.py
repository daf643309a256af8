"""Tiny random CLIPs on disk as transformers saves them, tokenizers made on the spot, noise as pictures."""

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

# One-letter words, so that the tokenizer needs no merges.
WORDS = ["c</w>", "d</w>", "a</w>", "p</w>", "<|startoftext|>", "<|endoftext|>"]
SIDE = 16
TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIG = {
    "projection_dim": 6,
    "text_config": {
        **TOWER,
        "vocab_size": len(WORDS),
        "hidden_size": 8,
        "max_position_embeddings": 7,
        "bos_token_id": 4,
        "eos_token_id": 5,
    },
    "vision_config": {**TOWER, "hidden_size": 12, "image_size": SIDE, "patch_size": 8},
}


def save_tokenizer(folder):
    CLIPTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, merges=[]).save_pretrained(folder)


def save_clip(folder, seed=0):
    """A CLIP with its tokenizer in `folder`, its weights wide enough that pictures and prompts matter."""
    model = CLIPModel(CLIPConfig(**CONFIG)).eval()
    spread(model, seed)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def spread(model, seed=0):
    """Draw every weight anew, biases and norms too so that none may be swapped unseen, but matrices the widest."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 0:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (1.0 if parameter.dim() > 1 else 0.5)


def pictures(count, size=(SIDE, SIDE), seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, size[1], size[0], 3)
    return [Image.fromarray(pixels.numpy()) for pixels in torch.randint(0, 256, shape, generator=generator).byte()]


def features(model, images, texts, pixels):
    """Features of images and texts by the model alone: ids written out, `pixels` (images, 3, side, side) given."""
    ids = [[4, *(WORDS.index(f"{letter}</w>") for letter in text.split()), 5] for text in texts]
    with torch.no_grad():
        image_features = model.get_image_features(pixel_values=pixels).pooler_output
        text_features = [model.get_text_features(input_ids=torch.tensor([row])).pooler_output[0] for row in ids]
    return image_features, torch.stack(text_features)
