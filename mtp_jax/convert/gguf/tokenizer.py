"""The tokenizer of a GGUF file.

The file has the tokens, the merges, the ids of special tokens, and the name of the rule that first splits a text into
words, `tokenizer.ggml.pre`. Everything else follows from this name: for example, SmolLM's tokenizer splits numbers into
single digits, and Qwen2's composes characters first. transformers reads GGUF tokenizers, too. But if it does not know
the name, it splits as GPT-2 does, and it never composes characters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mtp_jax.convert.files import matches
from mtp_jax.convert.gguf.header import Header
from mtp_jax.convert.gguf.settings import token_fields
from mtp_jax.convert.tokenizer import HubTokenizer, hub_tokenizer
from mtp_jax.data.chat import quiet_transformers
from mtp_jax.errors import UserError

PRE = "tokenizer.ggml.pre"
CONTROL = 3
USER_DEFINED = 4
"""Types of tokens that are matched in a text before it is split. Control tokens are special tokens."""


def _bytes(regex: bool) -> pre_tokenizers.PreTokenizer:
    """The last step of all rules: bytes become letters. With `regex`, the text is first split as GPT-2 does."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    """Splits into words (with a punctuation mark before them), digits, runs of punctuation with following line ends,
    and blanks."""
    parts = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("|".join(parts)), "isolated"), _bytes(False)])


class Splitter(NamedTuple):
    """A rule that splits texts into words, and the settings that belong to it."""

    split: Callable[[], pre_tokenizers.PreTokenizer]
    composes: bool = False
    """Whether characters are composed first (NFC)."""
    whole: bool = False
    """Whether a word that is in the vocabulary always becomes this one token, without merges."""
    bos: bool = False
    """Whether a text begins with the BOS token if the file does not say it."""


GPT2 = Splitter(lambda: _bytes(True))
DIGITS = Splitter(lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes(True)]))
LLAMA3 = Splitter(lambda: _words(r"\p{N}{1,3}"), whole=True, bos=True)
QWEN2 = Splitter(lambda: _words(r"\p{N}"), composes=True)
RULES = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3),
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2._replace(composes=False),
}


def open_tokenizer(header: Header, ignore: Sequence[str] = ()) -> HubTokenizer | None:
    """The tokenizer of a file; None if the file says that there is none.

    Args:
      header: header of the file.
      ignore: patterns of fields to ignore. If one matches `tokenizer.ggml.pre`, an unknown rule splits as GPT-2 does.

    Raises:
      UserError: the tokenizer is not implemented, or incomplete.
    """
    quiet_transformers()
    from transformers import PreTrainedTokenizerFast

    fields = header.fields
    kind = fields.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in KINDS:
        raise UserError(
            f"{header.path}: tokenizer.ggml.model={kind!r} is not implemented; implemented: {', '.join(KINDS)}"
        )
    tokens = _required(header, "tokenizer.ggml.tokens")
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{header.path} has a token twice in tokenizer.ggml.tokens; fetch it again")
    try:
        inner, bos = KINDS[kind](header, tokens, ignore)
        ids = token_fields(header) | {"unk_token_id": fields.get("tokenizer.ggml.unknown_token_id")}
        named = {name.removesuffix("_id"): tokens[one] for name, one in ids.items() if one is not None}
        _add_whole(inner, tokens, fields.get("tokenizer.ggml.token_type") or ())
        inner.post_processor = _in_front(named, ids, fields.get("tokenizer.ggml.add_bos_token", bos))
        fast = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **named)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors if the tables do not fit together
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer in {header.path} cannot be read: {reason}; fetch the file again") from error
    fast.chat_template = fields.get("tokenizer.chat_template")
    return hub_tokenizer(fast, header.path, [(header.path, {"eos_token_id": end_tokens(header)})])


def end_tokens(header: Header) -> list[int]:
    """Ids of the tokens that end an answer: end of text, end of turn and end of message."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ends = (header.fields.get(f"tokenizer.ggml.{name}") for name in names)
    return list(dict.fromkeys(end for end in ends if end is not None))


def _required(header: Header, name: str) -> list[Any]:
    if not header.fields.get(name):
        raise UserError(f"{header.path} has no {name}, which its tokenizer needs; fetch it again")
    return header.fields[name]


# The two kinds.


def _byte_level(header: Header, tokens: list[str], ignore: Sequence[str]) -> tuple[Tokenizer, bool]:
    """A byte-level BPE tokenizer, and whether texts begin with the BOS token by default."""
    name = header.fields.get(PRE)
    if name not in RULES and not matches(PRE, ignore):
        said = f"{PRE}={name!r} is not implemented" if name else f"no {PRE}, which says how a text is split"
        raise UserError(
            f"{header.path}: {said}; implemented: {', '.join(RULES)}. To split as GPT-2 does, which may give other "
            f"tokens than in training, ignore it: ignore={[PRE]!r}, --ignore {PRE}"
        )
    rule = RULES.get(name, GPT2)
    merges = [tuple(merge.split(" ")) for merge in header.fields.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole))
    inner.normalizer = normalizers.NFC() if rule.composes else None
    inner.pre_tokenizer = rule.split()
    inner.decoder = decoders.ByteLevel()
    return inner, rule.bos


def _pieces(header: Header, tokens: list[str], ignore: Sequence[str]) -> tuple[Tokenizer, bool]:
    """A SentencePiece tokenizer, built as transformers builds it for Llama and for Gemma."""
    from transformers import GemmaTokenizer, LlamaTokenizer

    gemma = header.fields["general.architecture"].startswith("gemma")
    if gemma:  # the file has runs of blanks as blanks, the tokenizer needs U+2581 instead
        tokens = ["\u2581" * len(token) if token.strip(" ") == "" else token for token in tokens]
    scores = range(0, -len(tokens), -1) if gemma else _required(header, "tokenizer.ggml.scores")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = merges_of(vocabulary, scores)
    unknown = header.fields.get("tokenizer.ggml.unknown_token_id")
    more = {} if unknown is None else {"unk_token": tokens[unknown]}
    if gemma:
        made = GemmaTokenizer(vocab=vocabulary, merges=merges, **more)
    else:
        prefix = header.fields.get("tokenizer.ggml.add_space_prefix", True)
        made = LlamaTokenizer(vocab=vocabulary, merges=merges, add_prefix_space=prefix, **more)
    return tokenizers.Tokenizer.from_str(made.backend_tokenizer.to_str()), True


KINDS: dict[str, Callable[[Header, list[str], Sequence[str]], tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _pieces,
}


def merges_of(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies: all pairs of tokens that form a token together, best first.

    Args:
      vocabulary: tokens and their ids.
      scores: scores by id; the pair with the highest score is merged first. Gemma needs scores that fall with the id,
        because the scores in its file do not rank its merges.
    """
    found = []
    for token, number in vocabulary.items():
        cuts = ((vocabulary.get(token[:cut]), vocabulary.get(token[cut:])) for cut in range(1, len(token)))
        found += [(-scores[number], pair) for pair in sorted(pair for pair in cuts if None not in pair)]
    spelled = list(vocabulary)
    pairs = [(rank, spelled[left], spelled[right]) for rank, (left, right) in found]
    pairs.sort(key=lambda pair: (pair[0], -len(pair[1]), -len(pair[2])))
    return [(left, right) for _, left, right in pairs]


def _add_whole(inner: Tokenizer, tokens: list[str], kinds: Sequence[int]) -> None:
    """Adds the tokens that are matched in a text before it is split. Gemma's runs of blanks are not among them, because
    they have other characters here."""
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        whole = [token for token, kind in zip(tokens, kinds, strict=False) if kind == wanted]
        whole = [token for token in whole if inner.token_to_id(token) is not None]
        added = [AddedToken(token, normalized=False, special=special) for token in whole]
        (inner.add_special_tokens if special else inner.add_tokens)(added)


def _in_front(named: dict[str, str], ids: dict[str, Any], first: bool) -> processors.PostProcessor | None:
    """The post-processor that puts the BOS token before a text; None if there is to be none."""
    bos = named.get("bos_token")
    if not first or bos is None:
        return None
    return processors.TemplateProcessing(single=[f"{bos}:0", "$A:0"], special_tokens=[(bos, ids["bos_token_id"])])
