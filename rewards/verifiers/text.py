"""Verifiers that compare characters."""


def exact(text: str, answer: str, *, strip: bool = True, ignore_case: bool = False, last_line: bool = False) -> float:
    """1 when the response is the answer, character for character, else 0.

        r = [text = answer]

    Source: the outcome reward of RLVR, Tulu 3 (Lambert et al. 2024), arXiv:2411.15124, without its answer extraction.

    Args:
        text: the response, decoded, without the stop token.
        answer: the row's answer.
        strip: white space around either counts for nothing.
        ignore_case: letters are compared case-folded.
        last_line: compare only the last line of the response that is not blank.
    Returns:
        0.0 or 1.0.

    >>> exact("12459\\n", "12459"), exact("12495", "12459")
    (1.0, 0.0)
    >>> exact("two and two:\\nFour", "four", ignore_case=True, last_line=True)
    1.0
    """
    if last_line:
        text = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return float(_plain(text, strip, ignore_case) == _plain(answer, strip, ignore_case))


def position_match(text: str, answer: str, *, strip: bool = True) -> float:
    """The share of characters that stand where the answer has them: partial credit for sequences.

        r = |{i : text_i = answer_i}| / max(|text|, |answer|)

    Source: the distance of Error Detecting and Error Correcting Codes (Hamming 1950),
    doi:10.1002/j.1538-7305.1950.tb00463.x, as a similarity, divided by the longer length, so that neither cutting short
    nor running on pays.

    Args:
        text: the response, decoded, without the stop token.
        answer: the row's answer.
        strip: white space around either counts for nothing.
    Returns:
        A share in [0, 1]; 1.0 exactly when both are equal.

    >>> position_match("12495", "12459"), position_match("12", "1245"), position_match("", "")
    (0.6, 0.5, 1.0)
    """
    text, answer = _plain(text, strip, False), _plain(answer, strip, False)
    longer = max(len(text), len(answer))
    return sum(a == b for a, b in zip(text, answer, strict=False)) / longer if longer else 1.0


def _plain(text: str, strip: bool, ignore_case: bool) -> str:
    text = text.strip() if strip else text
    return text.casefold() if ignore_case else text
