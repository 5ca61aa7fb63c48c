"""Tokenizers with the peculiarities of real ones, built here: what Hugging Face directories hold beside the weights."""

import dataclasses
import json
import pathlib
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["the cat sat on the mat", "user asks, assistant answers", "def f(x):\n    return x + 1"] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}</turn>\n{% endfor %}"


@dataclasses.dataclass(frozen=True)
class Odd:
    """A tokenizer, what its files declare, and how its texts are to be read."""

    inner: tokenizers.Tokenizer
    first: tuple[str, ...]
    """Tokens in front of every text."""
    end: str
    ends: tuple[str, ...]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of tokenizer_config.json."""
    generation: tuple[str, ...] = ()
    """End tokens of generation_config.json."""
    special: str = "read"
    rebuilt: bool = False
    """Whether transformers builds it anew from its vocabulary, whatever tokenizer.json says."""

    def save(self, directory: pathlib.Path) -> pathlib.Path:
        """Writes its files."""
        directory.mkdir(parents=True)
        self.inner.save(str(directory / "tokenizer.json"))
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (directory / "tokenizer_config.json").write_text(json.dumps(kind | self.config))
        if self.generation:
            ids = [self.inner.token_to_id(name) for name in self.generation]
            given = ids if len(ids) > 1 else ids[0]
            (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        return directory

    def ids(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """Ids of tokens."""
        return tuple(self.inner.token_to_id(name) for name in names)


def byte_level(*special: str | AddedToken, normalizer: Any = None, template: str = "") -> tokenizers.Tokenizer:
    """Byte-level BPE, as of GPT-2, Qwen, Llama 3 and SmolLM2."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = [str(getattr(one, "content", one)) for one in special]
    trainer = trainers.BpeTrainer(
        vocab_size=290 + len(special), special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return _templated(inner, template, names)


def spaced(*special: str, first_only: bool = False, template: str = "") -> tokenizers.Tokenizer:
    """BPE over blanks written as U+2581, with a token for every byte, as of Llama 2 and Gemma."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    trained = json.loads(inner.to_str())["model"]
    names = [*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [name for name, _ in sorted(trained["vocab"].items(), key=lambda item: item[1])]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(merge) for merge in trained["merges"]]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if first_only:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (*special, "<unk>")])
    return _templated(inner, template, list(special))


def _templated(inner: tokenizers.Tokenizer, template: str, names: list[str]) -> tokenizers.Tokenizer:
    if template:
        used = [(name, inner.token_to_id(name)) for name in names if name in template]
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return inner


def picture(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """With an added token for which the model has no embedding."""
    inner.add_special_tokens([AddedToken("<picture>", special=True)])
    return inner


def words() -> tokenizers.Tokenizer:
    """A table of words."""
    vocab = {name: i for i, name in enumerate(["<unk>", "[EOS]", "the", "cat", "sat", "a"])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["[EOS]"])
    return inner


def plain_bytes(end: str) -> tokenizers.Tokenizer:
    """One token per byte and an end token, nothing in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([end])
    return inner


S = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TURNS = ("<bos>", "<eos>", "<turn>", "</turn>")
ODD = {
    "bos by template": Odd(byte_level("<s>", "</s>", template="<s> $A"), ("<s>",), "</s>", ("</s>",), S),
    "bos declared alone": Odd(byte_level("<s>", "</s>"), (), "</s>", ("</s>",), S),
    "add_bos_token without a template": Odd(
        byte_level("<s>", "</s>"), (), "</s>", ("</s>",), S | {"add_bos_token": True}
    ),
    "add_bos_token false with a template": Odd(
        byte_level("<s>", "</s>", template="<s> $A"), ("<s>",), "</s>", ("</s>",), S | {"add_bos_token": False}
    ),
    "adds an end too": Odd(byte_level("<s>", "</s>", template="<s> $A </s>"), ("<s>",), "</s>", ("</s>",), S),
    "an end of another name": Odd(byte_level("[EOS]"), (), "[EOS]", ("[EOS]",), {"eos_token": "[EOS]"}),
    "end in the generation config": Odd(byte_level("<stop>"), (), "<stop>", ("<stop>",), {}, ("<stop>",)),
    "end of turn before end of text": Odd(
        *(byte_level(*CHAT), (), "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHATML},
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "Llama 2": Odd(
        *(spaced("<s>", "</s>", template="<s> $A"), ("<s>",), "</s>", ("</s>",)),
        S | {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "legacy": True},
        rebuilt=True,
    ),
    "blank before the text alone": Odd(
        spaced("<s>", "</s>", first_only=True, template="<s> $A"), ("<s>",), "</s>", ("</s>",), S
    ),
    "Gemma 3": Odd(
        *(picture(spaced(*TURNS, first_only=True, template="<bos> $A")), ("<bos>",), "<eos>", ("<eos>", "</turn>")),
        {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": WITH_BOS},
        ("<eos>", "</turn>"),
    ),
    "normalised": Odd(
        byte_level("</s>", normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
        *((), "</s>", ("</s>",), {"eos_token": "</s>"}),
    ),
    "two in front": Odd(
        byte_level("[gMASK]", "<sop>", "<|user|>", "<|endoftext|>", template="[gMASK] <sop> $A"),
        *(("[gMASK]", "<sop>"), "<|endoftext|>", ("<|endoftext|>", "<|user|>"), {"eos_token": "<|endoftext|>"}),
        ("<|endoftext|>", "<|user|>"),
    ),
    "special tokens that take blanks": Odd(
        byte_level(AddedToken("<|end|>", rstrip=True, special=True), AddedToken("<mask>", lstrip=True, special=True)),
        *((), "<|end|>", ("<|end|>",), {"eos_token": "<|end|>"}),
    ),
    "special tokens are text": Odd(
        byte_level("<s>", "</s>", template="<s> $A"),
        *(("<s>",), "</s>", ("</s>",), S | {"split_special_tokens": True}),
        special="text",
    ),
    "words": Odd(words(), (), "[EOS]", ("[EOS]",), {"eos_token": "[EOS]", "unk_token": "<unk>"}),
}
