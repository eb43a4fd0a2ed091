"""A tiny model that converses, as `transformers` writes it: byte-level tokenizer, special tokens, a template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI = (  # the end of a conversation is written where another turn would begin
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
FORGETS = (  # what was thought in earlier turns is left out
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACED = (  # prompts end in a space, which melts into the word behind it
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BARE = TURNS  # no beginning of an answer
# template -> ends of its turns
TEMPLATES = {
    "ChatML": (CHATML, "<|im_end|>"), "Llama 3": (LLAMA, "<|eot_id|>"), "Phi 3": (PHI, "<|end|>"),
    "forgets": (FORGETS, "<|im_end|>"), "spaced": (SPACED, "</s>"), "bare": (BARE, "<|im_end|>"),
}  # fmt: skip


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_tokenizer(folder: Path, template: str | None = CHATML, end: str = "<|im_end|>") -> int:
    """Bytes, two merges and special tokens; returns the id of the end of a turn."""
    import transformers

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = {"\u0120H": 256, "\u0120B": 257}  # a space and a letter
    vocab = {c: i for i, c in enumerate(letters)} | merged
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("\u0120", "H"), ("\u0120", "B")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=end)
    made.chat_template = template
    made.save_pretrained(folder)
    return inner.token_to_id(end)


def write_chat_model(
    folder: Path, template: str | None = CHATML, end: str = "<|im_end|>", dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:  # fmt: skip
    """A Llama of two layers with its tokenizer."""
    import transformers

    eos = write_tokenizer(folder, template, end)
    sizes = {
        "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 160, "bos_token_id": 258, "eos_token_id": eos,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.to(dtype).save_pretrained(folder)
    return folder


def write_conversations(path: Path, count: int = 12) -> Path:
    """A dozen questions that are answered by what was asked, twice."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    lines = [{"messages": [says("user", w), says("assistant", f"{w} {w}")]} for w in (words * count)[:count]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
