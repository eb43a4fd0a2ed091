"""GGUF files of Llama's shape (llama.cpp's format): config, tokenizer and weights, dequantised (extra `gguf`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seriatim.interop.chat import ChatTemplate
from seriatim.interop.tokenizer import PublishedTokenizer

FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LETTERS = 256  # of byte-level encoding
CONTROL, USER = 3, 4  # kinds of tokens that are not text


class GGUF:
    """An open file, read as if it were a folder of safetensors.

    config: as a config.json would have it; files: published name -> what holds it, as `weights.load_into` takes them;
    tokenizer; settings: what a generation_config.json would say. Raises ImportError without the package, ValueError for
    what is not understood.
    """

    def __init__(self, path: str | Path):
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ImportError("GGUF files are read by the package gguf: pip install 'seriatim[gguf]'") from None
        try:
            reader = GGUFReader(str(path))
            self.said: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # whatever a broken file makes numpy say
            raise ValueError(
                f"{path} cannot be read as GGUF ({error}): it was cut short, or is something else"
            ) from None
        self.path = Path(path)
        kind = self.said.get("general.architecture")
        if kind != "llama":
            raise ValueError(f"{path} is of architecture {kind!r}; GGUF files are read of Llama's shape only")
        self.tensors = {t.name: t for t in reader.tensors}
        odd = sorted({t.tensor_type.name for t in reader.tensors} - set(FORMATS))
        if odd:
            raise ValueError(f"{path} holds tensors in {', '.join(odd)}; understood are {', '.join(FORMATS)}")
        if "rope_freqs.weight" in self.tensors:
            raise ValueError(f"{path} stretches its rotary embedding by a tensor of its own, which is not understood")

    def _key(self, name: str, default: Any = None) -> Any:
        value = self.said.get(f"llama.{name}", default)
        if value is None:
            raise ValueError(f"{self.path} does not say llama.{name}")
        return value

    @property
    def config(self) -> dict[str, Any]:
        heads, scaling = self._key("attention.head_count"), self.said.get("llama.rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise ValueError(f"{self.path}: rotary embedding scaled by {scaling!r} is not understood")
        rope = {} if scaling == "none" else {"rope_type": "linear", "factor": self._key("rope.scaling.factor")}
        return {
            "model_type": "llama", "hidden_size": self._key("embedding_length"), "num_attention_heads": heads,
            "num_hidden_layers": self._key("block_count"), "intermediate_size": self._key("feed_forward_length"),
            "num_key_value_heads": self._key("attention.head_count_kv", heads),
            "head_dim": self._key("rope.dimension_count", self._key("embedding_length") // heads),
            "max_position_embeddings": self._key("context_length"), "vocab_size": self._vocab(),
            "rms_norm_eps": self._key("attention.layer_norm_rms_epsilon"), "rope_scaling": rope or None,
            "rope_theta": self._key("rope.freq_base", 10_000.0),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "bos_token_id": self.said.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.said.get("tokenizer.ggml.eos_token_id"),
        }  # fmt: skip

    def _vocab(self) -> int:
        return int(self.tensors["token_embd.weight"].shape[1])

    @property
    def settings(self) -> dict[str, Any]:
        return {"eos_token_id": self.said.get("tokenizer.ggml.eos_token_id")}

    @property
    def files(self) -> Mapping[str, Any]:
        config = self.config
        found: dict[str, Any] = {}
        for name in self.tensors:
            stem, _, last = name.rpartition(".")
            if stem.startswith("blk."):
                _, layer, part = stem.split(".", 2)
                theirs = f"model.layers.{layer}.{LAYER.get(part, part)}"
            else:
                theirs = TOP.get(stem, stem)
            found[f"{theirs}.{last}"] = _Stored(self, name, config)
        return found

    @property
    def tokenizer(self) -> PublishedTokenizer:
        """Byte-level encoding from the file's own lists. Raises ValueError for another kind."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        said = {k.removeprefix("tokenizer.ggml."): v for k, v in self.said.items()}
        if said.get("model") != "gpt2" or said.get("pre", "default") not in ("default", "gpt-2", "smollm"):
            raise ValueError(
                f"{self.path} has a tokenizer of kind {said.get('model')!r}, {said.get('pre')!r}, which is not "
                "understood: use the model's own tokenizer.json"
            )
        ids = {token: i for i, token in enumerate(said["tokens"])}
        merges = [tuple(pair.split(" ")) for pair in said["merges"]]
        inner = Tokenizer(models.BPE(vocab=ids, merges=merges))
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if said.get("pre") == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
        special = [t for t, kind in zip(said["tokens"], said["token_type"], strict=True) if kind in (CONTROL, USER)]
        inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        return PublishedTokenizer(inner)

    @property
    def chat(self) -> ChatTemplate | None:
        source, listed = self.said.get("tokenizer.chat_template"), self.said.get("tokenizer.ggml.tokens", ())
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(f"the tokenizer.chat_template of {self.path} is no text")
        ids = {f"{name}_token": self.said.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        there = {name: i for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(listed)}
        return ChatTemplate(source, {name: listed[i] for name, i in there.items()})


class _Stored:
    """A tensor of the file, dequantised when it is asked for."""

    def __init__(self, file: GGUF, name: str, config: Mapping[str, Any]):
        self.file, self.name, self.config = file, name, config

    def get_tensor(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        stored = self.file.tensors[self.name]
        shape = tuple(int(n) for n in reversed(stored.shape))
        x = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).view(shape)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(self.name.split(".")[-2])
        if heads is None:
            return x
        # its heads are turned in pairs of neighbours, ours by halves
        return x.unflatten(0, (self.config[heads], -1, 2)).transpose(1, 2).flatten(0, 2)
