"""What the tests of the launch scripts share."""

import pytest

from tests.launch.cloud import Cloud, make_repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A clone's stand-in, which the scripts install from."""
    return make_repository(tmp_path_factory.mktemp("launch"))


@pytest.fixture
def cloud(tmp_path, repository):
    """A cloud whose trainings end well at once."""
    cloud = Cloud(tmp_path, repository)
    cloud.trainings(0)
    return cloud
