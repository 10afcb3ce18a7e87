"""Any change of a sealed file is told, and the checksum itself is no exception."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.run.checksums import BLANK, KEY, checksum, intact, sealed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(st.binary(), st.binary().filter(lambda after: BLANK[:17] not in after), st.data())
def test_every_byte_is_covered(before: bytes, after: bytes, data: st.DataObject) -> None:
    whole = sealed(before + BLANK + after)
    assert intact(whole)
    place = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    assert not intact(whole[:place] + bytes([other]) + whole[place + 1 :])
    assert not intact(whole[:place])


def test_the_digest_is_that_of_the_file_with_zeros() -> None:
    assert sealed(BLANK)[-64:].decode() == hashlib.sha256(BLANK).hexdigest()
    for data in (b"", b"no mark", BLANK[:-1], sealed(BLANK), BLANK + b"hlmtheory-sha256:"):
        with pytest.raises(ValueError, match="no BLANK"):
            sealed(data)
    assert intact(sealed(BLANK * 2))
    for data in (b"", b"no mark", BLANK, sealed(BLANK) * 2):
        assert not intact(data)


@given(st.dictionaries(st.text().filter(lambda key: key != KEY), JSON))
def test_json_goes_both_ways_whatever_its_layout(content: dict) -> None:
    told = checksum(content)
    again = json.loads(json.dumps({KEY: told, **content}, indent=3))
    assert checksum(again) == told
    assert checksum({**content, "more": 1}) != told
