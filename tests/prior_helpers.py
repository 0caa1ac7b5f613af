"""Class pictures in a folder, and settings that draw them: what the tests of prior preservation share.

A test module says `pytest_plugins = ("prior_helpers",)` to get the fixtures, and may import the rest before that:
PYTEST_DONT_REWRITE.
"""

import pytest
from train_helpers import draw_picture

WORDS = ["a red cup", "a blue fox"]


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory):
    """Five captioned class pictures of another shape than any of the samples'."""
    folder = tmp_path_factory.mktemp("class")
    for i in range(5):
        draw_picture(70 + i, (50, 100)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(WORDS[i % 2])
    return folder


@pytest.fixture
def given(class_folder):
    return ["preservation=prior", "+dataset@preservation.dataset=folder", f"preservation.dataset.path={class_folder}"]


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    return tmp_path_factory.mktemp("drawings")


@pytest.fixture
def drawn(drawings):
    def settings(count=3, folder=drawings):
        own = [f"preservation.prompts=[{','.join(WORDS)}]", f"preservation.count={count}", "preservation.steps=2"]
        return ["preservation=prior", f"preservation.folder={folder}", *own]

    return settings
