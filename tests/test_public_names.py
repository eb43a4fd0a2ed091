"""Everything that the package promises by name is there."""

import seriatim


def test_every_public_name_loads():
    missing = [name for name in seriatim.__all__ if not hasattr(seriatim, name)]
    assert not missing
