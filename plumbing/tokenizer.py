"""Text to token ids and back, from a checkpoint's own tokenizer.json, and the prompt formats of the
model families.

    tok = load("path/to/Qwen3-4B")               # a Hugging Face folder
    ids = tok.chat("What is 12 * 34?")           # the prompt, up to where the reply starts
    tok.decode(ids), tok.stop_ids, tok.n_vocab

Two promises. Text never becomes a control token: a question that spells `<|im_end|>` is encoded as
those ten characters; control tokens enter a prompt only as ids, from the formats below. And plain
text gets the ids that Hugging Face's `tokenizers` gives it, for the same file without its added
tokens (with them that library makes control tokens of spellings found in text). Bytes that a
vocabulary has no token for are dropped, as that library drops them: SmolLM2 lacks 21 of 256,
control bytes and such as hardly any text has.

What was simplified: byte-level BPE only, with the split patterns of the families we train; prompts
of one question; no Jinja is run.
"""

import json
import re
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import tiktoken

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
MAX_FILE = 64 * 2**20  # bytes; the largest tokenizer.json in use has about 20 MB
# characters; longer runs are cut: the regex engine's stack overflows on a million spaces
MAX_RUN = 25_000
UNKNOWN = "\ufffd".encode()

# A split pattern is code that runs on every text: a file may name one of these and nothing else.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
# up to three digits together, where Qwen takes them one by one
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# Mistral-Nemo: also splits camelCase
NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# SmolLM2, StarCoder: digits are cut out one by one, and GPT-2's pattern cuts what is left between
# them. So no space joins a digit, and a digit ends white space as the end of the text does. The
# step that cuts them out knows the digits of Unicode 17, which no \p{N} here has yet.
NUMBER = r"\p{N}" + "\U00011de0-\U00011de9\U00016ff4-\U00016ff6"
DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|[#]| ?[^\s\p{L}#]+|\s+(?![^\s#])|\s+"
DIGITS = DIGITS.replace("#", NUMBER)
NO_SPLIT = r"(?s:.+)"


# ---------------------------------------------------------------- prompt formats
# Each gives the prompt as a list of control-token ids and plain texts. `c` maps the spelling of a
# control token to its id.


def chatml(c, question, system, thinking):
    """Qwen2.5, Qwen3, SmolLM2. Where there is a <think> token (Qwen3), thinking=False adds the
    empty think block, as Qwen3's template does for enable_thinking=False; the template of
    Qwen3-Instruct-2507 has no such block: use thinking=True there. Without a system text there is
    no system message, as in Qwen3; templates that have one of their own (SmolLM2, Qwen2.5) are seen
    to by `Tokenizer.default_system`."""

    def turn(role, text):
        return [c["<|im_start|>"], f"{role}\n{text}", c["<|im_end|>"], "\n"]

    parts = (
        (turn("system", system) if system else [])
        + turn("user", question)
        + [c["<|im_start|>"], "assistant\n"]
    )
    if "<think>" in c and "</think>" in c and not thinking:
        parts += [c["<think>"], "\n\n", c["</think>"], "\n\n"]
    return parts


def llama3(c, question, system, thinking):
    """Llama 3. From 3.1 on (which has <|eom_id|>, unlike 3.0) the template always gives a system
    message, opened by two date lines. Today stays the day of Llama-3.1's template; Llama-3.2's
    takes the clock's, and a prompt that changes overnight spoils an experiment."""

    def turn(role, text):
        return [
            c["<|start_header_id|>"],
            role,
            c["<|end_header_id|>"],
            "\n\n" + text,
            c["<|eot_id|>"],
        ]

    dates = (
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        if "<|eom_id|>" in c
        else ""
    )
    head = turn("system", dates + system.strip()) if dates or system else []
    reply = [c["<|start_header_id|>"], "assistant", c["<|end_header_id|>"], "\n\n"]
    return [c["<|begin_of_text|>"], *head, *turn("user", question.strip()), *reply]


def deepseek(c, question, system, thinking):
    """DeepSeek-R1-Distill. These models always think: since February 2025 their template opens the
    think block itself."""
    think = [c["<think>"], "\n"] if "<think>" in c else ["<think>\n"]
    return [
        c["<｜begin▁of▁sentence｜>"],
        system,
        c["<｜User｜>"],
        question,
        c["<｜Assistant｜>"],
        *think,
    ]


def mistral(c, question, system, thinking):
    """Mistral-Nemo-Instruct: the system text heads the user's message, with no spaces around."""
    return [c["<s>"], c["[INST]"], f"{system}\n\n{question}" if system else question, c["[/INST]"]]


def base(c, question, system, thinking):
    """Models that never learnt a chat format: the question, then the instruction, each on its
    line."""
    return [f"{question}\n{system}\n" if system else f"{question}\n"]


# name: (function, the control tokens it needs); "auto" takes the first whose tokens are all there
FORMATS = {
    "chatml": (chatml, ("<|im_start|>", "<|im_end|>")),
    "llama3": (
        llama3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "deepseek": (deepseek, ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")),
    "mistral": (mistral, ("<s>", "[INST]", "[/INST]")),
    "base": (base, ()),
}
# Qwen's and Llama's; folders may name only one
STOPS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")


# ---------------------------------------------------------------- the tokenizer


class Tokenizer:
    """What `load` returns.

    stop_ids  sorted ids that end a reply: eos_token_id of generation_config.json and of
              config.json, eos_token of tokenizer_config.json and the family's own, as far as the
              vocabulary has them. () when there are none: then only the length limit ends a reply.
    n_vocab   highest id + 1. A model may have more rows (Qwen pads its embedding); those are masked
              in sampling and in training.
    format    name of the prompt format, a key of FORMATS.
    control   {spelling: id} of the control ("added") tokens.
    missing   the bytes that no token has, as bytes: `encode` drops them. b"" in most families.
    default_system  the system message that the folder's ChatML template puts in where none is
              given, "You are a helpful AI assistant named SmolLM, ..."; "" where it has none.
    """

    def __init__(self, tokens, control, merging, words, pattern, nfc):
        """tokens: {id: bytes}. merging: ids that merges make, by rank. words: ids that only a whole
        word gets. pattern: what a word is."""
        self.control, self.n_vocab = control, max(tokens) + 1
        # `load` fills these in
        self.format, self.stop_ids, self.default_system, self._bos = "base", (), "", None
        self._tokens, self._merging, self._words, self._nfc = tokens, merging, words, nfc
        self._pattern = pattern
        present = {tokens[i] for i in merging}
        self.missing = bytes(b for b in range(256) if bytes([b]) not in present)
        self._bpe = _encoding(pattern, [tokens[i] for i in merging])
        # Built from bytes and whole words alone it has no steps to make a word by merging: it finds
        # whole words and nothing else.
        self._finder = (
            _encoding(pattern, [bytes([b]) for b in range(256)] + [tokens[i] for i in words])
            if words
            else None
        )

    def encode(self, text):
        """Ids of `text` as plain text, without BOS. Control tokens spelled in it stay text. Lone
        surrogates become U+FFFD.

        Runs of more than MAX_RUN characters that are all white space, or have none, are cut into
        pieces encoded one by one: that keeps the time linear. Nothing is lost but bytes that the
        vocabulary has no token for: decode(encode(text)) is text, in NFC form where the file asks
        for that (Qwen).
        """
        text = unicodedata.normalize("NFC", text) if self._nfc else text
        cuts = [0]
        if len(text) > MAX_RUN:
            for run in re.finditer(r"\s+|\S+", text):
                cuts.extend(range(run.start() + MAX_RUN, run.end(), MAX_RUN))
        return [i for a, b in pairwise([*cuts, len(text)]) for i in self._encode(text[a:b])]

    def _encode(self, text):
        ranks = self._bpe.encode_ordinary(text)
        if self.missing and max(ranks, default=0) >= len(self._merging):
            ranks = self._encode_without_missing(text)
        ids = [self._merging[rank] for rank in ranks]
        found, at = {}, 0  # byte offset: id of the whole word that starts there
        for rank in self._finder.encode_ordinary(text) if self._finder else ():
            if rank >= 256:
                found[at] = self._words[rank - 256]
            at += len(self._tokens[found[at]]) if rank >= 256 else 1
        if not found:
            return ids
        out, at, end = [], 0, 0
        for i in ids:
            if at in found:
                out.append(found[at])
                end = at + len(self._tokens[found[at]])
            if at >= end:
                out.append(i)
            at += len(self._tokens[i])
        return out

    def _encode_without_missing(self, text):
        """Ranks of a text in which bytes have no token. These are taken out after the text was cut
        into words: what stood around them in one word may merge, what stood in two may not."""
        # lone surrogates, as tiktoken sees to them
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ranks = []
        for word in _words(self._pattern).findall(text):
            piece = word.encode().translate(None, delete=self.missing)
            if piece:
                ranks += self._bpe._encode_single_piece(piece)
        return ranks

    def decode(self, ids):
        """Text of `ids`, integers in any iterable. Never fails: an id outside the vocabulary and
        bytes that are no UTF-8 give U+FFFD. Control tokens give their spelling."""
        return b"".join(self._tokens.get(int(i), UNKNOWN) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, i):
        """Bytes of one token, which need not be whole characters; those of U+FFFD outside the
        vocabulary."""
        return self._tokens.get(int(i), UNKNOWN)

    def chat(self, question, system=SYSTEM, thinking=False):
        """Prompt ids for one question, up to where the reply starts.

        system    the instruction; "" or None: no system message, so that a template's own stands
        thinking  True: Qwen3 may think
        """
        render, _ = FORMATS[self.format]
        parts = render(self.control, question, system or self.default_system, thinking)
        if self.format == "base" and self._bos is not None:
            parts = [self._bos, *parts]
        return [
            i for part in parts for i in ([part] if isinstance(part, int) else self.encode(part))
        ]


def load_tokenizer(folder, format="auto"):
    """Tokenizer of a Hugging Face folder: tokenizer.json and, where there, tokenizer_config.json,
    generation_config.json, config.json.

    format  a key of FORMATS, or "auto": the first whose control tokens the file has. Base models of
            Llama 3 and SmolLM2 have the chat tokens but never learnt them: a folder whose eos_token
            ends texts, not turns, and that has no chat template gets "base".
    Raises  FileNotFoundError without a tokenizer.json; ValueError (one line) for one that is
            broken, or no byte-level BPE of a known family, and for a format whose control tokens it
            lacks.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json: give the folder of a Hugging Face model"
        )
    file, config = _read(path), _read(folder / "tokenizer_config.json")
    try:
        tok = _build(file)
        tok._bos = _bos(file, config, tok.control)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f"{path} is not a tokenizer ({type(e).__name__}: {str(e)[:80]})") from None

    eos = _spelling(config.get("eos_token"))
    stops = {tok.control.get(spelling) for spelling in (*STOPS, eos)}
    for name in ("generation_config.json", "config.json"):
        given = _read(folder / name).get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        if not all(i is None or _is_int(i) for i in ids):
            raise ValueError(
                f"{folder / name}: eos_token_id is {given!r:.80}, which is no token id"
            )
        stops.update(ids)
    tok.stop_ids = tuple(sorted(i for i in stops if i is not None and 0 <= i < tok.n_vocab))

    able = [
        name for name, (_, needs) in FORMATS.items() if all(token in tok.control for token in needs)
    ]
    template = _template(folder, config)
    tok.format = able[0] if format == "auto" else format
    if format == "auto" and eos in ("<|end_of_text|>", "<|endoftext|>") and not template:
        tok.format = "base"
    if tok.format not in able:
        raise ValueError(
            f"{folder} has no tokens for the prompt format {format!r}: choose one of auto, "
            f"{', '.join(able)}"
        )
    if tok.format == "chatml":
        tok.default_system = _default_system(template)
    return tok


# ---------------------------------------------------------------- reading tokenizer.json


def _read(path):
    """The JSON object in a file; {} when there is no such file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{path} has more than {MAX_FILE >> 20} MB: no tokenizer is that large")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({str(e)[:80]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _is_int(i):
    return isinstance(i, int) and not isinstance(i, bool)


def _spelling(token):
    """Text of a special token in tokenizer_config.json, where it is a string or an object with the
    text as `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _template(folder, config):
    """The folder's chat template, which is Jinja; "" when it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        with path.open("rb") as f:
            return f.read(MAX_FILE).decode("utf-8", "replace")
    given = config.get("chat_template") or _read(folder / "chat_template.json").get("chat_template")
    if isinstance(given, list):  # several, by name
        entries = [entry for entry in given if isinstance(entry, dict)]
        given = {entry.get("name"): entry.get("template") for entry in entries}.get("default")
    return given if isinstance(given, str) else ""


def _default_system(template):
    """The system message that a ChatML template holds as a literal, "" when it holds none. No Jinja
    is run: a literal is 'in single quotes', a new line in it stands as itself or as its escape."""
    text = r"((?:[^'\\]|\\.)*?)"
    literal = re.search(rf"'<\|im_start\|>system(?:\n|\\n){text}<\|im_end\|>", template, re.DOTALL)
    if not literal:
        return ""
    # this is how Jinja reads escapes
    return literal[1].encode("ascii", "backslashreplace").decode("unicode-escape", "replace")


@cache
def _words(pattern):
    """The split pattern for `re`, which has no \\p{..} and another idea of white space."""
    out, opened = "", False
    for part in re.split(r"([\[\]]|\\p\{\w+\}|\\[sS])", pattern):
        if part in ("[", "]"):
            opened = part == "["
        elif part == r"\S":
            part = f"[^{_characters(part.lower())}]"
        elif part == r"\s" or part.startswith(r"\p"):
            part = _characters(part) if opened else f"[{_characters(part)}]"
        out += part
    return re.compile(out)


@cache
def _characters(name):
    """What a class such as \\p{L} holds in tiktoken's engine, as ranges for the brackets of `re`.

    Not as Python has it: libraries differ in their version of Unicode, and so in what is a letter.
    """
    every = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    found = bytes(_encoding(name, []).encode_ordinary(every)).decode()  # only what matches
    ranges = []
    for c in map(ord, found):
        if ranges and ranges[-1][1] == c - 1:
            ranges[-1][1] = c
        else:
            ranges.append([c, c])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


def _encoding(pattern, tokens):
    """BPE of these tokens, ranked as they stand. Bytes that are none of them come last."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for b in range(256):
        ranks.setdefault(bytes([b]), len(ranks))
    return tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _build(file):
    """Tokenizer of a parsed tokenizer.json. Raises ValueError saying what is wrong or not
    supported."""
    model = file.get("model") or {}
    if (
        model.get("type", "BPE") != "BPE"
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
    ):
        raise ValueError(
            f"the model is of type {model.get('type')!r:.80}: only byte-level BPE with vocab and "
            f"merges is supported"
        )
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ValueError(f"{key} is {model[key]!r:.80}: only plain byte-level BPE is supported")
    normalizer = (file.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"the normalizer {normalizer!r:.80} is not supported: only NFC, or none")

    vocab, added = model["vocab"], file.get("added_tokens") or []
    control = {token["content"]: token["id"] for token in added}
    ids = vocab | control
    if not all(
        isinstance(token, str) and token and _is_int(i) and i >= 0 for token, i in ids.items()
    ):
        raise ValueError("a token is not a text with an id of 0 or more")
    if (
        len(set(ids.values())) < len(ids)
        or len(control) < len(added)
        or any(vocab.get(t, i) != i for t, i in control.items())
    ):
        raise ValueError("two tokens share an id, or one token has two")
    if max(ids.values(), default=0) > 2 * len(ids) + 1000:
        highest = str(max(ids.values()))
        raise ValueError(f"ids go up to {highest:.20} for {len(ids)} tokens: they must lie closer")

    alphabet = _byte_alphabet()
    tokens, plain = {}, {}  # {id: bytes} of all; {token: id} of those that text may become
    for token, i in vocab.items():
        try:
            tokens[i] = token.translate(alphabet).encode("latin-1")
            plain[token] = i
        except UnicodeEncodeError:
            # not written in stand-ins for bytes, so that no text leads to it
            tokens[i] = token.encode("utf-8", "replace")
    for token, i in control.items():
        tokens[i] = token.encode("utf-8", "replace")
        plain.pop(token, None)
    letters = {chr(c): b for c, b in alphabet.items() if b < 256}
    missing = bytes(b for letter, b in letters.items() if letter not in plain)
    _check_missing(missing, letters.keys() & control.keys(), model)

    byte_ids = [plain[letter] for letter in letters if letter in plain]
    merging = _merge_order(byte_ids, plain, model, tokens)
    words = sorted(set(plain.values()) - set(merging)) if model.get("ignore_merges") else []
    if any(len(tokens[i]) < 3 for i in words):
        raise ValueError(
            "a token of two bytes has no merge, which is not supported together with ignore_merges"
        )
    return Tokenizer(
        tokens,
        control,
        merging,
        words,
        _split_pattern(file.get("pre_tokenizer")),
        nfc=normalizer == "NFC",
    )


def _check_missing(missing, controlling, model):
    """Refuse bytes without a token where more is at stake than bytes that texts hardly have."""
    written = bytes([9, 10, 13, *range(32, 127)])
    if controlling or any(b in written for b in missing):
        raise ValueError(
            "some of the 256 byte tokens are added tokens, or printable and missing: "
            "only byte-level BPE is supported"
        )
    for key in ("unk_token", "ignore_merges"):
        if missing and model.get(key):
            raise ValueError(
                f"{len(missing)} of the 256 byte tokens are missing, which is not "
                f"supported together with {key}"
            )


def _byte_alphabet():
    """GPT-2's printable stand-ins for the 256 bytes, {stand-in: byte} for str.translate; what else
    is below 256 is sent out of latin-1."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    return (
        dict.fromkeys(others, 0x10FFFF)
        | {b: b for b in printable}
        | {256 + n: b for n, b in enumerate(others)}
    )


def _split_pattern(pre):
    """The regular expression that cuts text into words, from the `pre_tokenizer` entry."""
    pre = pre or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds, last = [step.get("type") for step in steps], steps[-1]
    use_regex = last.get("use_regex", True)
    if not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"]:
            return GPT2 if use_regex else NO_SPLIT
        if kinds == ["Digits", "ByteLevel"] and use_regex and steps[0].get("individual_digits"):
            return DIGITS
        if kinds == ["Split", "ByteLevel"] and not use_regex:
            return _known_pattern(steps[0])
    raise ValueError(
        f"the pre-tokenizer {kinds!r:.80} is not supported: only ByteLevel, alone or "
        "after a Split or Digits one by one, and no prefix space"
    )


def _known_pattern(split):
    """The pattern of a Split step, which must be one of those above."""
    pattern = split["pattern"].get("Regex")
    known = pattern in (GPT2, QWEN, LLAMA3, NEMO)
    if not known or split.get("behavior") != "Isolated" or split.get("invert"):
        raise ValueError(
            f"the split pattern {str(pattern)[:60]!r} is not one of GPT-2, Qwen, "
            "Llama 3, Mistral-Nemo"
        )
    return pattern


def _bos(file, config, control):
    """Id that the folder has put before every text: the first token of the post-processor's
    template, or bos_token if add_bos_token."""
    post = file.get("post_processor") or {}
    for step in post.get("processors", [post]):
        first = step["single"][0] if step.get("type") == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            return control[first["SpecialToken"]["id"]]
    return control.get(_spelling(config.get("bos_token"))) if config.get("add_bos_token") else None


# ---------------------------------------------------------------- merge order


def _merge_order(byte_ids, plain, model, tokens):
    """Ids of the bytes (256, or fewer), then of the tokens that merging makes, by rank.

    tokenizer.json merges the listed *pairs*, by their place in the list. tiktoken merges any
    neighbours that together are a token, by the rank of that token. The two agree when each token
    here has the rank of the pair that makes it, and tokens that no pair makes are left out. Files
    come in two kinds: converted from tiktoken, with every split of every token listed, and trained,
    with parts before wholes.
    """
    vocab, pairs = model["vocab"], []
    for merge in model["merges"]:
        left, right = merge.partition(" ")[::2] if isinstance(merge, str) else merge
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ValueError(
                f"the merge {left!r:.40} {right!r:.40} has a token that is not in the vocabulary"
            )
        # else it leads to or from a control token
        if left in plain and right in plain and left + right in plain:
            pairs.append((plain[left], plain[right], plain[left + right]))
    if len(set(pairs)) < len(pairs):
        raise ValueError("a merge is listed twice")
    wholes = list(dict.fromkeys(whole for _, _, whole in pairs))
    if len(wholes) == len(pairs) or not _all_splits(pairs, wholes, plain):
        return byte_ids + _made(byte_ids, pairs)

    order = byte_ids + wholes
    if model.get("ignore_merges"):
        return order
    # tiktoken takes a word that is a token as it is. Here merges must make it: followed by a byte
    # that never merges, they have to.
    bpe = _encoding(NO_SPLIT, [tokens[i] for i in order])
    made = list(byte_ids)
    for rank, i in enumerate(wholes, len(byte_ids)):
        if bpe._encode_single_piece(tokens[i] + b"\xff")[0] == rank:
            made.append(i)
    return made


def _all_splits(pairs, wholes, plain):
    """Whether every split of each token into two tokens is listed, all splits of one token
    together: then any neighbours may merge."""
    if 1 + sum(a[2] != b[2] for a, b in pairwise(pairs)) > len(wholes):
        return False
    listed, text = {pair[:2] for pair in pairs}, {i: token for token, i in plain.items()}
    splits = (
        (plain.get(token[:k]), plain.get(token[k:]))
        for token in map(text.get, wholes)
        for k in range(1, len(token))
    )
    return all(split in listed for split in splits if None not in split)


def _made(byte_ids, pairs):
    """Ids of the tokens that merging makes, by rank. Raises ValueError where a pair stands before
    one that makes its parts.

    As long as no merge crosses the ends of a token, its bytes merge as if they stood alone. So
    (left, right) makes the token if and only if, alone, no earlier merge joins the end of left to
    the start of right; to see that, undo the merges at this border, last one first.
    """
    made = dict.fromkeys(byte_ids, -1)  # id: rank of the merge that makes it
    parts, ranks = {}, {}  # id: its two halves; pair: its rank
    absent = set()  # parts named by merges so far that nothing made

    def crossed(left, right, before):
        while ranks.get((left, right), before) >= before:
            if made[left] > made[right]:
                before, left = made[left], parts[left][1]
            elif made[right] >= 0:
                # equal merges go from left to right, so that the border's own comes before this one
                # at the same rank
                before, right = made[right] + 1, parts[right][0]
            else:
                return False
        return True

    for rank, (left, right, whole) in enumerate(pairs):
        if left not in made or right not in made:
            absent |= {left, right} - made.keys()
            continue
        if whole not in made and not crossed(left, right, rank):
            if whole in absent:
                raise ValueError(
                    f"merge {rank} makes a token that an earlier merge uses, which is not supported"
                )
            made[whole], parts[whole] = rank, (left, right)
        ranks[left, right] = rank
    return list(parts)
