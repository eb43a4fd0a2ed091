"""Everything that the package promises by name is there."""

import seriatim


def test_every_public_name_loads():
    missing = [name for name in seriatim.__all__ if not hasattr(seriatim, name)]
    assert not missing


def test_no_public_name_is_given_twice():
    names = [name for names in seriatim._WHERE.values() for name in names]
    assert len(names) == len(set(names))
