"""What several test files are given."""

import pytest
from images import prepared


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The prepared shapes; the working folder is theirs while a module's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        yield prepared(tmp_path_factory.mktemp("shapes"), patch)
