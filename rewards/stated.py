"""Where a response states its answer."""

import re

_BRACE = re.compile(r"\\boxed\s*\{|[{}]")


def boxed(text: str) -> str | None:
    r"""What stands in the last closed, non-empty \boxed{}; None where there is none. Linear in the text's length.

    >>> boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}."), boxed("no box"), boxed(r"\boxed{3} or \boxed{4")
    ('\\frac{1}{2}', None, '3')
    """
    opened: list[int | None] = []  # where each brace that is still open begins; None: not of a \boxed
    start, end = -1, -1
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(None)
        elif brace[0] != "}":
            opened.append(brace.end())
        elif opened and (begin := opened.pop()) is not None and text[begin : brace.start()].strip():
            start, end = begin, brace.start()
    return text[start:end] if start >= 0 else None


def stated(text: str) -> str:
    r"""Where the answer stands: the last \boxed{}, else what follows the last ####, else all.

    >>> stated(r"\boxed{3} #### 4"), stated("2 + 2 #### 4"), stated("4")
    ('3', ' 4', '4')
    """
    box = boxed(text)
    return text.rpartition("####")[2] if box is None else box


def shown(text: str) -> str:
    """The end of a text, for messages."""
    return repr(text if len(text) <= 80 else "..." + text[-77:])
