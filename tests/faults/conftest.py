import pytest
from conftest import promised

from faults.preload import build


@pytest.fixture(scope="session")
def preload(tmp_path_factory):
    """preload.c, compiled."""
    library = build(tmp_path_factory.mktemp("preload"))
    if library is None:
        if promised("STATEDICT_IO_REQUIRE_NATIVE"):
            pytest.fail("STATEDICT_IO_REQUIRE_NATIVE=1, but there is no C compiler here, or no Linux")
        pytest.skip("needs Linux and a C compiler")
    return library
