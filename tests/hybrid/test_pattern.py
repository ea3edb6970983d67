"""Block patterns: what can be written, and what every mistake is answered with."""

from __future__ import annotations

import pytest

from hybrid.pattern import KINDS, MAX_BLOCKS, PatternError, parse_pattern


@pytest.mark.parametrize(
    "pattern, blocks",
    [
        ("P", "P"),
        ("P*8", "PPPPPPPP"),
        ("PRMA", "PRMA"),
        ("R M*21 R", "R" + "M" * 21 + "R"),
        ("R M*5 R M*5 R R", "RMMMMMRMMMMMRR"),
        ("R M*30", "R" + "M" * 30),
        ("A*8", "AAAAAAAA"),
        ("  P *  2   R ", "PPR"),
        ("P*2P", "PPP"),
        ("P*2M*3", "PPMMM"),
        ("R\tM\nR", "RMR"),
        ("P*1", "P"),
        ("P*007", "P" * 7),
        (f"P*{MAX_BLOCKS}", "P" * MAX_BLOCKS),
        (f"R P*{MAX_BLOCKS - 2} R", "R" + "P" * (MAX_BLOCKS - 2) + "R"),
    ],
)
def test_good(pattern: str, blocks: str) -> None:
    assert parse_pattern(pattern) == list(blocks)


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("", "empty pattern"),
        ("   ", "cannot read"),
        ("X", "unknown block 'X'"),
        ("p*8", "unknown block 'p'"),
        ("P*8 Q", "unknown block 'Q'"),
        ("PP*2 rR", "unknown block 'r'"),
        ("P*0", "repetition of 0"),
        ("R P*0 R", "repetition of 0"),
        ("P*-1", "cannot read '*-1'"),
        ("P*", "cannot read '*'"),
        ("*3", "cannot read '*3'"),
        ("P**2", "cannot read '**2'"),
        ("P*2*3", "cannot read '*3'"),
        ("P*2.5", "cannot read '.5'"),
        ("P*x", "cannot read '*x'"),
        ("8*P", "cannot read '8*P'"),
        ("P,R", "cannot read ',R'"),
        ("[P]", "cannot read '[P]'"),
        ("P-R", "cannot read '-R'"),
        ("П", "cannot read 'П'"),
        (f"P*{MAX_BLOCKS + 1}", f"1 to {MAX_BLOCKS} blocks"),
        (f"P*{MAX_BLOCKS} R", f"1 to {MAX_BLOCKS} blocks"),
        ("P*99999999999999999999", f"1 to {MAX_BLOCKS} blocks"),
        pytest.param("P*" + "9" * 5_000, "", id="5000 digits"),
        ("P\nX", "unknown block 'X'"),
    ],
)
def test_bad(pattern: str, said: str) -> None:
    try:
        parse_pattern(pattern)
    except PatternError as error:
        assert said in str(error) and "\n" not in str(error)
    else:
        pytest.fail("no error")


def test_messages_say_what_would_be_right() -> None:
    with pytest.raises(PatternError) as caught:
        parse_pattern("P*8 B")
    assert "'P*8 B'" in str(caught.value) and all(kind in str(caught.value) for kind in KINDS)
    with pytest.raises(PatternError, match=r'write e\.g\. "P\*8"'):
        parse_pattern("")


def test_every_kind_can_stand_alone_and_repeat() -> None:
    for kind in KINDS:
        assert parse_pattern(f"{kind}*3") == [kind] * 3
