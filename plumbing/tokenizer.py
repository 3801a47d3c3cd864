"""Text to token ids and back, from a checkpoint's own tokenizer.json, and the prompt formats of the
model families.

    tok = load_tokenizer("path/to/Qwen3-4B")     # a Hugging Face folder
    ids = tok.chat("What is 12 * 34?")           # the prompt, up to where the reply starts
    tok.decode(ids), tok.stop_ids, tok.n_vocab

Two promises. Text never becomes a control token: a question that spells `<|im_end|>` is encoded as
those ten characters; control tokens enter a prompt only as ids, from the formats below. And plain
text gets the ids that Hugging Face's `tokenizers` gives it, for the same file without its added
tokens (with them that library makes control tokens of spellings found in text). Bytes that a
vocabulary has no token for are dropped, as that library drops them: SmolLM2 lacks 21 of 256,
control bytes and such as hardly any text has.

What was simplified: byte-level BPE only, with ids that rise with the merges and the split patterns
of the families we train; prompts of one question; no Jinja is run.
"""

import re
import unicodedata
from itertools import count, pairwise
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

from plumbing.rows import read_json

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
MAX_FILE = 64 * 2**20  # bytes; the largest tokenizer.json in use has about 20 MB
# characters; longer runs are cut: the regex engine's stack overflows on a million spaces
MAX_RUN = 25_000
UNKNOWN = "\ufffd".encode()

# A split pattern is code that runs on every text: a file may name one of these and nothing else.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
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
NEW_DIGITS = "\U00011de0-\U00011de9\U00016ff4-\U00016ff6"
DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|[\p{N}#]| ?[^\s\p{L}\p{N}#]+|\s+(?![^\s\p{N}#])|\s+"
DIGITS = DIGITS.replace("#", NEW_DIGITS)
TOO_NEW = rf"[^\P{{Cn}}{NEW_DIGITS}]"  # characters that tiktoken has no class for
NO_SPLIT = r"(?s:.+)"


# ---------------------------------------------------------------- prompt formats

CHATML = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
LLAMA = (
    "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
DEEPSEEK = "<｜begin▁of▁sentence｜>{system}<｜User｜>{question}<｜Assistant｜><think>\n"

# name: (the prompt with a system text, and without one), up to where the reply starts
FORMATS = {
    # Qwen2.5, Qwen3, SmolLM2
    "chatml": ("<|im_start|>system\n{system}<|im_end|>\n" + CHATML, CHATML),
    "llama3": ("<|begin_of_text|>" + LLAMA_SYSTEM + LLAMA, "<|begin_of_text|>" + LLAMA),
    # DeepSeek-R1-Distill: always thinks, and since February 2025 its template says so
    "deepseek": (DEEPSEEK, DEEPSEEK.replace("{system}", "")),
    # Mistral-Nemo-Instruct
    "mistral": ("<s>[INST]{system}\n\n{question}[/INST]", "<s>[INST]{question}[/INST]"),
    # models that never learnt a chat format
    "base": ("{question}\n{system}\n", "{question}\n"),
}
# Qwen3's, for enable_thinking=False. Qwen3-Instruct-2507 has no such block: use thinking=True there
NO_THOUGHTS = "<think>\n\n</think>\n\n"
# Today stays the day of Llama-3.1's template. Llama-3.2's takes the clock's, and a prompt that
# changes overnight spoils an experiment.
LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
# the control tokens in these prompts; the thinking ones are text where a vocabulary lacks them
CONTROL = r"<\|\w+\|>|<｜[^｜]+｜>|<s>|\[/?INST\]"
THINKING = r"</?think>"
# Qwen's and Llama's; folders may name only one
STOPS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")


# ---------------------------------------------------------------- the tokenizer


class Tokenizer:
    """What `load_tokenizer` returns.

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

    def __init__(self, file):
        """file: what a tokenizer.json holds. Raises ValueError saying what is wrong or not
        supported."""
        # `load_tokenizer` fills these in
        self.format, self.stop_ids, self.default_system, self._bos = "base", (), "", []
        model, normalizer = file.get("model") or {}, (file.get("normalizer") or {}).get("type")
        _check_kind(model, normalizer)
        self._nfc = normalizer == "NFC"
        added = [(token["content"], token["id"]) for token in file.get("added_tokens") or []]
        self.control, ids = dict(added), _token_ids({*model["vocab"].items(), *added})
        self.n_vocab = max(ids.values()) + 1

        byte_of = {letter: b for b, letter in enumerate(byte_alphabet())}
        plain = {}  # {token: its bytes} of those that text may become
        for token in ids.keys() - self.control.keys():
            if set(token) <= byte_of.keys():
                plain[token] = bytes(map(byte_of.get, token))
        self._tokens = {i: plain.get(t) or t.encode("utf-8", "replace") for t, i in ids.items()}
        self.missing = bytes(b for letter, b in byte_of.items() if letter not in plain)
        _check_missing(self.missing, model)

        order = _merge_order(model["merges"], ids, plain)
        self._ids = [ids[token] for token in order]  # by rank
        self._words = {}  # {bytes: id} of tokens that no merge makes: whole words alone get them
        if model.get("ignore_merges"):
            self._words = {plain[token]: ids[token] for token in plain.keys() - set(order)}
        pattern = _split_pattern(file.get("pre_tokenizer") or {})
        # tiktoken has to have all bytes
        last = [bytes([b]) for b in self.missing]
        self._bpe = _encoding(pattern, [plain[token] for token in order] + last)
        # the same words for `regex`, which has white space under another name, and knows letters
        # that are too new for tiktoken
        pattern = pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
        self._word = regex.compile(pattern)
        self._too_new = _encoding(TOO_NEW, [bytes([b]) for b in range(256)])

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
        for run in re.finditer(r"\s+|\S+", text):
            cuts.extend(range(run.start() + MAX_RUN, run.end(), MAX_RUN))
        ids = []
        for a, b in pairwise([*cuts, len(text)]):
            ids += self._encode(text[a:b])
        return ids

    def _encode(self, text):
        ranks = self._bpe.encode_ordinary(text)
        if self._words or max(ranks, default=0) >= len(self._ids):
            return self._encode_words(text)
        return [self._ids[rank] for rank in ranks]

    def _encode_words(self, text):
        """Ids of a text in which words may have a token that no merge makes, or bytes have none.

        Such bytes are taken out once the text is cut into words: what stood around them in one word
        may merge, what stood in two may not."""
        # lone surrogates, as tiktoken sees to them
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        too_new = bytes(self._too_new.encode_ordinary(text)).decode()
        known = text.translate(dict.fromkeys(map(ord, too_new), 0x10FFFF))
        ids = []
        for match in self._word.finditer(known):
            word = text[match.start() : match.end()].encode().translate(None, delete=self.missing)
            if word in self._words:
                ids.append(self._words[word])
            elif word:
                ids += [self._ids[rank] for rank in self._bpe._encode_single_piece(word)]
        return ids

    def decode(self, ids):
        """Text of `ids`, integers in any iterable. Never fails: an id outside the vocabulary and
        bytes that are no UTF-8 give U+FFFD. Control tokens give their spelling."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, i):
        """Bytes of one token, which need not be whole characters; those of U+FFFD outside the
        vocabulary."""
        return self._tokens.get(int(i), UNKNOWN)

    def chat(self, question, system=SYSTEM, thinking=False):
        """Prompt ids for one question, up to where the reply starts.

        system    the instruction; "" or None: no system message, so that a template's own stands
        thinking  True: Qwen3 may think
        """
        system = system or self.default_system
        template = FORMATS[self.format][0 if system else 1]
        if self.format == "chatml" and "<think>" in self.control and not thinking:
            template += NO_THOUGHTS
        if self.format == "llama3":
            question, system = question.strip(), system.strip()
            # from 3.1 on there always is a system message, opened by dates
            if "<|eom_id|>" in self.control:
                template, system = FORMATS["llama3"][0], LLAMA_DATES + system
        ids = list(self._bos)
        for part in re.split(f"({CONTROL}|{THINKING})", template):
            if part in self.control:
                ids.append(self.control[part])
            else:
                ids += self.encode(part.format(question=question, system=system))
        return ids


def _encoding(pattern, tokens):
    """tiktoken's BPE of these tokens, ranked as they stand."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


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
        tok = Tokenizer(file)
        bos = tok.control.get(_bos(file, config))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f"{path} is not a tokenizer ({type(e).__name__}: {str(e)[:80]})") from None

    eos, template = _spelling(config.get("eos_token")), _template(folder, config)
    stops = {tok.control.get(spelling) for spelling in (*STOPS, eos)}
    for name in ("generation_config.json", "config.json"):
        stops.update(_eos_ids(folder / name))
    tok.stop_ids = tuple(sorted(stops & set(range(tok.n_vocab))))

    able = []  # formats whose control tokens are there
    for name, (prompt, _) in FORMATS.items():
        if set(re.findall(CONTROL, prompt)) <= tok.control.keys():
            able.append(name)
    if format == "auto":
        never_learnt = eos in ("<|end_of_text|>", "<|endoftext|>") and not template
        format = "base" if never_learnt else able[0]
    if format not in able:
        raise ValueError(
            f"{folder} has no tokens for the prompt format {format!r}: choose one of auto, "
            f"{', '.join(able)}"
        )
    tok.format = format
    if format == "chatml":
        tok.default_system = _default_system(template)
    if format == "base" and bos is not None:
        tok._bos = [bos]
    return tok


# ---------------------------------------------------------------- the files beside tokenizer.json


def _read(path):
    """The JSON object in a file; {} when there is no such file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{path} has more than {MAX_FILE >> 20} MB: no tokenizer is that large")
    return read_json(path)


def _eos_ids(path):
    """The ids that a generation_config.json or config.json names as eos_token_id, None among
    them where it names none."""
    given = _read(path).get("eos_token_id")
    ids = given if isinstance(given, list) else [given]
    if not all(i is None or type(i) is int for i in ids):
        raise ValueError(f"{path}: eos_token_id is {given!r:.80}, which is no token id")
    return ids


def _spelling(token):
    """Text of a special token in tokenizer_config.json, where it is a string or an object with the
    text as `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _bos(file, config):
    """Spelling of the token that the folder has put before every text, or None: the first of the
    post-processor's template, or bos_token if add_bos_token."""
    post = file.get("post_processor") or {}
    for step in post.get("processors", [post]):
        first = step["single"][0] if step.get("type") == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            return first["SpecialToken"]["id"]
    return _spelling(config.get("bos_token")) if config.get("add_bos_token") else None


def _template(folder, config):
    """The folder's chat template, which is Jinja; "" when it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8", "replace")
    given = config.get("chat_template") or _read(folder / "chat_template.json").get("chat_template")
    for named in given if isinstance(given, list) else ():  # several: [{"name":, "template":}]
        if isinstance(named, dict) and named.get("name") == "default":
            given = named.get("template")
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


# ---------------------------------------------------------------- reading tokenizer.json


def byte_alphabet():
    """The 256 characters in which byte-level BPE spells bytes, as one string: character b is byte
    b's. Bytes that print in latin-1 are spelled as themselves, the others from U+0100 on (GPT-2).
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = count(256)
    return "".join(chr(b if b in printable else next(others)) for b in range(256))


def _token_ids(listed):
    """{token: id} of all tokens, from the pairs that a file lists."""
    ids, highest = dict(listed), 2 * len(listed) + 1000
    if not all(
        isinstance(t, str) and t and type(i) is int and 0 <= i <= highest for t, i in listed
    ):
        raise ValueError(
            "a token is not a text with an id of 0 or more, or ids go far beyond the "
            f"{len(listed)} tokens: they must lie closer"
        )
    if not len(listed) == len(ids) == len(set(ids.values())):
        raise ValueError("two tokens share an id, or one token has two")
    return ids


def _check_kind(model, normalizer):
    """Raise ValueError for what is no plain byte-level BPE."""
    kind = model.get("type", "BPE")
    if kind != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ValueError(
            f"the model is of type {kind!r:.80}: only byte-level BPE with vocab and merges is "
            "supported"
        )
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ValueError(f"{key} is {model[key]!r:.80}: only plain byte-level BPE is supported")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"the normalizer {normalizer!r:.80} is not supported: only NFC, or none")


def _check_missing(missing, model):
    """Refuse bytes without a token where more is at stake than bytes that texts hardly have."""
    if set(missing) & {9, 10, 13, *range(32, 127)}:
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


def _merge_order(merges, ids, plain):
    """The tokens that text may become by merging, by rank: the letters of the bytes, then what
    merges make.

    tokenizer.json merges the listed *pairs*, by their place in the list. tiktoken merges any
    neighbours that together are a token, by the rank of that token. The two agree where ids rise
    with the merges, as training and conversion write them: each token is made by one merge, or by
    all its splits, one after the other. Other lists are refused.
    """
    order, latest = [letter for letter in byte_alphabet() if letter in plain], -1
    for merge in merges:
        left, right = merge.partition(" ")[::2] if isinstance(merge, str) else merge
        known = {left, right, left + right} <= ids.keys()
        if known and left + right not in plain:
            continue  # it makes a control token
        made = ids.get(left + right, -1)
        if not known or made < latest:
            raise ValueError(
                f"the merge {left!r:.40} {right!r:.40} has a token that is not in the vocabulary, "
                "or makes one of a lower id than the merge before it"
            )
        if made > latest:
            order.append(left + right)
        latest = made
    return order


SPLITS = {  # types of the steps and use_regex of the last: the patterns that they may stand for
    ("ByteLevel", True): [GPT2],
    ("ByteLevel", False): [NO_SPLIT],
    ("Digits", "ByteLevel", True): [DIGITS],
    ("Split", "ByteLevel", False): [GPT2, QWEN, LLAMA3, NEMO],
}


def _split_pattern(pre):
    """The regular expression that cuts text into words, from the `pre_tokenizer` entry."""
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds, first, last = [step.get("type") for step in steps], steps[0], steps[-1]
    known = SPLITS.get((*kinds, last.get("use_regex", True)), [])
    in_runs = kinds[0] == "Digits" and not first.get("individual_digits")
    if not known or in_runs or last.get("add_prefix_space"):
        raise ValueError(
            f"the pre-tokenizer {kinds!r:.80} is not supported: only ByteLevel, alone or "
            "after a Split or Digits one by one, and no prefix space"
        )
    if kinds[0] != "Split":
        return known[0]
    pattern = first["pattern"].get("Regex")
    if pattern not in known or first.get("behavior") != "Isolated" or first.get("invert"):
        raise ValueError(
            f"the split pattern {str(pattern)[:60]!r} is not one of GPT-2, Qwen, "
            "Llama 3, Mistral-Nemo"
        )
    return pattern
