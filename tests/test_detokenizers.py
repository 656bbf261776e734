"""pipelines.detokenizers: the published rules on lines of the benchmarks."""

import pytest

from pipelines.detokenizers import NAMES, detokenized


@pytest.mark.parametrize(
    ("name", "spaced", "expected"),
    [
        (
            "wikitext",
            ' = Robert = \n The well @-@ known 1 @,@ 000 @.@ 5 ( born 1979 ) said : " no " , didn \'t he ? Yes . \n',
            ' = Robert =\nThe well-known 1,000.5 (born 1979) said: "no", didn \'t he? Yes.\n',
        ),
        (
            "wikitext",
            " = = Career = = \n the boys ' own [ 1 ] at 5 \u00b0 C",
            " == Career ==\nthe boys' own [1] at 5\u00b0C",
        ),
        (
            "ptb",
            "the <unk> 's and firms ' n't up N N N or $ N \\/ share # N .",
            "the ?'s and firms'n't up 1 1 1 or $1 / share #1 .",
        ),
        (
            "lm1b",
            'He said : " it \'s ( not ) over " , and paid $ 5 / \u00a3 3 . http : / / a.b he asked ?',
            'He said: "it\'s (not) over", and paid $5/\u00a33. http://a.b he asked?',
        ),
        ("lm1b", "The end .", "The end."),
        ("lambada", "  \u201c yes , \u201d he said\n", '\n" yes , " he said'),
        ("", " as  it was ", " as  it was "),
    ],
)
def test_rules(name: str, spaced: str, expected: str) -> None:
    assert detokenized(spaced, name) == expected


def test_numbers_side_by_side_as_ten_passes_would_leave_them() -> None:
    for count in range(12):
        text = " N" * count + " end"
        slow = text
        for _ in range(10):
            slow = slow.replace(" N ", " 1 ")
        assert detokenized(text, "ptb") == slow


def test_names() -> None:
    assert NAMES == ("", "wikitext", "ptb", "lm1b", "lambada")
    with pytest.raises(KeyError):
        detokenized("x", "wiki")
