"""Text to token ids and back, from a checkpoint's own tokenizer.json, and the prompt formats of the model families.

    tok = load("path/to/Qwen3-4B")               # a Hugging Face folder
    ids = tok.chat("What is 12 * 34?")           # the prompt, up to where the reply starts
    tok.decode(ids), tok.stop_ids, tok.n_vocab

Two promises. Text never becomes a control token: a question that spells `<|im_end|>` is encoded as those ten characters; control
tokens enter a prompt only as ids, from the formats below. And plain text gets the ids that Hugging Face's `tokenizers` gives it, for the
same file without its added tokens (with them that library makes control tokens of spellings found in text).

What was simplified: byte-level BPE only, with the split patterns of the families we train; prompts of one question; no Jinja is run.
"""
import json
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import tiktoken

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
MAX_FILE = 64 * 2**20  # bytes; the largest tokenizer.json in use has about 20 MB
MAX_RUN = 25_000       # characters; longer runs are cut: the regex engine's stack overflows on a million spaces
UNKNOWN = "\ufffd".encode()

# A split pattern is code that runs on every text: a file may name one of these and nothing else.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # up to three digits together, where Qwen takes them one by one
NEMO = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"  # Mistral-Nemo: also splits camelCase
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
NO_SPLIT = r"(?s:.+)"


# ---------------------------------------------------------------- prompt formats
# Each gives the prompt as a list of control-token ids and plain texts. `c` maps the spelling of a control token to its id.

def chatml(c, question, system, thinking):
    """Qwen2.5 and Qwen3. Where there is a <think> token (Qwen3), thinking=False adds the empty think block, as Qwen3's template does for
    enable_thinking=False; the template of Qwen3-Instruct-2507 has no such block: use thinking=True there. Without a system text there is
    no system message, as in Qwen3; Qwen2.5's templates put in a default that differs between models and is not in tokenizer.json."""
    def turn(role, text):
        return [c["<|im_start|>"], f"{role}\n{text}", c["<|im_end|>"], "\n"]
    parts = (turn("system", system) if system else []) + turn("user", question) + [c["<|im_start|>"], "assistant\n"]
    if "<think>" in c and "</think>" in c and not thinking:
        parts += [c["<think>"], "\n\n", c["</think>"], "\n\n"]
    return parts


def llama3(c, question, system, thinking):
    """Llama 3. From 3.1 on (which has <|eom_id|>, unlike 3.0) the template always gives a system message, opened by two date lines. Today
    stays the day of Llama-3.1's template; Llama-3.2's takes the clock's, and a prompt that changes overnight spoils an experiment."""
    def turn(role, text):
        return [c["<|start_header_id|>"], role, c["<|end_header_id|>"], "\n\n" + text, c["<|eot_id|>"]]
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n" if "<|eom_id|>" in c else ""
    head = turn("system", dates + system.strip()) if dates or system else []
    reply = [c["<|start_header_id|>"], "assistant", c["<|end_header_id|>"], "\n\n"]
    return [c["<|begin_of_text|>"], *head, *turn("user", question.strip()), *reply]


def deepseek(c, question, system, thinking):
    """DeepSeek-R1-Distill. These models always think: since February 2025 their template opens the think block itself."""
    think = [c["<think>"], "\n"] if "<think>" in c else ["<think>\n"]
    return [c["<｜begin▁of▁sentence｜>"], system, c["<｜User｜>"], question, c["<｜Assistant｜>"], *think]


def mistral(c, question, system, thinking):
    """Mistral-Nemo-Instruct: the system text heads the user's message, with no spaces around."""
    return [c["<s>"], c["[INST]"], f"{system}\n\n{question}" if system else question, c["[/INST]"]]


def base(c, question, system, thinking):
    """Models that never learnt a chat format: the question, then the instruction, each on its line."""
    return [f"{question}\n{system}\n" if system else f"{question}\n"]


FORMATS = {  # name: (function, the control tokens it needs); "auto" takes the first whose tokens are all there
    "chatml": (chatml, ("<|im_start|>", "<|im_end|>")),
    "llama3": (llama3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "deepseek": (deepseek, ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")),
    "mistral": (mistral, ("<s>", "[INST]", "[/INST]")),
    "base": (base, ()),
}
STOPS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")  # Qwen's and Llama's; folders may name only one


# ---------------------------------------------------------------- the tokenizer

class Tokenizer:
    """What `load` returns.

    stop_ids  sorted ids that end a reply: eos_token_id of generation_config.json and of config.json, eos_token of tokenizer_config.json
              and the family's own, as far as the vocabulary has them. () when there are none: then only the length limit ends a reply.
    n_vocab   highest id + 1. A model may have more rows (Qwen pads its embedding); those are masked in sampling and in training.
    format    name of the prompt format, a key of FORMATS.
    control   {spelling: id} of the control ("added") tokens.
    """

    def __init__(self, tokens, control, merging, words, pattern, nfc):
        """tokens: {id: bytes}. merging: ids that merges make, by rank. words: ids that only a whole word gets. pattern: what a word is."""
        self.control, self.n_vocab = control, max(tokens) + 1
        self.format, self.stop_ids, self._bos = "base", (), None  # `load` fills these in
        self._tokens, self._merging, self._words, self._nfc = tokens, merging, words, nfc
        self._bpe = _encoding(pattern, [tokens[i] for i in merging])
        # Built from bytes and whole words alone it has no steps to make a word by merging: it finds whole words and nothing else.
        self._finder = _encoding(pattern, [bytes([b]) for b in range(256)] + [tokens[i] for i in words]) if words else None

    def encode(self, text):
        """Ids of `text` as plain text, without BOS. Control tokens spelled in it stay text. Lone surrogates become U+FFFD.

        Runs of more than MAX_RUN characters that are all white space, or have none, are cut into pieces encoded one by one: that keeps the
        time linear. Nothing is lost: decode(encode(text)) is text, in NFC form where the file asks for that (Qwen).
        """
        text = unicodedata.normalize("NFC", text) if self._nfc else text
        cuts = [0]
        if len(text) > MAX_RUN:
            for run in re.finditer(r"\s+|\S+", text):
                cuts.extend(range(run.start() + MAX_RUN, run.end(), MAX_RUN))
        return [i for a, b in pairwise([*cuts, len(text)]) for i in self._encode(text[a:b])]

    def _encode(self, text):
        ids = [self._merging[rank] for rank in self._bpe.encode_ordinary(text)]
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

    def decode(self, ids):
        """Text of `ids`, integers in any iterable. Never fails: an id outside the vocabulary and bytes that are no UTF-8 give U+FFFD.
        Control tokens give their spelling."""
        return b"".join(self._tokens.get(int(i), UNKNOWN) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, i):
        """Bytes of one token, which need not be whole characters; those of U+FFFD outside the vocabulary."""
        return self._tokens.get(int(i), UNKNOWN)

    def chat(self, question, system=SYSTEM, thinking=False):
        """Prompt ids for one question, up to where the reply starts. system "" or None: no instruction. thinking=True: Qwen3 may think."""
        render, _ = FORMATS[self.format]
        parts = render(self.control, question, system or "", thinking)
        if self.format == "base" and self._bos is not None:
            parts = [self._bos, *parts]
        return [i for part in parts for i in ([part] if isinstance(part, int) else self.encode(part))]


def load(folder, format="auto"):
    """Tokenizer of a Hugging Face folder: tokenizer.json and, where there, tokenizer_config.json, generation_config.json, config.json.

    format  a key of FORMATS, or "auto": the first whose control tokens the file has. Llama 3 base models have the chat tokens but never
            learnt them: a folder whose eos_token is <|end_of_text|> and that has no chat template gets "base".
    Raises  FileNotFoundError without a tokenizer.json; ValueError (one line) for one that is broken, or no byte-level BPE of a known
            family, and for a format whose control tokens it lacks.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json: give the folder of a Hugging Face model")
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
            raise ValueError(f"{folder / name}: eos_token_id is {given!r:.80}, which is no token id")
        stops.update(ids)
    tok.stop_ids = tuple(sorted(i for i in stops if i is not None and 0 <= i < tok.n_vocab))

    able = [name for name, (_, needs) in FORMATS.items() if all(token in tok.control for token in needs)]
    has_template = "chat_template" in config or any((folder / f"chat_template.{end}").exists() for end in ("jinja", "json"))
    tok.format = able[0] if format == "auto" else format
    if format == "auto" and tok.format == "llama3" and eos == "<|end_of_text|>" and not has_template:
        tok.format = "base"
    if tok.format not in able:
        raise ValueError(f"{folder} has no tokens for the prompt format {format!r}: choose one of auto, {', '.join(able)}")
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
    """Text of a special token in tokenizer_config.json, where it is a string or an object with the text as `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _encoding(pattern, tokens):
    return tiktoken.Encoding("", pat_str=pattern, mergeable_ranks={t: rank for rank, t in enumerate(tokens)}, special_tokens={})


def _build(file):
    """Tokenizer of a parsed tokenizer.json. Raises ValueError saying what is wrong or not supported."""
    model = file.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise ValueError(f"the model is of type {model.get('type')!r:.80}: only byte-level BPE with vocab and merges is supported")
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ValueError(f"{key} is {model[key]!r:.80}: only plain byte-level BPE is supported")
    normalizer = (file.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"the normalizer {normalizer!r:.80} is not supported: only NFC, or none")

    vocab, added = model["vocab"], file.get("added_tokens") or []
    control = {token["content"]: token["id"] for token in added}
    ids = vocab | control
    if not all(isinstance(token, str) and token and _is_int(i) and i >= 0 for token, i in ids.items()):
        raise ValueError("a token is not a text with an id of 0 or more")
    if len(set(ids.values())) < len(ids) or len(control) < len(added) or any(vocab.get(t, i) != i for t, i in control.items()):
        raise ValueError("two tokens share an id, or one token has two")
    if max(ids.values(), default=0) > 2 * len(ids) + 1000:
        raise ValueError(f"ids go up to {max(ids.values())} for {len(ids)} tokens: they must lie closer")

    alphabet = _byte_alphabet()
    tokens, plain = {}, {}  # {id: bytes} of all; {token: id} of those that text may become
    for token, i in vocab.items():
        try:
            tokens[i] = token.translate(alphabet).encode("latin-1")
            plain[token] = i
        except UnicodeEncodeError:  # not written in stand-ins for bytes, so that no text leads to it
            tokens[i] = token.encode("utf-8", "replace")
    for token, i in control.items():
        tokens[i] = token.encode("utf-8", "replace")
        plain.pop(token, None)
    letters = [chr(c) for c, b in alphabet.items() if b < 256]
    if not all(letter in plain for letter in letters):
        raise ValueError("some of the 256 byte tokens are missing, or are added tokens: only byte-level BPE is supported")

    merging = _merge_order([plain[letter] for letter in letters], plain, model, tokens)
    words = sorted(set(plain.values()) - set(merging)) if model.get("ignore_merges") else []
    if any(len(tokens[i]) < 3 for i in words):
        raise ValueError("a token of two bytes has no merge, which is not supported together with ignore_merges")
    return Tokenizer(tokens, control, merging, words, _split_pattern(file.get("pre_tokenizer")), nfc=normalizer == "NFC")


def _byte_alphabet():
    """GPT-2's printable stand-ins for the 256 bytes, {stand-in: byte} for str.translate; what else is below 256 is sent out of latin-1."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    return dict.fromkeys(others, 0x10FFFF) | {b: b for b in printable} | {256 + n: b for n, b in enumerate(others)}


def _split_pattern(pre):
    """The regular expression that cuts text into words, from the `pre_tokenizer` entry."""
    pre = pre or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds, last = [step.get("type") for step in steps], steps[-1]
    split, use_regex = kinds == ["Split", "ByteLevel"], last.get("use_regex", True)
    if not (kinds == ["ByteLevel"] or split and not use_regex) or last.get("add_prefix_space"):
        raise ValueError(f"the pre-tokenizer {kinds!r:.80} is not supported: only ByteLevel, with or without a Split before, "
                         "and no prefix space")
    if not split:
        return GPT2 if use_regex else NO_SPLIT
    pattern = steps[0]["pattern"].get("Regex")
    if pattern not in (GPT2, QWEN, LLAMA3, NEMO) or steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        raise ValueError(f"the split pattern {str(pattern)[:60]!r} is not one of GPT-2, Qwen, Llama 3, Mistral-Nemo")
    return pattern


def _bos(file, config, control):
    """Id that the folder has put before every text: the first token of the post-processor's template, or bos_token if add_bos_token."""
    post = file.get("post_processor") or {}
    for step in post.get("processors", [post]):
        first = step["single"][0] if step.get("type") == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            return control[first["SpecialToken"]["id"]]
    return control.get(_spelling(config.get("bos_token"))) if config.get("add_bos_token") else None


# ---------------------------------------------------------------- merge order

def _merge_order(byte_ids, plain, model, tokens):
    """Ids of the 256 bytes, then of the tokens that merging makes, by rank.

    tokenizer.json merges the listed *pairs*, by their place in the list. tiktoken merges any neighbours that together are a token, by the
    rank of that token. The two agree when each token here has the rank of the pair that makes it, and tokens that no pair makes are left
    out. Files come in two kinds: converted from tiktoken, with every split of every token listed, and trained, with parts before wholes.
    """
    vocab, pairs = model["vocab"], []
    for merge in model["merges"]:
        left, right = merge.partition(" ")[::2] if isinstance(merge, str) else merge
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ValueError(f"the merge {left!r:.40} {right!r:.40} has a token that is not in the vocabulary")
        if left in plain and right in plain and left + right in plain:  # else it leads to or from a control token
            pairs.append((plain[left], plain[right], plain[left + right]))
    if len(set(pairs)) < len(pairs):
        raise ValueError("a merge is listed twice")
    wholes = list(dict.fromkeys(whole for _, _, whole in pairs))
    if len(wholes) == len(pairs) or not _all_splits(pairs, wholes, plain):
        return byte_ids + _made(byte_ids, pairs)

    order = byte_ids + wholes
    if model.get("ignore_merges"):
        return order
    # tiktoken takes a word that is a token as it is. Here merges must make it: followed by a byte that never merges, they have to.
    bpe = _encoding(NO_SPLIT, [tokens[i] for i in order])
    return [i for rank, i in enumerate(order) if rank < 256 or bpe._encode_single_piece(tokens[i] + b"\xff")[0] == rank]


def _all_splits(pairs, wholes, plain):
    """Whether every split of each token into two tokens is listed, all splits of one token together: then any neighbours may merge."""
    if 1 + sum(a[2] != b[2] for a, b in pairwise(pairs)) > len(wholes):
        return False
    listed, text = {pair[:2] for pair in pairs}, {i: token for token, i in plain.items()}
    splits = ((plain.get(token[:k]), plain.get(token[k:])) for token in map(text.get, wholes) for k in range(1, len(token)))
    return all(split in listed for split in splits if None not in split)


def _made(byte_ids, pairs):
    """Ids of the tokens that merging makes, by rank. Raises ValueError where a pair stands before one that makes its parts.

    As long as no merge crosses the ends of a token, its bytes merge as if they stood alone. So (left, right) makes the token if and only
    if, alone, no earlier merge joins the end of left to the start of right; to see that, undo the merges at this border, last one first.
    """
    made = dict.fromkeys(byte_ids, -1)  # id: rank of the merge that makes it
    parts, ranks = {}, {}               # id: its two halves; pair: its rank
    absent = set()                      # parts named by merges so far that nothing made

    def crossed(left, right, before):
        while ranks.get((left, right), before) >= before:
            if made[left] > made[right]:
                before, left = made[left], parts[left][1]
            elif made[right] >= 0:  # equal merges go from left to right, so that the border's own comes before this one at the same rank
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
                raise ValueError(f"merge {rank} makes a token that an earlier merge uses, which is not supported")
            made[whole], parts[whole] = rank, (left, right)
        ranks[left, right] = rank
    return list(parts)
