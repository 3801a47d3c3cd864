"""The reward of the reference: string equality, for replication. verify.py is what to use."""

import re


def hendrycks(response, gold):
    """The reward of the reference: equality of two strings after the normalisation of the MATH
    benchmark (Hendrycks et al. 2021).

    Kept with its quirks, so that published runs can be replicated: "\\boxed " anywhere takes what
    follows its last occurrence up to a "$"; \\fbox is never right; only 0.5 among decimals is a
    fraction; text from "\\text{ " on is cut; a malformed \\frac or \\sqrt on either side makes the
    comparison one of raw strings.
    """
    answer = boxed(response)
    if answer is None:
        return False
    try:
        return normalise(answer) == normalise(gold)
    except ValueError:
        return answer == gold


def boxed(response):
    if r"\boxed " in response:
        return response.rpartition(r"\boxed ")[2].partition("$")[0]
    box = response[response.rfind(r"\boxed") :]
    depth = 0
    for brace in re.finditer("[{}]", box if box.startswith(r"\boxed{") else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return box[7 : brace.start()]
    return None


def normalise(s):
    s = s.replace("\n", "").replace(r"\!", "").replace("\\\\", "\\")
    s = s.replace("tfrac", "frac").replace("dfrac", "frac")
    for old in (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$"):
        s = s.replace(old, "")
    if s.count(r"\text{ ") > 1:
        raise ValueError("two units")
    s = s.partition(r"\text{ ")[0]
    s = s.replace(r"\%", "").replace(r"\%", "")  # twice: of "\\%%" nothing is left
    s = re.sub(r"(^|[ {])\.", r"\g<1>0.", s)
    if s.count("=") == 1 and s.index("=") <= 2:
        s = s.partition("=")[2]
    if re.search(r"\\sqrt(?=\\sqrt|\Z)", s):
        raise ValueError("a root of nothing")
    s = re.sub(r"(?s)\\sqrt([^{])", r"\\sqrt{\1}", s).replace(" ", "")
    short = re.search(r"(?s)\\frac([^{]?)(?=\\frac|\Z)", s)
    if short and not short[1]:
        raise ValueError("a fraction of nothing")
    if not short:
        s = re.sub(r"(?s)\\frac([^{])([^{])", r"\\frac{\1}{\2}", s)
        s = re.sub(r"(?s)\\frac([^{])\{", r"\\frac{\1}{", s)
    if s == "0.5":
        return r"\frac{1}{2}"
    ratio = re.fullmatch(r"(0|-?[1-9][0-9]{0,4299})/(0|-?[1-9][0-9]{0,4299})", s)
    return rf"\frac{{{ratio[1]}}}{{{ratio[2]}}}" if ratio else s
