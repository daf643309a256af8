"""GCPOTrainer on conversations: tools, environments and rollouts of one's own say what the policy did not draw."""

import pytest
import torch
from datasets import Dataset
from tiny import record, text_trainer, variety
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_chat_template

import gcpo_trl.trainer

EOS = "<|im_end|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", EOS]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
EVERY_TOKEN_DRAWN = {"select_strategies": ["initial"], "select_fraction": 1.0}  # critical: what the policy drew


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory, libraries_frozen):
    """Path of a random Llama that reads bytes, with Qwen3's template of conversations and tools."""
    folder = tmp_path_factory.getbasetemp() / "tiny-chat"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate(letters + SPECIAL + TAGS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in TAGS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=SPECIAL[0])
    fast.chat_template = qwen3_chat_template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        pad_token_id=fast.pad_token_id,
        eos_token_id=fast.eos_token_id,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def conversations(rows=4):
    questions = [[{"role": "user", "content": f"What is {row} times {row + 1}?"}] for row in range(rows)]
    return Dataset.from_list([{"prompt": question} for question in questions])


def speak(trainer, monkeypatch, *turns):
    """Let the model say ``turns``: one list of texts a call, a text a row. Returns their ids."""
    tokenizer, said, left = trainer.processing_class, [], list(turns)

    def generate(input_ids, **options):
        texts = left.pop(0)
        assert len(texts) == len(input_ids), f"{len(input_ids)} rows asked for, {len(texts)} scripted"
        said.append([tokenizer(text, add_special_tokens=False).input_ids for text in texts])
        longest = max(map(len, said[-1]))
        padded = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in said[-1]]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    monkeypatch.setattr(trainer.model, "generate", generate)
    return said


def call(name, **arguments):
    quoted = ", ".join(f'"{key}": {value}' for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{{quoted}}}}}\n</tool_call>{EOS}'


def assert_drawn(batch, row, first, last):
    """The row holds what was said first, an answer that was not drawn, what was said last; only the drawn train."""
    ids, critical = batch["completion_ids"][row].tolist(), batch["tool_mask"][row].tolist()
    length = int(batch["completion_mask"][row].sum())
    answer = length - len(first) - len(last)
    assert answer > 0 and ids[: len(first)] == first and ids[length - len(last) : length] == last
    assert critical == [1] * len(first) + [0] * answer + [1] * len(last) + [0] * (len(ids) - length)
    return ids[len(first) : len(first) + answer]


def test_conversations_are_prompts_and_completions_of_rewards(tiny_chat, tmp_path):
    roles = []

    def reward(prompts, completions, **columns):
        roles.extend(message["role"] for completion in completions for message in completion)
        return variety(prompts, completions)

    trainer = text_trainer(tiny_chat, tmp_path, reward, conversations(), args={"select_fraction": 0.2})
    kept = record(trainer)
    trainer.train()
    assert roles == ["assistant"] * 4
    batch = kept.batches[0]
    drawn = batch["completion_mask"]
    # a fifth of the tokens a strategy, and of a short text one at least, as long as it has as many
    each = torch.minimum((drawn.sum(1) // 5).clamp(min=1) * 3, drawn.sum(1))
    assert torch.equal(batch["tool_mask"].sum(1), each) and not (batch["tool_mask"] > drawn).any()
    assert any(gradient.abs().sum() > 0 for gradient in kept.gradients[0].values())


def test_the_answer_of_a_tool_is_never_critical_and_never_weighed(tiny_chat, tmp_path, monkeypatch):
    called, weighed = [], []

    def multiply(a: int, b: int) -> int:
        """
        Multiply two numbers.

        Args:
            a: One number.
            b: The other number.

        Returns:
            Their product.
        """
        called.append((a, b))
        return a * b

    weight = gcpo_trl.trainer.gcpo_trainer.advantage_weight
    monkeypatch.setattr(
        gcpo_trl.trainer.gcpo_trainer,
        "advantage_weight",
        lambda *args, **kw: weighed.append(args[2]) or weight(*args, **kw),
    )
    args = EVERY_TOKEN_DRAWN | {"per_device_train_batch_size": 2, "max_completion_length": 256}
    trainer = text_trainer(tiny_chat, tmp_path, dataset=conversations(), tools=[multiply], args=args)
    said = speak(trainer, monkeypatch, [call("multiply", a=3, b=4), f"I do not know.{EOS}"], [f"It is 12.{EOS}"])
    kept = record(trainer)
    trainer.train()
    assert called == [(3, 4)]
    batch = kept.batches[0]
    answer = assert_drawn(batch, 0, said[0][0], said[1][0])
    assert "12" in trainer.processing_class.decode(answer)
    assert batch["tool_mask"].sum() == batch["num_items_in_batch"] == sum(map(len, [*said[0], *said[1]]))
    # The loss sees the rows in any order; the weight's mean leaves out the same tokens.
    assert sorted(weighed[0].sum(1).tolist()) == sorted(batch["tool_mask"].sum(1).tolist())
    assert trainer.state.log_history[0]["tools/call_frequency"] == 0.5


def test_an_environment_acts_and_rewards(tiny_chat, tmp_path, monkeypatch):
    class Counter:
        def reset(self, **columns):
            self.count = 0

        def increment(self, step: int) -> int:
            """
            Count on.

            Args:
                step: How far.

            Returns:
                The new count.
            """
            self.count += step
            return self.count

        def get_reward(self):
            return float(self.count)

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    args = EVERY_TOKEN_DRAWN | {"per_device_train_batch_size": 2, "max_completion_length": 256}
    trainer = text_trainer(tiny_chat, tmp_path, None, environment_factory=Counter, args=args)
    said = speak(trainer, monkeypatch, [call("increment", step=7), f"I will not.{EOS}"], [f"Done.{EOS}"])
    kept = record(trainer)
    trainer.train()
    assert trainer._rewards.tolist() == [[7.0], [0.0]]
    answer = assert_drawn(kept.batches[0], 0, said[0][0], said[1][0])
    assert "7" in trainer.processing_class.decode(answer)


def test_a_rollout_function_says_what_was_drawn_and_speaks_to_the_reward(tiny_text, tmp_path, monkeypatch):
    heard = []

    def rollout(prompts, trainer):
        ids = [[5, 6, 7, 8, 9, 2], [9, 8, 7, 2]] * (len(prompts) // 2)
        return {
            "prompt_ids": [[1, 4] for _ in prompts],
            "completion_ids": ids,
            "logprobs": [[0.0] * len(row) for row in ids],
            "env_mask": [[1, 1, 0, 0, 1, 1], [1, 0, 1, 1]] * (len(prompts) // 2),
            "score": [float(index) for index in range(len(prompts))],
        }

    def reward(completions, score, **columns):
        heard.extend(score)
        return score

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = text_trainer(tiny_text, tmp_path, reward, rollout_func=rollout, args=EVERY_TOKEN_DRAWN)
    kept = record(trainer)
    trainer.train()
    assert heard == [0, 1, 2, 3]
    assert kept.batches[0]["tool_mask"].tolist() == [[1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 0]] * 2
    assert kept.batches[0]["num_items_in_batch"] == 2 * (4 + 3)
