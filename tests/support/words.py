"""Texts that people, cameras and programs write, for hypothesis."""

from hypothesis import strategies as st

ODD = "ab01 _-.,'\"\\/[]{}()@#%~=:;*?!é日ü\u00e9e\u0301\ufeff\u2028\x85\x1c\t\r\n\U0001f600"
"""Letters that something or other takes for more than letters."""


def letters(without: str = ""):
    """Any letter of Unicode but halves of one, and often an odd one."""
    anything = st.integers(1, 0x10FFFF).filter(lambda n: not 0xD800 <= n < 0xE000).map(chr)
    return st.one_of(st.sampled_from(ODD), anything).filter(lambda letter: letter not in without)


def texts(without: str = "", min_size: int = 0, max_size: int = 30):
    """Any text."""
    return st.text(letters(without), min_size=min_size, max_size=max_size)


def names(max_size: int = 30):
    """Names that a file may have on Linux, without a dot."""
    return texts("/.", 1, max_size).filter(lambda name: len(name.encode()) < 200)
