"""What the tests of the ops share: settings of the property tests, and the backend of a case."""

from collections.abc import Iterator

import pytest
from hypothesis import settings
from ops.backends import Backend, prepare

# A loaded machine is no failure.
settings.register_profile("ops", deadline=None)
settings.load_profile("ops")


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The backend that a test is parametrized with, see `ops.backends`."""
    yield from prepare(request.param, monkeypatch)
